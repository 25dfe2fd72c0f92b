"""`vlft export` for chat templates that take thoughts as `reasoning_content` only, as that of Qwen3.8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from build import row, write_json
from transformers import AutoProcessor

from vlft.cli.main import main
from vlft.config.flags import DataFlags, ModelFlags
from vlft.demo.templates import TEMPLATES
from vlft.families import QWEN3_5
from vlft.preview import preview_rows

THOUGHTS = "<think>\nIt is {0}.\n</think>\n\nSo {0}."


@pytest.fixture(scope="module")
def base(base_of, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("apart") / "base"
    shutil.copytree(base_of(QWEN3_5), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES["qwen3.8"], encoding="utf-8")
    return folder


def as_messages(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the empty keys that parquet gives to each turn."""
    return [{key: value for key, value in turn.items() if value is not None} for turn in turns]


@pytest.mark.parametrize("kind", ["trl", "calibration", "verl"])
def test_thoughts_are_apart_where_the_template_takes_them_so(kind, base, tmp_path):
    """The stock processor makes the trained tokens of the exported messages, also with thoughts of earlier answers."""
    talk = row("First?", THOUGHTS.format("a"))
    talk["conversations"] += row("Then?", THOUGHTS.format("b"))["conversations"]
    data = write_json(tmp_path / "rows.json", [talk])
    assert main(["export", kind, str(data), str(tmp_path / "out"), "--model_id", str(base)]) == 0
    (trained,) = preview_rows(
        str(data), [0], DataFlags(), ModelFlags(model_id=str(base)), given=frozenset({"model_id"})
    )
    ids = trained.as_json()["input_ids"]
    processor = AutoProcessor.from_pretrained(base)
    rows = parquet.read_table(tmp_path / "out" / "data.parquet").to_pylist()
    for one in rows:
        messages = one["messages"] if kind == "calibration" else one["prompt"] + one.get("completion", [])
        text = processor.apply_chat_template(
            as_messages(messages),
            tokenize=False,
            add_generation_prompt=kind == "verl",
            enable_thinking=True,
            preserve_thinking=True,
        )
        made = processor.tokenizer(text, add_special_tokens=False).input_ids
        assert ids[: len(made)] == made
    assert len(made) == len(ids) or kind == "verl"


@pytest.mark.parametrize("kind", ["trl", "calibration"])
def test_each_row_has_the_arguments_of_the_template_with_which_it_is_trained(kind, base, tmp_path, capsys):
    data = write_json(tmp_path / "rows.json", [row("First?", THOUGHTS.format("a")), row("Colour?", "Red.")])
    assert main(["export", kind, str(data), str(tmp_path / "out"), "--model_id", str(base), "--json"]) == 0
    assert any("`chat_template_kwargs`" in line for line in json.loads(capsys.readouterr().out)["next"])
    trained = preview_rows(
        str(data), [0, 1], DataFlags(), ModelFlags(model_id=str(base)), given=frozenset({"model_id"})
    )
    processor = AutoProcessor.from_pretrained(base)
    rows = parquet.read_table(tmp_path / "out" / "data.parquet").to_pylist()
    for one, ours in zip(rows, trained, strict=True):
        messages = one["messages"] if kind == "calibration" else one["prompt"] + one["completion"]
        text = processor.apply_chat_template(as_messages(messages), tokenize=False, **one["chat_template_kwargs"])
        made = processor.tokenizer(text, add_special_tokens=False).input_ids
        assert made[: len(ours.as_json()["input_ids"])] == ours.as_json()["input_ids"]


def test_marks_in_the_text_that_verl_would_read_are_refused(base, tmp_path, capsys):
    from build import write_image

    write_image(tmp_path / "a.png", 60, 60)
    rows = [row("<image>What does <audio> mean?", "A mark.", image="a.png"), row("What does <audio> mean?", "A mark.")]
    data = write_json(tmp_path / "rows.json", rows)
    argv = ["export", "verl", str(data), str(tmp_path / "out"), "--model_id", str(base)]
    assert main(argv) == 1
    assert "the text has <audio>, which verl reads as a mark of media" in capsys.readouterr().err
    assert main([*argv, "--on_bad_row", "skip"]) == 0
    assert len(parquet.read_table(tmp_path / "out" / "data.parquet")) == 1
