"""Torch in place of the fused kernels, so that a CPU can run the code around them. Gradients are torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlft.model import fused


def torch_rms_norm(x, weight, eps, offset=0.0, dtype=None):
    """RMSNorm, computed in float32."""
    exact = x.float()
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (exact * (offset + weight.float())).to(dtype or x.dtype)


def torch_swiglu(gate, up):
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def _normed(x, weight, bias, eps, offset):
    if bias is None:
        return torch_rms_norm(x, weight, eps, offset)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def norm(x, weight, bias, gate, *, eps, offset, dtype):
    exact = x.float()
    mean = exact.mean(-1) if bias is not None else exact.new_zeros(0)
    variance = exact.var(-1, correction=0) if bias is not None else exact.square().mean(-1)
    result = _normed(exact, weight.float(), None if bias is None else bias.float(), eps, offset)
    if gate is not None:
        result = result * F.silu(gate.float())
    return result.to(dtype), mean, torch.rsqrt(variance + eps)


def norm_backward(dy, x, weight, gate, mean, scale, *, offset, centred, for_weight):
    exact = x.float()
    eps = (1 / scale.square() - (exact.var(-1, correction=0) if centred else exact.square().mean(-1)))[:, None]
    given = [exact, weight] if gate is None else [exact, weight, gate]
    leaves = [one.detach().float().requires_grad_() for one in given]
    with torch.enable_grad():
        x_ = leaves[0] - leaves[0].mean(-1, keepdim=True) if centred else leaves[0]
        y = x_ * torch.rsqrt(x_.square().mean(-1, keepdim=True) + eps) * (leaves[1] + offset)
        y = y if gate is None else y * F.silu(leaves[2])
    dx, dweight, *dgate = torch.autograd.grad(y, leaves, dy.float())
    dbias = dy.float().sum(0).to(weight.dtype) if for_weight and centred else None
    dgate = None if gate is None else dgate[0].to(gate.dtype)
    return dx.to(x.dtype), dweight.to(weight.dtype) if for_weight else None, dbias, dgate


def rotate(given, cos, sin, results, *, backward=False):
    for x, out in zip(given[:2], results, strict=False):
        turned = cos.shape[1]
        leaf = x.float().clone().requires_grad_()
        with torch.enable_grad():
            first, second = leaf[..., :turned].chunk(2, dim=-1)
            y = leaf[..., :turned] * cos.float()[:, None] + torch.cat([-second, first], -1) * sin.float()[:, None]
            y = torch.cat([y, leaf[..., turned:]], dim=-1)
        out.copy_(torch.autograd.grad(y, leaf, leaf.detach())[0] if backward else y.detach())
    for x, out in zip(given[2:], results[2:], strict=True):
        out.copy_(x)


def _gelu(x):
    return x * torch.sigmoid(1.702 * x)


def _gradients(function, dy, *inputs):
    leaves = [x.float().detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        y = function(*leaves)
    return [g.to(x.dtype) for g, x in zip(torch.autograd.grad(y, leaves, dy.float()), inputs, strict=True)]


def convolve(x, weight, within):
    """Tap by tap."""
    exact, taps = x.float(), weight.shape[1]
    total = torch.zeros_like(exact)
    for back in range(min(taps, len(x))):
        shifted = torch.cat([exact.new_zeros(back, x.shape[1]), exact[: len(x) - back]])
        total = total + shifted * (within >= back)[:, None] * weight[:, taps - 1 - back].float()
    return F.silu(total).to(x.dtype)


def convolve_backward(dy, x, weight, within, *, for_weight):
    dx, dweight = _gradients(lambda x, weight: convolve(x, weight, within), dy, x, weight)
    return dx, dweight if for_weight else None


OPERATIONS = fused.Operations(
    norm=norm,
    norm_backward=norm_backward,
    rotate=rotate,
    quick_gelu=lambda x: _gelu(x.float()).to(x.dtype),
    quick_gelu_backward=lambda dy, x: _gradients(_gelu, dy, x)[0],
    swiglu=torch_swiglu,
    swiglu_backward=lambda dy, gate, up: tuple(_gradients(torch_swiglu, dy, gate, up)),
    convolve=convolve,
    convolve_backward=convolve_backward,
)
TORCH = fused.functions(OPERATIONS)
