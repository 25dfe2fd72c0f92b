"""Preference rows: the forms of all kits give the same row, and faults name the field and both values."""

from __future__ import annotations

import json

import pytest
from build import FAMILY

from vlft.config.row_flags import RowFlags
from vlft.data.rows.forms import PAIR_FORMS
from vlft.data.rows.records import parse_record
from vlft.data.sample import Image, Text
from vlft.errors import DataError

PAIRS = RowFlags(pairs=True)


def parse(raw, flags=PAIRS):
    return parse_record(raw, file="t.json", index=0, image_folder="pics", family=FAMILY, flags=flags)


def brief(part):
    if isinstance(part, Text):
        return part.text
    return f"<{part.path}>" if isinstance(part, Image) else f"<{part.path or list(part.frames)}>"


def shape(turns):
    return [(turn.role, [brief(part) for part in turn.parts]) for turn in turns]


def refusal(raw, flags=PAIRS):
    with pytest.raises(DataError) as caught:
        parse(raw, flags)
    return caught.value.row


CAT = [("user", ["<pics/cat.jpg>", "What is it?"]), ("assistant", ["A cat."])]
DOG = [("assistant", ["A dog."])]


@pytest.mark.parametrize("form", PAIR_FORMS, ids=lambda form: "+".join(form.keys))
def test_the_examples_of_the_table_are_one_row(form):
    sample = parse(form.example)
    assert shape(sample.turns) == CAT
    assert shape(sample.rejected) == DOG
    assert sample.warnings == ()
    assert [turn.trained for turn in (*sample.turns, *sample.rejected)] == ["none", "all", "all"]
