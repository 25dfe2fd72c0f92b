"""Rows that are split into samples, one for each answer: through the commands, against the same samples as rows."""

from __future__ import annotations

import json
import shutil
from itertools import chain
from pathlib import Path

import pytest
from build import row, write_json
from mishaps import before_each_loss
from runs import FULL, assert_same, lines

from vlft import load_rows, open_base
from vlft.cli.main import main
from vlft.demo.templates import TEMPLATES
from vlft.model.load import load_processor

THOUGHT = "<think>\nIt is {}.\n</think>\n\nSo {}."


@pytest.fixture(scope="module")
def thinking_base(base, tmp_path_factory) -> Path:
    """The tiny base with a chat template that drops the thoughts of earlier answers."""
    folder = tmp_path_factory.mktemp("thinking") / "base"
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES["qwen3.5"], encoding="utf-8")
    return folder


def talk(*answers: str, **keys) -> dict:
    said = [turn for i, answer in enumerate(answers) for turn in (("human", f"Q{i}?"), ("gpt", answer))]
    return {**keys, "conversations": [{"from": who, "value": text} for who, text in said]}


def as_samples(raw: dict) -> list[dict]:
    """A row as one row for each answer, in which only this answer is trained."""
    found, turns = [], raw["conversations"]
    for place in range(1, len(turns), 2):
        history = [{**turn, "loss": False} if turn["from"] == "gpt" else turn for turn in turns[:place]]
        found.append({**raw, "conversations": [*history, turns[place]]})
    return found


ROWS = [
    talk("A.", THOUGHT.format("b", "b"), "C.", id="three"),
    talk("Only one.", id="one"),
    talk(THOUGHT.format("d", "d"), "E.", id="two"),
]


@pytest.fixture
def data(tmp_path) -> tuple[Path, Path]:
    """`ROWS`, and the samples that they become, as rows."""
    apart = [one for raw in ROWS for one in as_samples(raw)]
    return write_json(tmp_path / "rows.json", ROWS), write_json(tmp_path / "apart.json", apart)


def train(base: Path, data: Path, out: Path, *more: str) -> Path:
    flags = ["--model_id", str(base), "--data_path", str(data), "--output_dir", str(out), "--use_cpu", "true"]
    flags += ["--save_strategy", "no", "--logging_steps", "1", "--dataloader_num_workers", "0", *more]
    assert main(["train", *flags]) == 0
    return out


def test_split_rows_train_as_their_samples_alone(thinking_base, data, tmp_path, capsys, monkeypatch):
    rows, apart = data
    more = (*FULL, "--num_train_epochs", "2", "--packing", "false", "--learning_rate", "1e-3")
    steps = ("--gradient_accumulation_steps", "6")
    seen = []
    before_each_loss(monkeypatch, lambda _, batch: seen.append([index for _, index in batch["rows"]]))
    run = train(thinking_base, rows, tmp_path / "split", *more, *steps)
    assert sorted(chain(*seen[:6])) == [0, 0, 0, 1, 2, 2]
    out = capsys.readouterr().out
    assert f"{rows}: 3 rows, 3 to train" in out
    assert "samples: 3 rows with 2 trained answers on average -> 6 samples" in out
    assert "global batch: 6 samples" in out
    assert "trained with thoughts (2 samples) and without (4)" in out
    alone = train(thinking_base, apart, tmp_path / "apart", *more, *steps)
    assert_same(run, alone)
    packed = ("--packing", "true", "--pack_tokens", "200", "--gradient_accumulation_steps", "9")
    pack = train(thinking_base, rows, tmp_path / "packed", *FULL, *more[6:8], *more[-2:], *packed)
    assert_same(pack, alone)
    record = json.loads((run / "vlft.json").read_text())
    (entry,) = record["data"]
    assert (entry["rows"], entry["trained"], entry["skipped"], entry["samples"]) == (3, 3, [], 6)
    assert record["training"]["rows"] == 3
    assert record["training"]["thought"] == {"on": 2, "off": 4}
    assert sum(line["samples"] for line in lines(run)) == 12


def said_by(capsys, *argv: str) -> dict:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_commands_agree_on_rows_and_samples(thinking_base, data, tmp_path, capsys):
    rows, apart = map(str, data)
    base = ("--model_id", str(thinking_base))
    checked, alone = (said_by(capsys, "check-data", one, *base) for one in (rows, apart))
    assert (checked["rows"], checked["ok"], checked["samples"]) == (3, 3, 6)
    assert (alone["rows"], alone["samples"]) == (6, 6)
    planned = said_by(capsys, "plan", "--data_path", rows, *base, "--packing", "false")
    assert (planned["rows"], planned["samples"], planned["steps_per_epoch"]) == (3, 6, 6)
    assert planned["files"][0]["trained"] == 3
    shown = said_by(capsys, "preview", rows, *base, "--index", "0-2")["rows"]
    assert [len(one.get("samples", [one])) for one in shown] == [3, 1, 2]
    three = shown[0]
    assert three["input_ids"] is None
    assert [one["answer"] for one in three["samples"]] == [f"conversations[{k}]" for k in (1, 3, 5)]
    assert three["tokens"] == sum(len(one["input_ids"]) for one in three["samples"])
    totals = {sum(one["tokens"] for one in shown), planned["tokens"], checked["tokens"]["total"]}
    assert len(totals) == 1
    assert sum(bucket["rows"] for bucket in checked["tokens"]["histogram"]) == 6
    assert checked["tokens"]["supervised"] == planned["supervised_tokens"] == alone["tokens"]["supervised"]
    assert main(["check-data", rows, *base, "--report", str(tmp_path / "report")]) == 0
    out = capsys.readouterr().out
    assert "3 rows with 2 trained answers on average -> 6 samples" in out
    assert main(["plan", "--data_path", rows, *base]) == 0
    assert "longest sample: " in capsys.readouterr().out
    assert main(["preview", rows, *base, "--html", str(tmp_path / "row.html")]) == 0
    out = capsys.readouterr().out
    assert "rows.json[0] (id three): 3 samples" in out
    assert "the sample that ends with conversations[3]" in out
    assert "⟦It is b.\n</think>\n\nSo b.<|im_end|>⟧" in out
    page = (tmp_path / "row.html").read_text()
    assert page.count("the sample that ends with") >= 3


def test_a_row_is_refused_whole_and_says_which_sample(thinking_base, data, capsys):
    """The longest sample of row 0 does not fit; its shorter ones are not trained either."""
    rows = str(data[0])
    argv = ["--model_id", str(thinking_base), "--max_length", "98"]
    assert main(["check-data", rows, *argv, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    (bad,) = found["bad"]
    assert (bad["index"], found["ok"], found["samples"]) == (0, 2, 3)
    assert bad["reason"].startswith("the row up to conversations[5] is 99 tokens long")
    argv = ["plan", "--data_path", rows, *argv, "--over_length", "skip", "--packing", "false", "--json"]
    assert main(argv) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["rows"], planned["samples"], planned["files"][0]["skipped"]) == (2, 3, 1)
    small = ["plan", "--data_path", rows, "--model_id", str(thinking_base), "--pack_tokens", "90"]
    assert main(small) == 1
    assert "the row up to turn 5 (counted from 0): 99 tokens fit no pack" in capsys.readouterr().err


def test_a_mix_draws_rows_with_all_their_samples(thinking_base, data, tmp_path):
    rows, _ = data
    other = write_json(tmp_path / "other.json", [row(f"Q{i}?", f"{i}.") for i in range(4)])
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"- {{path: {rows}, repeat: 2}}\n- {{path: {other}, cap: 2}}\n")
    base = open_base(thinking_base)
    found = load_rows(base, data_mix=str(mix))
    assert len(found) == 2 * 6 + 2
    measured = found.measured
    assert len(measured.starts) == 2 * 3 + 2
    assert (measured.drawn[str(rows)].rows, measured.drawn[str(rows)].draws) == (3, 6)
    ends = [(sample.index, sample.answer) for sample in list(found)[:12]]
    one = [(0, 1), (0, 3), (0, 5)]
    assert ends == 2 * one + 2 * [(1, None)] + 2 * [(2, 1), (2, 3)]


def test_turns_of_the_flag(base, thinking_base, data, capsys):
    """On a template that renders every row in one text, rows are split only if the flag says so."""
    rows = str(data[0])

    def samples(where: Path, turns: str) -> tuple[int, int]:
        argv = ("plan", "--data_path", rows, "--model_id", str(where), "--turns", turns, "--packing", "false")
        found = said_by(capsys, *argv)
        return found["rows"], found["samples"]

    assert samples(base, "auto") == (3, 3)
    assert samples(base, "split") == (3, 6)
    assert samples(base, "last") == samples(thinking_base, "last") == (3, 3)
    assert samples(thinking_base, "split") == (3, 6)


def test_a_resumed_run_has_the_same_samples(thinking_base, data, tmp_path, monkeypatch, capsys):
    rows, _ = data
    more = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    more += ["--lora_rank", "4", "--packing", "false"]
    whole = train(thinking_base, rows, tmp_path / "whole", *more)

    def stop(trainer, batch):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        before_each_loss(patch, stop)
        with pytest.raises((AssertionError, KeyboardInterrupt)):
            train(thinking_base, rows, tmp_path / "stopped", *more)
    resumed = train(thinking_base, rows, tmp_path / "stopped", *more)
    assert "resuming from" in capsys.readouterr().out
    assert_same(resumed, whole, 0)
    argv = ["train", "--model_id", str(thinking_base), "--data_path", str(rows), "--output_dir", str(resumed)]
    assert main([*argv, "--use_cpu", "true", *more, "--turns", "last"]) == 1
    assert "its turns are auto, this run's are last" in capsys.readouterr().err


def test_a_run_says_how_to_serve_it_and_chats_so(thinking_base, tmp_path, capsys):
    """An adapter that was trained without thoughts, then merged."""
    rows = write_json(tmp_path / "rows.json", [talk("A.", "B."), talk("C.")])
    run = train(thinking_base, rows, tmp_path / "run", "--max_steps", "1", "--lora_rank", "4", "--thinking", "off")
    chosen = "'{\"enable_thinking\": false}'"
    out = capsys.readouterr().out
    assert f"--default-chat-template-kwargs {chosen}" in out
    assert out.strip().splitlines()[-1].startswith("merge:")
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    out = capsys.readouterr().out
    assert f"serve    transformers serve {tmp_path / 'merged'} --chat-template-kwargs {chosen}\n" in out
    assert f"--default-chat-template-kwargs {chosen}" in out
    assert "--jinja --image-min-tokens" in out
    assert f" --chat-template-kwargs {chosen}\n" in out
    tokenizer = load_processor(thinking_base).tokenizer
    asked = [{"role": "user", "content": "Hi."}]
    on, off = (
        len(tokenizer.apply_chat_template(asked, add_generation_prompt=True, enable_thinking=one).input_ids)
        for one in (True, False)
    )
    for where, more, tokens in (
        (run, (), off),
        (tmp_path / "merged", (), off),
        (run, ("--thinking", "on"), on),
        (thinking_base, (), on),
        (thinking_base, ("--thinking", "off"), off),
    ):
        found = said_by(capsys, "chat", str(where), "Hi.", "--max_new_tokens", "1", *more)
        assert found["prompt_tokens"] == tokens


def test_chat_refuses_a_choice_that_the_model_does_not_have(base, capsys):
    assert main(["chat", str(base), "Hi.", "--thinking", "on"]) == 1
    assert "does not take enable_thinking" in capsys.readouterr().err
