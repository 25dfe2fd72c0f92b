"""Cross-entropy of the head, a few hundred rows at a time: no tensor of tokens x vocabulary, in training or evaluation.

With 152k words the logits of 16k tokens are 10 GB in float32, and plain cross-entropy holds them several times. Here a
chunk of rows goes through the head, gives its loss and, since the gradient of a sum needs nothing from later layers,
its gradients at once; then its logits are gone. (The idea: Liger's fused linear cross-entropy, arXiv 2410.10989;
what differs is that a frozen head costs no weight gradient, and that evaluation goes the same way.)

Letters: K supervised rows, C channels, V the vocabulary.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch.autograd.function import once_differentiable

#: Most elements of one chunk's float32 logits (256 MiB): enough rows to keep a GPU's matmul busy (441 at 152k words).
CHUNK_ELEMENTS = 2**26
FEWEST_ROWS = 16


def chunk_rows(vocabulary: int) -> int:
    """Rows of one chunk."""
    return max(FEWEST_ROWS, CHUNK_ELEMENTS // vocabulary)


def bind(head: torch.nn.Module) -> None:
    """Let a linear head take targets too, and return the summed loss; without targets it is as before.

    Inside the head's own forward, since that is where ZeRO-3 has its weight at hand.

    Args:
        head: an `nn.Linear` without bias; only this instance changes.

    Raises:
        TypeError: another kind of head, whose loss this is not.
    """
    if type(head) is not torch.nn.Linear or head.bias is not None:
        raise TypeError(f"the head is {head}, expected a Linear without bias")

    def forward(self: Any, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return type(self).forward(self, hidden)
        return linear_cross_entropy(hidden, self.weight, targets)

    head.forward = types.MethodType(forward, head)


def linear_cross_entropy(hidden_KC: torch.Tensor, weight_VC: torch.Tensor, targets_K: torch.Tensor) -> torch.Tensor:
    """Sum of `cross_entropy(hidden @ weight.T, targets)`, its gradients made in the forward.

    Matmuls run in autocast's dtype, else in the weight's; softmax, loss and the sum of weight gradients in float32.
    Nothing is differentiated that needs no gradient, and nothing at all under `no_grad`.

    Args:
        hidden_KC: [K, C]; K may be 0.
        weight_VC: [V, C].
        targets_K: int64 [K], each in [0, V).

    Returns:
        loss: float32 [], differentiable once.
    """
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden_KC, weight_VC, targets_K)
    return _run(hidden_KC, weight_VC, targets_K, for_hidden=False, for_weight=False)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_KC: torch.Tensor, weight_VC: torch.Tensor, targets_K: torch.Tensor) -> torch.Tensor:
        for_hidden, for_weight, _ = ctx.needs_input_grad
        loss, *gradients = _run(hidden_KC, weight_VC, targets_K, for_hidden=for_hidden, for_weight=for_weight)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden_KC.dtype, weight_VC.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_KC, weight_VC = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if hidden_KC is not None:
            # In float32: rounding `upstream` itself to bf16 would tilt every gradient by up to 0.4%.
            hidden_KC = (hidden_KC.float() * upstream).to(hidden_dtype)
        if weight_VC is not None:
            # In place, for want of room for a second one; autograd then refuses a second backward.
            weight_VC = weight_VC.mul_(upstream).to(weight_dtype)
        return hidden_KC, weight_VC, None


def _run(
    hidden_KC: torch.Tensor, weight_VC: torch.Tensor, targets_K: torch.Tensor, *, for_hidden: bool, for_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Loss, and its gradients as asked: of hidden in the computing dtype, of the weight in float32."""
    device = hidden_KC.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VC.dtype
    loss = torch.zeros((), dtype=torch.float32, device=hidden_KC.device)
    grad_KC = torch.empty_like(hidden_KC, dtype=dtype) if for_hidden else None
    grad_VC = torch.zeros_like(weight_VC, dtype=torch.float32) if for_weight else None
    rows = chunk_rows(len(weight_VC))
    with torch.autocast(device, enabled=False):
        hidden_KC, weight_VC = hidden_KC.to(dtype), weight_VC.to(dtype)
        for start in range(0, len(hidden_KC), rows):
            chunk = slice(start, start + rows)
            grad_kC = None if grad_KC is None else grad_KC[chunk]
            _add_chunk(hidden_KC[chunk], weight_VC, targets_K[chunk, None], loss, grad_kC, grad_VC)
    return loss, grad_KC, grad_VC


def _add_chunk(
    hidden_kC: torch.Tensor,
    weight_VC: torch.Tensor,
    targets_k1: torch.Tensor,
    loss: torch.Tensor,
    grad_kC: torch.Tensor | None,
    grad_VC: torch.Tensor | None,
) -> None:
    """Add a chunk to the loss and the weight's gradient, and set its rows' gradient.

    A function of its own so that its logits are gone before the next chunk's are made.
    """
    log_kV = torch.log_softmax(hidden_kC @ weight_VC.T, dim=1, dtype=torch.float32)
    picked_k1 = log_kV.gather(1, targets_k1)
    loss -= picked_k1.sum()
    if grad_kC is None and grad_VC is None:
        return
    # The gradient of the logits: softmax, less 1 at the target.
    slope_kV = log_kV.exp_().scatter_(1, targets_k1, picked_k1.expm1()).to(hidden_kC.dtype)
    if grad_kC is not None:
        torch.mm(slope_kV, weight_VC, out=grad_kC)
    if grad_VC is not None:
        # In slices of the vocabulary, so that no second tensor of the weight's size is needed.
        words = max(1, CHUNK_ELEMENTS // weight_VC.shape[1])
        for slope_kv, grad_vC in zip(slope_kV.split(words, dim=1), grad_VC.split(words), strict=True):
            grad_vC += slope_kv.T @ hidden_kC
