"""Memory for the pixels of micro-batches, used again from batch to batch.

The kernel clears each page of fresh memory before its first use. For the pixels of a pack that takes longer than
writing them, and a batch out of a loader's worker pays it three times: for its pictures, for the pack, and for the
shared memory that torch sends it in. Here each picture is resized into its place in the pack at once (`decode`), and
the pack into memory that both processes keep.

    dataset     with pack():              the pictures of one micro-batch are written one after the other
    decode      room(...)                 memory of the next picture
    collate     joined(...)               neighbours become one tensor; nothing is copied
    ipc         place_of, received        worker to trainer: which segment, and where in it

**Memory is never written while somebody can read it.** A segment is used again only if no tensor in this process has
its storage (`weakref.finalize` on the array that the storage keeps) and the first byte of the segment is 0. The worker
sets that byte when it sends the segment, and the trainer clears it when no tensor of its own has the storage. So views,
pinned copies in progress, several batches in flight and batches that a trainer keeps are all safe: where no segment is
free, another one is made, and after `MOST_SEGMENTS` a batch has ordinary memory. A process that is forked while tensors
hold segments sees their memory too, and must not read those tensors; loader workers never do.

Outside `pack()` everything has ordinary memory. torch is imported where used.
"""

from __future__ import annotations

import math
import mmap
import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

HEAD = mmap.PAGESIZE  # bytes before the pixels. The first one is 1 while the trainer can read the segment
SEGMENT_BYTES = 256 << 20  # of address space; only pages that were written take memory. Larger packs are copied
MOST_SEGMENTS = 64  # of a process, for about 25 batches that are sent or kept; each is an open file in both processes


class _Segment:
    """A piece of memory for the stills or the videos of one micro-batch at a time."""

    def __init__(self, number: int, *, shared: bool) -> None:
        self.number = number
        self.sent = False  # whether the trainer has its file
        self.file: int | None = None
        self._held = threading.Lock()  # taken as long as tensors of this process have the storage
        if shared:
            self.file = os.memfd_create("vlft-pixels")
            try:
                os.ftruncate(self.file, HEAD + SEGMENT_BYTES)
                self.memory = mmap.mmap(self.file, HEAD + SEGMENT_BYTES)
            except OSError:
                os.close(self.file)
                raise
        else:
            self.memory = mmap.mmap(-1, HEAD + SEGMENT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = np.frombuffer(self.memory, np.uint8, offset=HEAD).ctypes.data

    def hold(self) -> torch.Tensor | None:
        """Return the whole segment, uint8 [SEGMENT_BYTES], or None if somebody can read it.

        Nobody else gets it as long as a tensor has this storage. Threads may call this at the same time.
        """
        if not self._held.acquire(blocking=False):
            return None
        if self.memory[0]:
            self._held.release()
            return None
        import torch

        return torch.from_numpy(_watched(self.memory, self._held.release))


class _Pool:
    """The segments of this process."""

    def __init__(self, *, shared: bool) -> None:
        self.shared = shared
        self.token = os.urandom(8)  # names this process: its number may be used again
        self.segments: list[_Segment] = []

    def hold(self) -> torch.Tensor | None:
        """Return a free segment as a tensor; None if there are too many, or the system gives no memory."""
        for segment in tuple(self.segments):
            if (whole := segment.hold()) is not None:
                return whole
        if len(self.segments) >= MOST_SEGMENTS:
            return None
        try:
            segment = _Segment(len(self.segments), shared=self.shared)
        except OSError:
            return None
        whole = segment.hold()
        self.segments.append(segment)
        return whole


class _Run:
    """Pixels of one kind that are written one after the other."""

    def __init__(self) -> None:
        self._whole = _pool.hold()
        self._used = 0

    def next(self, size: int) -> torch.Tensor | None:
        """Return the next bytes, uint8 [size]; None if the segment has too few left."""
        if self._whole is None or self._used + size > SEGMENT_BYTES:
            return None
        start, self._used = self._used, self._used + size
        return self._whole[start : self._used]


_pool = _Pool(shared=False)
_runs: ContextVar[dict[bool, _Run] | None] = ContextVar("runs", default=None)


def share() -> None:
    """Use memory from here on that can be sent to the process which started this one. Called by a loader's worker."""
    global _pool
    _pool = _Pool(shared=hasattr(os, "memfd_create"))


@contextmanager
def pack() -> Iterator[None]:
    """Write all pixels of this block into as few segments as possible: one for stills, one for videos."""
    before = _runs.set({})
    try:
        yield
    finally:
        _runs.reset(before)


def room(*shape: int, video: bool) -> torch.Tensor:
    """Return memory for the pixels of a still or a video, with any content: uint8 of this shape, contiguous."""
    import torch

    runs = _runs.get()
    found = None
    if runs is not None:
        run = runs.get(video) or runs.setdefault(video, _Run())
        found = run.next(math.prod(shape))
    return torch.empty(shape, dtype=torch.uint8) if found is None else found.view(shape)


def room_to_send(size: int) -> torch.Tensor | None:
    """Return memory that `place_of` knows, in a worker: uint8 [size]. None if there is none."""
    return _Run().next(size) if _pool.shared else None


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join pixels, uint8 and contiguous, into one tensor of one dimension. Neighbours in memory are not copied."""
    import torch

    if not parts:
        return torch.empty(0, dtype=torch.uint8)
    first = parts[0]
    if len(parts) == 1 and first.untyped_storage().nbytes() == first.nbytes:
        return first.flatten()
    # What lies between two parts of one storage is in it too.
    together = first.untyped_storage().data_ptr() == parts[-1].untyped_storage().data_ptr()
    end = first.data_ptr()
    for part in parts:
        if not (together and part.data_ptr() == end):
            return torch.cat([part.flatten() for part in parts])
        end += part.nbytes
    # Through an array, so that the storage has these bytes alone: `copy.deepcopy` copies whole storages.
    return torch.from_numpy(first.as_strided((end - first.data_ptr(),), (1,)).numpy())


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in which segment a tensor is: all that a message says of it.

    Attributes:
        process: number of the worker.
        token: of its pool.
        segment: number of the segment in it.
        file: handle of the segment's file, when it is sent for the first time.
        offset: of the tensor in the segment, in bytes.
        shape: of the tensor, uint8 and contiguous.
    """

    process: int
    token: bytes
    segment: int
    file: Any
    offset: int
    shape: tuple[int, ...]


def place_of(tensor: torch.Tensor) -> Place | None:
    """Return where a tensor is, for a message that is sent now; None if it is not in a segment that can be sent.

    The segment is not free from here on, until the receiver lets it go.
    """
    if not (_pool.shared and tensor.is_contiguous()):
        return None
    for segment in _pool.segments:
        offset = tensor.data_ptr() - segment.address
        if 0 <= offset < SEGMENT_BYTES:
            break
    else:
        return None
    segment.memory[0] = 1
    file = None if segment.sent or segment.file is None else DupFd(segment.file)
    segment.sent = True
    return Place(
        process=os.getpid(),
        token=_pool.token,
        segment=segment.number,
        file=file,
        offset=offset,
        shape=tuple(tensor.shape),
    )


def received(place: Place) -> torch.Tensor:
    """Return the tensor of a message. Its worker may use the segment again when no tensor has this storage any more."""
    import torch

    whole = _mapped(place).whole()
    end = place.offset + math.prod(place.shape)
    return torch.from_numpy(whole[place.offset : end]).view(place.shape)


class _Mapped:
    """A worker's segment in this process."""

    def __init__(self, file: int) -> None:
        self._memory = mmap.mmap(file, HEAD + SEGMENT_BYTES)
        self._whole: Callable[[], np.ndarray | None] = lambda: None

    def whole(self) -> np.ndarray:
        """Return the segment, uint8 [SEGMENT_BYTES]. All tensors of a message share the array, and keep it."""
        if (whole := self._whole()) is None:
            memory, owner = self._memory, os.getpid()

            def let_go() -> None:
                if os.getpid() == owner:  # a worker that this process starts in the meantime has a copy of the tensors
                    memory[0] = 0

            whole = _watched(memory, let_go)
            self._whole = weakref.ref(whole)
        return whole


#: token of a worker -> its segments, as long as its `Process` exists
_mapped_of: dict[bytes, dict[int, _Mapped]] = {}
_mapping = threading.Lock()  # loaders that pin memory receive in a thread each


def _mapped(place: Place) -> _Mapped:
    with _mapping:
        if place.token not in _mapped_of:
            _mapped_of[place.token] = {}
            for process in multiprocessing.active_children():
                if process.pid == place.process:
                    weakref.finalize(process, _mapped_of.pop, place.token, None).atexit = False
        segments = _mapped_of[place.token]
        if place.file is not None:
            file = place.file.detach()
            try:
                segments[place.segment] = _Mapped(file)
            finally:
                os.close(file)
        return segments[place.segment]


def _watched(memory: mmap.mmap, let_go: Callable[[], object]) -> np.ndarray:
    """Return a segment without its head, and call `let_go` when neither array nor tensor has this memory any more."""
    array = np.frombuffer(memory, np.uint8, offset=HEAD, count=SEGMENT_BYTES)
    weakref.finalize(array, let_go).atexit = False
    return array
