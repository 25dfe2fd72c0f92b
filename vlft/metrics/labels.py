"""Figures of a model that chooses among labels: accuracy, macro F1, AUC, confusion. Pure functions of scores.

Neighbours: `vlft.scoring` makes the scores, `vlft.evaluation.labels` turns rows into what stands here.

Letters in shapes: R rows, K labels, B bootstrap samples, P rows of a label, N the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: Figure -> one line for people. Larger is better for each.
NAMES: Mapping[str, str] = {
    "accuracy": "share of rows whose most likely label is the right one",
    "macro_f1": "mean over labels of F1: of precision and recall, their harmonic mean",
    "auc": "chance that a row of a label is given more of it than another row; mean over labels",
}
SAMPLES = 2000
_AT_ONCE = 4_000_000  # numbers of a chunk of bootstrap samples: 32 MB


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The scores that a model gives labels, and the right ones.

    Attributes:
        right_R: int64, place of the right label of each row.
        scores_RK: float64, log-probability of each label. They need not add up to 1 over labels.
    """

    right_R: np.ndarray
    scores_RK: np.ndarray

    @property
    def chosen_R(self) -> np.ndarray:
        """Place of the most likely label of each row, int64; of equally likely ones the first."""
        return self.scores_RK.argmax(axis=1)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with the ends of its 95% interval. All are NaN if the figure is not defined."""

    value: float
    low: float
    high: float


def confusion(choices: Choices) -> tuple[tuple[int, ...], ...]:
    """Count how often each label was chosen for each right label: counts[right][chosen]."""
    labels = choices.scores_RK.shape[1]
    counts = np.zeros((labels, labels), dtype=np.int64)
    np.add.at(counts, (choices.right_R, choices.chosen_R), 1)
    return tuple(tuple(row) for row in counts.tolist())


def figures(choices: Choices, weights_BR: np.ndarray) -> dict[str, np.ndarray]:
    """The figures of `NAMES`, each float64 [B], of rows with weights.

    Args:
        choices: of a model.
        weights_BR: float64, how often each row counts; of all rows once, ones [1, R].
    """
    return {
        "accuracy": _accuracy(choices, weights_BR),
        "macro_f1": _macro_f1(choices, weights_BR),
        "auc": _auc(choices, weights_BR),
    }


def compared(
    models: Sequence[Choices], *, samples: int = SAMPLES, seed: int = 0
) -> list[dict[str, tuple[Interval, Interval]]]:
    """The figures of each model, and their differences to those of the first model.

    Intervals are of the percentile bootstrap over rows. The models share each bootstrap sample, so that a difference is
    paired. A sample in which a figure is not defined, such as the AUC of one label alone, does not count. The time
    grows with rows and labels: 100,000 rows of 3 labels take some 15 seconds.

    Args:
        models: their choices in the same rows, at least one model.
        samples: number of bootstrap samples.
        seed: of the random rows.

    Returns:
        for each model, name of `NAMES` -> figure and difference. The differences of the first model are 0.

    Raises:
        ValueError: the models have other rows, or none.
    """
    right_R = models[0].right_R
    if not len(right_R) or any(not np.array_equal(model.right_R, right_R) for model in models):
        raise ValueError("all models need the same rows, at least one")
    whole = [figures(model, np.ones((1, len(right_R)))) for model in models]
    drawn: list[list[dict[str, np.ndarray]]] = [[] for _ in models]
    for weights_BR in _resamples(len(right_R), samples, seed):
        for model, found in zip(models, drawn, strict=True):
            found.append(figures(model, weights_BR))
    all_drawn = [{name: np.concatenate([some[name] for some in found]) for name in NAMES} for found in drawn]
    return [
        {
            name: (
                _interval(own[name][0], spread[name]),
                _interval(own[name][0] - whole[0][name][0], spread[name] - all_drawn[0][name]),
            )
            for name in NAMES
        }
        for own, spread in zip(whole, all_drawn, strict=True)
    ]


def _interval(value: float, drawn_B: np.ndarray) -> Interval:
    known = drawn_B[~np.isnan(drawn_B)]
    low, high = np.percentile(known, (2.5, 97.5)) if len(known) else (np.nan, np.nan)
    return Interval(value=float(value), low=float(low), high=float(high))


def _resamples(rows: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row is drawn: float64 [B, R], B of all samples at a time."""
    generator = np.random.default_rng(seed)
    size = max(1, _AT_ONCE // rows)
    for start in range(0, samples, size):
        count = min(size, samples - start)
        drawn_BR = generator.integers(0, rows, (count, rows)) + np.arange(count)[:, None] * rows
        yield np.bincount(drawn_BR.ravel(), minlength=count * rows).reshape(count, rows).astype(np.float64)


def _accuracy(choices: Choices, weights_BR: np.ndarray) -> np.ndarray:
    return weights_BR @ (choices.right_R == choices.chosen_R) / weights_BR.sum(axis=1)


def _macro_f1(choices: Choices, weights_BR: np.ndarray) -> np.ndarray:
    """As scikit-learn's `f1_score(average="macro")`: the mean over labels that are right or chosen in some row."""
    one_KK = np.eye(choices.scores_RK.shape[1])
    right_RK, chosen_RK = one_KK[choices.right_R], one_KK[choices.chosen_R]
    hits_BK = weights_BR @ (right_RK * chosen_RK)
    sizes_BK = weights_BR @ (right_RK + chosen_RK)
    seen_BK = sizes_BK > 0
    f1_BK = 2 * hits_BK / np.where(seen_BK, sizes_BK, 1)
    return f1_BK.sum(axis=1) / seen_BK.sum(axis=1)


def _auc(choices: Choices, weights_BR: np.ndarray) -> np.ndarray:
    """As scikit-learn's `roc_auc_score(multi_class="ovr")`: each label against all others, the mean over labels.

    A row gives a label its probability among the labels (their softmax). With two labels both have the same AUC, which
    is that of the second. Labels that no row or every row has are left out, where scikit-learn refuses; NaN if none is
    left.
    """
    labels = choices.scores_RK.shape[1]
    some = range(1, 2) if labels == 2 else range(labels)
    sums_B, counted_B = np.zeros(len(weights_BR)), np.zeros(len(weights_BR))
    for label in some:
        auc_B = _auc_of(choices.right_R == label, _log_odds(choices.scores_RK, label), weights_BR)
        known_B = ~np.isnan(auc_B)
        sums_B[known_B] += auc_B[known_B]
        counted_B += known_B
    return np.where(counted_B > 0, sums_B / np.maximum(counted_B, 1), np.nan)


def _log_odds(scores_RK: np.ndarray, label: int) -> np.ndarray:
    """float64 [R]. In the order of the probabilities, but two that are almost 1 differ. Rounding keeps ties equal."""
    others = np.delete(scores_RK, label, axis=1)
    most_R1 = others.max(axis=1, keepdims=True)
    return np.round(scores_RK[:, label] - most_R1[:, 0] - np.log(np.exp(others - most_R1).sum(axis=1)), 9)


def _auc_of(is_R: np.ndarray, score_R: np.ndarray, weights_BR: np.ndarray) -> np.ndarray:
    """Share of pairs of a row of the label and another row that are in order; a tie is half a pair. [B], maybe NaN."""
    others = np.flatnonzero(~is_R)
    others = others[np.argsort(score_R[others])]
    own_P, own_BP = score_R[is_R], weights_BR[:, is_R]
    below_BN = np.zeros((len(weights_BR), len(others) + 1))
    np.cumsum(weights_BR[:, others], axis=1, out=below_BN[:, 1:])
    first_P = np.searchsorted(score_R[others], own_P, side="left")
    last_P = np.searchsorted(score_R[others], own_P, side="right")
    ordered_B = (own_BP * (below_BN[:, first_P] + below_BN[:, last_P])).sum(axis=1) / 2
    pairs_B = own_BP.sum(axis=1) * below_BN[:, -1]
    return np.where(pairs_B > 0, ordered_B / np.where(pairs_B > 0, pairs_B, 1), np.nan)
