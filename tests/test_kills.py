"""A run that is ended at any moment, a third of the times while it saves, and resumed: its results do not change.

`VLFT_KILLS=30 python -m pytest -m distributed tests/test_kills.py` ends each run 30 times; the default is a few times.
"""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from launch import vlft as vlft_process
from runs import FULL, VISION_LORA, arguments, lines, weights
from safetensors.torch import load_file

KILLS = int(os.environ.get("VLFT_KILLS", "3"))
DROPOUT = ("--lora_dropout", "0.1")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("towers", "number"),
    [
        pytest.param(FULL, signal.SIGKILL, id="full-kill"),
        pytest.param((*VISION_LORA, *DROPOUT), signal.SIGTERM, id="vision-lora-term", marks=pytest.mark.grid),
        pytest.param(FULL, signal.SIGTERM, id="full-term", marks=pytest.mark.grid),
        pytest.param((*VISION_LORA, *DROPOUT), signal.SIGKILL, id="vision-lora-kill", marks=pytest.mark.grid),
    ],
)
def test_a_run_that_is_ended_again_and_again_ends_as_if_it_had_not_been(
    base, mixed_json, media, tmp_path, train, towers, number
):
    more = (*towers, "--max_steps", "30", "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2",
            "--packing", "true", "--global_batch", "3", "--dataloader_num_workers", "1")  # fmt: skip
    whole = train(*more, name="whole")
    rng = random.Random(f"{towers}{number}")
    ended = runs = 0
    while ended < KILLS:
        out = tmp_path / f"run{runs}"
        argv = arguments(base, mixed_json, media, out, *more)
        while True:
            act = partial(_end, out=out, rng=rng, number=number, saving=ended % 3 == 0)
            # After the last signal the run finishes.
            ranks = vlft_process(argv, out=tmp_path, while_running=act if ended < KILLS else _wait)
            (rank,) = ranks
            _assert_whole(out)
            if rank.status == 0:
                break
            assert rank.status in (-number, 75), rank.output[-3000:]
            ended += 1
        runs += 1
        one, two = weights(whole), weights(out)
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert [line["loss"] for line in lines(out)] == [line["loss"] for line in lines(whole)]


def _wait(processes: list) -> None:
    pass


def _end(processes: list, *, out: Path, rng: random.Random, number: int, saving: bool) -> None:
    """Send the signal at a random moment, or while a checkpoint is written."""
    process = processes[0]
    first = set(out.glob("checkpoint-*"))
    until = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < until and set(out.glob("checkpoint-*")) <= first:
        time.sleep(0.002)  # without some progress no run would ever end
    if saving:
        while process.is_alive() and not (out / ".saving").exists():
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.04))
    else:
        time.sleep(rng.uniform(0, 0.5))
    if process.is_alive():
        os.kill(process.pid, number)


def _assert_whole(out: Path) -> None:
    """Every checkpoint with a final name has all its files."""
    for folder in out.glob("checkpoint-*"):
        for file in folder.glob("*.safetensors"):
            assert load_file(file)
        assert torch.load(folder / "optimizer.pt", weights_only=True)
        assert {"vlft.json", "trainer_state.json", "scheduler.pt", "rng_state.pth"} <= {
            p.name for p in folder.iterdir()
        }
