"""Pixels of plain JPEG files, decoded by torchvision: 2.5 times as fast as Pillow, bit for bit the same.

Refuses nothing: whatever is not known to come out as Pillow's pixels is left to Pillow, which also finds the words for
what is wrong with a file. Letters in shapes: H, W of the upright picture.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from vlft.text import error_text

# EXIF orientation -> (swap rows and columns first, axes to mirror then), as `ImageOps.exif_transpose` has it.
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
    """The pixels of a JPEG whose header Pillow has read.

    Plain ones only: 8 bits, grey or three colours (others may be stored inverted, or come with a profile to apply).
    Both decoders are libjpeg-turbo at its default settings, so that pixels are equal; a test compares them.

    Args:
        path: of the file.
        picture: the same file as `Image.open` gives it, not loaded.
        orientation: its EXIF orientation.

    Returns:
        uint8 [3, H, W], in any memory layout; None where Pillow is to decode: another kind of file, one that the
        decoder gives up on (it does at the first missing byte), or whose size is not the header's.
    """
    decode = fast_decoder()
    if decode is None or picture.format not in ("JPEG", "MPO") or picture.mode not in ("RGB", "L"):
        return None
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
    """torchvision's decoder, tried on a small picture; None, with a note to the user, if it does not work here.

    It is deprecated since torchvision 0.29, in favour of torchcodec, and needs a part of torchvision in C++ that some
    builds lack. Called before loader workers start, so that there is one note and not one from each.
    """
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
                f"torchvision.io.decode_jpeg cannot be used ({error_text(error)}). The pixels are the same. Install a "
                "torchvision that has it to be faster.",
                file=sys.stderr,
                flush=True,
            )
        return None
    return decode_jpeg
