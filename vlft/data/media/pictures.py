"""Opens picture files: upright size from the header, pixels as 8-bit RGB. Independent of rows, budgets and tokens.

Letters in shapes: H, W of the upright picture.
"""

from __future__ import annotations

import logging
import os
import stat
import struct
import sys
import warnings
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from vlft.data.media.depth import grey_bits, grey_to_8_bits, is_deep, is_grey, remark_on
from vlft.data.media.jpeg import read_jpeg, read_plain_jpeg
from vlft.data.media.kinds import HEAD, kind_of_file, mistaken
from vlft.data.media.missing import missing

# Exceptions that Pillow's decoders are known to raise on damaged files, besides their own classes (which are OSErrors).
BROKEN_PICTURE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    RuntimeError,  # AVIF
    struct.error,
    zlib.error,
)
# Readers hold the whole file in memory. The largest picture that Pillow opens has 0.5 GB of 8-bit RGB.
PICTURE_BYTES = 1 << 30
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# Formats that Pillow knows and cannot decode.
UNDECODED = ("MPEG",)
_PILLOW_LOG = logging.getLogger("PIL")


if TYPE_CHECKING:
    import torch


class Unreadable(Exception):
    """A file that cannot be trained on. The message says why and what to do, and does not name the row."""


class MissingFile(Unreadable):
    """A file that does not exist (`.path`)."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return missing(self.path)


@dataclass(frozen=True, kw_only=True)
class Header:
    """Size and depth of a picture, by its header.

    Attributes:
        size: (H, W) of the picture that `open_picture` returns.
        deep: whether it has more than 8 bits per channel.
    """

    size: tuple[int, int]
    deep: bool


def picture_header(path: str) -> Header:
    """Read size and depth of a picture. No pixel is decoded.

    Raises:
        Unreadable: the file is missing, is not a picture, or is of a kind that is refused.
    """
    with _opened(path) as picture:
        return Header(size=_size(picture, path), deep=is_deep(picture, path))


def picture_size(path: str) -> tuple[int, int]:
    """Read (H, W) of the picture that `open_picture` returns, from the file's header.

    Raises:
        Unreadable: the errors of `picture_header`.
    """
    with _opened(path) as picture:
        return _size(picture, path)


def depth_remark(path: str) -> str | None:
    """Return a warning about a picture of 16 bits per channel that is trained almost black, else None.

    Only the high bytes are trained, and they are almost black if the values use a small part of the 16 bits. The
    picture is decoded if its header says that it has more than 8 bits.

    Raises:
        Unreadable: the errors of `open_picture`.
    """
    with _opened(path) as picture:
        if not is_deep(picture, path):
            return None
        try:
            _load(picture)
            return remark_on(picture, path)
        except BROKEN_PICTURE as error:
            raise Unreadable(f"{path}: damaged or cut short ({error}). Fetch or save it again") from error


def open_picture(path: str) -> Image.Image:
    """Open a still as an upright 8-bit RGB picture. Of an animation, the first frame is used.

    The picture is rotated as its EXIF says, and transparent parts get a white background, as in Qwen2-VL's processor of
    transformers 5.23 (5.17 drops the alpha channel instead). 16-bit grey is reduced to its high byte, or to the highest
    eight of the bits that its file states; Pillow alone would clip it to white.

    Raises:
        Unreadable: the errors of `picture_size`; the pixels are damaged or end early.
    """
    with _opened(path) as picture:
        return _decoded(picture, path)


def open_thumbnail(path: str, side: int) -> Image.Image:
    """Open a still as `open_picture` does, with at most `side` pixels in its longer side.

    Much faster for large JPEGs: libjpeg decodes them at 1/2, 1/4 or 1/8 of their size. For people, not for models.

    Raises:
        Unreadable: the errors of `open_picture`.
    """
    with _opened(path) as picture:
        picture.draft(None, (2 * side, 2 * side))  # at least twice as large, so that the second step is smooth
        small = _decoded(picture, path)
    small.thumbnail((side, side))
    return small


def read_pixels(path: str) -> torch.Tensor:
    """Read the picture of `open_picture` as uint8 [3, H, W], in any memory layout. Faster for JPEGs.

    Raises:
        Unreadable: the errors of `open_picture`.
    """
    import torch

    require_file(path, most=PICTURE_BYTES)
    try:
        if (plain_3HW := read_plain_jpeg(path)) is not None:
            return plain_3HW
        with _opened(path) as picture:
            promised = _size(picture, path)
            pixels_3HW = read_jpeg(path, picture, _orientation(picture))
            if pixels_3HW is not None and pixels_3HW.shape[1:] == promised:
                return pixels_3HW
            return torch.from_numpy(np.array(_decoded(picture, path))).permute(2, 0, 1)
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read ({error}). Check its disk") from error


def _decoded(picture: Image.Image, path: str) -> Image.Image:
    promised = _size(picture, path)
    try:
        _load(picture)
        bits = grey_bits(picture, path) if is_grey(picture) else 8
        rgb = _to_rgb(ImageOps.exif_transpose(picture), bits)
    except Image.DecompressionBombError as error:
        raise Unreadable(_too_large(path, error)) from error
    except BROKEN_PICTURE as error:
        raise Unreadable(f"{path}: damaged or cut short ({error}). Fetch or save it again") from error
    if rgb.size[::-1] != promised:
        h, w = promised
        raise Unreadable(f"{path}: its header says {w}x{h}, its pixels are {rgb.width}x{rgb.height}. Save it again")
    return rgb


def _load(picture: Image.Image) -> None:
    """Decode the pixels. libtiff's messages on stderr are suppressed, since Pillow also raises an exception."""
    if picture.format != "TIFF":
        picture.load()
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        picture.load()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _opened:
    """`Image.open` as a context that turns its exceptions into `Unreadable` and suppresses Pillow's warnings.

    The warnings concern unused metadata, and pictures between one and two times Pillow's limit of pixels, which are
    accepted because large scans have such sizes.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._quiet = warnings.catch_warnings()

    def __enter__(self) -> Image.Image:
        require_file(self.path, most=PICTURE_BYTES)
        self._quiet.__enter__()
        warnings.simplefilter("ignore")
        if _PILLOW_LOG.level != logging.CRITICAL:  # it logs remarks on unusual TIFFs
            _PILLOW_LOG.setLevel(logging.CRITICAL)  # takes 0.1 ms: it clears the cache of every logger
        try:
            self.picture = self._open()
        except Unreadable:
            self._quiet.__exit__(None, None, None)
            raise
        return self.picture

    def _open(self) -> Image.Image:
        try:
            picture = Image.open(self.path)
        except Image.DecompressionBombError as error:
            raise Unreadable(_too_large(self.path, error)) from error
        except UnidentifiedImageError as error:
            raise Unreadable(f"{self.path}: {_no_picture(self.path)}") from error
        except (*BROKEN_PICTURE, MemoryError) as error:  # a valid header needs little memory
            why = mistaken(self.path, "picture") if os.access(self.path, os.R_OK) else None
            why = why or f"cannot be opened ({str(error) or type(error).__name__}). Fetch or save it again"
            raise Unreadable(f"{self.path}: {why}") from error
        if picture.format == "EPS":
            picture.close()
            raise Unreadable(f"{self.path}: PostScript, a program that would have to be run. Save it as PNG or JPEG")
        if picture.format in UNDECODED or isinstance(picture, ImageFile.StubImageFile):
            picture.close()
            raise Unreadable(f"{self.path}: {_no_picture(self.path)}")
        return picture

    def __exit__(self, *_: object) -> None:
        self.picture.close()
        self._quiet.__exit__(None, None, None)


def _no_picture(path: str) -> str:
    """Say why Pillow finds no picture in a file, and what to do."""
    if why := mistaken(path, "picture"):
        return why
    with open(path, "rb") as file:
        kind = kind_of_file(file.read(HEAD))
    if kind is None:
        return "not a picture that Pillow knows. Save it as PNG or JPEG"
    if kind.ending in (".heic", ".jxl", ".avif", ".psd"):
        return f"is {kind.name}, which this Pillow does not read. Save it as PNG or JPEG"
    return f"begins as {kind.name} does, and its header is damaged. Fetch or save it again"


def _size(picture: Image.Image, path: str) -> tuple[int, int]:
    """Return (H, W) after the EXIF rotation, from the header."""
    if picture.mode == "F":
        raise Unreadable(f"{path}: floating-point pixels, which have no fixed black and white. Save it with 8 bits")
    try:
        if picture.format == "PNG" and _png_ends_with_metadata(path):
            picture.load()
        orientation = _orientation(picture)
        width, height = picture.size
        if picture.format == "TIFF":  # Pillow >= 11.1 returns the rotated size before the picture is loaded
            tags = picture.tag_v2  # type: ignore[attr-defined]
            width, height = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
    except Image.DecompressionBombError as error:
        raise Unreadable(_too_large(path, error)) from error
    except BROKEN_PICTURE as error:
        raise Unreadable(f"{path}: its header is damaged ({error}). Fetch or save it again") from error
    return (width, height) if orientation in SIDEWAYS else (height, width)


def _orientation(picture: Image.Image) -> int | None:
    # The method of the base class: PNG's own decodes all pixels to search for EXIF after them.
    return Image.Image.getexif(picture).get(ExifTags.Base.Orientation)


def _png_ends_with_metadata(path: str) -> bool:
    """Whether a PNG has text or EXIF after its pixels, which might rotate the picture."""
    with open(path, "rb") as file:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if pixels and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                return True
            pixels = pixels or kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
    return False


def _to_rgb(picture: Image.Image, bits: int) -> Image.Image:
    if is_grey(picture):
        picture = grey_to_8_bits(picture, bits)
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture.convert("RGB")


def _too_large(path: str, error: Exception) -> str:
    return f"{path}: too large to be opened safely ({error}). Make it smaller"


def require_file(path: str, *, most: int | None = None) -> None:
    """Refuse anything that is not a regular file: folders, and pipes and devices, which may never end.

    Args:
        most: maximum size in bytes; None for any size.

    Raises:
        Unreadable: the file does not exist, cannot be accessed, is not a regular file, or is larger.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a lone surrogate, a null
        raise MissingFile(path) from error
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read ({error.strerror}). Check its disk and permissions") from error
    if stat.S_ISREG(found.st_mode):
        if most is not None and found.st_size > most:
            raise Unreadable(f"{path}: {found.st_size:,} bytes, a picture has {most:,} at most. Make it smaller")
        return
    if not stat.S_ISDIR(found.st_mode):
        raise Unreadable(f"{path}: is {_odd(found.st_mode)}, not a regular file. Name a picture or video file")
    raise Unreadable(f"{path}: is a folder, not a file. Put it there, or correct the path or --image_folder")


def _odd(mode: int) -> str:
    return "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
