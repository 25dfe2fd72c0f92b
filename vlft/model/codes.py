"""Quantise a weight into bitsandbytes' formats, with the same codes on every device. Imports torch.

bitsandbytes has a kernel for each device, and they choose other codes for a few weights that lie between two code
values. A run that was trained on a GPU and is merged on a CPU would then merge other weights than it trained on. Here
each step is one of torch's exact operations: largest, divide, multiply, compare with the middle between two codes. The
codes are those of bitsandbytes on a CPU (0.50). Scales, one for 64 weights, are quantised by bitsandbytes on the CPU.

`vlft.model.packed` puts the result into bitsandbytes' modules, which also make it dense again.

Letters in shapes: O x D a weight, N its elements, S blocks of `BLOCK` weights.
"""

from __future__ import annotations

from typing import Any

import torch

from vlft.model.quantise import BLOCK, SCALES, Quantisation

LEAST = 1e-38  # a block of zeros is divided by this


def packed_4bit(weight_OD: torch.Tensor, quantisation: Quantisation) -> tuple[torch.Tensor, Any]:
    """Quantise to 4 bits.

    Args:
        weight_OD: any floating-point dtype.
        quantisation: nf4 or fp4.

    Returns:
        uint8 [N / 2, 1], two codes in a byte, and bitsandbytes' `QuantState` with the scales, on the same device.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    codes = get_4bit_type(quantisation.kind, device=weight_OD.device)
    places_N, scales_S = _nearest(weight_OD.reshape(-1).float(), codes)
    if len(places_N) % 2:
        places_N = torch.nn.functional.pad(places_N, (0, 1), value=int(codes.abs().argmin()))
    packed = ((places_N[::2] << 4) | places_N[1::2])[:, None]
    scales: dict[str, Any] = {"absmax": scales_S}
    if quantisation.double:
        scales_S = scales_S.cpu()
        # In float64: the order of the sum differs between machines, and rounding to float32 hides it.
        middle = scales_S.double().mean().float()
        packed_S, second = quantize_blockwise(scales_S - middle, blocksize=SCALES)
        scales = {"absmax": packed_S, "offset": middle, "state2": second}
    state = QuantState(
        **scales,
        shape=weight_OD.shape,
        dtype=weight_OD.dtype,
        blocksize=BLOCK,
        code=codes,
        quant_type=quantisation.kind,
    )
    state.to(weight_OD.device)
    return packed, state


def packed_int8(weight_OD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to 8 bits.

    Args:
        weight_OD: any floating-point dtype.

    Returns:
        int8 [O, D], and the largest absolute value of each row, float32 [O].
    """
    half_OD = weight_OD.half()  # as bitsandbytes does
    scales_O = half_OD.abs().amax(dim=1).float()
    places_OD = half_OD.float() * (127.0 / scales_O.clamp(min=LEAST))[:, None]
    return places_OD.round().to(torch.int8), scales_O


def _nearest(values_N: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The place of the nearest code for each value, after each block was divided by its largest value.

    Returns:
        uint8 [N], and the scale of each block, float32 [S].
    """
    count = len(values_N)
    values_SB = torch.nn.functional.pad(values_N, (0, -count % BLOCK)).view(-1, BLOCK)
    scales_S = values_SB.abs().amax(dim=1)
    shares_SB = (values_SB * (1.0 / scales_S.clamp(min=LEAST))[:, None]).clamp(-1, 1)
    ordered, order = codes.sort()
    middles = (ordered[:-1] + ordered[1:]) / 2
    places_SB = order.to(torch.uint8)[torch.bucketize(shares_SB, middles, out_int32=True)]
    return places_SB.view(-1)[:count], scales_S
