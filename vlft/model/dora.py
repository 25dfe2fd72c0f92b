"""DoRA (arXiv 2402.09353): each row of an adapted weight gets a trained length, `W' = m * (W + s B A) / |W + s B A|`.

PEFT (0.21) computes the lengths of the rows of W + s B A in each forward pass: it multiplies the adapter by an identity
matrix as wide as the input, and rounds the lengths to the dtype of the matmuls. Here they follow from the lengths of
W's rows and from W A^T and A A^T, in float32 and without a tensor of W's size. As in PEFT and in the paper (section
4.3), they are constants for the gradient.

Neighbours: `vlft.model.lora` binds `scaled_linear`, and has the legend of the letters. `vlft.merge.write` merges.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlft.model.packed import dense, is_quantised


def start(model: torch.nn.Module, computing: torch.dtype = torch.float32) -> None:
    """Set the trained lengths of new adapters to those of the base's rows, in float32.

    PEFT rounds them to the base's dtype, and the model then would not start as its base.

    Args:
        model: with PEFT's layers; changed in place.
        computing: the dtype of matmuls, to which quantised layers round their dense weights. The lengths are those of
            the rounded weights, which are also the ones that a merge writes.
    """
    from peft.tuners.lora.layer import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and layer.lora_magnitude_vector:
            base: Any = layer.get_base_layer()
            weight_OD = dense(base.weight, computing) if is_quantised(base) else base.weight.data
            for vector in layer.lora_magnitude_vector.values():
                vector.weight.data = row_lengths(weight_OD)


def row_lengths(weight_OD: torch.Tensor) -> torch.Tensor:
    """The Euclidean lengths of the rows of a weight: [O], float32."""
    return torch.linalg.vector_norm(weight_OD, dim=1, dtype=torch.float32)


@torch.no_grad()
def adapted_lengths(weight_OD: torch.Tensor, a_RD: torch.Tensor, b_OR: torch.Tensor, *, scaling: float) -> torch.Tensor:
    """The lengths of the rows of W + s B A: [O], float32. If B is 0 they are exactly those of W.

    A row w of W becomes w + s b A, whose squared length is |w|^2 + 2 s b (A w) + s^2 b (A A^T) b.
    """
    with _no_autocast(weight_OD.device.type):
        a, b = a_RD.float(), b_OR.float()
        cross_OR = (weight_OD @ a_RD.to(weight_OD.dtype).T).float()
        added_O = (b * (2 * scaling * cross_OR + scaling**2 * (b @ (a @ a.T)))).sum(1)
        return (row_lengths(weight_OD).square() + added_O).clamp_min(0).sqrt()


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast, which would round the products to 16 bits. Tensors on "meta" have no autocast."""
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def scaled_linear(
    y: torch.Tensor, weight_OD: torch.Tensor, a_RD: torch.Tensor, b_OR: torch.Tensor, m_O: torch.Tensor,
    bias_O: torch.Tensor | None, *, scaling: float,
) -> torch.Tensor:  # fmt: skip
    """DoRA's result from LoRA's.

    Args:
        y: [..., O]: what the layer computes with LoRA, without its bias.
        weight_OD: of the base.
        a_RD: the first matrix of the adapter.
        b_OR: the second matrix.
        m_O: the trained lengths of the rows.
        bias_O: of the base, frozen.
        scaling: factor of the update.

    Returns:
        [..., O], in the dtype of `y`. Gradients reach `y` and `m_O`.
    """
    # Of the matrices as the matmuls see them: their rounding errors would change the length of a row.
    lengths_O = adapted_lengths(weight_OD, a_RD.to(y.dtype), b_OR.to(y.dtype), scaling=scaling)
    return _Scaled.apply(y, m_O / lengths_O.to(m_O.dtype), bias_O)


class _Scaled(torch.autograd.Function):
    """`y * factor + bias`, computed in the factor's dtype and rounded once, without a copy of `y` in that dtype."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, factor_O: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(y, factor_O)
        result = torch.empty_like(y)
        if bias_O is None:
            return torch.mul(y, factor_O, out=result)
        return torch.addcmul(bias_O, y, factor_O, out=result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, factor_O = ctx.saved_tensors
        of_y, of_factor, _ = ctx.needs_input_grad
        grad_y = torch.mul(grad, factor_O, out=torch.empty_like(grad)) if of_y else None
        grad_factor = None
        if of_factor:
            products = (grad * y).reshape(-1, y.shape[-1])
            grad_factor = products.sum(0, dtype=torch.float32).to(factor_O.dtype)
        return grad_y, grad_factor, None
