"""Scores and answers of all models -> `Evaluation`. Computes intervals, reads nothing.

`vlft.evaluation.evaluate` calls it at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from vlft.config.thinking import spoken
from vlft.evaluation.answers_file import Line
from vlft.evaluation.figures import Scores
from vlft.evaluation.labels import Labelled
from vlft.evaluation.result import AnsweredRow, Evaluation, Figure
from vlft.setup.asked import Asked, earlier, media_of
from vlft.text import counted


def assembled(
    models: tuple[str, ...],
    data: tuple[str, ...],
    outs: tuple[str, ...],
    scores: Mapping[str, Sequence[Scores]],
    found: Labelled | None,
    *,
    rows: Sequence[Asked],
    lines: Sequence[Sequence[Line]],
    skipped: int,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Put everything together.

    Args:
        models: names, MODEL first.
        data: data files.
        outs: answers file of each model.
        scores: metric -> its scores of each model.
        found: what the models chose among labels; None without labels.
        rows: the rows as the first model was asked.
        lines: the answers of each model, in the order of the rows.
        skipped: number of rows that were refused and skipped.
        notes: more notes for the user.
    """
    values: dict[str, list[tuple[float | None, ...]]] = {
        name: [one.rows for one in each] for name, each in scores.items()
    }
    figures = {name: tuple(one.figure for one in each) for name, each in scores.items()}
    differences = {name: _differences(each) for name, each in scores.items()}
    higher = {name: each[0].metric.higher for name, each in scores.items()}
    texts = {name: each[0].metric.text for name, each in scores.items()}
    if found is not None:  # its figures come first: the worst rows are those by accuracy
        others = {name: each for name, each in values.items() if name != "accuracy"}
        values = {"accuracy": [tuple(map(float, each)) for each in found.hits], **others}
        figures = {**found.figures, **{name: each for name, each in figures.items() if name not in found.figures}}
        differences |= found.differences
        higher |= dict.fromkeys(found.figures, True)
        texts |= found.texts
    answered = tuple(
        AnsweredRow(
            file=row.question.file,
            index=row.question.index,
            id=row.question.id,
            question=row.text,
            turns=earlier(row.question),
            references=row.references,
            media=media_of(row.question),
            answers=tuple(own[place].answer for own in lines),
            cut=tuple(own[place].cut for own in lines),
            scores={name: tuple(one[place] for one in each) for name, each in values.items()},
            label_scores=() if found is None else tuple(own[place].scores for own in lines),
        )
        for place, row in enumerate(rows)
    )
    return Evaluation(
        models=models,
        data=data,
        rows=answered,
        skipped=skipped,
        figures=figures,
        differences=differences if len(models) > 1 else {},
        higher=higher,
        texts=texts,
        confusions=() if found is None else found.confusions,
        outs=outs,
        notes=(*_cut(models, lines), *notes, *(() if found is None else found.notes)),
    )


def with_labels(
    models: Sequence[str], lines: Sequence[Sequence[Line]], found: Labelled
) -> tuple[list[list[Line]], tuple[str, ...]]:
    """Make the most likely label the answer of each line, and say where a file had another answer.

    Args:
        models: names.
        lines: the answers of each model, in the order of the rows.
        found: what the models chose among labels.

    Returns:
        the lines, and notes.
    """
    notes = []
    for name, own, labels in zip(models, lines, found.answers, strict=True):
        if other := sum(spoken(line.answer).strip() != label for line, label in zip(own, labels, strict=True)):
            notes.append(
                f"{name}: {other:,} of {counted(len(own), 'answer')} {'is' if other == 1 else 'are'} not the most "
                "likely label. With --labels the most likely label is the answer"
            )
    made = [
        [replace(line, answer=label) for line, label in zip(own, labels, strict=True)]
        for own, labels in zip(lines, found.answers, strict=True)
    ]
    return made, tuple(notes)


def _differences(each: Sequence[Scores]) -> tuple[Figure | None, ...]:
    first, *others = each
    return (None, *(one.minus(first) for one in others))


def _cut(models: Sequence[str], lines: Sequence[Sequence[Line]]) -> Iterator[str]:
    """Say how many answers of each model are incomplete: metrics count them as they are."""
    for name, own in zip(models, lines, strict=True):
        if cut := sum(line.cut for line in own):
            yield f"{name}: {cut:,} of {counted(len(own), 'answer')} reached --max_new_tokens and are incomplete"
