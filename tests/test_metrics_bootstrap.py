"""`vlft.metrics.bootstrap`: intervals and paired differences against scipy and the analytic intervals."""

import time
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from vlft.metrics import find
from vlft.metrics.bootstrap import differences, figure, intervals, sums_by_row
from vlft.metrics.case import Case, mean


def rows(scores) -> np.ndarray:
    """The numbers of a mean, float64[R, 2]."""
    scores = np.asarray(scores, dtype=np.float64)
    return np.stack([scores, np.ones_like(scores)], axis=1)


@pytest.mark.parametrize(("count", "share"), [(400, 0.5), (1000, 0.1), (2000, 0.93)])
def test_the_interval_of_a_share_is_the_binomial_one(count, share):
    right = round(count * share)
    low, high = intervals(rows([1] * right + [0] * (count - right)), mean, samples=4000)
    sigma = np.sqrt(share * (1 - share) / count)
    assert low == pytest.approx(share - 1.96 * sigma, abs=0.15 * sigma)
    assert high == pytest.approx(share + 1.96 * sigma, abs=0.15 * sigma)
    exact = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx(exact, abs=0.4 * sigma)


def test_the_interval_of_a_skewed_mean_is_that_of_scipy():
    scores = np.random.default_rng(5).exponential(size=300)
    found = stats.bootstrap((scores,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(6))
    theirs = (found.confidence_interval.low, found.confidence_interval.high)
    assert intervals(rows(scores), mean, samples=4000) == pytest.approx(theirs, abs=0.15 * found.standard_error)


def test_the_interval_of_a_ratio_takes_numbers_of_a_row_together():
    """As cer: errors by lengths, where long rows have more errors."""
    draw = np.random.default_rng(7)
    lengths = draw.integers(5, 100, size=200)
    errors = draw.binomial(lengths, 0.2)
    found = stats.bootstrap(
        (errors, lengths),
        lambda e, n, axis: e.sum(axis=axis) / n.sum(axis=axis),
        n_resamples=4000,
        paired=True,
        method="percentile",
        rng=draw,
    )
    theirs = (found.confidence_interval.low, found.confidence_interval.high)
    ours = intervals(np.stack([errors, lengths], axis=1).astype(float), mean, samples=4000)
    assert ours == pytest.approx(theirs, abs=0.15 * found.standard_error)


def test_the_difference_is_paired():
    """Two models that agree on most rows: the interval is that of the difference by row."""
    draw = np.random.default_rng(8)
    first = draw.random(1000)
    by_row = draw.normal(0.02, 0.05, size=1000)
    difference, low, high = differences(rows(first), rows(first + by_row), mean, samples=4000)
    error = by_row.std() / np.sqrt(1000)
    assert difference == pytest.approx(by_row.mean())
    assert low == pytest.approx(by_row.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(by_row.mean() + 1.96 * error, abs=0.15 * error)
    assert differences(rows(first), rows(first), mean) == (0, 0, 0)


def test_models_that_answer_the_same_do_not_differ():
    pytest.importorskip("sacrebleu")
    (metric,) = find(["bleu"])
    cases = [Case(answer=f"the cat sat on mat {n}", references=(f"the cat sat on a mat {n % 7}",)) for n in range(50)]
    sums = sums_by_row(metric, cases)
    assert differences(sums, sums.copy(), metric.value) == (0, 0, 0)
    low, high = intervals(sums, metric.value)
    assert 0 < low < figure(sums, metric.value) < high < 1


def test_few_rows():
    assert intervals(rows([0.25]), mean) == (0.25, 0.25)
    assert intervals(rows([1, 1, 1, 1]), mean) == (1, 1)
    assert intervals(rows([0, 1]), mean) == (0, 1)
    assert differences(rows([0]), rows([1]), mean) == (1, 1, 1)
    assert all(np.isnan(intervals(rows([]), mean)))
    assert all(np.isnan(differences(rows([]), rows([]), mean)))
    assert np.isnan(figure(rows([]), mean))


def test_rows_to_which_the_metric_does_not_apply_are_left_out():
    some = rows([0.0, 1.0, 0.5, 0.25])
    holes = np.insert(some, [0, 2, 4], np.nan, axis=0)
    assert figure(holes, mean) == figure(some, mean) == 0.4375
    assert intervals(holes, mean) == intervals(some, mean)
    other = holes.copy()
    other[1] = np.nan  # does not apply for one of the two models
    difference, low, high = differences(holes, other + 0.25, lambda sums: sums[..., 0])
    assert (difference, low, high) == (0.75, 0.75, 0.75)
    (metric,) = find(["iou"])
    cases = [Case(answer="[0, 0, 1, 1]", references=(text,)) for text in ("[0, 0, 1, 1]", "a cat")]
    sums = sums_by_row(metric, cases)
    assert sums[0].tolist() == [1, 1]
    assert np.isnan(sums[1]).all()
    with pytest.raises(ValueError, match="the same rows"):
        differences(some, holes, mean)


def test_a_sample_without_anything_counted_is_left_out():
    sums = np.array([[1.0, 2.0], [0.0, 0.0]])  # half a figure, and a row of length 0
    assert intervals(sums, mean) == (0.5, 0.5)


def test_the_seed_decides():
    some = rows(np.random.default_rng(9).random(50))
    assert intervals(some, mean) == intervals(some, mean)
    assert intervals(some, mean, seed=1) != intervals(some, mean)


def test_many_rows_take_little_time_and_memory():
    many = rows(np.random.default_rng(10).random(100_000))
    tracemalloc.start()
    began = time.process_time()
    low, high = intervals(many, mean, samples=500)
    assert time.process_time() - began < 10
    assert tracemalloc.get_traced_memory()[1] < 100e6  # all draws at once would take 400 MB
    tracemalloc.stop()
    assert high - low == pytest.approx(2 * 1.96 * many[:, 0].std() / np.sqrt(len(many)), rel=0.15)
