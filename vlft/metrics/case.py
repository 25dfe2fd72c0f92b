"""What a metric reads, and what it is: pure functions of an answer and its right answers. No model, no file.

Neighbours: `vlft.metrics` lists the metrics by name, `vlft.metrics.bootstrap` gives intervals and differences.

Letters in shapes: R rows, K statistics of a metric, B bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Case:
    """One answer of a model, and what is right.

    Attributes:
        answer: of the model, without its thoughts (`<think>...</think>`).
        references: the right answers, at least one: the row's own first, without its thoughts, then the others that it
            lists. Boxes are in the numbers that the model writes.
        question: text of the last user turn, with `<image>` and `<video>` where its media are.
        own_listed: whether the row's own answer is, to the letter, one of those that it lists: the first reference then
            stands for it.
        row: file, index and id, and for functions of the user whatever else is known of the row.
    """

    answer: str
    references: tuple[str, ...]
    question: str = ""
    own_listed: bool = False
    row: Mapping[str, Any] = field(default_factory=dict)
    full_answer: str | None = None
    full_references: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure of how good answers are.

    A row gives K numbers, which are summed over rows; the figure is a function of the sums. So a figure over any rows,
    of one row, and of a bootstrap sample are computed the same way. For a mean the numbers are (score, 1).

    Attributes:
        name: the key in `metrics`, and the word after `--metric`.
        text: one line for people.
        higher: whether a larger figure is better.
        size: K.
        score: the K numbers of a case; None if the metric does not apply to it, such as `iou` without a box in the
            references.
        value: sums [..., K], float64 -> figures [...], NaN where nothing was counted.
        needs: what a row must have for `score` to apply, for messages: "a box in its answer".
    """

    name: str
    text: str
    score: Callable[[Case], tuple[float, ...] | None]
    value: Callable[[np.ndarray], np.ndarray]
    size: int = 2
    higher: bool = True
    needs: str = "an answer"


def mean(sums: np.ndarray) -> np.ndarray:
    """The `value` of a metric whose numbers are (score, 1)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]
