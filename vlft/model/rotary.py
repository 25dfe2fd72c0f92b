"""Put a fused rotary embedding into transformers' attention modules, of both towers.

transformers calls rotary embedding as a function of the Python module, so there is no submodule to replace. In the
language model, whose attention differs between families, the code of `forward` runs with another function under that
name. In the ViT, where transformers 5.17 to 5.23 have one forward for all families, ours replaces it: query, key and
value stay views of one tensor. Both are used for flat rows only; a call without `segment_lengths` (generation, padded
batches) runs the module's own forward.

Letters: those of `vlft.model.fused`.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch

from vlft.model.fused import Function, computing

#: The function that the language model's attention calls.
NAME = "apply_rotary_pos_emb"


def fuse_language(attention: torch.nn.Module, function: Function) -> None:
    """Make the attention of a language layer turn query and key by a function.

    Args:
        attention: `self_attn` of a layer.
        function: as in `vlft.model.fused.Functions.rotary`.

    Raises:
        TypeError: its forward does not call transformers' function by the name that this module knows.
    """

    def rotate(
        q_1HTD: torch.Tensor, k_1GTD: torch.Tensor, cos_1TN: torch.Tensor, sin_1TN: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stock = torch.promote_types(q_1HTD.dtype, cos_1TN.dtype)
        return function(q_1HTD, k_1GTD, cos_1TN, sin_1TN, computing(q_1HTD.device, stock))

    stock: Any = inspect.unwrap(type(attention).forward)
    if not isinstance(stock, types.FunctionType) or NAME not in stock.__code__.co_names:
        raise TypeError(f"{type(attention).__name__} does not call {NAME}")
    ours = types.FunctionType(
        stock.__code__, stock.__globals__ | {NAME: rotate}, stock.__name__, stock.__defaults__, stock.__closure__
    )
    ours.__kwdefaults__ = stock.__kwdefaults__

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("segment_lengths") is None:
            return type(self).forward(self, *args, **kwargs)
        return ours(self, *args, **kwargs)

    attention.forward = types.MethodType(forward, attention)


def fuse_vision(attention: torch.nn.Module, function: Function) -> None:
    """Make the attention of a ViT block turn query and key by a function, in the result of their projection.

    Args:
        attention: `attn` of a block.
        function: as in `vlft.model.fused.Functions.joined_rotary`.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if kwargs.get("segment_lengths") is None or position_embeddings is None:
            return type(self).forward(self, hidden_states, cu_seqlens, position_embeddings, max_seqlen, **kwargs)
        parts = function(self.qkv(hidden_states), *position_embeddings, self.num_heads)
        out_1THD, _ = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            self,
            *(part_THD.transpose(0, 1)[None] for part_THD in parts),
            attention_mask=None,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=max_seqlen,
            max_length_k=max_seqlen,
            is_causal=False,
            **kwargs,
        )
        return self.proj(out_1THD.squeeze(0).flatten(1))

    attention.forward = types.MethodType(forward, attention)
