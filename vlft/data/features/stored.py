"""The files of cached features, and how they are read: key -> one tensor per picture or video.

The folder of a tower holds pairs of files that only grow:

    NAME.features   the tensors, one after the other
    NAME.index      a record of `RECORD` for each of them, written when its tensor is complete

A process that is killed leaves at most bytes without a record, or a part of a record, and both are ignored. The
checksum of a tensor is compared whenever it is read. `vlft.data.features.writer` writes the files.

A run must not depend on how fast its processes write. So a record has the run and the optimizer step of its features,
and a lookup names the first step whose features it may not see (`limit`). Records of other runs are always seen.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlft.files import lock_handle

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


class Index:
    """The records of one tower's folder, in memory. `refresh` adds the new ones.

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
        if len(self._records) - len(self._order) > 1000 + len(self._order) // 10:
            heads = self._records["key"][:, 0]
            self._order = np.argsort(heads, kind="stable")
            self._sorted = heads[self._order]
            self._recent = {}
            return
        for place in range(start, len(self._records)):
            self._recent.setdefault(self._records[place]["key"].tobytes(), []).append(place)

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
        own: list[tuple[int, int, str, np.void]] = []  # each with its stamp and checksum
        others: list[tuple[int, int, str, np.void]] = []
        for name, record in self.index.find(key):
            mine = int(record["run"]) == self.run
            if not mine or record["stamp"] < limit:
                (own if mine else others).append((int(record["stamp"]), int(record["crc"]), name, record))
        # The first of several, in an order that does not depend on which process wrote first.
        for found in (own, others):
            for _, _, name, record in sorted(found, key=lambda one: one[:3]):
                features = self.read(name, record)
                if features is not None:
                    return features
        return None

    def read(self, name: str, record: np.void) -> torch.Tensor | None:
        """Return the features of a record; None if their file is gone, cut or damaged."""
        import torch

        offset, length = int(record["offset"]), int(record["length"])
        shape = [int(record[one]) for one in ("layers", "rows", "width")]
        try:
            dtype = getattr(torch, DTYPES[record["dtype"]])
            if (handle := self._handle(name)) is None:
                return None  # another run has removed it
            done = 0
            if offset + length <= os.fstat(handle).st_size:  # a damaged record may ask for any number of bytes
                buffer = torch.empty(length, dtype=torch.uint8)
                view = buffer.numpy().data
                while done < length and (count := os.preadv(handle, [view[done:]], offset + done)):
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
            lock_handle(handle, shared=True)
            with contextlib.suppress(OSError):  # the folder of another user
                os.utime(path)
            self._open[name] = handle
        return self._open[name]

    def keep(self, name: str, handle: int) -> None:
        """Take over the open features of a pair, until `close`."""
        if name in self._open:
            os.close(self._open[name])
        self._open[name] = handle

    def close(self) -> None:
        """Close all files, so that other processes may remove them."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()
