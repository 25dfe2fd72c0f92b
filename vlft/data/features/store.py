"""Features on disk: key -> one tensor per picture or video, in files that processes and runs share.

A folder holds one folder per tower, and in it pairs of files that only grow:

    NAME.features   the tensors, one after the other
    NAME.index      a record of `RECORD` for each of them, written when its tensor is complete

A process that is killed leaves at most bytes without a record, or a part of a record, and both are ignored. The
checksum of a tensor is compared whenever it is read. A pair has one writer, which holds a lock on the index. A process
that has used a pair holds a shared lock on its features, so that nobody removes it.

The folder is bounded. When it is full, the pairs that no running process has used are removed, the least recently used
first. If that is not enough, nothing more is added: the pictures that are stored stay, because each epoch reads all of
them, and replacing one by another would help neither. An error in writing prints a note and ends the adding. It never
stops a run.

A run must not depend on how fast its processes write. So a record has the run and the optimizer step of its features,
and a lookup names the first step whose features it may not see (`limit`). Records of other runs are always seen.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlft.errors import ConfigError
from vlft.files import Lock, cache_folder

try:
    import fcntl
except ImportError:  # no pair is removed or extended by another process then
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import torch

RECORD = np.dtype(
    [
        ("key", "<u8", 2),
        ("run", "<u8"),
        ("stamp", "<i8"),  # optimizer steps that were complete when the features were computed
        ("offset", "<u8"),
        ("length", "<u8"),  # bytes
        ("rows", "<u4"),
        ("width", "<u4"),
        ("layers", "<u2"),
        ("dtype", "<u2"),  # index in DTYPES
        ("crc", "<u4"),  # of key and tensor
    ]
)
DTYPES = ("float32", "bfloat16", "float16")
FEATURES, INDEX = ".features", ".index"
PAIR_BYTES = 512 << 20  # a pair of files is not extended beyond this size
SHARES = 16  # ... or beyond this part of the bound
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


class Index:
    """The records of one tower's folder, in memory. `refresh` reads those that were added since.

    Args:
        folder: may be missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []  # of pairs
        self._read: list[int] = []  # bytes of each index
        self._pair = np.zeros(0, dtype=np.int32)
        self._records = np.zeros(0, dtype=RECORD)
        self._sorted = np.zeros(0, dtype=np.uint64)
        self._order = np.zeros(0, dtype=np.int64)
        self._recent: dict[bytes, list[int]] = {}  # key -> places of records that are not in `_order` yet

    def __len__(self) -> int:
        return len(self._records)

    def refresh(self) -> None:
        """Read the records that were added since the last call. A folder that cannot be read has none."""
        found = []
        with contextlib.suppress(OSError):
            for entry in sorted(os.scandir(self.folder), key=lambda one: one.name):
                if entry.name.endswith(INDEX):
                    pair = self._pair_of(entry.name.removesuffix(INDEX))
                    if entry.stat().st_size - self._read[pair] >= RECORD.itemsize:
                        found.append((pair, self._new_records(pair, entry.path)))
        if found:
            self._add(found)

    def _pair_of(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
            self._read.append(0)
        return self.names.index(name)

    def _new_records(self, pair: int, path: str) -> np.ndarray:
        with open(path, "rb") as file:
            file.seek(self._read[pair])
            data = file.read()
        whole = len(data) // RECORD.itemsize * RECORD.itemsize  # a kill may have left a part of a record
        self._read[pair] += whole
        return np.frombuffer(data[:whole], dtype=RECORD)

    def _add(self, found: Sequence[tuple[int, np.ndarray]]) -> None:
        start = len(self._records)
        self._records = np.concatenate([self._records, *(records for _, records in found)])
        self._pair = np.concatenate([self._pair, *(np.full(len(some), pair, np.int32) for pair, some in found)])
        for place in range(start, len(self._records)):
            self._recent.setdefault(self._records[place]["key"].tobytes(), []).append(place)
        if len(self._recent) > 1000 + len(self._order) // 10:
            heads = self._records["key"][:, 0]
            self._order = np.argsort(heads, kind="stable")
            self._sorted = heads[self._order]
            self._recent = {}

    def find(self, key: bytes) -> list[tuple[str, np.void]]:
        """Return the name of the pair and the record of each entry of a key."""
        head, tail = np.frombuffer(key, dtype="<u8")
        left, right = (int(np.searchsorted(self._sorted, head, side=side)) for side in ("left", "right"))  # type: ignore[call-overload]
        places = [int(place) for place in self._order[left:right] if self._records[place]["key"][1] == tail]
        places += self._recent.get(key, [])
        return [(self.names[self._pair[place]], self._records[place]) for place in places]


class Reader:
    """Reads features. It may be used in forked processes.

    Args:
        folder: of one tower.
        run: of the run that reads.
        note: receives a line for the user about a damaged entry.
    """

    def __init__(self, folder: Path, *, run: int, note: Callable[[str], None]) -> None:
        self.index = Index(folder)
        self.run = run
        self._note = note
        self._open: dict[str, int] = {}
        self._noted: set[str] = set()

    def get(self, key: bytes, *, limit: int) -> torch.Tensor | None:
        """Return the features of a key, [layers, rows, width], in the dtype in which they were computed.

        Args:
            key: of `vlft.data.features.keys`.
            limit: features that this run computed in this optimizer step or later are not seen. Steps count from 0.

        Returns:
            None if there are none, or they are damaged.
        """
        own, others = [], []
        for name, record in self.index.find(key):
            mine = int(record["run"]) == self.run
            if not mine or record["stamp"] < limit:
                (own if mine else others).append((int(record["stamp"]), int(record["crc"]), name, record))
        # The first of several, whatever the order in which processes wrote them.
        for found in (own, others):
            for _, _, name, record in sorted(found, key=lambda one: one[:3]):
                features = self.read(name, record)
                if features is not None:
                    return features
        return None

    def read(self, name: str, record: np.void) -> torch.Tensor | None:
        """Return the features of a record; None if their file is gone, cut or damaged."""
        import torch

        length, shape = int(record["length"]), [int(record[one]) for one in ("layers", "rows", "width")]
        buffer = torch.empty(length, dtype=torch.uint8)
        view = memoryview(buffer.numpy())
        try:
            dtype = getattr(torch, DTYPES[record["dtype"]])
            if (handle := self._handle(name)) is None:
                return None  # another run has removed it
            done = 0
            while done < length and (count := os.preadv(handle, [view[done:]], int(record["offset"]) + done)):
                done += count
            if done == length and zlib.crc32(view, zlib.crc32(record["key"].tobytes())) == record["crc"]:
                return buffer.view(dtype).view(shape)
            why = "it is damaged" if done == length else "it ends early"
        except (OSError, IndexError, RuntimeError) as error:
            why = str(error)
        if name not in self._noted:
            self._noted.add(name)
            self._note(f"{self.index.folder / name}{FEATURES}: an entry cannot be used ({why}): it is computed again")
        return None

    def _handle(self, name: str) -> int | None:
        if name not in self._open:
            path = self.index.folder / (name + FEATURES)
            try:
                handle = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                return None
            _lock(handle, shared=True)
            with contextlib.suppress(OSError):  # the folder of another user
                os.utime(path)
            self._open[name] = handle
        return self._open[name]

    def __del__(self) -> None:
        for handle in self._open.values():
            with contextlib.suppress(OSError):
                os.close(handle)


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
        self.pair_bytes = max(1, min(PAIR_BYTES, limit // SHARES)) if limit < PAIR_BYTES * 200 else limit // 200
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
        if self._pair is not None:
            for handle in self._pair[1:]:
                os.close(handle)
            self._pair = None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other writers out, because all of them together share the bound."""
        lock = Lock(self.root / LOCK)
        with contextlib.suppress(OSError):  # a file system without locks: the bound may be exceeded a little
            lock.take(wait=True)
        try:
            yield
        finally:
            lock.release()

    def _add(self, entries: Iterable[tuple[bytes, torch.Tensor]], stamp: int) -> int:
        import torch

        self._reader.index.refresh()
        used = sum(size for _, size, _ in _files(self.root))
        added = 0
        for key, features in entries:
            data = memoryview(features.contiguous().view(torch.uint8).flatten().numpy())
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
        name, file, index = self._writable()
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
        if self._pair is not None and os.fstat(self._pair[1]).st_size < self.pair_bytes:
            return self._pair
        self.close()
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
        if not _lock(index, shared=False):
            os.close(index)
            return None
        size = os.fstat(index).st_size
        os.truncate(index, size - size % RECORD.itemsize)
        file = os.open(self.folder / (name + FEATURES), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        _lock(file, shared=True)
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


def _lock(handle: int, *, shared: bool) -> bool:
    """Lock an open file until it is closed. Returns False if another process holds a lock that excludes this one."""
    if fcntl is None:
        return shared
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _unused(path: str) -> bool:
    """Whether no process uses a pair, as far as locks show it."""
    if fcntl is None:
        return False
    for name in (path, path.removesuffix(FEATURES) + INDEX):
        try:
            handle = os.open(name, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
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
