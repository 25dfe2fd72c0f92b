"""A cache of bytes that a process shares with all processes forked from it.

Entries are written once and never changed or removed: when the memory is used up, nothing more is kept. So reading
needs no lock. Writing takes one without waiting; where it is taken, e.g. by a process that was killed, the entry is not
kept. A key stands for itself by a hash of 16 bytes.
"""

from __future__ import annotations

import hashlib
import mmap
import multiprocessing
import struct

BYTES = 128 << 20  # for entries; only pages that were written take memory
PLACES = 1 << 17  # of the table, 8 bytes each
TRIES = 8  # places in which an entry may be
_HEAD = struct.Struct("<16sI")  # of an entry: key, length
_PLACE = struct.Struct("<Q")


class SharedCache:
    """Maps bytes to bytes.

    Create it before other processes are forked. A copy by pickle, which a spawned process gets, is empty.
    """

    def __init__(self, *, size: int = BYTES, places: int = PLACES) -> None:
        self._table_bytes = _PLACE.size * (1 + places)  # the first one says where the free memory begins
        self._places = places
        self._end = self._table_bytes + size
        try:
            self._memory: mmap.mmap | None = mmap.mmap(-1, self._end)
            self._lock = multiprocessing.Lock()
        except OSError:  # no memory or no semaphores of this kind: nothing is kept
            self._memory = None

    def __reduce__(self) -> tuple[type[SharedCache], tuple[()]]:
        return SharedCache, ()

    def get(self, key: bytes) -> bytes | None:
        """Return what was kept for a key, or None."""
        if self._memory is None:
            return None
        wanted = _digest(key)
        for place in self._candidates(wanted):
            if not (start := self._read(place)):
                return None
            found, length = _HEAD.unpack_from(self._memory, start)
            if found == wanted:
                return self._memory[start + _HEAD.size : start + _HEAD.size + length]
        return None

    def put(self, key: bytes, value: bytes) -> None:
        """Keep a value, if there is room for it."""
        if self._memory is None or not self._lock.acquire(block=False):
            return
        try:
            wanted = _digest(key)
            start = self._read(0) or self._table_bytes
            end = start + _HEAD.size + len(value)
            free = next((place for place in self._candidates(wanted) if not self._read(place)), None)
            if free is None or end > self._end:
                return
            self._memory[start + _HEAD.size : end] = value
            _HEAD.pack_into(self._memory, start, wanted, len(value))
            _PLACE.pack_into(self._memory, 0, end)
            self._memory[free : free + _PLACE.size] = _PLACE.pack(start)  # last: from here on readers find it
        finally:
            self._lock.release()

    def _read(self, place: int) -> int:
        (found,) = _PLACE.unpack_from(self._memory or b"", place)
        return found

    def _candidates(self, digest: bytes) -> list[int]:
        first = int.from_bytes(digest[:8], "little")
        return [_PLACE.size * (1 + (first + i) % self._places) for i in range(TRIES)]


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=16).digest()
