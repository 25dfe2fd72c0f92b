"""`vlft ui` with odd files and fields: an error stays in its panel, and nothing waits for a pipe."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from build import row, write_image, write_json

from vlft.errors import ConfigError
from vlft.setup.rows import open_some
from vlft.ui.commands import Form
from vlft.ui.desk import KEPT, Choices, Desk
from vlft.ui.folders import find
from vlft.ui.jobs import Jobs
from vlft.ui.rows import asked_row
from vlft.ui.runs import Curves, Runs, answered
from vlft.ui.screens import compare, data, look, train
from vlft.ui.thumbs import thumbs


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(jobs=Jobs(tmp_path / "jobs"), runs=Runs(), folder=str(tmp_path))


class List:
    """A component with choices, as Gradio's drop-down list."""

    choices = ()


def test_an_error_stays_in_its_panel(desk, caplog):
    desk.panel(["a", "b"], lambda form: 1 / 0)
    desk.panel([List(), "c"], lambda form: {}["<b>"])
    desk.panel(["d"], lambda form: ("\udcff fine",))
    desk.panel([List()], lambda form: (Choices(choices=("\udcff",)),))
    for _ in range(2):
        first, line, kept, second, fine, choices = desk.view(Form())
    assert first == ""
    assert "ZeroDivisionError" in line
    assert kept is KEPT
    assert "&lt;b&gt;" in second
    assert fine == "? fine"
    assert choices.choices == ("?",)
    assert sum("ZeroDivisionError" in str(one.exc_info) for one in caplog.records) == 1


def test_an_action_that_fails_says_so(desk):
    desk.action("button", lambda form: 1 / 0, "message")
    text, new = desk.act(desk.actions[0], Form())
    assert "ZeroDivisionError" in text
    assert new == {}


@pytest.mark.parametrize("index", ["²", "9" * 5000, "-1", "", "٣"])
def test_a_row_that_is_no_number_is_named(index, tmp_path):
    with pytest.raises(ConfigError, match="is no number of a row"):
        asked_row(str(tmp_path / "train.json"), index, "")
    with pytest.raises(ConfigError, match="need one number"):
        look.shifted(index, 1)


def test_nulls_and_lone_surrogates_in_fields_are_made_visible(desk, tmp_path):
    form = Form.of({"folder": "a\0b", "run": "r\0", "data": ["x\0", "\ud800"], "row_file": 3})
    assert (form.folder, form.run, form.data, form.row_file) == ("a␀b", "r␀", ("x␀", "?"), "3")
    assert "cannot be opened" in data.view(form)[-1]
    assert train.IDLE in train.view(Form(folder=str(tmp_path), run=form.run), desk)[1]


def test_names_that_are_not_utf8_are_listed(tmp_path):
    (tmp_path / os.fsdecode(b"sub\xff")).mkdir()
    (tmp_path / os.fsdecode(b"\xff.json")).write_text("[]")
    found = find(str(tmp_path))
    assert found.folders == ("sub\N{REPLACEMENT CHARACTER}",)
    assert Path(found.data[0][0]).name == "\N{REPLACEMENT CHARACTER}.json"


HUGE = "1" + "0" * 400
METRICS = [
    '{"step": Infinity, "loss": 1}',
    '{"step": NaN}',
    f'{{"step": {HUGE}, "loss": 1}}',
    '{"step": -1}',
    "[1]",
    f'{{"step": 3, "loss": {HUGE}, "step_s": Infinity, "max_steps": {HUGE}, "tokens_per_s": -Infinity, "lr": [1]}}',
    '{"step": 4, "loss": NaN, "step_s": 1e308, "max_steps": 0, "peak_gb": true, "grad_norm": "x"}',
]


@pytest.mark.parametrize("training", ["null", "[1]", '"x"', '{"finished": true}'])
def test_a_run_with_odd_numbers_is_shown(tmp_path, desk, training):
    (tmp_path / "vlft.json").write_text(f'{{"base_model": null, "training": {training}}}')
    (tmp_path / "metrics.jsonl").write_text("".join(one + "\n" for one in METRICS))
    described = [
        {"file": "e.json", "index": 0, "media": [1], "turns": [1, {"text": ["<image>"]}], "right": None},
        {"file": "e.json", "index": 1, "media": None, "turns": None},
        {"file": "e.json", "index": 2, "media": [{"path": 3}, {"path": "a\0b"}, None]},
        *(None, {"file": []}),
    ]
    lines = [{"step": 0, "rows": [one]} for one in described]
    lines.append({"step": float("inf"), "answers": [{"file": "e.json", "index": 0, "answer": "no"}]})
    lines.append({"step": 2, "answers": [{"file": "e.json", "index": 0, "answer": "yes"}]})
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    rows, _ = answered(tmp_path)
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert rows[0]["answers"] == [(2, "yes")]
    _, html = train.view(Form(folder=str(tmp_path), run=str(tmp_path)), desk)
    assert "step 4" in html
    assert train.base_of(str(tmp_path)) == ""


def test_nothing_waits_for_a_pipe(tmp_path, desk):
    (tmp_path / "sub").mkdir()
    for name in ("sub/config.json", "vlft.json", "metrics.jsonl", "answers.jsonl", ".lock", "x.json", "a.png"):
        os.mkfifo(tmp_path / name)
    assert find(str(tmp_path)).data == ()
    assert not Curves(path=tmp_path / "metrics.jsonl").update()
    assert answered(tmp_path) == ([], [])
    assert train.IDLE in train.view(Form(folder=str(tmp_path), run=str(tmp_path)), desk)[1]
    write_image(tmp_path / "b.jpg")
    assert [one["alt"] for one in thumbs([str(tmp_path / "a.png"), str(tmp_path / "b.jpg")])] == ["b.jpg"]


def test_a_finished_run_names_the_next_steps(tmp_path, desk):
    (tmp_path / "vlft.json").write_text('{"base_model": "m", "training": {"finished": true}}')
    _, html = train.view(Form(folder=str(tmp_path), run=str(tmp_path)), desk)
    assert "step 7 merges it" in html


def test_a_row_is_read_again_only_if_its_file_has_changed_and_its_screen_is_shown(tmp_path, desk, monkeypatch):
    file = write_json(tmp_path / "train.json", [row("Hi.", "A."), {"bad": 1}])
    (tmp_path / "vlft.json").write_text('{"base_model": "m"}')
    form = Form(folder=str(tmp_path), run=str(tmp_path), source="row", row_file=str(file), step=compare.STEP)
    read = []
    monkeypatch.setattr("vlft.ui.rows.open_some", lambda *given: read.append(given) or open_some(*given))
    assert compare.view(replace(form, step="1 Data"), desk) == (KEPT, KEPT)
    assert not read
    for _ in range(3):
        assert "Hi." in compare.view(form, desk)[1]
        assert "train.json" in compare.view(replace(form, row_index="1"), desk)[1]
    assert len(read) == 2
    write_json(file, [row("Hello again.", "B.")])
    assert "Hello again." in compare.view(form, desk)[1]


def test_marks_of_pictures_are_not_shown_as_text(tmp_path, desk):
    (tmp_path / "vlft.json").write_text('{"base_model": "m"}')
    turns = [{"role": "user", "text": "<image>\nIs <image> a tag?"}]
    described = {"file": "e.json", "index": 0, "turns": turns, "right": "Yes.", "media": [{"path": "gone.png"}]}
    (tmp_path / "answers.jsonl").write_text(json.dumps({"step": 0, "rows": [described]}) + "\n")
    _, html = train.view(Form(folder=str(tmp_path), run=str(tmp_path)), desk)
    assert ">Is &lt;image&gt; a tag?<" in html


def test_later_and_earlier_end_at_the_last_and_the_first_row(tmp_path, desk, monkeypatch):
    started = []
    monkeypatch.setattr(desk.jobs, "start", lambda words, **_: started.append(words[words.index("--index") + 1]))
    file = write_json(tmp_path / "train.json", [row("Hi.", str(i)) for i in range(6)])
    form = Form(folder=str(tmp_path), data=(str(file),), index="0-3")
    assert look.turned(form, 1, desk) == {"index": "4-5"}
    with pytest.raises(ConfigError, match=r"Row 5 is the last one of .*train\.json"):
        look.turned(replace(form, index="4-5"), 1, desk)
    assert look.turned(replace(form, index="4-5"), -1, desk) == {"index": "2-3"}
    with pytest.raises(ConfigError, match="Row 0 is the first one"):
        look.turned(form, -1, desk)
    assert look.start(replace(form, index="4-9"), desk) == {"index": "4-5"}
    assert look.start(replace(form, index="5-9"), desk) == {"index": "5"}
    assert look.start(replace(form, index="9"), desk) == {"index": "9"}  # the command says how many there are
    assert started == ["4-5", "2-3", "4-5", "5", "9"]
