"""Recognises the kind of a file by its first bytes, and explains what to do if another kind was meant.

Failed downloads leave web pages named .jpg in data sets, so one table covers all kinds. Opens no picture.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

HEAD = 1024  # bytes read


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file.

    Attributes:
        ending: usual ending of such files.
        name: name in a sentence, with its article.
        holds: whether it is a picture, a video, or neither.
    """

    ending: str
    name: str
    holds: Literal["picture", "video", "neither"]


def _picture(ending: str, name: str) -> Kind:
    return Kind(ending=ending, name=name, holds="picture")


def _video(ending: str, name: str) -> Kind:
    return Kind(ending=ending, name=name, holds="video")


def _other(ending: str, name: str) -> Kind:
    return Kind(ending=ending, name=name, holds="neither")


# First bytes -> kind. The first entry that matches counts.
STARTS: tuple[tuple[bytes, Kind], ...] = (
    (b"\xff\xd8\xff", _picture(".jpg", "a JPEG picture")),
    (b"\x89PNG\r\n\x1a\n", _picture(".png", "a PNG picture")),
    (b"GIF8", _picture(".gif", "a GIF picture")),
    (b"BM", _picture(".bmp", "a BMP picture")),
    (b"II*\x00", _picture(".tif", "a TIFF picture")),
    (b"MM\x00*", _picture(".tif", "a TIFF picture")),
    (b"\x00\x00\x00\x0cjP  ", _picture(".jp2", "a JPEG 2000 picture")),
    (b"P5", _picture(".pgm", "a PGM picture")),
    (b"P6", _picture(".ppm", "a PPM picture")),
    (b"\xff\x0a", _picture(".jxl", "a JPEG XL picture")),
    (b"\x00\x00\x00\x0cJXL ", _picture(".jxl", "a JPEG XL picture")),
    (b"8BPS", _picture(".psd", "a Photoshop picture")),
    (b"\x1aE\xdf\xa3", _video(".mkv", "a Matroska or WebM video")),
    (b"\x00\x00\x01\xba", _video(".mpg", "an MPEG video")),
    (b"\x00\x00\x01\xb3", _video(".mpg", "an MPEG video")),
    (b"FLV\x01", _video(".flv", "a Flash video")),
    (b"0&\xb2u\x8ef\xcf\x11", _video(".wmv", "a Windows Media video")),
    (b"YUV4MPEG2", _video(".y4m", "a YUV4MPEG video")),
    (b"OggS", _video(".ogv", "an Ogg file")),
    (b"version https://git-lfs", _other(".txt", "a Git LFS pointer")),
    (b"%PDF", _other(".pdf", "a PDF")),
    (b"PK\x03\x04", _other(".zip", "a ZIP archive")),
    (b"\x1f\x8b", _other(".gz", "a gzip archive")),
    (b"\x93NUMPY", _other(".npy", "a NumPy array")),
    (b"ID3", _other(".mp3", "sound (MP3)")),
    (b"fLaC", _other(".flac", "sound (FLAC)")),
)
# Brand of an ISO file -> kind; any other brand is a video (https://mp4ra.org/registered-types/brands).
BRANDS = {
    b"avif": _picture(".avif", "an AVIF picture"),
    b"avis": _picture(".avif", "an AVIF picture"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"), _picture(".heic", "a HEIC picture")),
    b"qt  ": _video(".mov", "a QuickTime video"),
}
RIFFS = {
    b"WEBP": _picture(".webp", "a WebP picture"),
    b"AVI ": _video(".avi", "an AVI video"),
    b"WAVE": _other(".wav", "sound (WAV)"),
}
# Pattern of the beginning of a text, in lower case and without leading blanks -> kind.
TEXTS: tuple[tuple[str, Kind], ...] = (
    (r"<svg|<\?xml[^>]*>\s*(<!--.*?-->\s*)*(<!doctype svg[^>]*>\s*)?<svg", _other(".svg", "an SVG drawing")),
    (r"<!doctype html|<html|<head|<body|<script|<!--.*?-->\s*<(!doctype )?html", _other(".html", "a web page")),
    (r"<\?xml|<[a-z]+[^>]*xmlns", _other(".xml", "XML text")),
    (r"[\[{]", _other(".json", "JSON text")),
)
TEXT = _other(".txt", "text")
_PRINTABLE = re.compile(r"[^\x00-\x08\x0e-\x1a\x1c-\x1f\x7f\ufffd]*")


def kind_of_file(head: bytes) -> Kind | None:
    """Recognise the kind of a file by its first bytes; None if it is unknown.

    Args:
        head: first bytes of the file, at least 16 if it has as many.
    """
    for start, kind in STARTS:
        if head.startswith(start):
            return kind
    if head[:4] == b"RIFF":
        return RIFFS.get(head[8:12])
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], _video(".mp4", "an MP4 video"))
    if any(head[at : at + 1] == head[at + step : at + step + 1] == b"G" for at, step in ((0, 188), (4, 192))):
        return _video(".ts", "an MPEG-TS video")
    return _kind_of_text(head)


def _kind_of_text(head: bytes) -> Kind | None:
    text = head.decode("utf-8-sig", "replace")
    text = text[:-1] if text.endswith("\ufffd") else text  # a character cut in two
    if not text.strip() or not _PRINTABLE.fullmatch(text):
        return None
    low = text.lstrip().lower()
    return next((kind for pattern, kind in TEXTS if re.match(pattern, low, re.DOTALL)), TEXT)


# What to do about files that are neither a picture nor a video.
ADVICE = {
    ".txt": "Fetch it again",
    ".json": "Fetch it again",
    ".xml": "Fetch it again",
    ".html": "Its download failed: fetch it again",
    ".zip": "Unpack it",
    ".gz": "Unpack it",
}
AS_PICTURES = {
    ".svg": "Save it as PNG or JPEG",
    ".pdf": "Save its pages as PNG or JPEG",
    ".npy": "Save it as PNG or JPEG",
}


def mistaken(path: str, wanted: Literal["picture", "video"], *, sure: bool = False) -> str | None:
    """Say why a file is not a picture, or not a video, and what to do, for a message that begins with its path.

    Args:
        sure: ignore a picture where a video is wanted, and the reverse: some readers accept both.

    Returns:
        None if its first bytes are of the wanted kind or of an unknown one.

    Raises:
        OSError: the file cannot be read.
    """
    size = os.path.getsize(path)
    if not size:
        return "is empty (0 bytes). Fetch it again"
    with open(path, "rb") as file:
        kind = kind_of_file(file.read(HEAD))
    if kind is None or kind.holds == wanted:
        return None
    if kind.name == "a Git LFS pointer":
        return f"is a Git LFS pointer, not the {wanted} itself. Fetch it: git lfs pull"
    if kind.holds == "neither":
        advice = ADVICE.get(kind.ending) or (wanted == "picture" and AS_PICTURES.get(kind.ending))
        return f"is {kind.name}, not a {wanted}. {advice or f'Name a {wanted} file'}"
    other = "image" if kind.holds == "picture" else "video"
    tag = f"with a{'n' * (other == 'image')} <{other}> tag"
    return None if sure else f'is {kind.name}, not a {wanted}. Name it under "{other}", {tag}'
