"""The second side of the baseline: a stock model with fused kernels and varlen attention.

The forward, the padding and the adapters stay those of transformers and peft. Neighbours: `vlft.model.kernels` and
`vlft.model.attention` choose what runs, `vlft.bench.baseline` trains.

Letters: B rows of a batch, T tokens of a row with padding, N tokens without, H heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from vlft.model import adapt, attention, kernels
from vlft.model.apply import checkpoint_activations
from vlft.model.segments import Kernel, run_kernel
from vlft.model.towers import Towers

NAME = "vlft_flash_padded"  # transformers prepares variable lengths only for names with "flash"


def install(model: Any, *, dtype: torch.dtype, say: Callable[[str], None] = print) -> dict[str, str]:
    """Use the kernels that pass their self-tests on the model's device.

    Args:
        model: a loaded base (the top class), on its device.
        dtype: what the run computes in.
        say: receives a line for each attention kernel that was rejected.

    Returns:
        "attention" and "kernels": what runs, as text.
    """
    device = next(model.parameters()).device
    backends = attention.install(model, "auto", dtype=dtype, device=device, say=say)
    language: str = backends["language"]
    if backends["language"] != "sdpa":  # with a padding mask, `attention.install` alone leaves sdpa
        use_without_padding(model, attention.load_kernel(backends["language"]))
        language += " without padding"
    return {
        "attention": f"vision {backends['vision']}, language {language}",
        "kernels": kernels.install(model, "auto", dtype=dtype, device=device),
    }


def use_without_padding(model: Any, kernel: Kernel) -> None:
    """Make the language model of a stock model run a varlen kernel on padded batches, without their padding."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(NAME, _attend(kernel))
    AttentionMaskInterface.register(NAME, flash_attention_mask)  # the mask [B, T] itself; None without padding
    adapt.attend_by(model, "language", NAME)


class _Tokens:
    """Where the tokens of a padded batch are: computed once for all layers of a forward pass."""

    def __init__(self) -> None:
        self._mask_BT: torch.Tensor | None = None
        self.places_N = self.cu_seqlens = torch.empty(0)
        self.longest = 0

    def find(self, mask_BT: torch.Tensor) -> None:
        if mask_BT is self._mask_BT:
            return
        lengths_B = mask_BT.sum(1)
        self._mask_BT = mask_BT
        self.places_N = mask_BT.flatten().nonzero()[:, 0]
        self.cu_seqlens = F.pad(lengths_B.cumsum(0), (1, 0)).to(torch.int32)
        self.longest = int(lengths_B.max())


def _attend(kernel: Kernel) -> Callable[..., tuple[torch.Tensor, None]]:
    """A function with transformers' attention interface that runs a causal varlen kernel."""
    tokens = _Tokens()

    def attend(
        module: torch.nn.Module,
        query_BHTD: torch.Tensor,
        key_BGTD: torch.Tensor,
        value_BGTD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        rows, _, length, _ = query_BHTD.shape
        query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query_BHTD, key_BGTD, value_BGTD))
        if attention_mask is None:
            cu_seqlens = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query_BHTD.device)
            out = run_kernel(kernel, query, key, value, cu_seqlens, length, scale=scaling, causal=True)[0]
        else:
            tokens.find(attention_mask)
            query, key, value = (x.index_select(2, tokens.places_N) for x in (query, key, value))
            cu_seqlens, longest = tokens.cu_seqlens, tokens.longest
            found = run_kernel(kernel, query, key, value, cu_seqlens, longest, scale=scaling, causal=True)[0]
            out = found.new_zeros(rows * length, *found.shape[1:]).index_copy(0, tokens.places_N, found)
        return out.unflatten(0, (rows, length)), None

    return attend


def recompute(model: Any, towers: Towers, *, on: bool) -> None:
    """Recompute activations, without transformers' hook that makes a frozen ViT run backward."""
    model.gradient_checkpointing_disable()
    if on:
        checkpoint_activations(model, ("language",) if towers.vision == "frozen" else adapt.PARTS)
