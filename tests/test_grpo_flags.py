"""`--method grpo` on the command line, before a model is loaded: what is refused, and with which words. Without TRL."""

from __future__ import annotations

import json

import pytest

from vlft.cli.main import main
from vlft.config.grpo import GrpoFlags, settings_of
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


def test_rows_that_grpo_cannot_take(refused, media):
    clip = {
        "id": "clip",
        "video": str(media / "clip.mp4"),
        "conversations": [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "It slides."}],
    }
    text = refused("--allow_outside_folder", "true", rows=[clip])
    assert "rows.json[0]" in text
    assert "TRL's GRPO takes pictures only, and this row has a video" in text


def test_a_prompt_without_room_for_a_completion(refused):
    talk = [{"from": "human", "value": "long " * 40}, {"from": "gpt", "value": "4"}]
    text = refused("--max_length", "300", rows=[{"conversations": talk}])
    assert "--max_completion_length is 256; --max_length is 300" in text


def test_a_prompt_that_is_too_long(refused):
    talk = [{"from": "human", "value": "long " * 90}, {"from": "gpt", "value": "4"}]
    text = refused("--max_length", "64", "--max_completion_length", "8", rows=[{"conversations": talk}])
    assert "the prompt is" in text
    assert "skip such rows with --over_length skip" in text


def test_all_rows_are_tried_with_a_reward_that_needs_more_than_an_answer(refused):
    def talk(answer):
        return {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": answer}]}

    text = refused(reward="iou", rows=[talk("[0, 0, 10, 10]")] * 19 + [talk("nowhere")])
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
