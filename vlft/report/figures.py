"""Figures of a run that more than one page shows."""

from __future__ import annotations

import math

import numpy as np

from vlft.checkpoint.best import best_by, best_of
from vlft.report.read import Run


def spent(run: Run) -> dict[str, float]:
    """Return the seconds of a run by activity, from its first step on. Where ranks differ, they are those of rank 0."""
    lines = run.lines
    wait = float(np.nansum(lines["data_wait_s"]))
    unlogged = run.record.training.get("unlogged") or {}
    return {
        "steps": max(0.0, float(np.nansum(run.seconds)) - wait),
        "waiting for data": wait,
        "evaluation": float(np.nansum(run.evaluations["eval_runtime"])),
        "answers for --eval_metric": float(np.nansum(run.evaluations["eval_metric_s"])),
        "answers for this page": float(np.nansum(run.evaluations["eval_answers_s"])),
        "saving checkpoints": float(np.nansum(lines["save_s"])) + float(unlogged.get("save_s", 0)),
        "writing this page": float(np.nansum(lines["report_s"])) + float(unlogged.get("report_s", 0)),
    }


def rate(run: Run) -> float:
    """Return the tokens per second of all steps; NaN without steps."""
    seconds = float(np.nansum(run.seconds))
    return float(np.nansum(run.lines["tokens"])) / seconds if seconds else math.nan


def best_evaluation(run: Run) -> tuple[int, float] | None:
    """Return step and value of the best evaluation, by the metric of the run; None without evaluations."""
    metric, higher = best_by(run.record)
    if metric not in run.evaluations:
        return None
    return best_of(
        zip(run.evaluations["step"].astype(int).tolist(), run.evaluations[metric].tolist(), strict=True), higher=higher
    )


def last(column: np.ndarray) -> float:
    """Return the last finite value of a column; NaN if it has none."""
    good = column[np.isfinite(column)]
    return float(good[-1]) if len(good) else math.nan


def number(value: float) -> str:
    """Format a number with four digits; `-` if it is not finite."""
    return f"{value:.4g}" if math.isfinite(value) else "-"
