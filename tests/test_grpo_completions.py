"""`completions.jsonl` of a GRPO run, its table in the terminal, the report and `vlft ui`. They need TRL."""

from __future__ import annotations

import importlib.util
import json
import re
from html import unescape
from pathlib import Path

import pytest
import torch
from runs import killed_after_a_checkpoint, lines, record_of

from vlft.cli.main import main
from vlft.train.grpo import completions
from vlft.train.grpo.start import INSTALL, PACKAGES

if any(importlib.util.find_spec(name) is None for name in PACKAGES):
    pytest.skip(f"TRL is not installed: {INSTALL}", allow_module_level=True)

from vlft.report import write_report
from vlft.text import printable
from vlft.train.grpo.trainer import GrpoTrainer
from vlft.ui.runs import newest

#: A reward file that writes down what it saw and what it said of it.
WITNESS = """
import json
def seen(completions, completion_ids, id, index, answer, trainer_state, log_extra, **columns):
    texts = [one[0]["content"] for one in completions]
    scores = [len(set(text)) / 8 + place / 16 for place, text in enumerate(texts)]
    log_extra("letters", [len(text) for text in texts])
    with open({path!r}, "a") as file:
        entry = [trainer_state.global_step + 1, texts, list(map(len, completion_ids)), id, index, scores]
        file.write(json.dumps(entry) + "\\n")
    return scores
"""


@pytest.fixture
def words(base, media, tmp_path):
    """The words of a quick run: five rows, two a step, two completions of each of up to 6 tokens."""
    talks = [
        ("one", "<image>What <b>is</b> it?", "A temple.", ["china.jpg"]),
        ("two", "<image><image>Compare.", "A flower and a cup.", ["flower.jpg", "coffee.jpg"]),
        ("sum", "2+2?", "<script>alert(1)</script>", []),
        ("who", "<image>Who?", "An astronaut.", ["astronaut.jpg"]),
        ("last", "<image>And this?", "A cup.", ["coffee.jpg"]),
    ]
    rows = [
        {"id": name, "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]}
        | ({"image": pictures} if pictures else {})
        for name, asked, said, pictures in talks
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "witness.py").write_text(WITNESS.format(path=str(tmp_path / "seen")))

    def of(*more: str, name: str = "run", **changed: str) -> list[str]:
        flags = {
            "method": "grpo", "reward": f"{tmp_path / 'witness.py'}:seen", "model_id": str(base),
            "data_path": str(tmp_path / "rows.json"), "image_folder": str(media), "output_dir": str(tmp_path / name),
            "num_generations": "2", "global_batch": "2", "max_completion_length": "6", "learning_rate": "1e-2",
            "lora_rank": "4", "save_strategy": "no",
        } | changed  # fmt: skip
        return ["train", *(word for flag, value in flags.items() for word in (f"--{flag}", value)), *more]

    return of


def kept(run: Path) -> list[dict]:
    return [json.loads(text) for text in (run / "completions.jsonl").read_text().splitlines()]


def test_the_file_holds_what_was_rewarded(words, tmp_path, monkeypatch, capsys):
    masks = []
    forward = GrpoTrainer._get_per_token_logps_and_entropies

    def watched(trainer, model, ids, mask, *more, **kwargs):
        masks.append(mask)
        return forward(trainer, model, ids, mask, *more, **kwargs)

    monkeypatch.setattr(GrpoTrainer, "_get_per_token_logps_and_entropies", watched)
    assert main(words("--log_completions", "--num_completions_to_print", "3")) == 0
    out, run = capsys.readouterr().out, tmp_path / "run"
    found, logged = kept(run), lines(run)
    seen = {entry[0]: entry for entry in map(json.loads, (tmp_path / "seen").read_text().splitlines()[1:])}
    assert [line["step"] for line in found] == [1, 1, 2, 2, 3, 3]
    for line in found:
        _, texts, lengths, names, indices, scores = seen[line["step"]]
        start = names.index(line["id"])
        assert line["index"] == indices[start]
        said = line["completions"]
        assert [one["completion"] for one in said] == texts[start : start + 2]
        assert [one["tokens"] for one in said] == lengths[start : start + 2]
        assert [one["extra"]["letters"] for one in said] == [str(len(text)) for text in texts[start : start + 2]]
        own = torch.tensor(scores[start : start + 2])
        assert [one["reward"] for one in said] == pytest.approx(own.tolist())
        assert [one["rewards"] for one in said] == [{"seen": one["reward"]} for one in said]
        assert [one["advantage"] for one in said] == pytest.approx(
            ((own - own.mean()) / (own.std() + 1e-4)).tolist(), rel=1e-4
        )
    for line in logged:
        own = [one for row in found if row["step"] == line["step"] for one in row["completions"]]
        assert line["reward"] == pytest.approx(sum(one["reward"] for one in own) / 4)
        assert line["completions/clipped_ratio"] == sum(one["cut"] for one in own) / 4
        assert line["supervised_tokens"] == sum(one["tokens"] for one in own)
    steps = [torch.cat([mask.flatten() for mask in masks[place : place + 2]]) for place in range(0, 6, 2)]
    assert [line["padding_fraction"] for line in logged] == pytest.approx(
        [1 - float(mask.float().mean()) for mask in steps], abs=1e-6
    )
    assert [line["tokens"] for line in logged] == [int(mask.sum()) for mask in steps]
    assert 0 < logged[0]["padding_fraction"] < 1
    (first, *_) = found
    assert f"step 1: {first['file']}[{first['index']}]: " in out
    assert out.count("  and 1 more of this step\n") == 3
    assert "; 12 completions, " in out
    assert re.search(r"^  reward +advantage +completion$", out, re.M)
    assert "log_completions" not in json.dumps(json.loads((run / "vlft.json").read_text()))


def test_equal_runs_and_a_killed_one_write_equal_files(words, tmp_path):
    flags = {"save_strategy": "steps", "save_steps": "2", "num_train_epochs": "2"}
    for name in ("whole", "equal"):
        assert main(words(name=name, **flags)) == 0
    with killed_after_a_checkpoint():
        main(words(name="killed", **flags))
    file = tmp_path / "killed" / "completions.jsonl"
    late = json.dumps({**kept(tmp_path / "whole")[-1], "step": 3})
    file.write_text(f"{file.read_text()}{late}\n{late[:40]}")  # as a run that was killed while it wrote
    assert main(words(name="killed", **flags)) == 0
    texts = [(tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "equal", "killed")]
    assert texts[0] == texts[1] == texts[2]
    assert [line["step"] for line in kept(tmp_path / "whole")] == [step for step in range(1, 7) for _ in range(2)]


def test_a_run_that_saved_nothing_starts_its_file_again(words, tmp_path, monkeypatch):
    def full(*_, **__):
        raise KeyError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(completions.Completions, "_line", full)
        with pytest.raises(KeyError):
            main(words())
    file = tmp_path / "run" / "completions.jsonl"
    file.write_text(json.dumps({"step": 1}) + "\n")
    assert main(words()) == 0
    assert all("completions" in line for line in kept(tmp_path / "run"))


def test_the_file_is_bounded(words, tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "KEPT_STEPS", 2)
    monkeypatch.setattr(completions, "KEPT", 3)
    monkeypatch.setattr(completions, "MOST_TEXT", 4)
    assert main(words(num_train_epochs="2", data_path=str(tmp_path / "rows.json"))) == 0
    found = kept(tmp_path / "run")
    assert [line["step"] for line in found] == [1, 3, 6]  # of 6: the first of each 3, and the last
    assert all(len(line["completions"]) == 2 for line in found)
    for line in found:
        assert re.fullmatch(r".{4}( \.\.\. and [\d,]+ more characters)?", line["right"], re.S)


def test_false_keeps_none(words, tmp_path):
    assert main(words("--log_completions", "false", "--max_steps", "1")) == 0
    assert not (tmp_path / "run" / "completions.jsonl").exists()
    assert "Completions during training" not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("values", ["[1]", "texts * 2"])
def test_a_column_needs_a_value_for_each_completion(values, words, tmp_path, capsys):
    file = tmp_path / "column.py"
    file.write_text(
        "def column(completions, log_extra, trainer_state, **columns):\n"
        "    texts = [one[0]['content'] for one in completions]\n"
        f"    log_extra('mine', {values})\n"
        "    return [0.0 for _ in completions]\n"
    )
    assert main(words(reward=f"{file}:column")) == 1
    assert "log_extra('mine') got" in capsys.readouterr().err


def test_the_page_shows_completions_by_their_rewards(words, tmp_path):
    assert main(words(num_train_epochs="3", reward=r"format:.*[aeiou].*")) == 0
    run = tmp_path / "run"
    html = (run / "report.html").read_text()
    part = html[html.index("Completions during training") : html.index("<h2>Rows</h2>")]
    assert html.count("<script>") == 1
    assert "<b>is</b>" not in html
    assert "What &lt;b&gt;is&lt;/b&gt; it?" in part
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in part
    assert part.count("data:image/jpeg;base64,") == 5
    assert "completions trained on" in html
    assert "padding of prompts and completions" in html
    found = kept(run)
    for one in re.findall(r"<table class=\"completions\">.*?</table>", part, re.S):
        rewards = [float(value) for value in re.findall(r"<tr><td>([\d.]+)</td>", one)]
        assert rewards == sorted(rewards, reverse=True)
    for row in {line["id"] for line in found}:
        steps = [line["step"] for line in found if line["id"] == row]
        section = next(text for text in part.split("<section>") if f"(id {row})" in text)
        shown = [int(step) for step in re.findall(r"step (\d+), mean reward", section)]
        assert (shown[0], shown[-1]) == (steps[0], steps[-1])
    first = part.split("<section>")[1]
    (line,) = (
        one for one in found if f"(id {one['id']})" in first and f"step {one['step']}, " in first.split("</table>")[0]
    )
    texts = {printable(one["completion"]) for one in line["completions"]}
    cells = re.findall(r'<span class="text">(.*?)</span>', first.split("</table>")[0], re.S)
    assert {unescape(text) for text in cells} == texts
    page = newest(run)
    assert {row["said"]["step"] for row in page} == {found[-1]["step"]}
    assert [row["id"] for row in page] == [line["id"] for line in found if line["step"] == found[-1]["step"]]


def test_a_damaged_file_is_counted_and_read_on(tmp_path):
    run = record_of(tmp_path / "run", steps=2, of=2, method="grpo")
    said = {"completion": "\x1b<b>", "reward": 0.5, "rewards": {"a": 0.5}, "advantage": 1.0, "cut": False, "tokens": 3}
    line = {"step": 2, "file": "f.json", "index": 1, "id": None, "turns": [{"role": "user", "text": "?"}], "right": "!",
            "media": [{"kind": "image", "path": "/no/such.jpg"}], "completions": [said, said]}  # fmt: skip
    bad = [{**line, "completions": []}, {**line, "turns": 3}, {**line, "completions": [{**said, "reward": "x"}]}]
    bad += [{**line, "step": 1e999}, 7, {**line, "media": [4]}]
    good = [json.dumps(one) for one in [*bad, line]]
    (run / "completions.jsonl").write_text("\n".join([*good, "{", good[-1][:30]]))
    html = write_report(run).read_text()
    assert f"{len(bad) + 1} lines of its files could not be read" in html
    assert "␛&lt;b&gt;" in html
    assert "2 times" in html
    assert "image such.jpg" in html
    (row,) = newest(run)
    assert row["said"]["count"] == 2
