"""`--method grpo` on the command line, before a model is loaded: what is refused, and with which words. Without TRL."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from vlft.cli.main import main
from vlft.config.grpo import GrpoFlags, defaults, settings_of
from vlft.train.grpo import start


@pytest.fixture
def refused(base, tmp_path, capsys, monkeypatch):
    """Run `vlft train --method grpo` on some rows and return what it says; its exit status must be 1."""
    monkeypatch.setattr(start, "PACKAGES", ())

    def run(*more: str, rows: list[dict] | None = None, reward: str | None = "edit_ratio", method: str = "grpo") -> str:
        data = tmp_path / "rows.json"
        talk = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
        data.write_text(json.dumps(rows or [{"id": "sum", "conversations": talk}]))
        asked = ["--reward", reward] if reward else []
        flags = ["--method", method, "--model_id", str(base), "--data_path", str(data), *asked, *more]
        assert main(["train", *flags, "--output_dir", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--packing", "true"), "--packing true has no effect with --method grpo"),
        (("--pack_tokens", "400"), "--pack_tokens has no effect with --method grpo: completions are padded"),
        (("--reference", "live"), "--reference live has no effect with --method grpo: it belongs to --method dpo"),
        (("--lora_dropout", "0.1"), "--lora_dropout 0.1 with --method grpo"),
        (("--turns", "split"), "--turns split with --method grpo"),
        (("--rollout", "vllm"), "--rollout vllm is not supported yet"),
        (("--deepspeed", "zero3"), "--deepspeed zero3 with --method grpo was not tried"),
        (("--beta", "0.1", "--language", "full"), "--beta 0.1 needs an adapter that can be switched off"),
        (("--beta", "0", "--temperature", "0"), "--temperature is 0, must be more than 0"),
        (("--num_generations", "1"), "--num_generations is 1, must be at least 2"),
        (("--temperature", "0"), "--temperature is 0, must be more than 0"),
        (("--per_device_train_batch_size", "3"), "a step has 3 completions (--per_device_train_batch_size 3 x "),
        (
            ("--global_batch", "1", "--per_device_train_batch_size", "3"),
            "--global_batch 1 x 8 completions (--num_generations) is not a multiple of 3",
        ),
        (("--cache_vision_features", "true"), "--cache_vision_features has no effect with --method grpo"),
        (("--num_completions_to_print", "3"), "--num_completions_to_print 3 has no effect without "),
    ],
)
def test_flags_that_do_not_go_with_grpo(refused, flags, text):
    assert text in refused(*flags)


def test_a_reward_that_is_replaced_is_named(refused):
    text = refused("--reward", "iou")
    assert "--reward edit_ratio (a later --reward iou replaces it. Several values: --reward A B)" in text


@pytest.mark.parametrize(
    "flags",
    [
        ("--eval_path", "rows.json"),
        ("--eval_strategy", "steps"),
        ("--eval_path", "rows.json", "--eval_strategy", "steps", "--load_best_model_at_end", "true"),
        ("--early_stopping_patience", "3"),
        ("--save_strategy", "best"),
    ],
)
def test_evaluation_is_refused_once(refused, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text("[]")
    text = refused(*flags)
    assert text.count("\n") == 1
    assert " ".join(flags[:1]) in text
    assert "a run with --method grpo does not evaluate" in text


def test_plan_counts_the_processes_of_gpus(base, tmp_path, capsys):
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([talk("2+2?")] * 8))
    flags = ["plan", "--method", "grpo", "--reward", "edit_ratio", "--model_id", str(base), "--data_path", str(data)]
    assert main([*flags, "--gpus", "3", "--global_batch", "4"]) == 1
    assert "is not a multiple of 24 (--per_device_train_batch_size 8 x 3 processes)" in capsys.readouterr().err
    small = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
    assert main([*flags, *small]) == 1
    assert "a step has 4 completions" in capsys.readouterr().err
    assert main([*flags, *small, "--gpus", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps_per_epoch"] == 8


@pytest.mark.parametrize(
    ("towers", "rate"),
    [
        ({}, 1e-5),
        ({"merger": "full"}, 1e-5),
        ({"merger": "full", "language": "frozen"}, 1e-6),
        ({"language": "full"}, 1e-6),
        ({"vision": "full", "language": "frozen"}, 1e-6),
    ],
)
def test_the_rate_of_full_weights(towers, rate):
    assert defaults({"method": "grpo", **towers})["learning_rate"] == rate


def test_another_trl_is_refused_before_the_model(refused, monkeypatch):
    monkeypatch.setattr(start, "PACKAGES", ("trl",))
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(start.importlib.metadata, "version", lambda name: "0.24.0")
    assert "--method grpo needs TRL 1.16, and 0.24.0 is installed. Install: pip install" in refused()
    monkeypatch.setattr(start.importlib.metadata, "version", lambda name: f"{start.TRL}.0")
    monkeypatch.setitem(sys.modules, "vlft.train.grpo.trainer", None)
    assert "--method grpo: TRL 1.16.0 cannot be imported: ModuleNotFoundError: " in refused()


def test_the_release_of_trl_is_that_of_the_extra():
    extras = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert f"trl=={start.TRL}.0" in extras["grpo"]


def test_grpo_flags_belong_to_grpo(refused):
    text = refused("--num_generations", "4", method="sft")
    assert "--num_generations 4 has no effect with --method sft: it belongs to --method grpo" in text
    text = refused("--log_completions", "true", method="sft")
    assert "--log_completions true has no effect with --method sft: it belongs to --method grpo" in text
    assert settings_of("sft", GrpoFlags()) == {}


def test_a_reward_is_needed(refused):
    assert "--method grpo needs --reward: what a completion is worth" in refused(reward=None)


def test_without_the_extra(refused, monkeypatch):
    monkeypatch.setattr(start, "PACKAGES", ("no_such_trl", "no_such_datasets"))
    text = refused()
    assert "the packages no_such_trl and no_such_datasets are not installed" in text
    assert "pip install 'vlft[grpo]'" in text


def test_a_file_that_does_not_import(refused, tmp_path):
    (tmp_path / "wrong.py").write_text("import no_such_module\n")
    text = refused(reward=f"{tmp_path / 'wrong.py'}:reward")
    assert "wrong.py:1 raised ModuleNotFoundError" in text
    assert "Traceback" not in text


def talk(question: str, answer: str = "4", **more: str) -> dict:
    return {**more, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


VIDEO = "pictures only, and this is a video"
ROOM = r"the prompt is [\d,]+ tokens long \(0 of them pictures\), a completion may have 256 .*--max_length is 500"


@pytest.fixture
def refusing(base, media, tmp_path) -> Path:
    """Three rows: a video, a prompt without room for a completion, and a row that can be trained."""
    data = tmp_path / "three.json"
    clip = talk("<video>What?", video=str(media / "clip.mp4"), id="clip")
    data.write_text(json.dumps([clip, talk("long " * 60), talk("2+2?")]))
    return data


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("train", ("--output_dir", "out")),
        ("check-data", ()),
        ("check-data", ("--headers_only",)),
        ("plan", ()),
        ("preview", ("--index", "0")),
        ("preview", ("--index", "1")),
    ],
)
def test_rows_that_grpo_cannot_take_are_refused_by_every_verb(
    verb, more, base, refusing, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(start, "PACKAGES", ())
    monkeypatch.chdir(tmp_path)
    data = ["--data_path"] * (verb in ("train", "plan")) + [str(refusing)]
    method = ["--method", "grpo", "--model_id", str(base), "--max_length", "500", "--allow_outside_folder", "true"]
    reward = ["--reward", "edit_ratio"] if verb in ("train", "plan") else []
    assert main([verb, *data, *more, *method, *reward]) == 1
    said = "".join(capsys.readouterr())
    assert (VIDEO in said) is (more != ("--index", "1"))
    assert (re.search(ROOM, said) is not None) is (verb != "preview" or more == ("--index", "1"))
    if verb in ("train", "plan"):
        assert "2 of 3 rows cannot be trained" in said
        assert "train on the rest: --on_bad_row skip" in said


def test_export_leaves_out_what_grpo_cannot_take(base, refusing, tmp_path, capsys):
    flags = ["--method", "grpo", "--model_id", str(base), "--max_length", "500", "--allow_outside_folder", "true"]
    assert main(["export", "verl", str(refusing), str(tmp_path / "out"), *flags, "--on_bad_row", "skip"]) == 0
    said = "".join(capsys.readouterr())
    assert "1 of 3 rows" in said
    assert re.search(ROOM, said)


@pytest.mark.parametrize(("kind", "limit"), [("verl", "data.max_response_length"), ("trl", "max_completion_length")])
def test_export_names_the_limit_of_completions(base, refusing, tmp_path, capsys, kind, limit):
    flags = ["--method", "grpo", "--model_id", str(base), "--allow_outside_folder", "true", "--on_bad_row", "skip"]
    for more, length in (((), 256), (("--max_completion_length", "99"), 99)):
        assert main(["export", kind, str(refusing), str(tmp_path / f"out{length}"), *flags, *more]) == 0
        said = capsys.readouterr().out
        assert f"{limit}={length} " in said
        assert "max_length=None" not in said


def test_check_data_counts_tokens_of_prompts(base, tmp_path, capsys):
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([talk("long " * 600)]))
    report = tmp_path / "report"
    assert main(["check-data", str(data), "--method", "grpo", "--model_id", str(base), "--report", str(report)]) == 0
    said = capsys.readouterr().out
    assert "tokens of prompts in all; a row has" in said
    assert "trained (0" not in said
    assert "are trained" not in said
    assert "of them trained" not in (report / "report.html").read_text()
    assert main(["check-data", str(data), "--model_id", str(base)]) == 0
    assert "a step learns little from so long a row" in capsys.readouterr().out


def test_check_data_finds_videos_without_a_base(refusing, capsys):
    flags = [str(refusing), "--method", "grpo", "--allow_outside_folder", "true", "--json"]
    assert main(["check-data", *flags]) == 1
    (bad,) = json.loads(capsys.readouterr().out)["bad"]
    assert bad["id"] == "clip"
    assert VIDEO in bad["reason"]


def test_costs_of_another_completion_length_are_not_reused(base, refusing, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("VLFT_COST_CACHE", str(tmp_path / "costs"))
    flags = ["--method", "grpo", "--reward", "edit_ratio", "--model_id", str(base), "--data_path", str(refusing)]
    flags += ["--max_length", "500", "--on_bad_row", "skip", "--allow_outside_folder", "true", "--json"]
    found = []
    for length in ("256", "8", "256"):
        assert main(["plan", *flags, "--max_completion_length", length]) == 0
        found.append(json.loads(capsys.readouterr().out)["rows"])
    assert found == [1, 2, 1]


def test_a_prompt_that_is_too_long(refused):
    text = refused("--max_length", "64", "--max_completion_length", "8", rows=[talk("long " * 90)])
    assert "the prompt is" in text
    assert "a completion may have 8 (--max_completion_length)" in text
    assert "skip such rows with --over_length skip" in text


def test_all_rows_are_tried_with_a_reward_that_needs_more_than_an_answer(refused):
    text = refused(reward="iou", rows=[talk("Where?", "[0, 0, 10, 10]")] * 19 + [talk("Where?", "nowhere")])
    assert "rows.json[19]: " in text
    assert "iou needs a box in its answer" in text


def test_a_row_without_an_answer(refused):
    rows = [{"conversations": [{"from": "human", "value": "2+2?"}]}]
    assert "rows.json[0]" in refused(rows=rows)


def test_a_reward_that_needs_more_than_the_row_has(refused):
    text = refused(reward="iou")
    assert "the rows' own answers: " in text
    assert "rows.json[0]" in text
    assert "iou needs a box in its answer" in text
