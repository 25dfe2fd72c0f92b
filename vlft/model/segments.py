"""Attention over flat rows: several samples are concatenated, and no sample attends to another.

A model calls this instead of transformers' attention. It runs a variable-length kernel or sdpa. Without `cu_seq_lens_q`
(generation, padded batches) it runs transformers' own sdpa. `vlft.model.attention` chooses the kernel.

Letters: H heads, G key/value heads, T tokens of the row, D head size.
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

#: `kernel(query_THD, key_TGD, value_TGD, cu_seqlens, longest, scale=, causal=)` -> output_THD, all of one 16-bit dtype.
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
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    causal: bool,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Plain `scaled_dot_product_attention`, segment by segment; neighbours of equal length share a call.

    Args:
        query_1HTD: [1, H, T, D], with H a multiple of G.
        key_1GTD: [1, G, T, D].
        value_1GTD: [1, G, T, D].
        lengths: Python ints that sum to T; nothing is read back from the device.
        scale: factor on the scores.
        causal: whether a token attends only to earlier tokens and itself.
        dropout: probability of dropout, in training.

    Returns:
        output_1THD: [1, T, H, D].
    """
    outputs, start = [], 0
    for length, group in itertools.groupby(lengths):
        count = sum(1 for _ in group)
        end = start + count * length
        # [1, H, n*L, D] -> [n, H, L, D]
        q, k, v = (
            x[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for x in (query_1HTD, key_1GTD, value_1GTD)
        )
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=gqa)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [n*L, H, D]
        start = end
    return torch.cat(outputs)[None]


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
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        if cu_seq_lens_q is None:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal
            )
        if kernel is None or query.device.type == "cpu":
            if segment_lengths is None:  # the stock path (generate) passes only tensors to the ViT
                segment_lengths = cu_seq_lens_q.diff().tolist()
            return attend_segments(
                query, key, value, segment_lengths, scale=scaling, causal=causal, dropout=dropout
            ), None
        return run_kernel(kernel, query, key, value, cu_seq_lens_q, max_length_q, scale=scaling, causal=causal), None

    return attention


def run_kernel(
    kernel: Kernel,
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int | None,
    *,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """Run a varlen kernel on the tensors that transformers passes to attention.

    Rotary embedding returns float32 query and key if hidden states are float32 (float32 masters of a full tower, or a
    base stored in float32), while the value is 16-bit under autocast. Autocast casts the inputs of sdpa, but not those
    of varlen kernels (torch 2.11 to 2.15), which need one 16-bit dtype.

    Returns:
        output_1THD: [1, T, H, D] in the value's dtype.
    """
    q_THD, k_TGD, v_TGD = (
        x.squeeze(0).transpose(0, 1).to(value_1GTD.dtype) for x in (query_1HTD, key_1GTD, value_1GTD)
    )
    return kernel(q_THD, k_TGD, v_TGD, cu_seqlens, longest, scale=scale, causal=causal)[None]


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
