"""Tables -> a folder with rows.jsonl and media files, made once, in bounded memory.

What reads rows later sees ordinary JSON lines. Pictures keep the bytes they came with and are named by them. A folder
appears whole or not at all: it is built aside, under a lock, and renamed. Knows no rows: which keys and values mean
something is for `vlft.data.rows.normalise` to say, but for those that hold media; and no formats, which are the
readers'.
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

FORMAT = 2  # raise it whenever the same source becomes other rows or files
ROWS = "rows.jsonl"
ABOUT = "about.json"
BROKEN = "vlft: this row cannot be read"  # the key of a row that stands for a `BrokenLine`
TURN_KEYS = ("conversations", "messages", "conversation", "texts")
# Bytes under these keys are pictures or videos; under others, what starts as media do. The rest is no text either.
BYTES_KEYS = ("url", *(key for keys in MEDIA_KEYS.values() for key in keys))
COPIED_AT_A_TIME = 1 << 20  # bytes
COLUMNS = 1000  # names that are kept of a table whose rows tell them


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """A source as JSON lines.

    Attributes:
        rows: the file. digest: of what the rows and their media hold, wherever the folder lies.
        columns: that the table has.
    """

    rows: str
    digest: str
    columns: tuple[str, ...]


def unpacked(path: str, columns: Columns | None = None) -> Unpacked:
    """The rows of a table, unpacked unless an earlier run did so and the source is as it was.

    Args:
        path: a table as `tables.sources_of` knows them: parquet, Arrow, CSV, tars, a folder.
        columns: `--columns`.

    Raises:
        ConfigError: it is no table, is damaged, encrypted or empty, has no columns that are read, or there is no folder
            to unpack it to.
    """
    root = cache_folder(os.environ, variable="VLFT_MEDIA_CACHE", name="media")
    if root is None:
        raise ConfigError(f"{path}: there is no folder to unpack it to. Set VLFT_MEDIA_CACHE to one.")
    files = sources_of(path)
    folder = root / "unpacked" / _key(path, files)
    try:
        found = _whole(folder)
        if found is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = Lock(f"{folder}.lock")
            lock.take(wait=True)  # one process unpacks, those that start with it wait
            with lock:
                found = _whole(folder)  # another process may have made it meanwhile
                if found is None:
                    _make(path, files, folder, columns)
                    found = _whole(folder)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be unpacked to {folder} ({error}). Set VLFT_MEDIA_CACHE to a folder with room"
        ) from error
    if found is None:
        raise ConfigError(f"{folder}: is not whole, though it was just written. Look at its disk.")
    _check(path, columns, found.columns)
    return found


def _check(path: str, columns: Columns | None, names: tuple[str, ...]) -> None:
    """Refuse a table that is not read by its columns of these names."""
    if not names:
        return  # no row could be read, as each of them says
    if columns is None:
        check_names(path, names)
    else:
        refuse_missing(path, columns, missing(columns, names), names)


def _key(path: str, files: list[str]) -> str:
    """A name for what stands in these files now."""
    home, stamps = os.path.dirname(path), []
    for file in files:
        stat = os.stat(file)
        stamps.append((os.path.relpath(file, home), stat.st_size, stat.st_mtime_ns))
    what = json.dumps([FORMAT, os.path.realpath(path), stamps])
    return hashlib.sha256(what.encode(errors="surrogateescape")).hexdigest()[:32]


def _whole(folder: Path) -> Unpacked | None:
    """What the folder holds; None where it is not there, or its rows are not all of those it was left with."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if os.path.getsize(folder / ROWS) != about["bytes"]:
            return None
        return Unpacked(rows=str(folder / ROWS), digest=about["digest"], columns=tuple(about["columns"]))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError, TypeError):
        return None


def _make(path: str, files: list[str], folder: Path, columns: Columns | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # rows that somebody changed
    with workshop(folder.with_name(f".{folder.name}.tmp")) as aside:
        source = open_source(path, files)
        if source.columns is not None:
            _check(path, columns, source.columns)  # refused before hours of unpacking
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
    """Shown on a terminal only, with the time that is left, once it takes seconds."""
    bytes_ = {"unit_scale": True, "unit_divisor": 1024} if source.unit == "B" else {}
    name = os.path.basename(path.rstrip(os.sep))
    return tqdm(total=source.size, desc=f"unpacking {name}", unit=source.unit, disable=None, delay=2, **bytes_)


class _Writer:
    """Rows as lines of JSON, and the media in them as files. It is the `Keep` of readers.

    Args:
        path: of the source, for messages.
        aside: where files are written. folder: where they will lie, which is how rows name them.
        bar: of the progress.
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
                f"{self.path}[{self.rows}]: turns are lists of unequal length: {error}. Fix it."
            ) from error
        line = json.dumps(plain, ensure_ascii=True, default=str).encode() + b"\n"
        self.rows += 1
        self.digest.update(line.replace(self._prefix, b""))
        return line

    def _plain(self, value: Any, key: str) -> Any:
        """A value as JSON has it; media become the absolute paths of their files."""
        if isinstance(value, (bytes, bytearray, memoryview)):
            content = bytes(value)
            is_media = key in BYTES_KEYS or ending_of(content[:16]) != ".bin"
            return self.file(content) if is_media else f"({len(content):,} bytes)"
        if isinstance(value, list):
            return [self._plain(item, key) for item in value]
        if isinstance(value, str) and key in TURN_KEYS:
            return listed(value)  # a list of turns as JSON; text that is none is refused as such
        if not isinstance(value, dict):
            return value
        if value and value.keys() <= {"bytes", "path"}:
            held = value.get("bytes")
            return value.get("path") if held is None else self._plain(held, key)
        if key in TURN_KEYS and all(isinstance(item, list) for item in value.values()):
            # Older versions of `datasets` keep a list of objects as an object of lists.
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
    """The row that a line of an unpacked table stands for; a `BrokenLine` where that was one."""
    if isinstance(value, dict) and isinstance(value.get(BROKEN), str):
        return BrokenLine(reason=value[BROKEN], row=value.get("row"))
    return value
