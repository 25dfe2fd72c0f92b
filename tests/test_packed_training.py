"""Training on packs through the command line: the same as on their rows alone, on any split, and after a kill."""

from __future__ import annotations

import json
from itertools import chain

import pytest
import torch
from launch import vlft as vlft_process
from mishaps import before_each_loss
from runs import FULL, PACKED, VISION_LORA, arguments, assert_same, lines, losses, split, weights

from vlft.cli.main import main

#: `test_train` has ZeRO-2 on two processes, `test_deepspeed` ZeRO-3.
GRID_ZERO2 = [pytest.param(("--deepspeed", "zero2"), id="zero2", marks=pytest.mark.grid)]
LANGUAGE_LORA: tuple[str, ...] = ()


@pytest.mark.parametrize("towers", [FULL, LANGUAGE_LORA, VISION_LORA], ids=["full", "lora", "vision-lora"])
def test_packs_train_as_their_rows_alone(train, towers):
    """A step of all rows: seven micro-batches of one row, three packs, or one pack of everything."""
    alone = train(*towers, *split(1, 7), name="alone")
    assert len(losses(alone)) == 2
    for name, more in {
        "three": (*PACKED, "--gradient_accumulation_steps", "3"),
        "one": ("--packing", "true"),
        "by rows": (*PACKED, "--global_batch", "7"),
    }.items():
        assert_same(train(*towers, *more, name=name), alone)


def test_every_epoch_trains_every_row_once(train, monkeypatch):
    packs = []
    before_each_loss(monkeypatch, lambda _, batch: packs.append([i for _, i in batch["rows"]]))
    run = train(*PACKED)
    assert len(packs) == 6
    assert sorted(chain(*packs[:3])) == sorted(chain(*packs[3:])) == list(range(7))
    assert [line["samples"] for line in lines(run)] == [len(pack) for pack in packs]
    assert all(line["tokens"] <= 400 for line in lines(run))


def test_a_step_of_few_rows(train, capsys):
    """Packs smaller than the budget allows, where one would hold more rows than a step is to have."""
    run = train("--packing", "true", "--global_batch", "2", "--num_train_epochs", "1")
    assert "1 pack (1 accumulated x 1 process)" in capsys.readouterr().out
    assert 3 <= len(losses(run)) <= 5
    assert sum(line["samples"] for line in lines(run)) == 7


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy", [pytest.param((), id="ddp"), pytest.param(("--deepspeed", "zero1"), id="zero1"), *GRID_ZERO2]
)
def test_two_processes_train_the_same_packs_as_one(train, base, mixed_json, media, tmp_path, strategy):
    whole = train(*FULL, *PACKED, "--gradient_accumulation_steps", "4", name="one")
    out = tmp_path / "two"
    argv = arguments(base, mixed_json, media, out, *FULL, *PACKED, "--gradient_accumulation_steps", "2", *strategy)
    for rank in vlft_process(argv, world=2, out=tmp_path):
        assert rank.status == 0, rank.output[-3000:]
    assert_same(out, whole)


@pytest.mark.distributed
def test_the_global_batch_is_settled_for_deepspeed_too(base, mixed_json, media, tmp_path, train):
    """Three micro-batches a step, known only once the rows are packed; DeepSpeed's settings were filled in before."""
    whole = train(*FULL, *PACKED, "--gradient_accumulation_steps", "3", name="whole")
    out = tmp_path / "deepspeed"
    argv = arguments(base, mixed_json, media, out, *FULL, *PACKED, "--global_batch", "7", "--deepspeed", "zero1")
    (rank,) = vlft_process(argv, out=tmp_path)
    assert rank.status == 0, rank.output[-3000:]
    assert_same(out, whole)


def test_a_killed_run_goes_on_with_the_same_packs(train, base, mixed_json, media, tmp_path):
    """In the middle of the second epoch, with workers and dropout."""
    steps = ("--save_strategy", "steps", "--save_steps", "2", "--num_train_epochs", "3")
    more = (*VISION_LORA, *PACKED, "--lora_dropout", "0.1", "--dataloader_num_workers", "2", *steps)
    whole = train(*more, name="whole")
    out = tmp_path / "killed"
    argv = arguments(base, mixed_json, media, out, *more)
    (killed,) = vlft_process(argv, out=tmp_path, kill_in_step=6)
    assert killed.status == -9, killed.output[-3000:]
    assert main(argv) == 0
    a, b = weights(out), weights(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert losses(out) == losses(whole)


def test_other_packs_are_another_run(train, base, mixed_json, media, tmp_path, capsys):
    train(*PACKED, "--save_strategy", "steps", "--save_steps", "1")
    argv = arguments(base, mixed_json, media, tmp_path / "run", "--packing", "true", "--pack_tokens", "300")
    assert main(argv) == 1
    assert "its packing is tokens 400, patches 1600, this run's is tokens 300" in capsys.readouterr().err


def test_a_run_from_before_packing_is_not_gone_on_with_in_packs(train, base, mixed_json, media, tmp_path, capsys):
    """Its record says nothing of packs, and one row a step is as many as one pack a step."""
    run = train("--save_strategy", "steps", "--save_steps", "1")
    record = json.loads((run / "vlft.json").read_text())
    del record["training"]["packing"]
    record["training"]["finished"] = False
    (run / "vlft.json").write_text(json.dumps(record))
    assert main(arguments(base, mixed_json, media, run, "--packing", "true")) == 1
    assert "its packing is none, this run's is tokens 16384" in capsys.readouterr().err


def test_evaluation_in_packs(train, mixed_json):
    def evaluated(*more: str, name: str) -> list[float]:
        run = train(
            "--eval_path", str(mixed_json), "--eval_strategy", "epoch", "--learning_rate", "1e-9", *more, name=name
        )
        return [line["eval_loss"] for line in lines(run) if "eval_loss" in line]

    alone = evaluated(name="alone")
    assert evaluated(*PACKED, name="three") == pytest.approx(alone, rel=1e-6)
    assert evaluated("--packing", "true", name="one") == pytest.approx(alone, rel=1e-6)
