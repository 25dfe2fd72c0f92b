"""The objective as an interface: other objectives than SFT run in the real trainer, and their statistics are logged."""

from __future__ import annotations

import pytest
import torch
from conftest import HAS_VIDEOS
from runs import arguments, assert_same, lines, split

from vlft.config.parse import FlagParser
from vlft.model.loss import sum_segments
from vlft.objectives import Loss, Mean, Objective, Sums
from vlft.objectives.sft import Sft
from vlft.train.metrics import Meter
from vlft.train.run import train


class Weighted(Sft):
    """Every trained token counts a quarter, from an extra tensor in the batch; also logs log-probabilities of rows."""

    unit = "quarters"
    statistics = ("row_logp", "rows_seen", "never")
    tensors = (*Sft.tensors, "token_weights")

    def collate(self, items):
        batch = super().collate(items)
        return {**batch, "token_weights": torch.full(batch["targets"].shape, 0.25)}

    def weight(self, batch):
        return 0.25 * super().weight(batch)

    def loss(self, model, batch):
        log_probs_K = self.log_probs(model, batch)
        rows = batch["counts"]["samples"]
        sums_S, _ = sum_segments(log_probs_K, batch["supervised_rows"], batch["cu_seqlens"])
        seen = {"row_logp": Mean(sums_S.sum(), rows), "rows_seen": Mean(torch.tensor(float(rows)), 1)}
        return Loss(-(log_probs_K * batch["token_weights"]).sum(), self.weight(batch), seen if rows else {})


class PerRow(Objective):
    """The mean over rows of the mean over their trained tokens: a long answer counts as much as a short one."""

    unit = "rows"

    def weight(self, batch):
        return batch["counts"]["samples"]

    def loss(self, model, batch):
        sums_S, counts_S = sum_segments(self.log_probs(model, batch), batch["supervised_rows"], batch["cu_seqlens"])
        return Loss(-(sums_S / counts_S.clamp(min=1)).sum(), self.weight(batch))


@pytest.fixture
def run(base, mixed_json, media, tmp_path):
    """`vlft train` with this objective; returns the run folder."""

    def go(objective: type[Objective], *more: str, name: str):
        argv = arguments(base, mixed_json, media, tmp_path / name, *more, "--num_train_epochs", "1")
        parsed = FlagParser("train", description="").parse(argv[1:])
        make = lambda opened: objective(encoder=opened.encoder, collator=opened.collator())  # noqa: E731
        return train(parsed, objective=make)

    return go


def test_another_objective_runs_in_the_same_trainer(run, mixed_json):
    """Weights that are all equal train as SFT does; weight, own tensors and statistics come from the objective."""
    more = (*split(2, 2), "--eval_path", str(mixed_json), "--eval_strategy", "epoch", "--report_rows", "0")
    ours, sft = run(Weighted, *more, name="weighted"), run(Sft, *more, name="sft")
    assert_same(ours, sft, tolerance=1e-5)
    *steps, evaluated = lines(ours)
    assert len(steps) == 2
    *plain, evaluated_sft = lines(sft)
    for line, theirs in zip(steps, plain, strict=True):
        assert list(line) == [*(key for key in theirs if key not in ("grad_norm", "lr", "max_steps")),
                              "row_logp", "rows_seen", "never", "max_steps", "grad_norm", "lr"]  # fmt: skip
        assert line["row_logp"] == pytest.approx(-line["loss"] * line["supervised_tokens"] / line["samples"], rel=1e-5)
        assert line["rows_seen"] == pytest.approx(line["samples"] / 2)  # of two micro-batches
        assert line["never"] is None
        assert line["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert evaluated["eval_loss"] == pytest.approx(evaluated_sft["eval_loss"], rel=1e-5)
    assert evaluated["eval_quarters"] == evaluated_sft["eval_tokens"] / 4
    rows = 7 if HAS_VIDEOS else 4
    assert evaluated["eval_row_logp"] == pytest.approx(-evaluated["eval_loss"] * evaluated_sft["eval_tokens"] / rows)
    assert "eval_tokens" not in evaluated


def test_a_loss_per_row_is_the_same_packed_and_alone(run):
    alone = run(PerRow, *split(1, 7), name="alone")
    packed = run(PerRow, *split(1, 1), "--packing", "true", name="packed")
    assert_same(packed, alone)
    (line,) = lines(packed)
    assert line["grad_norm"] == pytest.approx(lines(alone)[0]["grad_norm"], rel=1e-4)


# ---- sums over micro-batches and processes


def loss_of(total: float, weight: float, **statistics: tuple[float, float]) -> Loss:
    seen = {name: Mean(torch.tensor(one), by) for name, (one, by) in statistics.items()}
    return Loss(torch.tensor(total, requires_grad=True), weight, seen)


def test_sums_of_two_processes_are_those_of_one():
    parts = [
        loss_of(6.0, 3, right=(1.0, 2)),
        loss_of(1.0, 1),
        loss_of(0.0, 0),
        loss_of(5.0, 2, right=(2.0, 2), far=(8.0, 1)),
    ]
    empty = Sums(names=("right", "far"))
    one = empty
    for part in parts:
        one = one.plus(part)
    others = [empty.plus(parts[0]).plus(parts[1]), empty.plus(parts[2]).plus(parts[3]), empty]
    device = torch.device("cpu")
    together = torch.stack([other.as_vector(device) for other in others]).sum(0)
    assert together.tolist() == one.as_vector(device).tolist()
    assert not together.requires_grad
    assert one.means(together.tolist()) == ({"loss": 2.0, "right": 0.75, "far": 8.0}, 6.0)
    assert empty.means(empty.as_vector(device).tolist()) == ({"loss": None, "right": None, "far": None}, 0.0)


def test_a_statistic_that_was_not_named_is_refused():
    """Processes would wait for each other with vectors of different lengths."""
    with pytest.raises(ValueError, match=r"\['other'\] are not among Objective.statistics \['right'\]"):
        Sums(names=("right",)).plus(loss_of(1.0, 1, other=(1.0, 1)))


def metered(*statistics: str) -> Meter:
    return Meter(lambda batch: 0.0, peak=None, statistics=statistics)


def test_what_a_step_added_is_read_in_one_vector_with_its_norm():
    sums = Sums(names=("right", "far")).plus(loss_of(6.0, 3, right=(1.0, 2))).plus(loss_of(1.0, 1))
    totals, [norm] = sums.read(torch.tensor(0.1))
    assert totals == sums.as_vector(torch.device("cpu")).tolist() == [7.0, 1.0, 0.0, 4.0, 2.0, 0.0]
    assert norm == float(torch.tensor(0.1))
    assert Sums(names=("right",)).read() == ([0.0] * 4, [])


def test_statistics_of_a_step_that_is_left_out_are_left_out():
    meter = metered("right")
    batch = {"counts": dict.fromkeys(("tokens", "supervised_tokens", "images", "videos", "samples"), 1)}
    meter.add(batch, loss_of(2.0, 1, right=(1.0, 1)))
    assert meter.read(torch.tensor(2.5)) == 2.5
    meter.keep_step()
    meter.add(batch, loss_of(float("nan"), 1, right=(float("nan"), 1)))
    assert meter.read(3.5) == 3.5
    meter.drop_step()
    meter.add(batch, loss_of(5.0, 1))
    meter.keep_step()
    line = meter.line(steps=3)
    assert (line["loss"], line["right"], line["tokens"]) == (3.5, 1.0, 2)
    assert meter.line(steps=1)["right"] is None


@pytest.mark.parametrize("name", ["tokens_per_s", "lr"])
def test_a_statistic_with_the_name_of_another_entry_is_refused(name):
    meter = metered(name)
    with pytest.raises(ValueError, match=name):
        meter.line(steps=1)
