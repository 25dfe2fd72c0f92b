"""Parquet files and Hugging Face data sets -> a folder with rows.jsonl and media files, made once, in bounded memory.

What reads rows later sees ordinary JSON lines. Pictures keep the bytes they came with and are named by them. A folder
appears whole or not at all: it is built aside, under a lock, and renamed. Knows no rows: which keys and values mean
something is for `vlft.data.shapes` to say, but for those that hold media.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlft.data.caches import cache_folder
from vlft.data.columns import Source, check_columns, open_source, sources_of
from vlft.data.embedded import ending_of
from vlft.errors import ConfigError

FORMAT = 1  # raise it whenever the same source becomes other rows or files
ROWS = "rows.jsonl"
ABOUT = "about.json"
ROWS_AT_A_TIME = 8  # in memory as Python's; with pictures of 2 MB and 20 a row, 0.3 GB
# Bytes under these keys are pictures or videos; under others they are no file, and no text either.
MEDIA_KEYS = ("image", "images", "video", "videos", "image_url", "video_url", "url")
TURN_KEYS = ("conversations", "messages")


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """A source as JSON lines.

    Attributes:
        rows: the file. digest: of what the rows and their media hold, wherever the folder lies.
    """

    rows: str
    digest: str


def unpacked(path: str) -> Unpacked:
    """The rows of a parquet file or of a folder, unpacked unless an earlier run did so and the source is as it was.

    Args:
        path: a `.parquet` file, a folder of such files, or one that `Dataset.save_to_disk` of `datasets` wrote.

    Raises:
        ConfigError: it is none of these, is damaged, encrypted or empty, has no column that is read, or there is no
            folder to unpack it to.
    """
    root = cache_folder(os.environ, variable="VLFT_MEDIA_CACHE", name="media")
    if root is None:
        raise ConfigError(f"{path}: there is no folder to unpack it to. Set VLFT_MEDIA_CACHE to one.")
    files = sources_of(path)
    folder = root / "unpacked" / _key(path, files)
    try:
        found = _whole(folder)
        if found is None:
            with _lock(folder):
                found = _whole(folder)  # another process may have made it meanwhile
                if found is None:
                    _make(path, files, folder)
                    found = _whole(folder)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be unpacked to {folder} ({error}). Set VLFT_MEDIA_CACHE to a folder with room"
        ) from error
    if found is None:
        raise ConfigError(f"{folder}: is not whole, though it was just written. Look at its disk.")
    return found


def _key(path: str, files: list[str]) -> str:
    """A name for what stands in these files now."""
    stamps = [(os.path.basename(file), (stat := os.stat(file)).st_size, stat.st_mtime_ns) for file in files]
    what = json.dumps([FORMAT, os.path.realpath(path), stamps])
    return hashlib.sha256(what.encode(errors="surrogateescape")).hexdigest()[:32]


def _whole(folder: Path) -> Unpacked | None:
    """What the folder holds; None where it is not there, or its rows are not all of those it was left with."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if os.path.getsize(folder / ROWS) != about["bytes"]:
            return None
        return Unpacked(rows=str(folder / ROWS), digest=about["digest"])
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process unpacks, those that start with it wait; a kill leaves no lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(path: str, files: list[str], folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.tmp")
    for left in (aside, folder):  # of a process that was killed; or rows that somebody changed
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir()
    try:
        source = open_source(path, files)
        check_columns(path, source.schema)
        writer = _Writer(path, aside=aside, folder=folder)
        with open(aside / ROWS, "wb") as out:
            for row in _rows(path, source):
                out.write(writer.line(row))
            out.flush()
            os.fsync(out.fileno())
        if not writer.rows:
            raise ConfigError(f"{path}: holds no rows. Name one that does.")
        about = {"source": os.path.abspath(path), "rows": writer.rows, "files": len(writer.files)}
        about |= {"bytes": os.path.getsize(aside / ROWS), "digest": writer.digest.hexdigest()}
        (aside / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
        os.rename(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _rows(path: str, source: Source) -> Iterator[dict[str, Any]]:
    # As in `inputs.measure_rows`.
    with tqdm(total=source.rows, desc=f"unpacking {os.path.basename(path.rstrip(os.sep))}", unit="row", disable=None,
              delay=2) as bar:  # fmt: skip
        for batch in source.batches(ROWS_AT_A_TIME):
            for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
                try:
                    rows = batch.slice(start, ROWS_AT_A_TIME).to_pylist()
                except ValueError as error:  # text that is not UTF-8
                    raise ConfigError(f"{path}: rows from {bar.n} on cannot be read: {error}. Mend them.") from error
                yield from rows
                bar.update(len(rows))


class _Writer:
    """Rows as lines of JSON, and the media in them as files.

    Args:
        path: of the source, for messages.
        aside: where files are written. folder: where they will lie, which is how rows name them.
    """

    def __init__(self, path: str, *, aside: Path, folder: Path) -> None:
        self.path = path
        self.aside = aside
        self.folder = folder
        self.rows = 0
        self.files: set[str] = set()
        self.digest = hashlib.sha256()

    def line(self, row: dict[str, Any]) -> bytes:
        named: list[str] = []
        try:
            plain = {key: self._plain(value, key, named) for key, value in row.items() if value is not None}
        except ValueError as error:
            raise ConfigError(
                f"{self.path}[{self.rows}]: turns are lists of unequal length: {error}. Mend it."
            ) from error
        line = json.dumps(plain, ensure_ascii=True, default=str).encode() + b"\n"
        self.rows += 1
        prefix = json.dumps(f"{self.folder}{os.sep}")[1:-1].encode()
        self.digest.update(line.replace(prefix, b"") if named else line)
        return line

    def _plain(self, value: Any, key: str, named: list[str]) -> Any:
        """A value as JSON has it; media become the absolute paths of their files."""
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self._file(bytes(value), named) if key in MEDIA_KEYS else f"({len(value):,} bytes)"
        if isinstance(value, list):
            return [self._plain(item, key, named) for item in value]
        if not isinstance(value, dict):
            return value
        if value and value.keys() <= {"bytes", "path"} and key in MEDIA_KEYS:
            content = value.get("bytes")
            return value.get("path") if content is None else self._plain(content, key, named)
        if key in TURN_KEYS and all(isinstance(item, list) for item in value.values()):
            # Older versions of `datasets` keep a list of objects as an object of lists.
            turns = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
            return self._plain(turns, key, named)
        return {name: self._plain(item, name, named) for name, item in value.items() if item is not None}

    def _file(self, content: bytes, named: list[str]) -> str:
        digest = hashlib.sha256(content).hexdigest()
        name = os.path.join("media", digest[:2], f"{digest}{ending_of(content[:16])}")
        if name not in self.files:
            self.files.add(name)
            path = self.aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        named.append(name)
        return str(self.folder / name)
