"""How sure is a figure, and the difference of two models? 95% intervals by resampling rows (Efron 1979), percentiles.

Letters in shapes: R rows, K statistics of a metric, B samples. `sums_RK` has the K numbers of `Metric.score` for each
row; a row to which the metric does not apply is NaN in all K. Such rows are left out first, and samples are drawn from
the others. The intervals say how the figure would vary with other rows of the same kind, not with another training run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from vlft.metrics.case import Case, Metric

SAMPLES = 2000
LEVELS = (2.5, 97.5)  # percentiles of a 95% interval

_AT_ONCE = 1 << 18  # numbers of rows drawn at a time: they stay in the processor's cache

Value = Callable[[np.ndarray], np.ndarray]


def sums_by_row(metric: Metric, cases: Iterable[Case]) -> np.ndarray:
    """Return the K numbers of each case, float64[R, K]; NaN where the metric does not apply."""
    none = (np.nan,) * metric.size
    scored = (metric.score(case) for case in cases)
    return np.array([none if one is None else one for one in scored], dtype=np.float64).reshape(-1, metric.size)


def figure(sums_RK: np.ndarray, value: Value) -> float:
    """Return the figure over all rows to which the metric applies; NaN if there is none."""
    kept = sums_RK[_applies(sums_RK)]
    return float(value(kept.sum(axis=0))) if len(kept) else float("nan")


def intervals(sums_RK: np.ndarray, value: Value, *, samples: int = SAMPLES, seed: int = 0) -> tuple[float, float]:
    """Return the ends (low, high) of the 95% interval of a figure. Both are NaN if the metric applies to no row.

    The same rows in the same order give the same interval. 100,000 rows take about two seconds.

    Args:
        sums_RK: the numbers of each row, float64[R, K].
        value: sums [..., K] -> figures [...], as `Metric.value`.
        samples: B.
    """
    kept = sums_RK[_applies(sums_RK)]
    if not len(kept):
        return float("nan"), float("nan")
    figures_B = np.concatenate([value(counts @ kept) for counts in _counts(len(kept), samples, seed)])
    return _ends(figures_B)


def differences(
    first_RK: np.ndarray, second_RK: np.ndarray, value: Value, *, samples: int = SAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Return by how much the second model's figure is larger than the first's, and the 95% interval of that.

    The bootstrap is paired: a sample takes the same rows for both models, so what is hard about a row cancels. Rows to
    which the metric does not apply for one of the models are left out for both.

    Args:
        first_RK: the numbers of each row for the model to compare with.
        second_RK: the same rows, in the same order, for the other model.

    Returns:
        (difference, low, high); NaN if no row is left.

    Raises:
        ValueError: the two have other shapes.
    """
    if first_RK.shape != second_RK.shape:
        raise ValueError(f"two models must be compared on the same rows: {first_RK.shape} and {second_RK.shape}")
    both = _applies(first_RK) & _applies(second_RK)
    first, second = first_RK[both], second_RK[both]
    if not len(first):
        return float("nan"), float("nan"), float("nan")
    parts = [value(counts @ second) - value(counts @ first) for counts in _counts(len(first), samples, seed)]
    return float(value(second.sum(axis=0)) - value(first.sum(axis=0))), *_ends(np.concatenate(parts))


def _applies(sums_RK: np.ndarray) -> np.ndarray:
    return ~np.isnan(sums_RK).any(axis=1)


def _counts(rows: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each row is in each sample, float64[some of B, R], until there are B samples."""
    draw = np.random.default_rng(seed)
    together = max(1, _AT_ONCE // rows)
    for start in range(0, samples, together):
        count = min(together, samples - start)
        drawn = draw.integers(0, rows, size=(count, rows))
        drawn += np.arange(count)[:, None] * rows
        yield np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows).astype(np.float64)


def _ends(figures_B: np.ndarray) -> tuple[float, float]:
    """Return the percentiles of the samples that have a figure."""
    counted = figures_B[~np.isnan(figures_B)]
    if not len(counted):
        return float("nan"), float("nan")
    low, high = np.percentile(counted, LEVELS)
    return float(low), float(high)
