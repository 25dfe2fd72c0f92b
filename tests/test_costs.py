"""The cost cache: which files are opened again, which are not, and the effect of a damaged or unwritable cache."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from build import FAMILY, row, write_image, write_json, write_video
from PIL import Image as PIL

from vlft.config.flags import DataFlags
from vlft.data import dataset
from vlft.data.costs import cache as costs
from vlft.data.costs import store as kept
from vlft.data.costs.cache import cost_folder
from vlft.data.files.index import index_rows
from vlft.data.media import read as media
from vlft.setup import MeasuredRows, measure_rows


@pytest.fixture
def rows(tmp_path) -> Path:
    """Six rows over four pictures and a clip; the last row is refused."""
    for i in range(4):
        write_image(tmp_path / f"{i}.jpg", 200 + 40 * i, 150)
    write_video(tmp_path / "clip.mp4")
    return write_json(
        tmp_path / "train.json",
        [
            row("<image>What?", "A temple.", image="0.jpg"),
            row("<image><image>Which?", "The first.", image=["1.jpg", "2.jpg"]),
            row("<video>What?", "A pan.", video="clip.mp4"),
            row("<video>What?", "Frames.", video=["0.jpg", "0.jpg"]),
            row("No picture?", "None."),
            row("<image>What?", "Nobody knows.", image="missing.jpg"),
        ],
    )


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of pictures that are opened, and of videos."""
    seen: list[str] = []
    still, clip = PIL.open, media.open_clip
    monkeypatch.setattr(PIL, "open", lambda path, *a, **k: seen.append(Path(path).name) or still(path, *a, **k))
    monkeypatch.setattr(media, "open_clip", lambda path: seen.append(Path(path).name) or clip(path))
    return seen


def measure(path: Path, encoder, cache: Path | None) -> MeasuredRows:
    rows = index_rows([str(path)], image_folder=None, family=FAMILY)
    return measure_rows(rows, encoder, workers=0, cache=cache)


def with_recipe(encoder, **changes):
    return replace(encoder, recipe=replace(encoder.recipe, **changes))


def facts(measured: MeasuredRows) -> tuple:
    """The results of a pass, for comparison."""
    return list(measured.rows.samples), measured.rows.bad, measured.rows.counts, measured.costs


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.sqlite"))


def test_a_second_pass_opens_no_media(rows, encoder, opened, tmp_path):
    cache = tmp_path / "cache"
    plain = measure(rows, encoder, None)
    assert opened
    assert facts(measure(rows, encoder, cache)) == facts(plain)
    opened.clear()
    again = measure(rows, encoder, cache)
    assert facts(again) == facts(plain)  # the refused row as well
    assert opened == []
    assert len(entries(cache)) == 1
    assert [path.name for path in cache.iterdir()] == [entries(cache)[0].name]  # no temporary file is left


def test_only_rows_whose_files_changed_are_measured_again(rows, encoder, opened, tmp_path):
    cache = tmp_path / "cache"
    first = measure(rows, encoder, cache)
    write_image(tmp_path / "2.jpg", 500, 500)
    opened.clear()
    second = measure(rows, encoder, cache)
    assert set(opened) == {"1.jpg", "2.jpg"}
    assert [a == b for a, b in zip(first.costs, second.costs, strict=True)] == [True, False, True, True, True]
    assert second.costs == measure(rows, encoder, None).costs
    # Same size, other time: a picture saved again.
    os.utime(tmp_path / "clip.mp4", ns=(1, 1))
    opened.clear()
    assert measure(rows, encoder, cache).costs == second.costs
    assert set(opened) == {"clip.mp4"}
    opened.clear()
    assert measure(rows, encoder, cache).costs == second.costs
    assert opened == []


def test_a_file_that_goes_or_comes_is_seen(rows, encoder, tmp_path):
    cache = tmp_path / "cache"
    measure(rows, encoder, cache)
    (tmp_path / "0.jpg").rename(tmp_path / "missing.jpg")
    found = measure(rows, encoder, cache)
    assert [bad.index for bad in found.rows.bad] == [0, 3]
    assert facts(found) == facts(measure(rows, encoder, None))


def test_rows_edited_or_added_are_measured_and_the_others_are_not(rows, encoder, opened, tmp_path):
    cache = tmp_path / "cache"
    measure(rows, encoder, cache)
    raw = json.loads(rows.read_text())
    raw[1]["conversations"][1]["value"] = "The second, of course."
    write_json(rows, [row("<image>New?", "Yes.", image="3.jpg"), *raw])
    opened.clear()
    found = measure(rows, encoder, cache)
    assert set(opened) == {"1.jpg", "2.jpg", "3.jpg"}
    assert facts(found) == facts(measure(rows, encoder, None))


def test_other_settings_have_an_entry_of_their_own(rows, encoder, tmp_path):
    cache = tmp_path / "cache"
    measure(rows, encoder, cache)
    small = with_recipe(encoder, image_max_pixels=16 * 28 * 28)
    short = with_recipe(encoder, max_length=130)
    for other in (small, short):
        assert facts(measure(rows, other, cache)) == facts(measure(rows, other, None))
    assert len(entries(cache)) == 3
    assert facts(measure(rows, encoder, cache)) == facts(measure(rows, encoder, None))
    assert len(entries(cache)) == 3


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    path.write_bytes(data)


def other_table(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute("DROP TABLE kept")
        file.execute("CREATE TABLE kept (something TEXT)")


def other_values(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE kept SET value = '[1, \"two\"]'")


@pytest.mark.parametrize("damage", [cut, empty, overwrite, other_table, other_values])
def test_a_store_that_cannot_be_used_is_made_again(rows, encoder, opened, tmp_path, damage):
    cache = tmp_path / "cache"
    plain = measure(rows, encoder, cache)
    (entry,) = entries(cache)
    damage(entry)
    again = measure(rows, encoder, cache)
    assert facts(again) == facts(plain)
    for note in again.notes:
        assert str(entry) in note or str(cache) in note
    measure(rows, encoder, cache)
    opened.clear()
    assert facts(measure(rows, encoder, cache)) == facts(plain)
    assert opened == []


def test_a_pass_that_was_interrupted_goes_on_where_it_was(rows, encoder, opened, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "SECONDS", 0)
    monkeypatch.setattr(dataset, "SCAN_CHUNK", 1)
    cache = tmp_path / "cache"
    index = index_rows([str(rows)], image_folder=None, family=FAMILY)
    passing = costs.scan_costs(index, encoder, workers=0, folder=cache, note=pytest.fail)
    first = [next(passing), next(passing)]
    (entry,) = entries(cache)
    copy = entry.read_bytes()  # its state now: a killed process writes nothing more
    passing.close()
    entry.write_bytes(copy)
    opened.clear()
    assert list(measure(rows, encoder, cache).costs)[:2] == first
    assert "0.jpg" not in opened[:1]
    assert "1.jpg" not in opened


def test_a_folder_that_cannot_be_written_costs_a_note(rows, encoder, tmp_path):
    (tmp_path / "file").write_text("")
    found = measure(rows, encoder, tmp_path / "file" / "cache")
    assert found.costs == measure(rows, encoder, None).costs
    assert any("cannot be saved for the next run" in note for note in found.notes)


def _measure_often(path: Path, encoder, cache: Path, times: int) -> None:
    for turn in range(times):
        found = measure(path, with_recipe(encoder, max_length=1000 + turn // 4), cache)
        assert not found.notes, found.notes
        assert len(found.costs) == 5


def test_runs_at_once_do_not_disturb_each_other(rows, encoder, tmp_path):
    cache = tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_measure_often, args=(rows, encoder, cache, 12)) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join(120)
    assert [other.exitcode for other in others] == [0, 0]
    assert measure(rows, encoder, cache).costs == measure(rows, encoder, None).costs


def test_the_cache_does_not_grow_for_ever(rows, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "KEPT_FILES", 3)
    cache = tmp_path / "cache"
    for i in range(5):
        measure(rows, with_recipe(encoder, max_length=1000 + i), cache)
        os.utime(entries(cache)[0], ns=(i, i))  # the clock's resolution may be too coarse
    assert len(entries(cache)) == 3


def test_where_costs_are_kept(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert cost_folder({}) == Path("/home/someone/.cache/vlft/costs")
    assert cost_folder({"XDG_CACHE_HOME": "/caches"}) == Path("/caches/vlft/costs")
    assert cost_folder({"XDG_CACHE_HOME": "relative"}) == Path("/home/someone/.cache/vlft/costs")
    assert cost_folder({"VLFT_COST_CACHE": "/fast", "XDG_CACHE_HOME": "/caches"}) == Path("/fast")
    assert cost_folder({"VLFT_COST_CACHE": "0"}) is None
    assert cost_folder({"VLFT_COST_CACHE": ""}) is None


def test_planning_and_training_use_the_cache(rows, base, opened, tmp_path, monkeypatch):
    from vlft.config.flags import ModelFlags
    from vlft.setup import open_base, trainable_rows

    monkeypatch.setenv("VLFT_COST_CACHE", str(tmp_path / "cache"))
    data = DataFlags(data_path=[str(rows)], on_bad_row="skip")
    opened_base = open_base(data, ModelFlags(model_id=str(base)), given=frozenset())
    first = facts(trainable_rows(data.data_path, data, opened_base, workers=0))
    opened.clear()
    assert facts(trainable_rows(data.data_path, data, opened_base, workers=0)) == first
    assert opened == []
    monkeypatch.setenv("VLFT_COST_CACHE", "0")
    assert facts(trainable_rows(data.data_path, data, opened_base, workers=0)) == first
    assert opened
