"""Decode plain JPEG files with torchvision: 2.5 times as fast as Pillow, with the same pixels bit for bit.

Refuses nothing. Pillow decodes every file for which equal pixels are not certain, and its errors say what is wrong with
a file. Letters in shapes: H and W are height and width of the upright picture.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlft.text import error_text

if TYPE_CHECKING:
    import torch

# EXIF orientation -> (swap rows and columns first, then mirror these axes), as in `ImageOps.exif_transpose`.
_TURNS = {
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}


def read_jpeg(path: str, picture: Image.Image, orientation: int | None) -> torch.Tensor | None:
    """Return the pixels of a JPEG whose header Pillow has read.

    Only files of 8 bits, grey or with three colours, are decoded. Other files may be stored inverted, or have a profile
    to apply. Both decoders are libjpeg-turbo at its default settings, so pixels are equal; a test compares them.

    Args:
        path: path of the file.
        picture: the same file as `Image.open` returns it, not loaded.
        orientation: its EXIF orientation.

    Returns:
        uint8 [3, H, W], in any memory layout. None if Pillow must decode the file: it is of another kind, the decoder
        fails (as it does at the first missing byte), or the size differs from the header.
    """
    decode = fast_decoder()
    if decode is None or picture.format not in ("JPEG", "MPO") or picture.mode not in ("RGB", "L"):
        return None
    import torch

    try:
        pixels_3HW = decode(torch.from_numpy(np.fromfile(path, dtype=np.uint8)), mode="RGB")
    except RuntimeError:
        return None
    if pixels_3HW.shape != (3, picture.height, picture.width):
        return None
    swap, mirror = _TURNS.get(orientation or 1, (False, ()))
    if swap:
        pixels_3HW = pixels_3HW.transpose(1, 2)
    return pixels_3HW.flip(mirror) if mirror else pixels_3HW


@functools.cache
def fast_decoder() -> Callable[..., torch.Tensor] | None:
    """Return torchvision's decoder after a test on a small picture; None, with a note to the user, if it does not work.

    The decoder has been deprecated since torchvision 0.29 in favour of torchcodec, and needs a C++ part of torchvision
    that some builds lack. This is called before loader workers start, so that there is one note instead of one per
    worker.
    """
    import torch
    from torch.utils.data import get_worker_info

    try:
        from torchvision.io import decode_jpeg

        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, format="JPEG")
        decode_jpeg(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), mode="RGB")
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        worker = get_worker_info()
        if (worker is None or worker.id == 0) and os.environ.get("RANK", "0") == "0":
            print(
                "note: JPEG pictures are decoded by Pillow, which takes about 2.5 times as long: "
                f"torchvision.io.decode_jpeg cannot be used ({error_text(error)}). The pixels are the same. To decode "
                "faster, install a torchvision that has it.",
                file=sys.stderr,
                flush=True,
            )
        return None
    return decode_jpeg
