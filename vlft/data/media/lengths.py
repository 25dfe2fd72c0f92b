"""Detects truncated video files: the container states more bytes than the file has.

The length is stated by MP4 and MOV (boxes), Matroska and WebM (the segment), AVI (RIFF chunks), ASF (its properties),
FLV (its metadata) and GIF (a block at the end), unless the file was written as a stream of unknown length. MPEG-TS,
MPEG-PS, Ogg, MXF and raw streams do not state it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import BinaryIO

MOST_CHUNKS = 100_000  # chunks read at most; hours of film in fragments have fewer boxes at the top level
SLACK = 16  # bytes by which writers may be wrong, e.g. because they count headers twice
VIDEO_BOXES = (b"mdat", b"moof", b"moov")  # losing another box loses no frame
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def cut_short(path: str) -> str | None:
    """Say how much of a truncated file exists; None if nothing is known to be missing.

    Raises:
        OSError: the file cannot be read.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(16)
        promised = max((read(file, start, size) for read in _READERS), default=0)
        if promised > size + SLACK:
            return f"cut short: {size:,} of {promised:,} bytes are there"
        return "cut short: it ends inside a frame" if _torn_gif(file, start) else None


def _boxes(file: BinaryIO, start: bytes, size: int) -> int:
    """ISO/IEC 14496-12, 4.2."""
    if start[4:8] not in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof"):
        return 0
    at = 0
    for _ in range(MOST_CHUNKS):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            break
        length, kind = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:])
        if length < 8:  # 0: to the end of the file
            break
        at += length
        if at > size:
            return at if kind in VIDEO_BOXES else 0
    return 0


def _segment(file: BinaryIO, start: bytes, size: int) -> int:
    """RFC 8794, 4 and 11.2: an EBML header, then the segment."""
    if start[:4] != b"\x1aE\xdf\xa3":
        return 0
    file.seek(4)
    header = _vint(file)
    if header is None:
        return 0
    file.seek(header, os.SEEK_CUR)
    if file.read(4) != b"\x18S\x80g":
        return 0
    length = _vint(file)
    return 0 if length is None else file.tell() + length


def _vint(file: BinaryIO) -> int | None:
    """Read a number of one to eight bytes; None if it means that the length is unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0x7F >> more)]) + file.read(more))
    return None if value == (1 << 7 * (more + 1)) - 1 else value


def _riff(file: BinaryIO, start: bytes, size: int) -> int:
    """An OpenDML AVI has several RIFF chunks, one after another."""
    if start[:4] != b"RIFF" or start[8:12] != b"AVI ":
        return 0
    at = 0
    for _ in range(MOST_CHUNKS):
        file.seek(at)
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):  # a recording that was never closed
            return 0
        at += 8 + length + length % 2
        if at > size:
            return at
    return 0


def _asf(file: BinaryIO, start: bytes, size: int) -> int:
    """ASF specification 3.2: the file properties in the header object."""
    if start != _ASF:
        return 0
    file.seek(24)
    objects = int.from_bytes(file.read(4), "little")
    at = 30
    for _ in range(min(objects, MOST_CHUNKS)):
        file.seek(at)
        head = file.read(24)
        if len(head) < 24:
            return 0
        length = int.from_bytes(head[16:], "little")
        if head[:16] == _ASF_PROPERTIES:
            body = file.read(80)
            live = len(body) < 68 or body[64] & 1
            return 0 if live else int.from_bytes(body[16:24], "little")
        if length < 24:
            return 0
        at += length
    return 0


def _flv(file: BinaryIO, start: bytes, size: int) -> int:
    """Adobe Flash Video File Format 10.1, E.5: `filesize` in onMetaData, a double after its type 0."""
    if start[:4] != b"FLV\x01":
        return 0
    file.seek(0)
    head = file.read(1 << 16)
    at = head.find(b"\x00\x08filesize\x00")
    value = head[at + 11 : at + 19] if at >= 0 else b""
    promised = struct.unpack(">d", value)[0] if len(value) == 8 else 0.0
    return int(promised) if 0 < promised < 1 << 53 else 0


def _torn_gif(file: BinaryIO, start: bytes) -> bool:
    """GIF89a: whether the file ends inside a block. If only the last block is missing, no frame is lost."""
    if start[:4] != b"GIF8":
        return False
    file.seek(13 + _colours(start[10] if len(start) > 10 else 0))
    while (kind := file.read(1)) in (b"!", b","):
        if kind == b",":
            place = file.read(9)
            if len(place) < 9:
                return True
            file.seek(_colours(place[8]) + 1, os.SEEK_CUR)  # 1: the minimum code size
        else:
            file.seek(1, os.SEEK_CUR)  # the label
        while length := file.read(1):
            if not length[0]:
                break
            if len(file.read(length[0])) < length[0]:
                return True
        else:
            return True
    return False


def _colours(flags: int) -> int:
    """Return the bytes of a colour table."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


_READERS: tuple[Callable[[BinaryIO, bytes, int], int], ...] = (_boxes, _segment, _riff, _asf, _flv)
