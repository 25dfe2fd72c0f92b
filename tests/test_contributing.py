"""CONTRIBUTING.md: its drawing of the path of a sample agrees with the code, and so do its floors, paths and rules."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import rooms
import yaml
from models import collator

from vlft.data import collate, sample
from vlft.model import forward

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
DRAWING = PAGE.partition("<!-- path: begin -->")[2].partition("<!-- path: end -->")[0]
#: Paths of files that a reader is to write.
NEW_FILES = {"vlft/families/<name>.py", "vlft/objectives/<name>.py"}


@pytest.mark.parametrize("name", re.findall(r"vlft\.[\w.]+:[\w.]+", DRAWING))
def test_functions_of_the_drawing_exist(name):
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    assert callable(found)


RECORDS = re.findall(r"^(\w+)\((\w[\w, ]*)\)", DRAWING, re.M)


def test_the_drawing_has_its_records():
    assert [name for name, _ in RECORDS] == [
        *("Sample", "Cost", "EncodedMedia", "EncodedSample", "Batch", "FlatOutput"),
    ]


@pytest.mark.parametrize(("name", "fields"), RECORDS)
def test_records_of_the_drawing_have_their_fields(name, fields):
    record = next(getattr(module, name) for module in (sample, collate, forward) if hasattr(module, name))
    there = [field.name for field in dataclasses.fields(record)] if dataclasses.is_dataclass(record) else None
    assert set(fields.split(", ")) <= set(there or record.__annotations__)


def test_shapes_of_the_drawing_are_those_of_a_batch(encoded):
    """Each letter has one value in all shapes of a batch of three rows."""
    rows = [encoded[name] for name in ("still", "two-turns", "text")]
    batch = collator()(rows)
    values: dict[str, int] = {}
    shapes = re.findall(r"(\w+) \[([\w +,]+)\]", DRAWING)
    checked = []
    for name, dims in shapes:
        if name not in batch or not hasattr(batch[name], "shape"):
            continue
        checked.append(name)
        size = tuple(batch[name].shape)
        words = dims.split(", ")
        assert len(words) == len(size), name
        for word, found in zip(words, size, strict=True):
            letter, _, more = word.partition(" + ")
            if letter.isdigit():
                assert int(letter) == found, name
            else:
                assert values.setdefault(letter, found - int(more or 0)) == found - int(more or 0), (name, word)
    assert set(checked) == {
        *("input_ids", "position_ids", "cu_seqlens", "still_pixels", "vision_grid", "supervised_rows", "targets"),
    }
    assert values["S"] == 3


def test_floors_are_those_of_the_rooms():
    shown = {}
    for floor, names in re.findall(r"^\| (\d) \| (`.*?) \| ", PAGE, re.M):
        shown |= dict.fromkeys(re.findall(r"`(\w+)`", names), int(floor))
    found = {room.partition(".")[0]: int(floor) for room, floor in rooms.FLOORS.items() if room != "__main__"}
    assert shown == found


def test_paths_exist():
    for name in set(re.findall(r"`((?:vlft|tests|scripts|examples)/[\w./<>]*)`", PAGE)) - NEW_FILES:
        assert (ROOT / name).exists(), name
    for name in re.findall(r"^\| `(\w+\.\w+)` \|", PAGE, re.M):
        assert (ROOT / "tests" / name).exists(), name


def test_there_are_twelve_rules():
    rules = PAGE.partition("## Twelve rules\n")[2].partition("\n## ")[0]
    assert re.findall(r"^(\d+)\. \*\*", rules, re.M) == [str(number) for number in range(1, 13)]


def test_a_bug_report_asks_for_what_is_needed():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8"))
    asked = {one["attributes"]["label"]: one for one in form["body"] if "id" in one}
    for label in ("Command", "Message", "vlft.json"):
        assert asked[label]["validations"]["required"], label
    assert len({one["id"] for one in asked.values()}) == len(asked)
