"""Triton kernels for the causal convolution of gated delta nets, with its SiLU: each tensor is read or written once.

As in `vlft.model.triton_kernels`, they have no autograd, compute in float32 and compile nothing for a new number
of tokens.

Letters: T tokens of a flat row, Z channels, W taps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlft.model.triton_kernels import on_device_of

#: A tile of 16 tokens fits in the registers of 256 threads; one of 32 spills in the backward pass (compiled for 9.0).
TILE = {"ROWS": 16, "BLOCK": 128, "num_warps": 8}


@triton.jit
def _before_silu(x_ptr, weight_ptr, token, within, inside, column, valid, channels, TAPS: tl.constexpr):
    """The convolution at some tokens: tap `TAPS - 1 - back` reads the token `back` places before, in its sample."""
    total = tl.zeros([token.shape[0], column.shape[0]], dtype=tl.float32)
    for back in tl.static_range(TAPS):
        mask = (inside & (within >= back))[:, None] & valid[None, :]
        x = tl.load(x_ptr + (token - back)[:, None] * channels + column[None, :], mask=mask, other=0.0)
        weight = tl.load(weight_ptr + column * TAPS + (TAPS - 1 - back), mask=valid, other=0.0)
        total += x.to(tl.float32) * weight.to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["tokens"])
def _convolve(
    y_ptr, x_ptr, weight_ptr, within_ptr, tokens, channels, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, valid = token < tokens, column < channels
    within = tl.load(within_ptr + token, mask=inside, other=0)
    y = _before_silu(x_ptr, weight_ptr, token, within, inside, column, valid, channels, TAPS)
    y *= tl.sigmoid(y)
    mask = inside[:, None] & valid[None, :]
    tl.store(y_ptr + token[:, None] * channels + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _convolve_backward(
    dx_ptr, parts_ptr, dy_ptr, x_ptr, weight_ptr, within_ptr, tokens, channels, TAPS: tl.constexpr,
    FOR_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each token gathers slopes from itself and the `TAPS - 1` tokens after it. They are computed again from x."""
    program = tl.program_id(0).to(tl.int64)
    token = program * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < channels
    dx = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for ahead in tl.static_range(TAPS):
        later = token + ahead
        inside = later < tokens
        within = tl.load(within_ptr + later, mask=inside, other=0)
        mask = inside[:, None] & valid[None, :]
        before = _before_silu(x_ptr, weight_ptr, later, within, inside, column, valid, channels, TAPS)
        share = tl.sigmoid(before)
        dy = tl.load(dy_ptr + later[:, None] * channels + column[None, :], mask=mask, other=0.0).to(tl.float32)
        slope = dy * share * (1.0 + before * (1.0 - share))
        weight = tl.load(weight_ptr + column * TAPS + (TAPS - 1 - ahead), mask=valid, other=0.0).to(tl.float32)
        dx += tl.where((inside & (within >= ahead))[:, None], slope * weight[None, :], 0.0)
        if FOR_WEIGHT and ahead == 0:
            for back in tl.static_range(TAPS):
                mask = (inside & (within >= back))[:, None] & valid[None, :]
                x = tl.load(x_ptr + (token - back)[:, None] * channels + column[None, :], mask=mask, other=0.0)
                part = tl.sum(slope * x.to(tl.float32), axis=0)
                tl.store(parts_ptr + (program * channels + column) * TAPS + (TAPS - 1 - back), part, mask=valid)
    mask = (token < tokens)[:, None] & valid[None, :]
    tl.store(dx_ptr + token[:, None] * channels + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def convolve(x_TZ: torch.Tensor, weight_ZW: torch.Tensor, within_T: torch.Tensor) -> torch.Tensor:
    """A causal convolution of each channel within its sample, then SiLU.

    Args:
        x_TZ: contiguous.
        weight_ZW: contiguous, of any floating dtype; the last tap is for the token itself.
        within_T: integers, the place of each token in its sample.

    Returns:
        [T, Z] in x's dtype.
    """
    y_TZ = torch.empty_like(x_TZ)
    if len(x_TZ):
        with on_device_of(x_TZ):
            _convolve[_grid(x_TZ)](y_TZ, x_TZ, weight_ZW, within_T, *x_TZ.shape, TAPS=weight_ZW.shape[1], **TILE)
    return y_TZ


def convolve_backward(
    dy_TZ: torch.Tensor, x_TZ: torch.Tensor, weight_ZW: torch.Tensor, within_T: torch.Tensor, *, for_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of `convolve`: of x, and of the weight if needed. All tensors are contiguous."""
    dx_TZ = torch.empty_like(x_TZ)
    grid = _grid(x_TZ)
    parts = torch.empty((grid[0] if for_weight else 0, *weight_ZW.shape), dtype=torch.float32, device=x_TZ.device)
    if len(x_TZ):
        with on_device_of(x_TZ):
            _convolve_backward[grid](
                dx_TZ, parts, dy_TZ, x_TZ, weight_ZW, within_T, *x_TZ.shape, TAPS=weight_ZW.shape[1],
                FOR_WEIGHT=for_weight, **TILE,
            )  # fmt: skip
    return dx_TZ, parts.sum(0).to(weight_ZW.dtype) if for_weight else None


def _grid(x_TZ: torch.Tensor) -> tuple[int, int]:
    tokens, channels = x_TZ.shape
    return triton.cdiv(tokens, TILE["ROWS"]), triton.cdiv(channels, TILE["BLOCK"])
