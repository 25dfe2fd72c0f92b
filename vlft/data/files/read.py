"""Data files -> where their rows stand, and raw rows. Knows JSON and line ends; what a row must hold, records say.

Of tables (parquet, CSV, tars, folders), `vlft.data.files.unpack` makes JSON lines.
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

ARRAY_BYTES = 8 << 30  # of a .json, which is read whole; as rows in memory it takes several times that
BOM = b"\xef\xbb\xbf"
MAGIC = (b"\x1f\x8b", b"PK\x03\x04", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")

_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Where a row stands in its file: `length` bytes from `start`; `line` counts from 1 (0 in a `.json`)."""

    start: int
    length: int
    line: int


def row_spans(path: str) -> Iterator[Span]:
    """Where the rows of a `.json` or `.jsonl` stand. Of a `.jsonl` one line is held at a time, of a `.json` the whole
    text.

    Raises:
        ConfigError: no rows, or a `.json` that is not an array.
    """
    rows = 0
    for span in _line_spans(path) if path.lower().endswith(LINES) else _array_spans(path):
        rows += 1
        yield span
    if not rows:
        raise ConfigError(f"{path}: holds no rows. Name a file that does; its format: data/README.md.")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Where the rows of a data file are.

    Attributes:
        file: a `.json` or `.jsonl`: the data file itself, or what a table unpacks to.
        keys: names of a table's columns; None of a file of JSON, whose rows have to be asked.
        digest: sha256 of the rows of a table, in hex; None of a file of JSON, which is read for it.
    """

    file: str
    keys: tuple[str, ...] | None
    digest: str | None


def opened(path: str, columns: Columns | None = None) -> Opened:
    """The rows of a data file, a table unpacked.

    Args:
        columns: `--columns`.

    Raises:
        ConfigError: no such file, another ending, or a table that cannot be unpacked.
    """
    if is_table(path):
        table = unpacked(path, columns)
        return Opened(file=table.rows, keys=table.columns, digest=table.digest)
    if not os.path.exists(path):
        raise missing(path)
    if pointer := registry_at(path):
        raise ConfigError(pointer)
    if not path.lower().endswith((".json", *LINES)):
        raise refuse_ending(path)
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: is no regular file. {name_it()}")
    return Opened(file=path, keys=None, digest=None)


def files_of(path: str) -> list[str]:
    """The files that a data file consists of: itself, or those of a table.

    Raises:
        ConfigError: as `tables.sources_of`.
    """
    return sources_of(path) if is_table(path) else [path]


def row_of(data: bytes, line: int) -> object:
    """The JSON value of a row's bytes, or a `BrokenLine`.

    Args:
        data: of a `Span`; of one longer than `LINE_BYTES`, a byte more than those will do.
        line: of the span.
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
            f"{path}: {size:,} bytes, {ARRAY_BYTES:,} at most are read as one array. Split it, or write it as .jsonl "
            "(a row a line), which is read line by line."
        )
    with open(path, "rb") as file:
        data = file.read()
    text, start = _utf8(data, path), len(BOM) if data.startswith(BOM) else 0
    del data
    if not text.strip():
        return
    plain = text.isascii()
    done = 0  # characters that `start` is past
    for begin, end in _elements(text, path):
        start += begin - done if plain else len(text[done:begin].encode())
        length = end - begin if plain else len(text[begin:end].encode())
        yield Span(start=start, length=length, line=0)
        start, done = start + length, end


def _elements(text: str, path: str) -> Iterator[tuple[int, int]]:
    """First character of each element of the array that a text is, and the one after it."""
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
                json.loads(text)  # says what is wrong there
            at = _next(text, at + 1)
        if text[at:]:
            json.loads(text)
    except json.JSONDecodeError as error:
        hint = " If each line is a row of its own, name the file .jsonl." if error.msg.startswith("Extra data") else ""
        raise ConfigError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}. Fix it there.{hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON that can be read: {error}. Fix it.") from error


def _next(text: str, at: int) -> int:
    """The next character that is no white space."""
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
                _refuse_other(line, path)
                if line.startswith(BOM):
                    line, begin, length = line[len(BOM) :], begin + len(BOM), length - len(BOM)
            if not line.strip():
                continue
            if first and line.lstrip().startswith(b"["):
                raise ConfigError(f"{path}, line {number}: an array; a .jsonl has one object a line. Name it .json.")
            first = False
            yield Span(start=begin, length=length, line=number)


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The file's lines, of one that is too long only the first `LINE_BYTES` + 1 bytes; and how long each is."""
    while line := file.readline(LINE_BYTES + 1):
        part, length = line, len(line)
        while len(part) > LINE_BYTES and not part.endswith(b"\n"):
            part = file.readline(LINE_BYTES + 1)
            length += len(part)
        yield line, length


def _utf8(data: bytes, path: str) -> str:
    _refuse_other(data, path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8. Save the file as UTF-8."
        ) from error


def _refuse_other(data: bytes, path: str) -> None:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path}: is UTF-16, not UTF-8. Save the file as UTF-8.")
    if data.startswith(MAGIC):
        raise ConfigError(f"{path}: is compressed, whatever its name says. Unpack it (gunzip, unzip, unxz, zstd -d).")
