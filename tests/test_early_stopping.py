"""Early stopping and the best checkpoint: which evaluation is the best, why a run stopped, and both after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import arguments, killed_after_a_checkpoint, lines, weights

from vlft.checkpoint.best import best_of
from vlft.cli.main import main
from vlft.report import write_report

#: A rate at which the tiny base soon gets worse; evaluations after each two steps, of at most 14.
WORSE = ("--learning_rate", "100", "--optim", "sgd", "--lr_scheduler_type", "constant", "--report_rows", "0")
EVERY_TWO = ("--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2")
STOPS = ("--metric_for_best_model", "eval_loss")


@pytest.fixture
def stops(train, mixed_json):
    def run(*more: str, name: str = "run", patience: str = "2") -> Path:
        how = ("--early_stopping_patience", patience, *STOPS)
        return train("--eval_path", str(mixed_json), *WORSE, *EVERY_TWO, *how, *more, name=name)

    return run


def evaluated(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["eval_loss"]) for line in lines(run) if "eval_loss" in line]


def expected(found: list[tuple[int, float]], patience: int, threshold: float = 0.0) -> int:
    """The step at which a run with these evaluations stops, by the definition of early stopping."""
    best, bad = float("inf"), 0
    for step, value in found:
        better = value < best and abs(value - best) > threshold
        bad = 0 if better else bad + 1
        best = min(best, value)
        if bad == patience:
            return step
    return 0


def test_a_run_that_no_longer_improves_stops_and_says_why(stops, capsys):
    run = stops("--load_best_model_at_end", "true", patience="1")
    found = evaluated(run)
    step = found[-1][0]
    assert step == expected(found, 1) < 14
    best, loss = min(found, key=lambda one: one[1])
    said = capsys.readouterr().out
    why = f"at step {step} of 14: evaluation loss has not improved in 1 evaluation (--early_stopping_patience)"
    assert f"stopped: {why}\n" in said
    where = f"{run}/checkpoint-{best}; the output folder has its weights"
    assert f"best:   step {best}, evaluation loss {loss:.4f}; {where}\n" in said
    training = json.loads((run / "vlft.json").read_text())["training"]
    assert training["best"] == {
        "step": best, "metric": "eval_loss", "value": loss, "checkpoint": f"checkpoint-{best}"
    }  # fmt: skip
    assert training["stopped"] == {"step": step, "of": 14, "metric": "eval_loss", "evaluations": 1}
    assert training["finished"]
    page = write_report(run).read_text()
    assert why in page
    assert f"best evaluation, step {best}" in page
    a, b = weights(run), weights(run / f"checkpoint-{best}")
    assert all((a[name] == b[name]).all() for name in b)


def test_a_threshold_counts_small_improvements_as_none(stops):
    run = stops("--early_stopping_threshold", "100")
    assert evaluated(run)[-1][0] == expected(evaluated(run), 2, 100) == 6


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_run_that_was_killed_stops_where_the_other_did(stops, base, mixed_json, media, tmp_path, capsys, which):
    """Killed after each evaluation, also after the one that stops it."""
    whole = stops("--early_stopping_threshold", "100", name="whole")
    argv = arguments(base, mixed_json, media, tmp_path / "killed", "--eval_path", str(mixed_json), *WORSE, *EVERY_TWO)
    argv += [*STOPS, "--early_stopping_patience", "2", "--early_stopping_threshold", "100"]
    for _ in range(which):
        with killed_after_a_checkpoint():
            main(argv)
    assert main(argv) == 0
    killed = tmp_path / "killed"
    assert dict(evaluated(killed)) == pytest.approx(dict(evaluated(whole)), rel=1e-6)
    one, other = (json.loads((run / "vlft.json").read_text())["training"] for run in (whole, killed))
    assert (one["steps"], one["stopped"], one["best"]["step"]) == (6, other["stopped"], other["best"]["step"])
    a, b = weights(killed), weights(whole)
    assert all((a[name] == b[name]).all() for name in b)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--early_stopping_patience", "2"], "--early_stopping_patience 2 needs evaluations: --eval_path FILE"),
        (["--early_stopping_patience", "2"], "--early_stopping_patience 2 needs a metric to compare"),
        (["--early_stopping_patience", "0"], "--early_stopping_patience is 0, must be at least 1"),
        (["--early_stopping_threshold", "0.1"], "--early_stopping_threshold 0.1 has no effect without"),
        (["--metric_for_best_model", "eval_anls"], "--metric_for_best_model eval_anls: an evaluation has no such"),
        (["--metric_for_best_model", "loss", "--greater_is_better", "true"], "--greater_is_better true: the best"),
    ],
)
def test_what_cannot_stop(base, mixed_json, media, tmp_path, capsys, more, said):
    assert main([*arguments(base, mixed_json, media, tmp_path / "run"), *more]) == 1
    assert said in capsys.readouterr().err


def test_another_metric_is_another_run(stops, base, mixed_json, media, tmp_path, capsys):
    """The checkpoint holds the best value of the metric so far."""
    run = stops()
    record = run / "vlft.json"
    text = json.loads(record.read_text())
    text["training"]["best_by"]["metric"] = "eval_anls"
    record.write_text(json.dumps(text))
    argv = arguments(base, mixed_json, media, run, "--eval_path", str(mixed_json), *WORSE, *EVERY_TWO, *STOPS)
    assert main([*argv, "--early_stopping_patience", "2"]) == 1
    said = "metric of the best checkpoint (--metric_for_best_model) is metric eval_anls, this run's is metric eval_loss"
    assert said in capsys.readouterr().err


def test_the_best_of_equal_evaluations_is_the_first():
    nan = float("nan")
    assert best_of([(2, nan), (4, 0.5), (6, 0.5), (8, 0.1)], higher=True) == (4, 0.5)
    assert best_of([(2, nan), (4, 0.5), (6, 0.2), (8, 0.2)], higher=False) == (6, 0.2)
    assert best_of([(2, nan)], higher=True) is None
