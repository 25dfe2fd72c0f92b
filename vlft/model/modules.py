"""Put fused functions into transformers' modules: each changes the forward of one instance, never a class.

A module with a function returns the dtype that its reader wants: under autocast, linear layers and attention would cast
it. `vlft.model.kernels` decides which modules; `vlft.model.rotary` changes attention.
"""

from __future__ import annotations

import types
from typing import Any

import torch

from vlft.families import Norm
from vlft.model import fused
from vlft.model.fused import Function


def fuse_rms_norm(norm: torch.nn.Module, function: Function, factor: Norm = "w", *, keeps_dtype: bool = False) -> None:
    """Make one RMSNorm compute with a function. Under autocast it returns the dtype that linear layers compute in.

    Args:
        norm: with `weight`, and an attribute for epsilon that transformers spells differently for each factor.
        function: as in `Functions`.
        factor: what the norm multiplies by.
        keeps_dtype: return transformers' dtype also under autocast.
    """
    epsilon, offset = {"w": ("variance_epsilon", 0.0), "1 + w": ("eps", 1.0)}[factor]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype if offset else torch.promote_types(x.dtype, self.weight.dtype)
        if not keeps_dtype:
            dtype = fused.computing(x.device, dtype)
        return function(x, self.weight, getattr(self, epsilon), offset, dtype)

    norm.forward = types.MethodType(forward, norm)


def fuse_layer_norm(norm: torch.nn.Module, function: Function) -> None:
    """Make one LayerNorm compute with a function. Under autocast it returns the dtype that linear layers compute in.

    Autocast on a GPU computes LayerNorm in float32, also of 16-bit tensors. Each linear layer then casts the result.

    Args:
        norm: with weight and bias.
        function: as in `Functions`.
    """

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return function(x, self.weight, self.bias, self.eps, fused.computing(x.device, x.dtype))

    norm.forward = types.MethodType(forward, norm)


def fuse_gated_norm(norm: torch.nn.Module, function: Function) -> None:
    """Make the norm of one gated delta net compute with a function.

    Args:
        norm: with `weight`, called with a tensor and a gate.
        function: as in `Functions`.
    """

    def forward(self: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return function(x, self.weight, gate, self.variance_epsilon, fused.computing(x.device, x.dtype))

    norm.forward = types.MethodType(forward, norm)


def fuse_activation(activation: torch.nn.Module, function: Function) -> None:
    """Make one activation compute with a function of one tensor."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return function(x)

    activation.forward = types.MethodType(forward, activation)


def fuse_swiglu(mlp: torch.nn.Module, function: Function) -> None:
    """Make one gated MLP multiply with a function. Its linear layers do not change, with or without LoRA."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(function(self.gate_proj(x), self.up_proj(x)))

    mlp.forward = types.MethodType(forward, mlp)
