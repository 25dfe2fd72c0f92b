"""Attention over flat rows: several samples are concatenated, and no sample attends to another.

A model calls this instead of transformers' attention. It runs a variable-length kernel or sdpa. Without `cu_seq_lens_q`
(generation, padded batches) it runs transformers' own sdpa. `vlft.model.attention` chooses the kernel.

Answers that share a prompt are branches: each is a segment of queries, and its keys are the prompt and itself. The keys
of all segments are then gathered in each layer, and a segment may have more keys than queries.

Letters: H heads, G key/value heads, T tokens of the row, U gathered keys (T without branches), D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vlft.families import Sizes
from vlft.model import adapt

#: `kernel(query_THD, key_UGD, value_UGD, cu_seqlens, longest, scale=, causal=, cu_k=None, longest_k=None)` ->
#: output_THD, all of one 16-bit dtype. `cu_k` and `longest_k` are those of the keys; None: as of the queries. Where a
#: segment has more keys than queries, its last query is at its last key (causal, lower right).
Kernel = Callable[..., torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The attention of one tower.

    Attributes:
        heads: H.
        kv_heads: G.
        head_dim: D.
        causal: whether a token attends only to earlier tokens and itself.
        joined: whether query, key and value are slices of one projection's output, as in the ViT.
        partial_rotary: whether rotary embedding leaves some channels as they are. Query and key are then concatenated
            from two parts, which stores them head after head instead of token after token.
    """

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    joined: bool
    partial_rotary: bool = False

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


def attend_segments(
    query_1HTD: torch.Tensor,
    key_1GUD: torch.Tensor,
    value_1GUD: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    causal: bool,
    dropout: float = 0.0,
    key_lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Plain `scaled_dot_product_attention`, segment by segment; neighbours of equal length share a call.

    Args:
        query_1HTD: [1, H, T, D], with H a multiple of G.
        key_1GUD: [1, G, U, D].
        value_1GUD: [1, G, U, D].
        lengths: Python ints that sum to T; nothing is read back from the device.
        scale: factor on the scores.
        causal: whether a token attends only to earlier tokens and itself. The last query of a segment is at its last
            key (lower right).
        dropout: probability of dropout, in training.
        key_lengths: Python ints that sum to U, none smaller than the length of its segment; None: as `lengths`.

    Returns:
        output_1THD: [1, T, H, D].
    """
    outputs, start, key_start = [], 0, 0
    for (length, keys), group in itertools.groupby(zip(lengths, key_lengths or lengths, strict=True)):
        count = sum(1 for _ in group)
        end, key_end = start + count * length, key_start + count * keys
        # [1, H, n*L, D] -> [n, H, L, D]
        q = query_1HTD[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1)
        k, v = (x[0, :, key_start:key_end].unflatten(1, (count, keys)).transpose(0, 1) for x in (key_1GUD, value_1GUD))
        how: dict[str, Any] = {"is_causal": causal}
        if causal and keys != length:  # `is_causal` would align to the upper left
            seen = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
            how = {"attn_mask": seen}
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, enable_gqa=gqa, **how)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [n*L, H, D]
        start, key_start = end, key_end
    return torch.cat(outputs)[None]


def gathered(x_1GTD: torch.Tensor, kv_rows: torch.Tensor) -> torch.Tensor:
    """Keys or values of these rows, [1, G, T, D] -> [1, G, U, D], stored token after token.

    Args:
        x_1GTD: keys or values of the flat row.
        kv_rows: int64 [U], `branches["kv_rows"]` of the batch.
    """
    return x_1GTD.transpose(1, 2).index_select(1, kv_rows).transpose(1, 2)


def _attend(kernel: Kernel | None) -> Callable[..., tuple[torch.Tensor, None]]:
    """A function with transformers' attention interface that runs a varlen kernel; None: sdpa per segment."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        segment_lengths: Sequence[int] | None = None,
        kv_rows: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_k: int | None = None,
        key_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        if cu_seq_lens_q is None:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal
            )
        keys: dict[str, Any] = {}
        if kv_rows is not None:
            key, value = gathered(key, kv_rows), gathered(value, kv_rows)
            keys = {"cu_k": cu_seq_lens_k, "longest_k": max_length_k}
        if kernel is None or query.device.type == "cpu":
            if segment_lengths is None:  # the stock path (generate) passes only tensors to the ViT
                segment_lengths = cu_seq_lens_q.diff().tolist()
            out = attend_segments(
                query, key, value, segment_lengths,
                scale=scaling, causal=causal, dropout=dropout, key_lengths=key_lengths,
            )  # fmt: skip
            return out, None
        how = {"scale": scaling, "causal": causal, **keys}
        return run_kernel(kernel, query, key, value, cu_seq_lens_q, max_length_q, **how), None

    return attention


def run_kernel(
    kernel: Kernel,
    query_1HTD: torch.Tensor,
    key_1GUD: torch.Tensor,
    value_1GUD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int | None,
    *,
    scale: float,
    causal: bool,
    **keys: Any,
) -> torch.Tensor:
    """Run a varlen kernel on the tensors that transformers passes to attention, or on gathered keys and values.

    Rotary embedding returns float32 query and key if hidden states are float32 (float32 masters of a full tower, or a
    base stored in float32), while the value is 16-bit under autocast. Autocast casts the inputs of sdpa, but not those
    of varlen kernels (torch 2.11 to 2.15), which need one 16-bit dtype.

    Args:
        kernel: the kernel.
        query_1HTD: [1, H, T, D].
        key_1GUD: [1, G, U, D].
        value_1GUD: [1, G, U, D].
        cu_seqlens: int32 [S + 1], bounds of the segments.
        longest: tokens of the longest segment.
        scale: factor on the scores.
        causal: whether a token attends only to earlier tokens and itself.
        **keys: with branches, `cu_k` and `longest_k` of the keys.

    Returns:
        output_1THD: [1, T, H, D] in the value's dtype.
    """
    q_THD, k_UGD, v_UGD = (
        x.squeeze(0).transpose(0, 1).to(value_1GUD.dtype) for x in (query_1HTD, key_1GUD, value_1GUD)
    )
    return kernel(q_THD, k_UGD, v_UGD, cu_seqlens, longest, scale=scale, causal=causal, **keys)[None]


def heads_of(sizes: Sizes) -> dict[adapt.Part, Heads]:
    """Tower -> its softmax attention; gated delta nets have heads of their own."""
    text, vision = sizes.text, sizes.vision
    return {
        "language": Heads(
            heads=text.heads,
            kv_heads=text.kv_heads,
            head_dim=text.head_dim,
            causal=True,
            joined=False,
            partial_rotary=text.partial_rotary,
        ),
        "vision": Heads(heads=vision.heads, kv_heads=vision.heads, head_dim=vision.head_dim, causal=False, joined=True),
    }


def use_kernel(model: torch.nn.Module, part: adapt.Part, name: str, kernel: Kernel | None) -> None:
    """Make one tower use a varlen kernel, without a self-test.

    Args:
        model: a loaded base (the top class).
        part: "language" or "vision".
        name: a name for the kernel; each kernel needs its own.
        kernel: the kernel; None: sdpa per segment.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    registered = f"vlft_flash_{name}"
    AttentionInterface.register(registered, _attend(kernel))
    AttentionMaskInterface.register(registered, sdpa_mask)
    adapt.attend_by(model, part, registered)
