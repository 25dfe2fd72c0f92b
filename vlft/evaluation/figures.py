"""Answers and metrics -> figures with intervals, differences between models, and the figures of each row.

Letters in shapes: R rows, K statistics of a metric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlft.errors import ConfigError
from vlft.evaluation.result import Figure
from vlft.metrics import bootstrap
from vlft.metrics.case import Metric
from vlft.setup.asked import Asked


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A metric of one model.

    Attributes:
        metric: the metric.
        sums_RK: the statistics of each row; NaN where the metric does not apply.
    """

    metric: Metric
    sums_RK: np.ndarray

    @property
    def rows(self) -> tuple[float | None, ...]:
        """The figure of each row; None where the metric does not apply."""
        values_R = np.where(np.isnan(self.sums_RK[:, 0]), np.nan, self.metric.value(self.sums_RK)).tolist()
        return tuple(None if math.isnan(value) else value for value in values_R)

    @property
    def figure(self) -> Figure:
        """The figure over all rows to which the metric applies."""
        low, high = bootstrap.intervals(self.sums_RK, self.metric.value)
        value = bootstrap.figure(self.sums_RK, self.metric.value)
        rows = int((~np.isnan(self.sums_RK)).all(axis=1).sum())
        return Figure(value=value, low=low, high=high, rows=rows)

    def minus(self, other: Scores) -> Figure | None:
        """The difference to another model on the rows to which the metric applies for both; None: there are none."""
        value, low, high = bootstrap.differences(other.sums_RK, self.sums_RK, self.metric.value)
        rows = int((~np.isnan(self.sums_RK) & ~np.isnan(other.sums_RK)).all(axis=1).sum())
        return Figure(value=value, low=low, high=high, rows=rows) if rows else None


def scores_of(metric: Metric, rows: Sequence[Asked], answers: Sequence[str]) -> Scores:
    """Compute a metric of one model.

    Args:
        metric: the metric.
        rows: the rows as that model was asked.
        answers: its answers, with thoughts.

    Raises:
        ConfigError: the metric applies to no row.
        VlftError: a function of the user failed.
    """
    cases = (row.case(answer) for row, answer in zip(rows, answers, strict=True))
    sums_RK = bootstrap.sums_by_row(metric, cases)
    if np.isnan(sums_RK[:, 0]).all():
        raise _applies_to_none(metric)
    return Scores(metric=metric, sums_RK=sums_RK)


def check_applies(metrics: Sequence[Metric], rows: Sequence[Asked]) -> None:
    """Refuse metrics that apply to no row, before any answer is there: right answers are scored instead.

    Raises:
        ConfigError: names the metric and what a row needs.
    """
    for metric in metrics:
        if all(metric.score(row.case(row.references[0])) is None for row in rows):
            raise _applies_to_none(metric)


def _applies_to_none(metric: Metric) -> ConfigError:
    return ConfigError(
        f"--metric {metric.name} cannot be computed: it needs {metric.needs}, and no row has that. "
        "Choose another metric."
    )
