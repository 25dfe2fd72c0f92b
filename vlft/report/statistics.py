"""Curves and figures of what an objective logs beside its loss, such as the rewards of preference tuning.

`vlft.report.read` reads them; `page` and `compare` show them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from vlft.checkpoint.best import EVAL_METRICS
from vlft.pages.charts import Chart, Series, chart
from vlft.report.figures import last, number
from vlft.report.read import Run

#: Title of a chart -> the statistics in it, each with its name there. Others get a chart of their own.
CHARTS: dict[str, dict[str, str]] = {
    "reward of completions": {"reward": "training"},
    "reward margin": {"rewards/margins": "training"},
    "reward accuracy": {"rewards/accuracies": "training"},
    "rewards": {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    "log-probability of an answer": {"logps/chosen": "chosen", "logps/rejected": "rejected"},
}


def groups(run: Run) -> dict[str, dict[str, str]]:
    """Return the statistics of a run as in `CHARTS`, without those that it does not have."""
    known = {name for names in CHARTS.values() for name in names}
    there = {title: {k: v for k, v in names.items() if k in run.statistics} for title, names in CHARTS.items()}
    return there | {name: {name: "training"} for name in run.statistics if name not in known}


def charts_of(run: Run) -> list[Chart | None]:
    """Return a chart for each group: a line for training, and dots for evaluations."""
    found = []
    for title, names in groups(run).items():
        lines = [Series(name=shown, x=run.lines["step"], y=run.statistics[name]) for name, shown in names.items()]
        for name, shown in names.items():
            if (y := run.evaluations.get(f"eval_{name}")) is not None:
                of = "evaluation" if len(names) == 1 else f"{shown}, evaluation"
                lines.append(Series(name=of, x=run.evaluations["step"], y=y, dots=True))
        found.append(chart(title, lines))
    return found + [
        chart(name, [Series(name="evaluation", x=run.evaluations["step"], y=y, dots=True)])
        for name in run.record.training.get(EVAL_METRICS) or []
        if (y := run.evaluations.get(f"eval_{name}")) is not None
    ]


def facts_of(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the last value of each statistic that has a chart of its own, in training and in the evaluations."""
    for title, names in groups(run).items():
        if len(names) == 1:
            (name,) = names
            if math.isfinite(value := last(run.statistics[name])):  # `kl` is null without --beta
                yield f"{title}, last line", number(value)
            if (evaluated := run.evaluations.get(f"eval_{name}")) is not None:
                yield f"{title}, last evaluation", number(last(evaluated))
