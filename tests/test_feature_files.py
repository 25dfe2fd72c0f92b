"""The files of cached features: keys, damage, kills, the bound, and other processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from build import write_image

from vlft.data.features.keys import key_of
from vlft.data.features.reader import CachedMedia
from vlft.data.features.stored import FEATURES, INDEX, RECORD, Reader
from vlft.data.features.writer import Writer
from vlft.data.sample import Image, Overrides
from vlft.families import FAMILIES
from vlft.model.load import load_base
from vlft.model.prints import tower_print
from vlft.model.scale import PixelScale

MINE, OTHER = 1, 2
LATER = 10**6


def key(number: int) -> bytes:
    return number.to_bytes(8, "little") + b"\1" * 8


def features(number: int, rows: int = 3, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(2, rows, 8, generator=torch.Generator().manual_seed(number)).to(dtype)


@pytest.fixture
def notes():
    return []


@pytest.fixture
def writer(tmp_path, notes):
    made = []

    def make(tower: str = "tower", *, run: int = MINE, limit: int = 10**9) -> Writer:
        made.append(Writer(tmp_path, tower, run=run, limit=limit, note=notes.append))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def reader(tmp_path, notes):
    def make(tower: str = "tower", *, run: int = MINE) -> Reader:
        made = Reader(tmp_path / tower, run=run, note=notes.append)
        made.index.refresh()
        return made

    return make


def pair(folder: Path, ending: str) -> Path:
    (found,) = folder.rglob(f"*{ending}")
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_what_was_written_is_read(writer, reader, dtype):
    many = {key(i): features(i, rows=1 + i % 5, dtype=dtype) for i in range(1500)}
    assert writer().add(many.items(), stamp=0) == 1500
    found = reader()
    for name, tensor in many.items():
        assert torch.equal(found.get(name, limit=LATER), tensor)
        assert found.get(name, limit=LATER).dtype == dtype
    assert found.get(key(1501), limit=LATER) is None


def test_a_run_sees_its_own_earlier_steps_and_all_of_other_runs(writer, reader):
    mine = writer()
    mine.add([(key(1), features(1))], stamp=3)
    mine.add([(key(1), features(2))], stamp=2)  # another process of the run, which is late
    mine.add([(key(1), features(3))], stamp=5)
    found = reader()
    assert found.get(key(1), limit=2) is None
    for limit in (3, 4, 6):
        assert torch.equal(found.get(key(1), limit=limit), features(2))
    assert torch.equal(reader(run=OTHER).get(key(1), limit=0), features(2))
    assert mine.add([(key(1), features(2))], stamp=2) == 0
    assert writer(run=OTHER).add([(key(1), features(4))], stamp=0) == 0


def test_a_record_that_was_cut_is_ignored_and_its_file_is_extended(tmp_path, writer, reader):
    first = writer()
    first.add([(key(1), features(1)), (key(2), features(2))], stamp=0)
    first.close()
    with pair(tmp_path, INDEX).open("r+b") as index:
        index.truncate(2 * RECORD.itemsize - 5)
    assert reader().get(key(2), limit=LATER) is None
    writer(run=OTHER).add([(key(3), features(3))], stamp=0)
    assert len(list(tmp_path.rglob(f"*{FEATURES}"))) == 1
    for number in (1, 3):
        assert torch.equal(reader().get(key(number), limit=LATER), features(number))


@pytest.mark.parametrize("harm", ["flipped", "cut"])
def test_a_damaged_entry_is_noted_and_stored_again(tmp_path, writer, reader, notes, harm):
    first = writer()
    first.add([(key(1), features(1))], stamp=0)
    first.close()
    with pair(tmp_path, FEATURES).open("r+b") as file:
        if harm == "flipped":
            file.seek(7)
            file.write(b"\xaa\xbb")
        else:
            file.truncate(11)
    assert reader().get(key(1), limit=LATER) is None
    assert len(notes) == 1
    assert "an entry cannot be used" in notes[0]
    assert writer(run=OTHER).add([(key(1), features(1))], stamp=0) == 1
    assert torch.equal(reader().get(key(1), limit=LATER), features(1))


@pytest.mark.parametrize("field", ["offset", "length", "rows", "dtype", "crc"])
def test_a_damaged_record_is_noted_and_its_features_are_stored_again(tmp_path, writer, reader, notes, field):
    first = writer()
    first.add([(key(1), features(1))], stamp=0)
    first.close()
    record = np.fromfile(pair(tmp_path, INDEX), dtype=RECORD)
    record[field] ^= np.array(1, record[field].dtype) << (8 * record[field].itemsize - 1)  # the highest bit
    record.tofile(pair(tmp_path, INDEX))
    assert reader().get(key(1), limit=LATER) is None
    assert len(notes) == 1
    assert "an entry cannot be used" in notes[0]
    assert writer(run=OTHER).add([(key(1), features(1))], stamp=0) == 1
    assert torch.equal(reader().get(key(1), limit=LATER), features(1))


def test_a_process_that_is_killed_while_writing_leaves_only_whole_entries(tmp_path, reader, notes):
    def write() -> None:
        endless = Writer(tmp_path, "tower", run=OTHER, limit=10**10, note=print)
        for number in range(10**6):
            endless.add([(key(number), features(number, rows=2000))], stamp=number)

    for _ in range(3):
        process = multiprocessing.get_context("fork").Process(target=write)
        process.start()
        time.sleep(0.4)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    found = reader()
    numbers = range(len(found.index))
    assert len(numbers) > 3
    for number in numbers:
        if (tensor := found.get(key(number), limit=LATER)) is not None:
            assert torch.equal(tensor, features(number, rows=2000))
    assert notes == []


def test_a_full_folder_first_loses_what_no_process_uses(tmp_path, writer, reader, notes):
    size = features(0).nbytes + RECORD.itemsize
    old = writer("old", run=OTHER, limit=4 * size)
    old.add([(key(i), features(i)) for i in range(4)], stamp=0)
    old.close()
    new = writer("new", limit=4 * size)
    in_use = reader("old")
    assert in_use.get(key(0), limit=LATER) is not None  # its process has one of the pairs open
    pairs = len(list((tmp_path / "old").glob(f"*{FEATURES}")))
    assert new.add([(key(9), features(9))], stamp=0) == 1
    assert len(list((tmp_path / "old").glob(f"*{FEATURES}"))) == pairs - 1
    assert in_use.get(key(0), limit=LATER) is not None
    assert new.add([(key(10 + i), features(i)) for i in range(9)], stamp=0) == 2
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.suffix) <= 4 * size
    assert len(notes) == 1
    assert "full, at" in notes[0]
    assert new.add([(key(30), features(1))], stamp=0) == 0
    assert len(notes) == 1


def test_a_full_disk_is_noted_and_leaves_no_part_of_an_entry(tmp_path, writer, reader, notes, monkeypatch):
    mine = writer()
    mine.add([(key(1), features(1))], stamp=0)
    real, left = os.write, [40]

    def write(handle: int, data: memoryview) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(handle, data[: left[0]])
        left[0] -= done
        return done

    monkeypatch.setattr(os, "write", write)
    assert mine.add([(key(2), features(2))], stamp=0) == 0
    monkeypatch.undo()
    assert len(notes) == 1
    assert "No space left on device" in notes[0]
    assert pair(tmp_path, FEATURES).stat().st_size == features(1).nbytes
    assert mine.add([(key(3), features(3))], stamp=0) == 0  # it does not try again
    assert torch.equal(reader().get(key(1), limit=LATER), features(1))


def test_the_key_covers_the_pixels_and_not_the_name(tmp_path, encoder):
    recipe = encoder.recipe
    path = write_image(tmp_path / "a.png")
    still = Image(path=str(path), field="image")
    first = key_of(still, recipe, tower="t")
    copy = Image(path=str(shutil.copy(path, tmp_path / "b.png")), field="image")
    assert key_of(copy, recipe, tower="t") == first
    assert key_of(still, replace(recipe, max_length=5, fps=1.0), tower="t") == first
    assert key_of(still, replace(recipe, image_max_pixels=50 * 28 * 28), tower="t") != first
    assert key_of(replace(still, overrides=Overrides(max_pixels=50 * 28 * 28)), recipe, tower="t") != first
    assert key_of(still, recipe, tower="u") != first
    write_image(path, name="flower")
    assert key_of(still, recipe, tower="t") != first
    assert key_of(Image(path=str(tmp_path / "none.png"), field="image"), recipe, tower="t") is None


def test_a_picture_that_changes_while_it_is_decoded_is_not_stored(tmp_path, encoder, monkeypatch):
    from vlft.data.media import decode as decoder

    path = write_image(tmp_path / "a.png")
    still = Image(path=str(path), field="image")
    media = CachedMedia(tmp_path / "cache", tower="t", run=MINE)
    assert media.decode(still, encoder.recipe).key is not None
    real = decoder.decode

    def replaced(*args):
        write_image(path, name="flower")
        return real(*args)

    monkeypatch.setattr(decoder, "decode", replaced)
    assert media.decode(still, encoder.recipe).key is None


def test_other_weights_numbers_and_kernels_have_another_print(base_of):
    family = FAMILIES["qwen2_vl"]
    model, scale = load_base(base_of(family), family), PixelScale(mean=(0.0,) * 3, std=(1.0,) * 3)

    def print_of(**other):
        settings = {
            "scale": scale,
            "dtype": torch.float32,
            "device": torch.device("cpu"),
            "choices": {"attention": "sdpa"},
        } | other
        return tower_print(model, settings.pop("scale"), **settings)

    first = print_of()
    assert print_of() == first
    others = [
        print_of(dtype=torch.bfloat16),
        print_of(choices={"attention": "varlen"}),
        print_of(scale=PixelScale(mean=(0.0,) * 3, std=(2.0,) * 3)),
    ]
    with torch.no_grad():
        model.model.language_model.norm.weight += 1
        assert print_of() == first
        model.model.visual.merger.ln_q.bias[0] += 1e-6
    others.append(print_of())
    assert len({first, *others}) == 5
