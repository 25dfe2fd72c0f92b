"""Add features to the cache, within its bound, and beside other processes that read and add.

The folder of the cache holds one folder per tower (`vlft.data.features.stored`). A pair of files has one writer, which
holds a lock on the index. A process that has used a pair holds a shared lock on its features: no other removes it.

When the folder is full, the pairs that no running process has used are removed, the least recently used first. If that
is not enough, nothing more is added: the pictures that are stored stay, because each epoch reads all of them, and
replacing one by another would not help. An error in writing prints a note and ends the adding. It never stops a run.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlft.data.features.stored import DTYPES, FEATURES, INDEX, RECORD, Reader
from vlft.errors import ConfigError
from vlft.files import Lock, cache_folder, lock_handle

if TYPE_CHECKING:
    import torch

PAIR_BYTES = 512 << 20  # a pair of files is not extended beyond this size ...
LEAST_PAIRS, MOST_PAIRS = 16, 200  # ... but a full folder has between so many pairs
LOCK = ".lock"
GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a folder holds.

    Attributes:
        bytes: of all files, for all towers.
        media: pictures and videos of one tower.
    """

    bytes: int
    media: int


class Writer:
    """Adds features. One thread of one process uses it.

    Args:
        root: folder of all towers.
        tower: name of this tower's folder in it.
        run: of the run that writes.
        limit: most bytes of all files below `root`.
        note: receives a line for the user if nothing more can be added.
    """

    def __init__(self, root: Path, tower: str, *, run: int, limit: int, note: Callable[[str], None]) -> None:
        self.root = root
        self.folder = root / tower
        self.limit = limit
        self.pair_bytes = max(limit // MOST_PAIRS, min(PAIR_BYTES, limit // LEAST_PAIRS))
        self._reader = Reader(self.folder, run=run, note=note)
        self._run = run
        self._note = note
        self._pair: tuple[str, int, int] | None = None  # name, and open files of features and index
        self.adds = True  # whether anything more can be added

    def add(self, entries: Iterable[tuple[bytes, torch.Tensor]], *, stamp: int) -> int:
        """Store features that are not stored yet, and return how many were added.

        Args:
            entries: keys with their features [layers, rows, width], on the CPU and contiguous.
            stamp: optimizer steps that were complete when they were computed.
        """
        if not self.adds:
            return 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                return self._add(entries, stamp)
        except OSError as error:
            self.adds = False
            self._note(
                f"--vision_cache {self.root}: nothing more can be added ({error.strerror or error}). Training "
                "continues, and other features are computed in each epoch"
            )
            return 0

    def held(self) -> Held:
        """Return what the folder holds now."""
        self._reader.index.refresh()
        return Held(bytes=sum(size for _, size, _ in _files(self.root)), media=len(self._reader.index))

    def close(self) -> None:
        """Close the files, and let other processes extend or remove them."""
        for handle in self._pair[1:] if self._pair is not None else ():
            os.close(handle)
        self._pair = None
        self._reader.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other writers out, because all of them together share the bound."""
        alone = Lock(self.root / LOCK)
        with contextlib.suppress(OSError):  # a file system without locks: the bound may be exceeded a little
            alone.take(wait=True)
        try:
            yield
        finally:
            alone.release()

    def _add(self, entries: Iterable[tuple[bytes, torch.Tensor]], stamp: int) -> int:
        import torch

        self._reader.index.refresh()
        used = sum(size for _, size, _ in _files(self.root))
        added = 0
        for key, features in entries:
            data = features.contiguous().view(torch.uint8).flatten().numpy().data
            crc = zlib.crc32(data, zlib.crc32(key))
            if self._known(key, crc, stamp):
                continue
            size = len(data) + RECORD.itemsize
            if used + size > self.limit:
                used -= self._make_room(used + size - self.limit)
            if used + size > self.limit:
                self.adds = False
                self._note(
                    f"--vision_cache {self.root}: full, at {used / GB:.3g} of --vision_cache_gb {self.limit / GB:g}. "
                    "The features that it holds are used, and all others are computed in each epoch"
                )
                break
            self._append(key, features, data, crc, stamp)
            used += size
            added += 1
        return added

    def _known(self, key: bytes, crc: int, stamp: int) -> bool:
        """Whether these features need not be stored. An entry counts only if it can be read."""
        for name, record in self._reader.index.find(key):
            same = record["stamp"] == stamp and record["crc"] == crc
            earlier = int(record["run"]) != self._run or record["stamp"] < stamp
            if (same or earlier) and self._reader.read(name, record) is not None:
                return True
        return False

    def _append(self, key: bytes, features: torch.Tensor, data: memoryview, crc: int, stamp: int) -> None:
        _, file, index = self._writable()
        offset = os.fstat(file).st_size
        record = np.zeros(1, dtype=RECORD)
        record["key"] = np.frombuffer(key, dtype="<u8")
        layers, rows, width = features.shape
        dtype = DTYPES.index(str(features.dtype).removeprefix("torch."))
        values = (self._run, stamp, offset, len(data), rows, width, layers, dtype, crc)
        for column, value in zip(RECORD.names[1:], values, strict=True):  # type: ignore[index]
            record[column] = value
        start = os.fstat(index).st_size
        try:
            _write(file, data)
            _write(index, memoryview(record.tobytes()))
        except OSError:  # a full disk
            with contextlib.suppress(OSError):
                os.truncate(index, start)
                os.truncate(file, offset)
            raise

    def _writable(self) -> tuple[str, int, int]:
        """Return a pair that this process may extend: its own, one that no other process extends, or a new one."""
        if self._pair is not None:
            name, file, index = self._pair
            if os.fstat(file).st_size < self.pair_bytes:
                return self._pair
            os.close(index)
            self._reader.keep(name, file)  # with its lock: this process uses the pair
            self._pair = None
        for path, size, _ in sorted(_files(self.folder)):
            if path.endswith(FEATURES) and size < self.pair_bytes:
                pair = self._opened(Path(path).name.removesuffix(FEATURES))
                if pair is not None:
                    return pair
        made = self._opened(secrets.token_hex(8))
        if made is None:
            raise OSError(f"{self.folder}: its files cannot be locked")
        return made

    def _opened(self, name: str) -> tuple[str, int, int] | None:
        index = os.open(self.folder / (name + INDEX), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if lock_handle(index, shared=False) is False:
            os.close(index)
            return None
        size = os.fstat(index).st_size
        os.truncate(index, size - size % RECORD.itemsize)
        file = os.open(self.folder / (name + FEATURES), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        lock_handle(file, shared=True)
        self._pair = name, file, index
        return self._pair

    def _make_room(self, need: int) -> int:
        """Remove the least recently used pairs that no process uses, until `need` bytes are free. Returns the bytes."""
        freed = 0
        for path, size, _ in sorted(_files(self.root), key=lambda one: one[2]):
            if freed >= need:
                break
            if path.endswith(FEATURES) and _unused(path):
                index = path.removesuffix(FEATURES) + INDEX
                with contextlib.suppress(OSError):
                    freed += os.path.getsize(index)
                    os.unlink(index)  # first: a record without its tensor would be noted as damaged
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    freed += size
        return freed


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Return path, bytes and time of use of all files of the cache in a folder and the folders in it."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith((FEATURES, INDEX)):
                with contextlib.suppress(OSError):  # another run removes files, too
                    stat = os.stat(path := os.path.join(place, name))
                    found.append((path, stat.st_size, stat.st_mtime_ns))
    return found


def _unused(path: str) -> bool:
    """Whether no process uses a pair, as far as locks show it."""
    for name in (path, path.removesuffix(FEATURES) + INDEX):
        try:
            handle = os.open(name, os.O_RDWR)
        except OSError:
            continue
        try:
            if not lock_handle(handle, shared=False):
                return False
        finally:
            os.close(handle)
    return True


def _write(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]


def cache_root(given: str | None, environ: Mapping[str, str]) -> Path:
    """Return the folder of all towers: `--vision_cache`, or the one in the user's cache folder.

    Raises:
        ConfigError: the flag is not set, and there is no such folder.
    """
    if given is not None:
        return Path(given).expanduser()
    folder = cache_folder(environ, variable="VLFT_VISION_CACHE", name="vision")
    if folder is None:
        raise ConfigError("--cache_vision_features: no folder for the features. Set --vision_cache DIR.")
    return folder


def check_root(root: Path) -> None:
    """Make the folder, and write a file in it.

    Raises:
        ConfigError: it is a file, or cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".{secrets.token_hex(8)}"
        try:
            probe.write_bytes(b"1")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        why = "is a file" if root.is_file() else f"cannot be written ({error.strerror or error})"
        raise ConfigError(f"--vision_cache {root}: {why}. Choose a folder that can be written.") from error
