"""Triton kernels for activations. What `vlft.model.triton_kernels` says of its kernels also applies to them.

Letters: R rows, C channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlft.model.triton_kernels import TILE, on_device_of


@triton.jit
def _quick_gelu(y_ptr, x_ptr, channels, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, mask = tl.program_id(0).to(tl.int64) * channels + column, column < channels
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (x * tl.sigmoid(1.702 * x)).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _quick_gelu_backward(dx_ptr, dy_ptr, x_ptr, channels, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, mask = tl.program_id(0).to(tl.int64) * channels + column, column < channels
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(1.702 * x)
    dx = dy * share * (1.0 + 1.702 * x * (1.0 - share))
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu(y_ptr, gate_ptr, up_ptr, channels, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, mask = tl.program_id(0).to(tl.int64) * channels + column, column < channels
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(dgate_ptr, dup_ptr, dy_ptr, gate_ptr, up_ptr, channels, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, mask = tl.program_id(0).to(tl.int64) * channels + column, column < channels
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    dgate = dy * up * share * (1.0 + gate * (1.0 - share))
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + at, (dy * gate * share).to(dup_ptr.dtype.element_ty), mask=mask)


def quick_gelu(x_RC: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(1.702 x)`, of a contiguous tensor."""
    y_RC = torch.empty_like(x_RC)
    _each(_quick_gelu, y_RC, x_RC)
    return y_RC


def quick_gelu_backward(dy_RC: torch.Tensor, x_RC: torch.Tensor) -> torch.Tensor:
    """The gradient of `quick_gelu`; both are contiguous."""
    dx_RC = torch.empty_like(x_RC)
    _each(_quick_gelu_backward, dx_RC, dy_RC, x_RC)
    return dx_RC


def swiglu(gate_RC: torch.Tensor, up_RC: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, of contiguous tensors of one dtype."""
    y_RC = torch.empty_like(gate_RC)
    _each(_swiglu, y_RC, gate_RC, up_RC)
    return y_RC


def swiglu_backward(
    dy_RC: torch.Tensor, gate_RC: torch.Tensor, up_RC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `swiglu`; all are contiguous."""
    dgate_RC, dup_RC = torch.empty_like(gate_RC), torch.empty_like(up_RC)
    _each(_swiglu_backward, dgate_RC, dup_RC, dy_RC, gate_RC, up_RC)
    return dgate_RC, dup_RC


def _each(kernel: triton.JITFunction, *tensors: torch.Tensor) -> None:
    """Launch an elementwise kernel on contiguous [R, C] tensors, one program for each row and block of columns."""
    rows, channels = tensors[0].shape
    block = min(TILE // 2, triton.next_power_of_2(channels))
    if rows:
        with on_device_of(tensors[0]):
            kernel[(rows, triton.cdiv(channels, block))](*tensors, channels, BLOCK=block, num_warps=4)
