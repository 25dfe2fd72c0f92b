"""What a model is asked about a row, and what is right, as the model writes it: for evaluation and training.

row  --asked-->  Asked  --case(answer)-->  Case of `vlft.metrics`
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlft.config.thinking import spoken
from vlft.data.boxes import has_boxes
from vlft.data.encode import Encoder
from vlft.data.rows.parts import question_of, text_of, trained_answers
from vlft.data.sample import Image, Sample, Text, Turn, Video
from vlft.metrics.case import Case

FRAMES = 8  # frames that are listed of a video given as a list of frames


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A row as one model is asked about it.

    Attributes:
        question: the row up to its last user turn with an answer, for `vlft.answering`.
        text: of that turn, with `<image>` and `<video>` where its media are.
        references: right answers as the model writes them, the row's own first, with thoughts.
        own_listed: whether the row's own answer is one of the answers that it lists.
    """

    question: Sample
    text: str
    references: tuple[str, ...]
    own_listed: bool = False

    def case(self, answer: str) -> Case:
        """The answer of a model to this row, for a metric."""
        row = self.question
        return Case(
            answer=spoken(answer),
            references=tuple(map(spoken, self.references)),
            question=self.text,
            own_listed=self.own_listed,
            row={"file": row.file, "index": row.index, "id": row.id, "media": [path for _, path in media_of(row)]},
            full_answer=answer,
            full_references=self.references,
        )


def asked(sample: Sample, encoder: Encoder | None) -> Asked:
    """Return what is asked about a row.

    Args:
        sample: the row.
        encoder: of the model, which knows how it writes boxes; None: boxes stay as in the row.

    Raises:
        DataError: a box of the row cannot be read.
    """
    answer = trained_answers(sample)[-1]
    written = sample
    listed = sample.references
    if encoder is not None and has_boxes(sample, encoder.recipe.box_format):
        written = encoder.as_written(sample)
        listed = tuple(_as_written(text, sample, answer, encoder) for text in listed)
    # The encoder converts the boxes of the question itself.
    shown = question_of(written).turns[-1]
    own = text_of(written.turns[answer])
    return Asked(
        question=question_of(sample),
        text=said(shown),
        references=_references(own, listed),
        own_listed=own in listed,
    )


def _references(own: str, listed: Sequence[str]) -> tuple[str, ...]:
    """Put the row's own answer first. If it is one of the listed answers, it is not counted once more."""
    others = list(listed)
    if own in others:
        others.remove(own)
    return (own, *others)


def _as_written(text: str, sample: Sample, answer: int, encoder: Encoder) -> str:
    """Return a listed answer with its boxes as the model writes them."""
    turn = replace(sample.turns[answer], parts=(Text(text=text),))
    other = replace(sample, turns=(*sample.turns[:answer], turn), objects=None, rejected=())
    if not has_boxes(other, encoder.recipe.box_format):
        return text
    return text_of(encoder.as_written(other).turns[answer])


def said(turn: Turn) -> str:
    """The text of a turn, with `<image>` and `<video>` where its media are."""
    return "".join(
        part.text if isinstance(part, Text) else "<image>" if isinstance(part, Image) else "<video>"
        for part in turn.parts
    )


def earlier(question: Sample) -> tuple[tuple[str, str], ...]:
    """(role, text) of the turns before the question."""
    return tuple((turn.role, said(turn)) for turn in question.turns[:-1])


def media_of(question: Sample) -> tuple[tuple[str, str], ...]:
    """(kind, absolute path) of the media of a conversation, in order; kind is image, video or frame."""

    def kind(part: Any) -> str:
        return "image" if isinstance(part, Image) else "frame" if isinstance(part, Video) and part.frames else "video"

    return tuple((kind(part), os.path.abspath(path)) for part in question.media for _, path in part.files[:FRAMES])
