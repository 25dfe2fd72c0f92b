"""Decode plain JPEG files with torchvision: 2.5 times as fast as Pillow, with the same pixels bit for bit.

Refuses nothing. Pillow decodes every file for which equal pixels are not certain, and its errors say what is wrong with
a file. Letters in shapes: H and W are height and width of the upright picture.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import struct
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlft.text import error_text

if TYPE_CHECKING:
    import torch

START = b"\xff\xd8"
# Kinds of the segments of a header. After SCAN come pixels. APP1 has EXIF or XMP, which may turn the picture.
APP0, APP1, COMMENT, SCAN = 0xE0, 0xE1, 0xFE, 0xDA
FRAMES = (0xC0, 0xC1, 0xC2)  # of Huffman-coded baseline, extended and progressive pictures
TABLES = (*FRAMES, 0xC4, 0xDB, 0xDD)
FEW = 50  # pictures that Pillow decodes in the time that importing torchvision takes
MOST_PIXELS = 1 << 26  # larger pictures are left to Pillow, which has a limit
_FRAME = struct.Struct(">BBHBHHB")  # 0xFF, kind, length; of a frame bits, height, width, colours
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


def read_plain_jpeg(path: str) -> torch.Tensor | None:
    """Return the pixels of a JPEG without EXIF and XMP. Its header is read here, in a fifth of Pillow's time.

    Returns:
        as `read_jpeg`. None if Pillow must read the file, or at least its header.

    Raises:
        OSError: the disk fails.
    """
    if _decoder() is None:
        return None
    try:
        with open(path, "rb", buffering=0) as file:
            if file.read(len(START)) != START:
                return None
            content = np.fromfile(path, dtype=np.uint8)
    except PermissionError:
        return None
    size = _plain_size(content)
    return None if size is None else _pixels(content, size)


def _plain_size(content: np.ndarray) -> tuple[int, int] | None:
    """Return (H, W) by the header, if nothing in it can turn the picture or make it another than 8-bit grey or RGB."""
    found, at = None, len(START)
    while at + _FRAME.size <= len(content):
        mark, kind, length, bits, height, width, colours = _FRAME.unpack_from(content.data, at)
        if kind == SCAN:
            break
        if mark != 0xFF or not (kind in TABLES or APP0 <= kind <= COMMENT) or kind == APP1:
            return None
        if kind in FRAMES:
            plain = found is None and bits == 8 and colours in (1, 3) and 0 < height * width <= MOST_PIXELS
            if not plain:
                return None
            found = height, width
        at += 2 + length
    return found


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
    if _decoder() is None or picture.format not in ("JPEG", "MPO") or picture.mode not in ("RGB", "L"):
        return None
    pixels_3HW = _pixels(np.fromfile(path, dtype=np.uint8), (picture.height, picture.width))
    if pixels_3HW is None:
        return None
    swap, mirror = _TURNS.get(orientation or 1, (False, ()))
    if swap:
        pixels_3HW = pixels_3HW.transpose(1, 2)
    return pixels_3HW.flip(mirror) if mirror else pixels_3HW


def _pixels(content: np.ndarray, size: tuple[int, int]) -> torch.Tensor | None:
    """Decode a JPEG. None if that fails, or if it has another size."""
    import torch

    decode = fast_decoder()
    assert decode is not None
    try:
        pixels_3HW = decode(torch.from_numpy(content), mode="RGB")
    except RuntimeError:
        return None
    return pixels_3HW if pixels_3HW.shape == (3, *size) else None


def _decoder() -> Callable[..., torch.Tensor] | None:
    """`fast_decoder`; None for the first pictures of a process that does not need torchvision for anything else."""
    return fast_decoder() if "torchvision" in sys.modules or next(_read) >= FEW else None


_read = itertools.count()


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
