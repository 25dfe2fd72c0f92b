"""Whether the metrics of `--eval_metric` apply to the evaluation rows: for train and plan, before a step is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vlft.data.encode import Encoder
from vlft.errors import ConfigError, DataError
from vlft.metrics.case import Metric
from vlft.setup.asked import Asked, asked
from vlft.setup.rows import MeasuredRows


def last_samples(evaluated: MeasuredRows) -> np.ndarray:
    """Return the place of the sample that is asked of each row, int64 [R]: of a split row the last one."""
    return np.append(evaluated.starts[1:] - 1, len(evaluated.costs) - 1)


def asked_at(evaluated: MeasuredRows, place: int, encoder: Encoder) -> Asked | None:
    """Return what the model is asked about a sample; None if its row can no longer be read."""
    try:
        return asked(encoder.as_trained(evaluated.rows.samples[place]), encoder)
    except DataError:
        return None


def check_metrics(metrics: Sequence[Metric], evaluated: MeasuredRows, encoder: Encoder) -> None:
    """Score the rows' own answers, to find beforehand what would fail in the first evaluation.

    Raises:
        VlftError: a metric applies to no row, or a function of the user fails.
    """
    left = _inapplicable(metrics, (asked_at(evaluated, place, encoder) for place in last_samples(evaluated).tolist()))
    for metric in left:
        raise ConfigError(f"--eval_metric {metric.name}: no evaluation row has {metric.needs}. Drop it.")


def _inapplicable(metrics: Sequence[Metric], rows: Iterable[Asked | None]) -> Iterator[Metric]:
    left = list(metrics)
    for row in rows:
        if row is not None:
            case = row.case(row.references[0])
            left = [metric for metric in left if metric.score(case) is None]
        if not left:
            return
    yield from left
