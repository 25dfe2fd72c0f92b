"""Locate and read the raw rows of JSON data files.

`vlft.data.files.unpack` converts tables (parquet, CSV, tars, folders) to JSON lines first. `vlft.data.rows.records`
checks the rows.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from vlft.config.columns import Columns
from vlft.data.files.tables import is_table, missing, name_it, refuse_ending, sources_of
from vlft.data.files.unpack import unpacked
from vlft.data.rows.registries import registry_at, registry_of
from vlft.data.rows.source import LINE_BYTES, LINES, BrokenLine, kind_of
from vlft.errors import ConfigError

ARRAY_BYTES = 8 << 30  # limit for a .json, which is read at once; parsed rows take several times that in memory
BOM = b"\xef\xbb\xbf"
MAGIC = (b"\x1f\x8b", b"PK\x03\x04", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")

_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """The position of a row in its file.

    Attributes:
        start: offset of its first byte.
        length: number of bytes.
        line: line number, from 1; 0 in a `.json`.
    """

    start: int
    length: int
    line: int


def row_spans(path: str) -> Iterator[Span]:
    """Yield the positions of the rows of a `.json` or `.jsonl`.

    A `.jsonl` is read line by line. A `.json` is read into memory at once.

    Raises:
        ConfigError: the file holds no rows, or a `.json` is not an array.
    """
    rows = 0
    for span in _line_spans(path) if path.lower().endswith(LINES) else _array_spans(path):
        rows += 1
        yield span
    if not rows:
        raise ConfigError(f"{path}: holds no rows. Name a file that does; data/README.md describes the format.")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Where the rows of a data file are.

    Attributes:
        file: a `.json` or `.jsonl`: the data file itself, or the unpacked rows of a table.
        keys: names of a table's columns. None for a JSON file: only its rows have them.
        digest: sha256 of the rows of a table, in hex. None for a JSON file: `DataFile.print` computes it.
    """

    file: str
    keys: tuple[str, ...] | None
    digest: str | None


def opened(path: str, columns: Columns | None = None, *, pairs: bool = False) -> Opened:
    """Return where the rows of a data file are. A table is unpacked.

    Args:
        path: the data file.
        columns: the mapping of `--columns`.
        pairs: whether its rows are read as preference rows.

    Raises:
        ConfigError: the file does not exist, has an ending that is not supported, or is a table that cannot be
            unpacked.
    """
    if is_table(path):
        table = unpacked(path, columns, pairs=pairs)
        return Opened(file=table.rows, keys=table.columns, digest=table.digest)
    if not os.path.exists(path):
        raise missing(path)
    if pointer := registry_at(path):
        raise ConfigError(pointer)
    if not path.lower().endswith((".json", *LINES)):
        raise refuse_ending(path)
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: is not a regular file. {name_it()}")
    return Opened(file=path, keys=None, digest=None)


def files_of(path: str) -> list[str]:
    """Return the files that a data file consists of: itself, or the files of a table.

    Raises:
        ConfigError: the errors of `tables.sources_of`.
    """
    return sources_of(path) if is_table(path) else [path]


def row_of(data: bytes, line: int) -> object:
    """Parse the bytes of a row. Returns a `BrokenLine` if they are not JSON.

    Args:
        data: the bytes of a `Span`. If it is longer than `LINE_BYTES`, the first `LINE_BYTES + 1` bytes are enough.
        line: the line number of the span.
    """
    if line and len(data) > LINE_BYTES:
        return BrokenLine(reason=f"line {line}: more than {LINE_BYTES:,} bytes. Split the row")
    try:
        return json.loads(data.decode("utf-8").rstrip("\r\n"))
    except json.JSONDecodeError as error:
        return BrokenLine(reason=f"line {line}, column {error.colno}: not JSON: {error.msg}. Fix the line")
    except (ValueError, RecursionError) as error:
        return BrokenLine(reason=f"line {line}: not JSON in UTF-8: {error}. Fix the line")


def _array_spans(path: str) -> Iterator[Span]:
    size = os.path.getsize(path)
    if size > ARRAY_BYTES:
        raise ConfigError(
            f"{path}: {size:,} bytes, and an array may have {ARRAY_BYTES:,}. Split it, or write it as .jsonl (one row "
            "per line), which is read line by line."
        )
    with open(path, "rb") as file:
        data = file.read()
    text, start = _utf8(data, path), len(BOM) if data.startswith(BOM) else 0
    del data
    if not text.strip():
        return
    plain = text.isascii()
    done = 0  # the character at the byte offset `start`
    for begin, end in _elements(text, path):
        start += begin - done if plain else len(text[done:begin].encode())
        length = end - begin if plain else len(text[begin:end].encode())
        yield Span(start=start, length=length, line=0)
        start, done = start + length, end


def _elements(text: str, path: str) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of each element of the array in a text; `end` is exclusive."""
    decoder = json.JSONDecoder()
    at = _next(text, 0)
    try:
        if text[at] != "[":
            _refuse(path, json.loads(text))
        at = _next(text, at + 1)
        more = text[at : at + 1] != "]"
        while more:
            _, end = decoder.raw_decode(text, at)
            yield at, end
            at = _next(text, end)
            more = text[at : at + 1] == ","
            if not more and text[at : at + 1] != "]":
                json.loads(text)  # raises an error with the position
            at = _next(text, at + 1)
        if text[at:]:
            json.loads(text)
    except json.JSONDecodeError as error:
        hint = " If each line is a row of its own, name the file .jsonl." if error.msg.startswith("Extra data") else ""
        raise ConfigError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}. Fix it there.{hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}. Fix it.") from error


def _next(text: str, at: int) -> int:
    """Return the index of the next character that is not white space."""
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _refuse(path: str, value: object) -> NoReturn:
    if pointer := registry_of(path, value):
        raise ConfigError(pointer)
    raise ConfigError(
        f"{path}: {kind_of(value)} at the top, where an array of rows belongs. Put the rows between [ and ]."
    )


def _line_spans(path: str) -> Iterator[Span]:
    with open(path, "rb") as file:
        first, start = True, 0
        for number, (line, length) in enumerate(_lines(file), start=1):
            begin = start
            start += length
            if number == 1:
                _refuse_other_encodings(line, path)
                if line.startswith(BOM):
                    line, begin, length = line[len(BOM) :], begin + len(BOM), length - len(BOM)
            if not line.strip():
                continue
            if first and line.lstrip().startswith(b"["):
                raise ConfigError(
                    f"{path}, line {number}: an array; a .jsonl has one object per line. Rename the file to .json."
                )
            first = False
            yield Span(start=begin, length=length, line=number)


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield each line and its length in bytes. A line that is too long is cut after `LINE_BYTES` + 1 bytes."""
    while line := file.readline(LINE_BYTES + 1):
        part, length = line, len(line)
        while len(part) > LINE_BYTES and not part.endswith(b"\n"):
            part = file.readline(LINE_BYTES + 1)
            length += len(part)
        yield line, length


def _utf8(data: bytes, path: str) -> str:
    _refuse_other_encodings(data, path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8. Save the file as UTF-8."
        ) from error


def _refuse_other_encodings(data: bytes, path: str) -> None:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path}: is UTF-16, not UTF-8. Save the file as UTF-8.")
    if data.startswith(MAGIC):
        raise ConfigError(
            f"{path}: is compressed, although its name says otherwise. Unpack it (gunzip, unzip, unxz, zstd -d)."
        )
