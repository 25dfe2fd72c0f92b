"""CSV and TSV files as rows: a header, then a row a record. Knows quoting and encodings; not what columns mean."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

from vlft.data.files.mapping import listed
from vlft.data.rows.source import LINE_BYTES, BrokenLine, Keep, Source
from vlft.errors import ConfigError

# Cells of these columns that begin like a list or an object are one.
STRUCTURED = ("conversations", "messages", "conversation", "texts", "history", "objects", "image", "images", "video",
              "videos")  # fmt: skip
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LIMIT = threading.Lock()  # csv has one limit for all


def delimited_source(path: str, files: Sequence[str]) -> Source:
    """CSV or TSV files (`.gz` too) with the same header as one table.

    Raises:
        ConfigError: no header, another encoding than UTF-8, quotes that do not close, or headers that differ.
    """
    headers = [_header(file) for file in files]
    first, _ = headers[0]
    for file, (names, _) in zip(files, headers, strict=True):
        if names != first:
            raise ConfigError(
                f"{file}: its header ({', '.join(names)}) is not that of {files[0]} ({', '.join(first)}). Name them "
                "apart."
            )

    def rows(keep: Keep) -> Iterator[dict[str, Any] | BrokenLine]:
        for file, (names, separator) in zip(files, headers, strict=True):
            records = _records(file, separator, keep)
            next(records)  # the header
            for line, cells in records:
                yield _row(names, cells, line, separator)

    return Source(columns=tuple(first), size=sum(map(os.path.getsize, files)), unit="B", rows=rows)


def _row(names: list[str], cells: list[str], line: int, separator: str) -> dict[str, Any] | BrokenLine:
    if len(cells) != len(names):
        return BrokenLine(
            reason=f"line {line}: {len(cells)} cells, and the header has {len(names)}. Add what is missing, or put "
            f'quotes around a cell with a {SEPARATORS[separator]} or a line end in it, and double ("") a quote in it'
        )
    pairs = zip(names, cells, strict=True)
    return {name: listed(cell) if name in STRUCTURED else cell for name, cell in pairs if cell != ""}


def _header(file: str) -> tuple[list[str], str]:
    """The names in the first record, and what separates them."""
    tab = file.lower().removesuffix(".gz").endswith(".tsv")
    found = {separator: _first(file, separator) for separator in ("\t" if tab else SEPARATORS)}
    separator = max(found, key=lambda each: len(found[each]))  # of several with as many, the first
    names = [name.strip() for name in found[separator]]
    if not any(names):
        raise ConfigError(f"{file}: holds no rows. Name a file that does.")
    double = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if double is not None:
        raise ConfigError(
            f"{file}, line 1, the header: the name {double!r} stands twice ({', '.join(names)}). The first line holds "
            "the names of the columns: add or fix it."
        )
    return names, separator


def _first(file: str, separator: str) -> list[str]:
    try:
        return next(_records(file, separator, None), (1, []))[1]
    except _Quotes:
        return []  # with another separator, perhaps; else reading the rows says what is wrong


class _Quotes(ConfigError):
    """A file whose quotes do not close."""


def _records(file: str, separator: str, keep: Keep | None) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not empty, with the line it ends in."""
    try:
        with open(file, "rb") as raw, _text(file, raw) as text:
            reader = csv.reader(_counted(text, raw, keep), delimiter=separator, strict=True)
            while True:
                with _LIMIT:
                    before = csv.field_size_limit(LINE_BYTES)
                    try:
                        cells = next(reader, None)
                    finally:
                        csv.field_size_limit(before)
                if cells is None:
                    return
                if cells:
                    yield reader.line_num, cells
    except csv.Error as error:
        raise _Quotes(
            f"{file}, line {reader.line_num}: {error}. A cell that holds a quote, a {SEPARATORS[separator]} or a line "
            'end stands in quotes, and quotes in it are doubled ("").'
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}, line {_line_of_fault(file)}: byte {error.object[error.start]:#04x} is not UTF-8. Save the file "
            "as UTF-8 (in Excel: CSV UTF-8; else: iconv -f latin1 -t utf-8)."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{file}: damaged or cut short ({error}). Download or write it again.") from error


def _text(file: str, raw: IO[bytes]) -> io.TextIOWrapper:
    start = raw.read(2)
    raw.seek(0)
    if start in UTF16:
        raise ConfigError(f"{file}: is UTF-16, not UTF-8. Save the file as UTF-8.")
    packed = file.lower().endswith(".gz")
    if packed != (start == b"\x1f\x8b"):
        what = "not compressed" if packed else "compressed"
        raise ConfigError(f"{file}: is {what}, whatever its name says. Name it {'without' if packed else 'with'} .gz.")
    stream: Any = gzip.GzipFile(fileobj=raw) if packed else raw
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


def _counted(text: io.TextIOWrapper, raw: IO[bytes], keep: Keep | None) -> Iterator[str]:
    """Its lines; says how far it is by the bytes of the file."""
    done = 0
    for number, line in enumerate(text):
        yield line
        if keep is not None and number % 1000 == 0:
            done, before = raw.tell(), done
            keep.done(done - before)


def _line_of_fault(file: str) -> int:
    """The first line that is not UTF-8, from 1."""
    with open(file, "rb") as raw:
        stream: Any = gzip.GzipFile(fileobj=raw) if file.lower().endswith(".gz") else raw
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0
