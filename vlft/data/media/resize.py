"""Resize pixels as the stock processors do, into memory that is there already. torch is imported where used.

Letters in shapes: F pictures or frames of one size; H, W their height and width.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def resize_into(made_FHW3: torch.Tensor, pixels_F3HW: torch.Tensor) -> None:
    """Resize pictures as `torchvision.transforms.v2.functional.resize` does: bicubic, antialiased, in whole numbers.

    That function returns its result in new memory, from which it would have to be copied to its place.

    Args:
        made_FHW3: uint8 of the new size, contiguous; receives the result.
        pixels_F3HW: uint8, in any memory layout.
    """
    size = list(made_FHW3.shape[1:3])
    made_F3HW = made_FHW3.permute(0, 3, 1, 2)
    direct = direct_resize()
    if list(pixels_F3HW.shape[2:]) == size:
        made_F3HW.copy_(pixels_F3HW)
    elif direct is None:
        made_F3HW.copy_(_stock(pixels_F3HW, size))
    else:
        direct(pixels_F3HW, size, made_F3HW)


def resize_in_float_into(made_FHW3: torch.Tensor, pixels_F3HW: torch.Tensor) -> None:
    """Resize pictures as `resize_into`, but in floating point, as `torchvision.transforms.functional.resize` does."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    size = list(made_FHW3.shape[1:3])
    made_F3HW = resize(pixels_F3HW, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    made_FHW3.permute(0, 3, 1, 2).copy_(made_F3HW)


def direct_resize() -> Callable[[torch.Tensor, list[int], torch.Tensor], object] | None:
    """Return torch's function below torchvision's, which takes the memory of its result.

    On processors without AVX2, torchvision resizes in floating point instead, which rounds in another way. On others,
    the function is tested against torchvision, unless this process has not imported it: that takes a second, which is
    long for a preview of one row. A loader has imported it.

    Returns:
        a function of the pixels, the new size and the memory, all [F, 3, H, W]; None if torch lacks it, or if its
        result is not that of torchvision.
    """
    return _direct(tested="torchvision" in sys.modules)


@functools.cache
def _direct(*, tested: bool) -> Callable[[torch.Tensor, list[int], torch.Tensor], object] | None:
    import torch

    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    try:
        resize = torch.ops.aten._upsample_bicubic2d_aa.out
    except AttributeError:
        return None

    def direct(pixels_F3HW: torch.Tensor, size: list[int], made_F3HW: torch.Tensor) -> None:
        mixed_F3HW = pixels_F3HW.contiguous(memory_format=torch.channels_last)  # as the result is
        resize(mixed_F3HW, size, False, None, None, out=made_F3HW)

    try:
        return direct if not tested or _equals_stock(direct) else None
    except (RuntimeError, TypeError):
        return None


def _equals_stock(direct: Callable[[torch.Tensor, list[int], torch.Tensor], object]) -> bool:
    """Whether a function resizes noise as torchvision does: smaller and larger, from both layouts of memory."""
    import torch

    noise = torch.Generator("cpu").manual_seed(0)
    pixels_F3HW = torch.randint(0, 256, (2, 3, 97, 61), dtype=torch.uint8, generator=noise, device="cpu")
    for size in ([56, 28], [112, 84]):
        for given in (pixels_F3HW, pixels_F3HW.contiguous(memory_format=torch.channels_last)):
            made_FHW3 = torch.empty(2, *size, 3, dtype=torch.uint8, device="cpu")
            direct(given, size, made_FHW3.permute(0, 3, 1, 2))
            if not torch.equal(made_FHW3.permute(0, 3, 1, 2), _stock(given, size)):
                return False
    return True


def _stock(pixels_F3HW: torch.Tensor, size: list[int]) -> torch.Tensor:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    return resize(pixels_F3HW, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
