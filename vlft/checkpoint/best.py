"""Which evaluation of a run is its best, by the metric that the run's record names. Numbers only.

`vlft.train.record` writes the metric, `vlft.train.result` and `vlft.report` use it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from vlft.checkpoint.record import RunRecord

BEST_BY = "best_by"  # key of `RunRecord.training`: {"metric", "higher"}
STOPPED = "stopped"  # key of `RunRecord.training`: {"step", "of", "metric", "evaluations"} of a run that stopped early
EVAL_METRICS = "eval_metric"  # key of `RunRecord.training`: names of the metrics of answers
LOSS = "eval_loss"


def best_by(record: RunRecord) -> tuple[str, bool]:
    """Return the metric by which evaluations are compared, as in `metrics.jsonl`, and whether higher is better."""
    found = record.training.get(BEST_BY) or {}
    return str(found.get("metric", LOSS)), bool(found.get("higher", False))


def best_of(values: Iterable[tuple[int, float | None]], *, higher: bool) -> tuple[int, float] | None:
    """Return step and value of the best evaluation, the first of equal ones; None without a finite value.

    Args:
        values: step and value of each evaluation, in order; None where the metric applied to no row.
        higher: whether higher is better.
    """
    best: tuple[int, float] | None = None
    for step, value in values:
        if (
            value is not None
            and math.isfinite(value)
            and (best is None or (value > best[1] if higher else value < best[1]))
        ):
            best = step, value
    return best


def shown_metric(name: str) -> str:
    """Return the name of a metric for people: `evaluation loss`, `exact_match`."""
    return "evaluation loss" if name == LOSS else name.removeprefix("eval_")


def stopped_line(record: RunRecord) -> str | None:
    """Say why a run ended before its last step; None if it did not stop early."""
    found = record.training.get(STOPPED)
    if not isinstance(found, dict):
        return None
    return (
        f"at step {found['step']:,} of {found['of']:,}: {shown_metric(found['metric'])} has not improved in "
        f"{found['evaluations']:,} evaluation{'s' if found['evaluations'] != 1 else ''} (--early_stopping_patience)"
    )
