"""Rows and the scores of their labels -> the label that each model chose, figures, and confusions. No model, no file.

`vlft.scoring` makes the scores, `vlft.metrics.labels` computes the figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlft.errors import ConfigError
from vlft.evaluation.result import Confusion, Figure
from vlft.text import counted, short

if TYPE_CHECKING:
    from vlft.metrics.labels import Interval

NAMED = 5  # rows and labels that a message names


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What models chose. The order of models and rows is that of the scores.

    Attributes:
        answers: of each model, the most likely label of each row.
        hits: of each model, whether that is the right label, of each row.
        figures: accuracy, macro_f1 and auc -> figure of each model.
        differences: the same names -> figure of each model minus that of the first, with the interval of the paired
            bootstrap; None for the first model.
        texts: the same names -> one line for people. Larger is better for each.
        confusions: of each model.
        notes: for the user.
    """

    answers: tuple[tuple[str, ...], ...]
    hits: tuple[tuple[bool, ...], ...]
    figures: Mapping[str, tuple[Figure, ...]]
    differences: Mapping[str, tuple[Figure | None, ...]]
    texts: Mapping[str, str]
    confusions: tuple[Confusion, ...]
    notes: tuple[str, ...]


def places(names: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> list[int]:
    """The place of each row's right answer among the labels. Blanks around an answer do not count.

    Args:
        names: of the rows, for messages: `held_out.json[7]`.
        references: the right answer of each row, without thoughts.
        labels: of `vlft.setup.labels.read_labels`.

    Raises:
        ConfigError: the right answer of a row is no label.
    """
    known = {label: place for place, label in enumerate(labels)}
    found = [known.get(reference.strip()) for reference in references]
    wrong = [row for row, place in enumerate(found) if place is None]
    if wrong:
        raise ConfigError(_no_label([(names[row], references[row].strip()) for row in wrong], labels))
    return [place for place in found if place is not None]


def labelled(
    right: Sequence[int], scores: Sequence[Sequence[Mapping[str, float]]], labels: Sequence[str], *, seed: int = 0
) -> Labelled:
    """Choose the most likely label of each row, and compute the figures of each model.

    Args:
        right: from `places`, at least one row.
        scores: of each model, of each row, label -> log-probability.
        labels: in the order of the file. Of equally likely labels the first is chosen.
        seed: of the bootstrap.

    Raises:
        ConfigError: the scores of a row are of other labels, or one of them is not a number, as in an answers file of
            another run.
    """
    import numpy as np

    from vlft.metrics.labels import NAMES, Choices, compared, confusion

    right_R = np.array(right, dtype=np.int64)
    models = [
        Choices(right_R=right_R, scores_RK=np.array([_in_order(row, labels, place) for place, row in enumerate(rows)]))
        for rows in scores
    ]
    found = compared(models, seed=seed)
    undefined = {name for name in NAMES if any(math.isnan(one[name][0].value) for one in found)}
    names = [name for name in NAMES if name not in undefined]
    rows = len(right)
    figures = {name: tuple(_figure(one[name][0], rows) for one in found) for name in names}
    differences = {name: (None, *(_figure(one[name][1], rows) for one in found[1:])) for name in names}
    return Labelled(
        answers=tuple(tuple(labels[place] for place in model.chosen_R.tolist()) for model in models),
        hits=tuple(tuple((model.chosen_R == right_R).tolist()) for model in models),
        figures=figures,
        differences=differences,
        texts={name: NAMES[name] for name in names},
        confusions=tuple(Confusion(labels=tuple(labels), counts=confusion(model)) for model in models),
        notes=("auc is not defined where all rows have the same right label",) if undefined else (),
    )


def _figure(interval: Interval, rows: int) -> Figure:
    return Figure(value=interval.value, low=interval.low, high=interval.high, rows=rows)


def _in_order(row: Mapping[str, float], labels: Sequence[str], place: int) -> list[float]:
    if row.keys() != set(labels):
        raise ConfigError(
            f"row {place + 1} has scores of {_list(list(row))}; --labels has {_list(labels)}. Score the rows again, or "
            "use the same --labels."
        )
    wrong = [label for label in labels if not math.isfinite(row[label])]
    if wrong:
        raise ConfigError(
            f"row {place + 1}: the log-probability of {wrong[0]!r} is not a number, so the model computes no numbers "
            "for this row. Check that its weights hold no NaN."
        )
    return [row[label] for label in labels]


def _no_label(wrong: Sequence[tuple[str, str]], labels: Sequence[str]) -> str:
    """The message about rows whose right answer is no label."""
    some = ", ".join(f"{name} {short(answer, 40)!r}" for name, answer in wrong[:NAMED])
    more = f" and {counted(len(wrong) - NAMED, 'more row')}" if len(wrong) > NAMED else ""
    folded = {label.casefold() for label in labels}
    case = " Labels and answers must also agree in case." if wrong[0][1].casefold() in folded else ""
    return (
        f"{counted(len(wrong), 'row')} with a right answer that is no label: {some}{more}. The labels are "
        f"{_list(labels)}.{case} Add the answers to --labels, or change or remove these rows."
    )


def _list(labels: Sequence[str]) -> str:
    some = ", ".join(repr(short(label, 40)) for label in labels[: 2 * NAMED])
    return f"{some} and {len(labels) - 2 * NAMED:,} more" if len(labels) > 2 * NAMED else some
