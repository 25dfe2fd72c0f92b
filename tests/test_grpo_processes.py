"""`--method grpo` in two processes trains as in one, also where one has text alone and the other pictures."""

from __future__ import annotations

import importlib.util
import random
from collections import Counter

import launch
import pytest
import torch
from build import row, write_json
from runs import weights

pytestmark = [
    pytest.mark.grid,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed"),
]
ROWS = [
    row("<image>What is it?", "A temple.", image="china.jpg"),
    row("Two and two?", "Four."),
    row("<image><image>Compare.", "A flower and a cup.", image=["flower.jpg", "coffee.jpg"]),
    row("Three and three?", "Six."),
    row("<image>And this?", "A cup.", image="coffee.jpg"),
]


def same_completions() -> None:
    """Each copy of a prompt has the same completion in every run: what processes sample depends on their number."""
    from vlft.train.grpo.trainer import GrpoTrainer

    def completions(trainer, prompts, *_, **__):
        found, seen = [], Counter()
        for prompt in map(tuple, prompts):
            rng = random.Random(f"{prompt}/{seen[prompt]}")
            seen[prompt] += 1
            found.append([rng.randint(40, 120) for _ in range(rng.randint(2, 6))])
        return found, None

    GrpoTrainer._generate_single_turn = completions


def test_two_processes_train_as_one(base, media, tmp_path):
    write_json(tmp_path / "rows.json", ROWS)
    trained = {}
    for world in (1, 2):
        out = tmp_path / f"run{world}"
        flags = {
            "method": "grpo", "reward": "edit_ratio", "model_id": base, "data_path": tmp_path / "rows.json",
            "image_folder": media, "output_dir": out, "vision": "lora", "merger": "lora", "num_generations": 2,
            "global_batch": 2, "max_completion_length": 6, "learning_rate": "1e-3", "lora_rank": 4,
            "save_strategy": "no", "num_train_epochs": 2,
        }  # fmt: skip
        words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        (tmp_path / f"out{world}").mkdir()
        ended = launch.vlft(
            ["train", *words], world=world, out=tmp_path / f"out{world}", inside=same_completions, timeout=120
        )
        assert [one.status for one in ended] == [0] * world, ended[0].output
        trained[world] = weights(out)
    one, two = trained[1], trained[2]
    assert one.keys() == two.keys()
    for part in ("visual.blocks", "merger", "language_model"):
        assert any(bool(value.any()) for name, value in one.items() if part in name and "lora_B" in name), part
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
