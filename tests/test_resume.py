"""Resuming: on another number of processes, in the middle of an epoch, and only with the same run."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from launch import vlft as vlft_process
from mishaps import count_rows
from runs import FULL, PACKED, VISION_LORA, arguments, assert_same, lines, split

from vlft.cli.main import main
from vlft.train.folder import RunFolder

SAVE = ("--save_strategy", "steps", "--save_steps", "1")


def trained(ranks: list, *, steps: range) -> Counter[int]:
    """Row index -> how often it was trained in these steps, from the lines that `mishaps.count_rows` prints."""
    found: Counter[int] = Counter()
    for rank in ranks:
        for line in re.findall(r"^ROWS (.*)$", rank.output, re.M):
            step, *rows = map(int, line.split())
            found.update(rows if step in steps else ())
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("towers", "batches", "first", "then"),
    [
        pytest.param(FULL, "packs", 2, 1, id="full-packs-2-1"),
        pytest.param(VISION_LORA, "packs", 1, 2, id="vision-lora-packs-1-2"),
        pytest.param(FULL, "rows", 1, 2, id="full-rows-1-2", marks=pytest.mark.grid),
        pytest.param(FULL, "packs", 1, 2, id="full-packs-1-2", marks=pytest.mark.grid),
        pytest.param(FULL, "rows", 2, 1, id="full-rows-2-1", marks=pytest.mark.grid),
        pytest.param(VISION_LORA, "packs", 2, 1, id="vision-lora-packs-2-1", marks=pytest.mark.grid),
        pytest.param(VISION_LORA, "rows", 2, 1, id="vision-lora-rows-2-1", marks=pytest.mark.grid),
        pytest.param(VISION_LORA, "rows", 1, 2, id="vision-lora-rows-1-2", marks=pytest.mark.grid),
    ],
)
def test_a_run_goes_on_on_another_number_of_processes(base, mixed_json, media, tmp_path, towers, batches, first, then):
    """Killed in the second step of two epochs of several steps; the same command with more or fewer processes."""
    how = (*PACKED, "--global_batch", "4") if batches == "packs" else ("--packing", "false", "--global_batch", "4")
    out = tmp_path / "moved"
    argv = arguments(base, mixed_json, media, out, *towers, *SAVE, *how)
    ranks = vlft_process(argv, world=first, out=tmp_path, kill_in_step=2, during=[count_rows])
    assert {rank.status for rank in ranks} != {0}
    assert (out / "checkpoint-1").is_dir()
    kept = trained(ranks, steps=range(1, 2))
    ranks = vlft_process(argv, world=then, out=tmp_path, during=[count_rows])
    assert [rank.status for rank in ranks] == [0] * then, ranks[0].output[-3000:]
    # Only the rows whose training the kill undid are trained again.
    assert kept + trained(ranks, steps=range(2, 99)) == Counter(dict.fromkeys(range(7), 2))
    assert trained(ranks, steps=range(2)) == Counter()
    assert sum(line["samples"] for line in lines(out) if "loss" in line) == 2 * 7
    assert_same(out, _undisturbed(base, mixed_json, media, tmp_path, first, *towers, *how))


def _undisturbed(base, mixed_json, media, tmp_path, world, *more):
    out = tmp_path / "undisturbed"
    argv = arguments(base, mixed_json, media, out, *more)
    for rank in vlft_process(argv, world=world, out=tmp_path):
        assert rank.status == 0, rank.output[-3000:]
    return out


def test_another_number_of_rows_a_step_is_refused_with_what_makes_it_equal(
    train, base, mixed_json, media, tmp_path, capsys, monkeypatch
):
    run = train(*split(1, 2), *SAVE, "--max_steps", "2")
    record = json.loads((run / "vlft.json").read_text())
    record["training"] |= {"finished": False, "processes": 2, "global_batch": 4}
    (run / "vlft.json").write_text(json.dumps(record))
    assert main(arguments(base, mixed_json, media, run, *split(1, 2), *SAVE, "--max_steps", "2")) == 1
    said = capsys.readouterr().err
    assert "its global batch is 4, this run's is 2" in said
    assert "That run had 2, this run has 1: --gradient_accumulation_steps 4 makes them equal" in said


def test_a_run_that_was_killed_between_its_last_checkpoint_and_its_end(train, monkeypatch):
    """In the middle of an epoch: no more steps are trained than the flags state."""
    more = (*FULL, *split(1, 2), *SAVE, "--max_steps", "3")
    whole = train(*more, name="whole")

    def end(*args, **kwargs):
        raise KeyError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", end)
        with pytest.raises(KeyError, match="killed"):
            train(*more)
    run = train(*more)
    assert [line["step"] for line in lines(run)] == [1, 2, 3]
    assert not (run / "checkpoint-4").exists()
    assert_same(run, whole, tolerance=0)


def test_a_longer_row_than_the_packs_of_a_run_hold_makes_it_another_run(base, mixed_json, media, tmp_path, capsys):
    """The packs that a run chose are no larger than its rows needed; the message says that the data changed."""
    data = tmp_path / "data.json"
    rows = json.loads(mixed_json.read_text())
    data.write_text(json.dumps(rows))
    argv = arguments(base, data, media, tmp_path / "run", *SAVE, "--packing", "true", "--global_batch", "1")
    assert main([*argv, "--max_steps", "1"]) == 0
    record = json.loads((tmp_path / "run" / "vlft.json").read_text())
    record["training"]["finished"] = False
    (tmp_path / "run" / "vlft.json").write_text(json.dumps(record))
    rows[0]["conversations"][1]["value"] *= 40
    data.write_text(json.dumps(rows))
    capsys.readouterr()
    assert main([*argv, "--max_steps", "2"]) == 1
    assert "belongs to another run: its data is " in capsys.readouterr().err
