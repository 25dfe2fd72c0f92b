"""`vlft eval` with models of several families, with thoughts, and with labels: what each model is asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from build import write_image
from evaluated import BASE, evaluated, lines, story_rows, write_lines

from vlft.demo.templates import TEMPLATES
from vlft.families import QWEN2_5_VL, QWEN3_5


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_model_of_another_family_is_asked_and_read_in_its_own_way(base_of, tmp_path):
    write_image(tmp_path / "a.png", 120, 90)
    box = "<|box_start|>(12,9),(60,45)<|box_end|>"
    rows = [{"image": "a.png", "question": "<image>Where?", "answer": f"Here: {box}", "references": ["There."]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    other = base_of(QWEN2_5_VL)
    words = ("rows.json", "--box_format", "pixels", "--max_new_tokens", 2)
    status, document, err = evaluated(BASE, *words, "--compare", other)
    assert status == 0, err
    assert list(document["models"]) == [str(BASE), str(other)]
    own, theirs = (lines(found["out"])[0] for found in document["models"].values())
    assert own["references"] == ["Here: <|box_start|>(100,100),(500,500)<|box_end|>", "There."]
    # Qwen2.5-VL counts pixels of the picture that it gets, here 112 x 84.
    assert theirs["references"] == ["Here: <|box_start|>(11,8),(56,42)<|box_end|>", "There."]
    # Each answer is that of the model alone, and is scored against the answer in the model's own boxes.
    status, alone, _ = evaluated(other, *words, "--out", "alone.jsonl")
    assert lines("alone.jsonl") == [theirs]
    assert alone["metrics"] == document["models"][str(other)]["metrics"]
    said = [{**line, "answer": line["references"][0]} for line in (own, theirs)]
    for name, line in zip(("own.jsonl", "theirs.jsonl"), said, strict=True):
        write_lines(tmp_path / name, [line])
    _, document, _ = evaluated("own.jsonl", "rows.json", "--compare", "theirs.jsonl", "--metric", "exact_match", "iou")
    assert [found["metrics"] for found in document["models"].values()] == [{"exact_match": 1, "iou": 1}] * 2


def test_a_right_answer_needs_no_thoughts(base_of, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(base_of(QWEN3_5), model)
    (model / "chat_template.jinja").write_text(TEMPLATES["qwen3.5"])
    write_lines(tmp_path / "rows.jsonl", [{"question": "1+1?", "answer": "2"}])
    words = (model, "rows.jsonl", "--max_new_tokens", 2)
    status, _, err = evaluated(*words, "--thinking", "on", "--out", "on.jsonl")
    assert status == 0, err
    assert lines("on.jsonl")[0]["answer"].startswith("<think>\n")
    assert evaluated(*words, "--thinking", "off", "--out", "off.jsonl")[0] == 0
    assert not lines("off.jsonl")[0]["answer"].startswith("<think>\n")


@pytest.fixture
def labelled(tmp_path) -> tuple[Path, Path]:
    """Four rows with a damaged picture in the second one, and their labels."""
    data = story_rows(tmp_path / "data", 4)
    rows = json.loads(data.read_text())
    labels = list(dict.fromkeys(row["conversations"][1]["value"] for row in rows))
    (tmp_path / "labels.txt").write_text("\n".join(labels), encoding="utf-8")
    content = (data.parent / rows[1]["image"][0]).read_bytes()
    (data.parent / "damaged.png").write_bytes(content[: len(content) // 2])
    rows[1]["image"][0] = "damaged.png"
    data.write_text(json.dumps(rows))
    return data, tmp_path / "labels.txt"


def test_labels_of_a_damaged_picture_are_skipped_and_large_batches_halved(labelled, tmp_path, monkeypatch):
    import torch

    import vlft.scoring

    data, labels = labelled
    words = (BASE, data, "--labels", labels)
    status, _, err = evaluated(*words)
    assert status == 1
    assert f"{data}[1]" in err
    real, sizes = vlft.scoring.endings_logprobs, []

    def small(speaker, prompts, endings, *, together):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("too large")
        return real(speaker, prompts, endings, together=together)

    assert evaluated(*words, "--on_bad_row", "skip", "--out", "whole.jsonl")[1]["skipped"] == 1
    monkeypatch.setattr(vlft.scoring, "endings_logprobs", small)
    status, document, err = evaluated(*words, "--on_bad_row", "skip", "--out", "halved.jsonl")
    assert status == 0, err
    assert (document["rows"], document["skipped"]) == (3, 1)
    assert sizes == [3, 1, 1, 1]
    assert "1 row is answered together from now on" in err
    one, other = lines("whole.jsonl"), lines("halved.jsonl")
    assert [line["index"] for line in one] == [line["index"] for line in other] == [0, 2, 3]
    for a, b in zip(one, other, strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-4)


def test_the_length_of_answers_has_no_effect_on_labels(labelled, capsys):
    from vlft.cli.main import main

    data, labels = labelled
    assert main(["eval", str(BASE), str(data), "--labels", str(labels), "--max_new_tokens", "3"]) == 2
    assert "--max_new_tokens 3 has no effect with --labels" in capsys.readouterr().err
