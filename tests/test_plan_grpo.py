"""`vlft plan --method grpo`: completions and their cache against those of a real step, and what it says of time."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from build import row, write_json
from plans import plan, plan_and_text

from vlft.cli.main import main
from vlft.families import QWEN2_VL, QWEN3_5, sizes_of
from vlft.plan.sampling import cache_bytes

QUESTIONS = [row("<image>What is it?", "A temple.", image="china.jpg"), row("Two and two?", "4")]


@pytest.fixture
def flags(base, media, tmp_path):
    data = tmp_path / "rows.json"
    write_json(data, QUESTIONS)
    same = ["--method", "grpo", "--reward", "edit_ratio", "--num_generations", "4", "--global_batch", "2"]
    return [*same, "--model_id", base, "--data_path", data, "--image_folder", media, "--max_completion_length", "5"]


@pytest.mark.parametrize("family", [QWEN2_VL, QWEN3_5])
def test_the_cache_is_that_of_generate(base_of, family):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base_of(family))
    ids = torch.randint(5, 50, (3, 11))
    made = model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, return_dict_in_generate=True)
    values = [value for layer in made.past_key_values.layers for value in vars(layer).values()]
    tensors = [one for value in values for one in (value.values() if isinstance(value, dict) else [value])]
    real = sum(one.numel() * one.element_size() for one in tensors if isinstance(one, torch.Tensor))
    assert real == 3 * cache_bytes(sizes_of(model.config), 11 + 6 - 1, 4)  # the last token is not read again


def test_memory_has_the_completions_of_a_step(flags, capsys):
    found, text = plan_and_text(capsys, *flags, "--gpu", "h100", "--bf16", "false")
    memory = found["memory"]
    longest = found["longest"]["tokens"]
    assert memory["micro_batch"]["tokens"] == 4 * (longest + 5)
    assert f"sampled at once: 8 completions of up to {longest} + 5 tokens" in text
    assert memory["completions"] > 8 * memory["micro_batch"]["patches"] // 4 * 3 * 2 * 14 * 14 * 4
    more = plan(capsys, *flags, "--gpu", "h100", "--bf16", "false", "--max_completion_length", "105")["memory"]
    assert more["sampling"] > memory["sampling"]
    assert [one["strategy"] for one in memory["strategies"]] == ["ddp"]
    assert memory["hours"] is None
    assert "time: not predicted, because it is not known how long sampling takes" in text
    hours = plan(capsys, *flags, "--gpu", "h100", "--tokens_per_s", "100")["memory"]["hours"]
    assert hours == pytest.approx(4 * (found["tokens"] + 2 * 5) / 100 / 3600)


def test_a_step_of_answers_is_not_measured(flags, capsys):
    assert main(["plan", *map(str, flags), "--measure"]) == 1
    assert "it trains one step on the rows' own answers, not on completions" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_what_a_step_holds_is_what_the_trainer_holds(flags, capsys, tmp_path, monkeypatch):
    from vlft.train.grpo.trainer import GrpoTrainer

    real, held = GrpoTrainer._generate_and_score_completions, []

    def generate(trainer, inputs):
        made = real(trainer, inputs)
        held.append({name: value for name, value in made.items() if isinstance(value, torch.Tensor)})
        return made

    monkeypatch.setattr(GrpoTrainer, "_generate_and_score_completions", generate)
    assert main(["train", *map(str, flags), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]) == 0
    capsys.readouterr()
    one = held[0]
    assert len(one["completion_ids"]) == 8
    told = plan(capsys, *flags, "--gpu", "h100")["memory"]["completions"]
    # The plan takes the longest prompt and the most patches for each completion; here half of them have a picture.
    assert one["pixel_values"].numel() * 4 * 2 < told < one["pixel_values"].numel() * 4 * 2 * 1.1
