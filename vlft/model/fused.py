"""Differentiable functions on top of fused kernels, by Liger's where it has them, else by our Triton kernels.

`Operations` are the kernels below autograd: `vlft.model.triton_kernels` on a GPU, `vlft.model.standins` on tensors
without contents. So a forecast runs the same autograd code as a step on a GPU. `vlft.model.kernels` tests the functions
and puts them into a model.

Autocast does not see these functions. Each takes the dtypes as they come, computes in float32 and writes the dtype it
is asked for.

Letters: R rows, C channels; T tokens, H heads, G key/value heads, D channels of a head, N channels that rotary
embedding turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Function = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Functions:
    """Fused functions for a model; None where there is none.

    Attributes:
        rms_norm: `rms_norm(x, weight, eps, offset, dtype)`, with x [..., C]; multiplies by offset + weight, and returns
            `dtype`.
        swiglu: `swiglu(gate, up)`, with gate and up [..., C].
        layer_norm: `layer_norm(x, weight, bias, eps, dtype)`, with x [..., C].
        quick_gelu: `quick_gelu(x)`.
        rotary: `rotary(q_1HTD, k_1GTD, cos_1TN, sin_1TN, dtype)` -> the two, turned, in `dtype`.
        gated_norm: `gated_norm(x, weight, gate, eps, dtype)`: RMSNorm times `silu(gate)`, with x and gate [..., C].
        convolution: `convolution(x_TZ, weight_Z1W, within_T)`: a causal convolution of each of Z channels, with W taps
            that do not reach beyond the place of a token within its sample; then SiLU.
        joined_rotary: `joined_rotary(joined_TX, cos_TD, sin_TD, heads)`, with X = 3 * H * D -> query, key and value
            [T, H, D]. It writes query and key over its argument, which nothing else may read later.
    """

    rms_norm: Function | None = None
    swiglu: Function | None = None
    layer_norm: Function | None = None
    quick_gelu: Function | None = None
    rotary: Function | None = None
    joined_rotary: Function | None = None
    gated_norm: Function | None = None
    convolution: Function | None = None


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Kernels below autograd, with the arguments of those in `vlft.model.triton_kernels` and its neighbours."""

    norm: Function
    norm_backward: Function
    rotate: Function
    quick_gelu: Function
    quick_gelu_backward: Function
    swiglu: Function
    swiglu_backward: Function
    convolve: Function
    convolve_backward: Function


def triton_operations() -> Operations:
    """Our Triton kernels.

    Raises:
        ImportError: triton is not installed.
    """
    from vlft.model import triton_activations, triton_convolution, triton_kernels

    known = vars(triton_kernels) | vars(triton_activations) | vars(triton_convolution)
    return Operations(**{name: known[name] for name in Operations.__dataclass_fields__})


def functions(known: Operations, *, rms_norm: Function | None = None, swiglu: Function | None = None) -> Functions:
    """Differentiable functions on top of kernels.

    Args:
        known: the kernels.
        rms_norm: used where input, weight and result share one dtype, with the arguments `(x, weight, eps, offset)`.
        swiglu: used instead of ours.
    """

    def norm(x, weight, eps, offset, dtype):
        if rms_norm is not None and x.dtype == weight.dtype == dtype:
            return rms_norm(x, weight, eps, offset)
        return _Norm.apply(x, weight, None, known, eps, offset, dtype)

    return Functions(
        rms_norm=norm,
        swiglu=swiglu or (lambda gate, up: _Swiglu.apply(gate, up, known)),
        layer_norm=lambda x, weight, bias, eps, dtype: _Norm.apply(x, weight, bias, known, eps, 0.0, dtype),
        quick_gelu=lambda x: _QuickGelu.apply(x, known),
        rotary=lambda q, k, cos, sin, dtype: _Rotary.apply(q, k, cos, sin, known, dtype),
        joined_rotary=lambda joined, cos, sin, heads: _JoinedRotary.apply(joined, cos, sin, known, heads),
        gated_norm=lambda x, weight, gate, eps, dtype: _Norm.apply(x, weight, gate, known, eps, 0.0, dtype),
        convolution=lambda x, weight, within: _Convolution.apply(x, weight, within, known),
    )


def liger_functions() -> dict[str, Function]:
    """Liger's functions, as arguments of `functions`.

    Only its functions are used. Its `apply_*` functions patch classes, so they would change every other model of the
    process, and they fail on transformers 5.23 (liger-kernel 0.8.5).

    Raises:
        ImportError: the package is not installed, or its version does not have them.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def rms_norm(x, weight, eps, offset):
        # Not in place: that would overwrite the incoming gradient, which other functions may still read.
        return LigerRMSNormFunction.apply(x, weight, eps, offset, "gemma" if offset else "llama", False)

    return {"rms_norm": rms_norm, "swiglu": LigerSiLUMulFunction.apply}


def computing(device: torch.device, stock: torch.dtype) -> torch.dtype:
    """The dtype to write for a linear layer or attention: autocast's, which they would cast to, or that of torch.

    Args:
        device: of the tensors.
        stock: what the replaced module returns without autocast.
    """
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else stock


# ---- differentiable functions: tensors first, as `vlft.model.tracing.backward` needs them


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., C] as rows [R, C] without gaps between channels; a view where strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


class _Norm(torch.autograd.Function):
    """A norm of x with a weight and, as `more`, nothing, the bias of a LayerNorm or the gate of an RMSNorm."""

    @staticmethod
    def forward(ctx: Any, x, weight_C, more, known: Operations, eps: float, offset: float, dtype: torch.dtype):
        x_RC = _rows(x)
        bias_C = more if more is not None and more.dim() == 1 else None
        gate_RC = _rows(more) if more is not None and bias_C is None else None
        y_RC, mean_R, scale_R = known.norm(x_RC, weight_C, bias_C, gate_RC, eps=eps, offset=offset, dtype=dtype)
        ctx.save_for_backward(x_RC, weight_C, gate_RC, mean_R, scale_R)
        ctx.known, ctx.offset, ctx.centred = known, offset, bias_C is not None
        return y_RC.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):
        dx_RC, dweight_C, dbias_C, dgate_RC = ctx.known.norm_backward(
            _rows(dy), *ctx.saved_tensors, offset=ctx.offset, centred=ctx.centred,
            for_weight=any(ctx.needs_input_grad[1 : 3 if ctx.centred else 2]),
        )  # fmt: skip
        more = dbias_C if dgate_RC is None else dgate_RC.view(dy.shape)
        return dx_RC.view(dy.shape), dweight_C, more, None, None, None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TZ, weight_Z1W, within_T, known: Operations):
        weight_ZW = weight_Z1W.squeeze(1).contiguous()
        ctx.save_for_backward(x_TZ := x_TZ.contiguous(), weight_ZW, within_T)
        ctx.known = known
        return known.convolve(x_TZ, weight_ZW, within_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TZ):
        for_weight = ctx.needs_input_grad[1]
        dx_TZ, dweight_ZW = ctx.known.convolve_backward(dy_TZ.contiguous(), *ctx.saved_tensors, for_weight=for_weight)
        return dx_TZ, None if dweight_ZW is None else dweight_ZW.unsqueeze(1), None, None


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, known: Operations):
        x_RC = _rows(x).contiguous()
        ctx.save_for_backward(x_RC)
        ctx.known = known
        return known.quick_gelu(x_RC).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):
        return ctx.known.quick_gelu_backward(_rows(dy).contiguous(), *ctx.saved_tensors).view(dy.shape), None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate, up, known: Operations):
        ctx.save_for_backward(gate_RC := _rows(gate).contiguous(), up_RC := _rows(up).contiguous())
        ctx.known = known
        return known.swiglu(gate_RC, up_RC).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):
        dgate_RC, dup_RC = ctx.known.swiglu_backward(_rows(dy).contiguous(), *ctx.saved_tensors)
        return dgate_RC.view(dy.shape), dup_RC.view(dy.shape), None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_1HTD, k_1GTD, cos_1TN, sin_1TN, known: Operations, dtype: torch.dtype):
        ctx.save_for_backward(cos_1TN, sin_1TN)
        ctx.known, ctx.dtypes = known, (q_1HTD.dtype, k_1GTD.dtype)
        return _turned(known, (q_1HTD, k_1GTD), (dtype, dtype), cos_1TN, sin_1TN, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_1HTD, dk_1GTD):
        found = _turned(ctx.known, (dq_1HTD, dk_1GTD), ctx.dtypes, *ctx.saved_tensors, backward=True)
        return *found, None, None, None, None


def _turned(known: Operations, heads_first, dtypes, cos_1TN, sin_1TN, *, backward: bool) -> tuple[torch.Tensor, ...]:
    """Rotary embedding of tensors [1, H, T, D]. The results are stored token after token, as attention kernels want."""
    given = tuple(_heads(x_1HTD.squeeze(0).transpose(0, 1)) for x_1HTD in heads_first)
    results = tuple(torch.empty(x.shape, dtype=dtype, device=x.device) for x, dtype in zip(given, dtypes, strict=True))
    known.rotate(given, _rows(cos_1TN), _rows(sin_1TN), results, backward=backward)
    return tuple(x_THD.transpose(0, 1)[None] for x_THD in results)


class _JoinedRotary(torch.autograd.Function):
    """Query, key and value as views of one tensor, in both directions: nothing joins or splits them.

    Query and key are written over the projection's result, so that a block keeps one tensor of query, key and value for
    its backward pass. No linear layer reads its own result again, with or without LoRA.
    """

    @staticmethod
    def forward(ctx: Any, joined_TX, cos_TD, sin_TD, known: Operations, heads: int):
        ctx.save_for_backward(cos_TD, sin_TD)
        ctx.known = known
        q_THD, k_THD, v_THD = joined_TX.detach().unflatten(1, (3, heads, -1)).unbind(1)
        known.rotate((q_THD, k_THD), cos_TD, sin_TD, (q_THD, k_THD))
        return q_THD, k_THD, v_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes_THD):
        first = slopes_THD[0]
        tokens, heads, channels = first.shape
        joined = torch.empty((tokens, 3, heads, channels), dtype=first.dtype, device=first.device)
        given = tuple(_heads(slope) for slope in slopes_THD)
        ctx.known.rotate(given, *ctx.saved_tensors, joined.unbind(1), backward=True)
        return joined.flatten(1), None, None, None, None


def _heads(x_THD: torch.Tensor) -> torch.Tensor:
    return x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()
