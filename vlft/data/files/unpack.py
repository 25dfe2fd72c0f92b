"""Unpack a table once into a folder with rows.jsonl and media files, in bounded memory.

The rest of the program then reads ordinary JSON lines. Media files keep their bytes and are named by their content.
The folder is written atomically: it is built under another name, with a lock, and renamed.

`vlft.data.files.tables` finds the files, and its readers parse their formats. `vlft.data.rows.normalise` interprets
the keys and values of rows; this module looks only for media.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from vlft.config.columns import Columns
from vlft.data.files.mapping import check_names, listed, missing, refuse_missing
from vlft.data.files.tables import open_source, sources_of
from vlft.data.rows.embedded import ending_of
from vlft.data.rows.keys import MEDIA_KEYS
from vlft.data.rows.source import BrokenLine, Source
from vlft.errors import ConfigError
from vlft.files import Lock, cache_folder, put_in_place, workshop

FORMAT = 2  # increase it whenever the same source gives other rows or files
ROWS = "rows.jsonl"
ABOUT = "about.json"
BROKEN = "vlft: this row cannot be read"  # the key of a row that represents a `BrokenLine`
TURN_KEYS = ("conversations", "messages", "conversation", "texts")
# Bytes under these keys are media. Under other keys, bytes are media if they start like media, else only their number
# is written.
BYTES_KEYS = ("url", *(key for keys in MEDIA_KEYS.values() for key in keys))
COPIED_AT_A_TIME = 1 << 20  # bytes
COLUMNS = 1000  # column names that are recorded for a table whose reader does not list them


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """A table as JSON lines.

    Attributes:
        rows: path of the rows.jsonl.
        digest: sha256 of the rows and their media, in hex; independent of where the folder is.
        columns: columns of the table.
    """

    rows: str
    digest: str
    columns: tuple[str, ...]


def unpacked(path: str, columns: Columns | None = None, *, pairs: bool = False) -> Unpacked:
    """Unpack a table, unless an earlier run did so and its files have not changed.

    Args:
        path: a table that `tables.sources_of` accepts: parquet, Arrow, CSV, tars, a folder.
        columns: the mapping of `--columns`.
        pairs: whether its rows are read as preference rows.

    Raises:
        ConfigError: the path is not a table, or the table is damaged, encrypted or empty, has no columns that can be
            read, or there is no folder to unpack it to.
    """
    root = cache_folder(os.environ, variable="VLFT_MEDIA_CACHE", name="media")
    if root is None:
        raise ConfigError(f"{path}: there is no folder to unpack it to. Set VLFT_MEDIA_CACHE to one.")
    files = sources_of(path)
    folder = root / "unpacked" / _key(path, files)
    try:
        found = _complete(folder)
        if found is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = Lock(f"{folder}.lock")
            lock.take(wait=True)  # one process unpacks, the other processes wait
            with lock:
                found = _complete(folder)  # another process may have unpacked it in the meantime
                if found is None:
                    _make(path, files, folder, columns, pairs=pairs)
                    found = _complete(folder)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be unpacked to {folder} ({error}). Set VLFT_MEDIA_CACHE to a folder on a disk with free "
            "space"
        ) from error
    if found is None:
        raise ConfigError(f"{folder}: is incomplete, although it was just written. Check its disk.")
    _check(path, columns, found.columns, pairs=pairs)
    return found


def _check(path: str, columns: Columns | None, names: tuple[str, ...], *, pairs: bool) -> None:
    """Refuse a table whose columns do not fit `--columns` or, without it, the supported forms."""
    if not names:
        return  # all rows are broken, and each is refused with its reason
    if columns is None:
        check_names(path, names, pairs=pairs)
    else:
        refuse_missing(path, columns, missing(columns, names), names)


def _key(path: str, files: list[str]) -> str:
    """Return a name for the current content of these files."""
    home, stamps = os.path.dirname(path), []
    for file in files:
        stat = os.stat(file)
        stamps.append((os.path.relpath(file, home), stat.st_size, stat.st_mtime_ns))
    what = json.dumps([FORMAT, os.path.realpath(path), stamps])
    return hashlib.sha256(what.encode(errors="surrogateescape")).hexdigest()[:32]


def _complete(folder: Path) -> Unpacked | None:
    """Return the unpacked table in a folder; None if the folder does not exist, or its rows are incomplete."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if os.path.getsize(folder / ROWS) != about["bytes"]:
            return None
        return Unpacked(rows=str(folder / ROWS), digest=about["digest"], columns=tuple(about["columns"]))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError, TypeError):
        return None


def _make(path: str, files: list[str], folder: Path, columns: Columns | None, *, pairs: bool) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # a folder whose rows were changed
    with workshop(folder.with_name(f".{folder.name}.tmp")) as aside:
        source = open_source(path, files)
        if source.columns is not None:
            _check(path, columns, source.columns, pairs=pairs)  # refuse before hours of unpacking
        with _bar(path, source) as bar:
            writer = _Writer(path, aside=aside, folder=folder, bar=bar)
            with open(aside / ROWS, "wb") as out:
                for row in source.rows(writer):
                    out.write(writer.line(row))
        if not writer.rows:
            raise ConfigError(f"{path}: holds no rows. Name one that does.")
        about = {"source": os.path.abspath(path), "rows": writer.rows, "files": len(writer.files)}
        about |= {"columns": list(source.columns or writer.columns)}
        about |= {"bytes": os.path.getsize(aside / ROWS), "digest": writer.digest.hexdigest()}
        (aside / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
        put_in_place(aside, folder, last=ABOUT)


def _bar(path: str, source: Source) -> Any:
    """Progress bar with the remaining time. Shown only on a terminal, after a few seconds."""
    bytes_ = {"unit_scale": True, "unit_divisor": 1024} if source.unit == "B" else {}
    name = os.path.basename(path.rstrip(os.sep))
    return tqdm(total=source.size, desc=f"unpacking {name}", unit=source.unit, disable=None, delay=2, **bytes_)


class _Writer:
    """Converts rows to lines of JSON, and writes their media as files. Readers use it as their `Keep`.

    Args:
        path: the table, for messages.
        aside: folder where files are written.
        folder: folder that `aside` will be renamed to; rows name files in it.
        bar: progress bar.
    """

    def __init__(self, path: str, *, aside: Path, folder: Path, bar: Any) -> None:
        self.path = path
        self.aside = aside
        self.folder = folder
        self.bar = bar
        self.rows = 0
        self.files: set[str] = set()
        self.columns: dict[str, None] = {}
        self.digest = hashlib.sha256()
        self._prefix = json.dumps(f"{folder}{os.sep}")[1:-1].encode()

    def done(self, amount: int) -> None:
        self.bar.update(amount)

    def line(self, row: dict[str, Any] | BrokenLine) -> bytes:
        if isinstance(row, BrokenLine):
            row = {BROKEN: row.reason, "row": row.row}
        elif len(self.columns) < COLUMNS:
            self.columns |= dict.fromkeys(row)
        try:
            plain = {key: self._plain(value, key) for key, value in row.items() if value is not None}
        except ValueError as error:
            raise ConfigError(
                f"{self.path}[{self.rows}]: its turns are lists of different lengths: {error}. Fix the row."
            ) from error
        line = json.dumps(plain, ensure_ascii=True, default=str).encode() + b"\n"
        self.rows += 1
        self.digest.update(line.replace(self._prefix, b""))
        return line

    def _plain(self, value: Any, key: str) -> Any:
        """Convert a value to JSON; media become the absolute paths of their files."""
        if isinstance(value, (bytes, bytearray, memoryview)):
            content = bytes(value)
            is_media = key in BYTES_KEYS or ending_of(content[:16]) != ".bin"
            return self.file(content) if is_media else f"({len(content):,} bytes)"
        if isinstance(value, list):
            return [self._plain(item, key) for item in value]
        if isinstance(value, str) and key in TURN_KEYS:
            return listed(value)  # a list of turns as JSON; `records` refuses any other text
        if not isinstance(value, dict):
            return value
        if value and value.keys() <= {"bytes", "path"}:
            held = value.get("bytes")
            return value.get("path") if held is None else self._plain(held, key)
        if key in TURN_KEYS and all(isinstance(item, list) for item in value.values()):
            # Older versions of `datasets` store a list of objects as an object of lists.
            turns = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
            return self._plain(turns, key)
        return {name: self._plain(item, name) for name, item in value.items() if item is not None}

    def file(self, content: bytes | IO[bytes]) -> str:
        stream: Any = io.BytesIO(content) if isinstance(content, bytes) else content
        digest, head = hashlib.sha256(), b""
        spare = self.aside / "media.tmp"
        with open(spare, "wb") as out:
            while part := stream.read(COPIED_AT_A_TIME):
                head = head or part[:16]
                digest.update(part)
                out.write(part)
        name = os.path.join("media", digest.hexdigest()[:2], f"{digest.hexdigest()}{ending_of(head)}")
        if name in self.files:
            spare.unlink()
        else:
            self.files.add(name)
            path = self.aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            spare.rename(path)
        return str(self.folder / name)


def restored(value: object) -> object:
    """Return the row of a line of an unpacked table: the value itself, or the `BrokenLine` that it represents."""
    if isinstance(value, dict) and isinstance(value.get(BROKEN), str):
        return BrokenLine(reason=value[BROKEN], row=value.get("row"))
    return value
