"""What an evaluation found: figures of each model, their differences, and every row with its answers. Types only.

`vlft.evaluation.page` shows it, `vlft.cli.eval` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A metric over all rows to which it applies.

    Attributes:
        value: the figure; a share is 0 to 1.
        low: lower end of its 95% interval (bootstrap over rows).
        high: upper end.
        rows: number of rows to which the metric applies.
    """

    value: float
    low: float
    high: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class AnsweredRow:
    """A row with the answer of each model.

    Attributes:
        file: data file, as the user named it.
        index: position in the file, from 0.
        id: the row's own id, or None.
        question: text of its last user turn, with `<image>` and `<video>` where its media are.
        turns: (role, text) of the turns before that one.
        references: right answers as the first model writes them, the row's own first.
        media: (kind, absolute path) in order; kind is image, video or frame.
        answers: of each model, in the order of `Evaluation.models`.
        cut: whether each answer reached the limit of tokens.
        scores: metric -> its figure for this row, of each model; None where it does not apply.
        label_scores: of each model, label -> log-probability; only with `--labels`.
    """

    file: str
    index: int
    id: str | None
    question: str
    turns: tuple[tuple[str, str], ...] = ()
    references: tuple[str, ...]
    media: tuple[tuple[str, str], ...] = ()
    answers: tuple[str, ...]
    cut: tuple[bool, ...] = ()
    scores: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    label_scores: tuple[Mapping[str, float], ...] = ()

    @property
    def name(self) -> str:
        """`held_out.json[7]`, as in messages."""
        return f"{self.file}[{self.index}]"


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How often each label was chosen for each right label.

    Attributes:
        labels: in the order of the file.
        counts: counts[right][chosen].
    """

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of `vlft eval`.

    Attributes:
        models: names of the models, MODEL first, then those of `--compare`.
        data: data files.
        rows: every row, in the order of the files.
        skipped: number of rows that were refused and skipped.
        figures: metric -> figure of each model.
        differences: metric -> figure of each model minus that of MODEL's on the same rows, with the interval of the
            paired bootstrap; None for MODEL itself.
        higher: metric -> whether a larger figure is better.
        texts: metric -> one line for people.
        confusions: of each model; only with `--labels`.
        outs: answers file of each model.
        notes: for the user.
    """

    models: tuple[str, ...]
    data: tuple[str, ...]
    rows: tuple[AnsweredRow, ...]
    skipped: int = 0
    figures: Mapping[str, tuple[Figure, ...]]
    differences: Mapping[str, tuple[Figure | None, ...]] = field(default_factory=dict)
    higher: Mapping[str, bool] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    confusions: tuple[Confusion, ...] = ()
    outs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
