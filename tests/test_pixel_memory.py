"""Memory that batches use again: what somebody can still read is never overwritten, and nothing is kept for ever."""

from __future__ import annotations

import copy
import gc
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import tiny_sizes
from torch.utils.data import DataLoader

from vlft.data import ipc, pixel_memory
from vlft.data.collate import Collator
from vlft.data.dataset import RowDataset
from vlft.data.ipc import SMALL, sent
from vlft.data.sample import EncodedMedia, EncodedSample, Grid
from vlft.data.workers import loader_options
from vlft.errors import BadRow, DataError

VISION = tiny_sizes("qwen2_vl").vision
SIDE = 2 * VISION.patch * VISION.merge  # pixels
WAYS = ("worker", "here")


@pytest.fixture(autouse=True)
def _small_is_smaller(monkeypatch):
    """Pixels of these little rows travel as those of large packs do."""
    monkeypatch.setattr(ipc, "SMALL", 1 << 12)


def drawn(index: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8))


def placed(pixels_FHW3: torch.Tensor, *, is_video: bool = False) -> EncodedMedia:
    """Pixels in the memory of their batch."""
    frames, height, width, _ = pixels_FHW3.shape
    room = pixel_memory.room(*pixels_FHW3.shape, video=is_video)
    room.copy_(pixels_FHW3)
    grid = Grid(t=-(-frames // 2), h=height // VISION.patch, w=width // VISION.patch)
    return EncodedMedia(grid=grid, pixels=room, is_video=is_video)


class Drawn:
    """Encodes a number as a row of two stills and a clip, which follow from it. Row 7 fails after its first still."""

    def decode(self, row: SimpleNamespace) -> list[EncodedMedia]:
        sample = row.number
        media = [placed(drawn(sample, 1, 4 * SIDE, SIDE, 3))]
        if sample == 7:
            raise DataError(BadRow(file="x.json", index=7, id=None, field="image[1]", reason="damaged"))
        media.append(placed(drawn(sample + 1000, 4, SIDE, SIDE, 3), is_video=True))
        media.append(placed(drawn(sample + 2000, 1, SIDE, 2 * SIDE, 3)))
        return media

    def encode(self, row: SimpleNamespace, media: list[EncodedMedia]) -> EncodedSample:
        tokens = torch.arange(5)
        return EncodedSample(
            file="x.json", index=row.number, id=None, input_ids_T=tokens, labels_T=tokens, text="", media=tuple(media),
            kinds_T=torch.zeros(5, dtype=torch.uint8), positions_3T=tokens.expand(3, 5),
        )  # fmt: skip


def loader(lists, way: str = "worker") -> DataLoader:
    collate = Collator(vision=VISION, filler_token=0)
    rows = RowDataset([SimpleNamespace(number=i, answer=None) for i in range(64)], Drawn())
    return DataLoader(rows, batch_sampler=lists, collate_fn=collate, **loader_options(int(way == "worker")))


def assert_drawn(batch, rows) -> None:
    """The pixels of a batch are those of these rows."""
    rows = [row for row in rows if row != 7]
    stills = [
        one.flatten()
        for row in rows
        for one in (drawn(row, 1, 4 * SIDE, SIDE, 3), drawn(row + 2000, 1, SIDE, 2 * SIDE, 3))
    ]
    clips = [drawn(row + 1000, 4, SIDE, SIDE, 3).flatten() for row in rows]
    assert torch.equal(batch["still_pixels"], torch.cat(stills)), rows
    assert torch.equal(batch["video_pixels"], torch.cat(clips)), rows


@pytest.mark.parametrize("way", WAYS)
def test_what_is_kept_is_not_overwritten(monkeypatch, way):
    """Whole batches, more than there are segments, and views of batches: a slice, an array."""
    monkeypatch.setattr(pixel_memory, "MOST_SEGMENTS", 5)
    lists = [[i, i + 1, i + 2] for i in range(0, 60, 3)]
    kept, slices = [], []
    for number, batch in enumerate(loader(lists, way)):
        if number % 3:
            kept.append((number, batch))
        else:
            slices.append((number, batch["video_pixels"][40:70], batch["still_pixels"][500:900].numpy()))
        del batch
    assert len(kept) == 13
    for number, batch in kept:
        assert_drawn(batch, lists[number])
    for number, clip, still in slices:
        assert np.array_equal(still, drawn(lists[number][0], 4 * SIDE * SIDE * 3)[500:900].numpy())
        assert torch.equal(clip, drawn(lists[number][0] + 1000, 4 * SIDE * SIDE * 3)[40:70])


@pytest.mark.parametrize("way", WAYS)
def test_memory_is_used_again(request, way):
    """Also in the next pass of the same worker, and after a pass that was left early.

    Nothing waits for Python's search for cycles, which may take hundreds of batches.
    """
    gc.disable()
    request.addfinalizer(gc.enable)
    lists = [[i, i + 1] for i in range(0, 60, 2)]
    found, rows = loader(lists, way), set()
    for batch in found:
        rows.add(batch["still_pixels"].data_ptr())
        break
    del batch
    for _ in range(3):
        for numbers, batch in zip(lists, found, strict=True):
            assert_drawn(batch, numbers)
            rows.add(batch["still_pixels"].data_ptr())
            batch["still_pixels"] += 1  # a batch is its receiver's own
    assert len(rows) <= 8  # of 90: torch prefetches two batches a worker


def test_another_process_lets_nothing_go():
    """A process that is forked in the meantime, such as another loader's worker, has all batches and drops them."""
    lists = [[i] for i in range(8, 28)]
    batches = iter(loader(lists))
    first = next(batches)
    if not (child := os.fork()):
        del first
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for batch in batches:
        del batch
    assert_drawn(first, lists[0])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts the maps of this process")
def test_the_memory_of_a_loader_goes_with_it():
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count("vlft-pixels")

    gc.collect()
    before = maps()
    found = loader([[0, 1], [2, 3]])
    kept = list(found)
    assert maps() > before
    del found
    gc.collect()
    assert_drawn(kept[1], [2, 3])  # a batch outlives its worker
    del kept
    gc.collect()
    assert maps() == before


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_fail_after_a_picture(way):
    """Their picture lies between those of other rows."""
    lists = [[6, 7, 8], [7], [7, 9], [10, 11]]
    for numbers, batch in zip(lists, loader(lists, way), strict=True):
        assert [bad.field for bad in batch["skipped"]] == ["image[1]"] * (7 in numbers)
        if numbers == [7]:
            assert not batch["still_pixels"].any()
            assert len(batch["video_pixels"]) == 0
        else:
            assert_drawn(batch, numbers)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lacks", ["room", "memfd"])
def test_packs_that_find_no_room(monkeypatch, way, lacks):
    """They are larger than a segment, or the system has no memory of this kind (macOS)."""
    if lacks == "room":
        monkeypatch.setattr(pixel_memory, "SEGMENT_BYTES", 7 * SIDE * SIDE * 3)
    else:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    lists = [[0, 1, 2], [3], [4, 5, 6]]
    for numbers, batch in zip(lists, loader(lists, way), strict=True):
        assert_drawn(batch, numbers)


def test_a_copy_of_a_batch_has_its_own_size():
    """A deep copy is a copy of storages; that of a whole segment would take a quarter of a gigabyte."""
    for way in WAYS:
        [batch] = loader([[0, 1]], way)
        for name in ("still_pixels", "video_pixels", "input_ids", "labels", "position_ids"):
            assert batch[name].untyped_storage().nbytes() == batch[name].nbytes, name
        assert_drawn(copy.deepcopy(batch), [0, 1])
    with pixel_memory.pack():  # a batch of one still
        still = placed(drawn(0, 1, SIDE, SIDE, 3)).pixels
    assert pixel_memory.joined([still]).untyped_storage().nbytes() == still.nbytes


class Numbers:
    """Rows of `SMALL` bytes, each with its number, and of a few values that numpy does not have."""

    def __getitems__(self, numbers: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with pixel_memory.pack():
            return [(filled(number), torch.full((3,), number, dtype=torch.bfloat16)) for number in numbers]


def filled(number: int) -> torch.Tensor:
    room = pixel_memory.room(SMALL, video=False)
    return room.fill_(number)


def as_pair(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> object:
    return sent({"first": rows[0][0], "second": rows[1][0], "small": rows[1][1]})


def test_two_tensors_of_a_message_in_one_segment():
    """The segment is free when the last of them goes, as for pairs of answers."""
    lists = [[i, i + 1] for i in range(0, 40, 2)]
    kept = []
    for batch in DataLoader(Numbers(), batch_sampler=lists, collate_fn=as_pair, **loader_options(1)):
        kept.append((batch["second"], batch["small"]))
        del batch
    for (_, number), (second, small) in zip(lists, kept, strict=True):
        assert (second == number).all()
        assert (small == number).all()
        assert small.dtype == torch.bfloat16


def test_threads_do_not_share_a_segment():
    """Two loaders without workers, each in its thread."""
    wrong, interval = [], sys.getswitchinterval()

    def load(number: int) -> None:
        for _ in range(200):
            [(found, _)] = Numbers().__getitems__([number])
            wrong.extend([number] * int((found != number).sum()))

    threads = [threading.Thread(target=load, args=(number,)) for number in range(1, 4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory of this kind")
def test_a_segment_that_cannot_be_mapped_leaves_no_file(monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError("no address space")

    pool, opened = pixel_memory._Pool(shared=True), len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(pixel_memory.mmap, "mmap", refuse)
    assert pool.hold() is None
    assert len(os.listdir("/proc/self/fd")) == opened
