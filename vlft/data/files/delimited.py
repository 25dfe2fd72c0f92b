"""Read CSV and TSV files as rows: a header, then one row per record. Independent of what the columns mean."""

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

# A cell of these columns that starts like a list or an object is parsed as one.
STRUCTURED = ("conversations", "messages", "conversation", "texts", "history", "objects", "image", "images", "video",
              "videos")  # fmt: skip
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LIMIT = threading.Lock()  # the field size limit of csv is global


def delimited_source(path: str, files: Sequence[str]) -> Source:
    """Open CSV or TSV files (also `.gz`) with the same header as one table.

    Args:
        path: the data file as the user named it, for messages.
        files: the files of the table, in order.

    Raises:
        ConfigError: a file has no header, is not UTF-8, has quotes that do not close, or the headers differ.
    """
    headers = [_header(file) for file in files]
    first, _ = headers[0]
    for file, (names, _) in zip(files, headers, strict=True):
        if names != first:
            raise ConfigError(
                f"{file}: its header ({', '.join(names)}) is not that of {files[0]} ({', '.join(first)}). Pass them as "
                "separate data files."
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
    """Return the names in the first record, and the separator."""
    tab = file.lower().removesuffix(".gz").endswith(".tsv")
    found = {separator: _first(file, separator) for separator in ("\t" if tab else SEPARATORS)}
    separator = max(found, key=lambda each: len(found[each]))  # the first one in a tie
    names = [name.strip() for name in found[separator]]
    if not any(names):
        raise ConfigError(f"{file}: holds no rows. Name a file that does.")
    double = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if double is not None:
        raise ConfigError(
            f"{file}, line 1, the header: the name {double!r} occurs twice ({', '.join(names)}). The first line must "
            "hold the names of the columns: add or fix it."
        )
    return names, separator


def _first(file: str, separator: str) -> list[str]:
    try:
        return next(_records(file, separator, None), (1, []))[1]
    except _Quotes:
        return []  # another separator may fit; if none does, reading the rows reports the error


class _Quotes(ConfigError):
    """A file whose quotes do not close."""


def _records(file: str, separator: str, keep: Keep | None) -> Iterator[tuple[int, list[str]]]:
    """Yield each non-empty record, with the number of the line where it ends."""
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
            f"{file}, line {reader.line_num}: {error}. Put quotes around a cell that holds a quote, a "
            f'{SEPARATORS[separator]} or a line end, and double the quotes in it ("").'
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
        raise ConfigError(
            f"{file}: is {what}, although its name says otherwise. Name it {'without' if packed else 'with'} .gz."
        )
    stream: Any = gzip.GzipFile(fileobj=raw) if packed else raw
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


def _counted(text: io.TextIOWrapper, raw: IO[bytes], keep: Keep | None) -> Iterator[str]:
    """Yield the lines, and report progress in bytes of the file."""
    done = 0
    for number, line in enumerate(text):
        yield line
        if keep is not None and number % 1000 == 0:
            done, before = raw.tell(), done
            keep.done(done - before)


def _line_of_fault(file: str) -> int:
    """Return the number of the first line that is not UTF-8, from 1."""
    with open(file, "rb") as raw:
        stream: Any = gzip.GzipFile(fileobj=raw) if file.lower().endswith(".gz") else raw
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0
