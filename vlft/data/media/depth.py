"""Pictures of more than 8 bits per channel: the range of their values, and grey ones in 8 bits. Opens no picture.

Cameras and scanners produce 12 or 14 bits, and many programs store such values unchanged in files of 16 bits. White is
4,095 there, and the high byte is 15 at most. Some files say so. Letters in shapes: H, W of the picture as stored.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from PIL import Image

# TIFF 6.0: BitsPerSample, SMaxSampleValue, MaxSampleValue.
TIFF_BITS, TIFF_MOST = 258, (341, 281)
DARK = 4  # warn if the largest value of a picture is more than so many times smaller than white


def is_grey(picture: Image.Image) -> bool:
    """Whether Pillow holds the picture with 16 bits or more: only grey pictures, since Pillow reduces colours to 8."""
    return picture.mode == "I" or picture.mode.startswith("I;16")


def is_deep(picture: Image.Image, path: str) -> bool:
    """Whether a picture has more than 8 bits per channel, by its header."""
    if is_grey(picture):
        return True
    if picture.format == "TIFF":
        return max(_tiff_numbers(picture, TIFF_BITS), default=8) > 8
    if picture.format == "PNG":
        with open(path, "rb") as file:
            return file.read(25)[24:] == b"\x10"  # bit depth in the first chunk, IHDR
    return False


def grey_bits(picture: Image.Image, path: str) -> int:
    """Return the bits of white in a grey picture of 16 bits: 16, unless its file says less.

    A PNG must be loaded, because its values must fit: by the standard they are scaled to 16 bits regardless of sBIT.
    """
    if picture.format == "PNG":
        bits = _png_significant_bits(path)
        return bits if 8 < bits < 16 and not int(np.asarray(picture).max()) >> bits else 16
    if picture.format != "TIFF":
        return 16
    bits = max(_tiff_numbers(picture, TIFF_BITS), default=16)
    if 8 < bits < 16:
        return bits
    for tag in TIFF_MOST:  # by the standard a statistic, but writers of 12-bit pictures store 4095 in it
        most = max(_tiff_numbers(picture, tag), default=0)
        if 255 < most < 65535 and not most & (most + 1):
            return most.bit_length()
    return 16


def grey_to_8_bits(picture: Image.Image, bits: int) -> Image.Image:
    """Reduce a grey picture to the highest 8 of its bits, as Pillow reduces colours. Pillow would clip grey to white.

    Args:
        bits: bits of white, as returned by `grey_bits`.
    """
    values_HW = np.clip(np.asarray(picture), 0, (1 << bits) - 1) >> (bits - 8)
    return Image.fromarray(values_HW.astype(np.uint8))


def remark_on(picture: Image.Image, path: str) -> str | None:
    """Return a warning about the values of a deep, loaded picture if they are almost black, else None."""
    grey = is_grey(picture)
    white = (1 << (grey_bits(picture, path) if grey else 16)) - 1
    values = np.asarray(picture) if grey else np.asarray(picture.convert("RGB")).astype(np.int64) << 8
    most = int(values.max())
    if most * DARK > white:
        return None
    about = "" if grey else "about "
    return (
        f"16 bits a channel, and its largest value is {about}{most:,} of {white:,}: it is trained almost black. "
        "Save it with 8 bits, or spread its values over all 16"
    )


def _tiff_numbers(picture: Any, tag: int) -> list[int]:
    value = picture.tag_v2.get(tag, ())
    return [int(one) for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, (int, float))]


def _png_significant_bits(path: str) -> int:
    """Return the significant bits of a PNG's first channel (PNG, third edition, 11.3.2.7); 16 if it does not say."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IDAT":
                break
            if kind == b"sBIT":
                return (file.read(1) or b"\x10")[0]
            file.seek(length + 4, 1)
    return 16
