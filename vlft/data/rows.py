"""Data files -> raw rows. Knows JSON and line ends; what a row must hold is for `vlft.data.records` to say.

Of parquet files and folders, `vlft.data.unpack` makes JSON lines.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from vlft.data.unpack import unpacked
from vlft.errors import ConfigError

ARRAY_BYTES = 8 << 30  # of a .json, which is read whole; as rows in memory it takes several times that
LINE_BYTES = 64 << 20  # of a row in a .jsonl; a thousand times the longest conversation
PACKED = (".gz", ".zip", ".xz", ".bz2", ".zst", ".7z")
MAGIC = (b"\x1f\x8b", b"PK\x03\x04", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True, kw_only=True)
class BrokenLine:
    """What `read_rows` yields for a line that is not JSON; `records.parse_record` refuses it with its reason."""

    reason: str


def read_rows(path: str) -> Iterator[tuple[int, object]]:
    """The rows of one data file.

    Yields:
        (index, raw): index counts rows from 0 (blank lines of a `.jsonl` are none); raw is the row's JSON value, or a
        `BrokenLine` for a line of a `.jsonl` that is not JSON.

    Raises:
        ConfigError: no such file, another ending, no rows, a `.json` that is not an array, or a table that cannot be
            unpacked.
    """
    rows = 0
    file = plain_file(path)
    lines = file != path or file.lower().endswith(".jsonl")
    for index, raw in enumerate(_read_lines(file) if lines else _read_array(file)):
        rows += 1
        yield index, raw
    if not rows:
        raise ConfigError(f"{path}: holds no rows. Name a file that does; its format: data/README.md.")


def plain_file(path: str) -> str:
    """The `.json` or `.jsonl` with the rows of a data file: itself, or what a parquet file or a folder unpacks to.

    Raises:
        ConfigError: as `read_rows`, as far as the file need not be read for it.
    """
    if is_table(path):
        return unpacked(path).rows
    ending = os.path.splitext(path)[1].lower()
    if ending in PACKED:
        raise ConfigError(f"{path}: is compressed. Unpack it (gunzip, unzip, unxz, zstd -d), and name what comes out.")
    if ending not in (".json", ".jsonl"):
        raise ConfigError(
            f"{path}: a data file ends in .json (an array of rows), .jsonl (a row a line) or .parquet, or is a folder "
            "of parquet files or one of save_to_disk. Rename or convert it."
        )
    if not os.path.isfile(path):
        what = "is no regular file" if os.path.exists(path) else "no such file"
        raise ConfigError(f"{path}: {what}. Name the data file itself, from {os.getcwd()} or by its absolute path.")
    return path


def is_table(path: str) -> bool:
    """Whether a data file is to be unpacked: a parquet file, or a folder."""
    return path.lower().endswith(".parquet") or os.path.isdir(path)


def rows_print(path: str) -> bytes:
    """A print of all that the rows of a data file say, wherever they are unpacked to; 32 bytes.

    Raises:
        ConfigError: as `plain_file`.
    """
    if is_table(path):
        return bytes.fromhex(unpacked(path).digest)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def home_of(path: str) -> str:
    """The folder that relative media paths of a data file start from, unless flags name one."""
    plain = path.lower().endswith((".json", ".jsonl"))  # asked for every row, so without asking the file system
    return os.path.dirname(path) if plain or not os.path.isdir(path) else os.path.normpath(path)


def _read_array(path: str) -> list[object]:
    size = os.path.getsize(path)
    if size > ARRAY_BYTES:
        raise ConfigError(
            f"{path}: {size:,} bytes, {ARRAY_BYTES:,} at most are read as one array. Split it, or write it as .jsonl "
            "(a row a line), which is read line by line."
        )
    with open(path, "rb") as file:
        data = file.read()
    text = _utf8(data, path)
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " If each line is a row of its own, name the file .jsonl." if error.msg.startswith("Extra data") else ""
        raise ConfigError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}. Mend it there.{hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON that can be read: {error}. Mend it.") from error
    if not isinstance(rows, list):
        raise ConfigError(
            f"{path}: {kind_of(rows)} at the top, where an array of rows belongs. Put the rows between [ and ]."
        )
    return rows


def _read_lines(path: str) -> Iterator[object]:
    with open(path, "rb") as file:
        first = True
        for number, line in enumerate(_lines(file), start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                _refuse_other(line, path)
            if len(line) > LINE_BYTES:
                first = False
                yield BrokenLine(reason=f"line {number}: more than {LINE_BYTES:,} bytes. Split the row")
                continue
            if not line.strip():
                continue
            if first and line.lstrip().startswith(b"["):
                raise ConfigError(f"{path}, line {number}: an array; a .jsonl has one object a line. Name it .json.")
            first = False
            try:
                yield json.loads(line.decode("utf-8"))
            except json.JSONDecodeError as error:
                yield BrokenLine(reason=f"line {number}, column {error.colno}: not JSON: {error.msg}. Mend the line")
            except (ValueError, RecursionError) as error:
                yield BrokenLine(reason=f"line {number}: not JSON in UTF-8: {error}. Mend the line")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The file's lines; of one that is too long, the first `LINE_BYTES` + 1 bytes."""
    while line := file.readline(LINE_BYTES + 1):
        yield line
        while len(line) > LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES + 1)


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


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = ((dict, "an object"), (list, "a list"), (str, "a string"), ((int, float), "a number"))
    return next(name for kind, name in names if isinstance(value, kind))
