"""Rows to ask a model about: the question, what is right, and the media to show. Loads no model.

Neighbours: `vlft.evaluation.answers_file` keeps the answers, `vlft.evaluation.ask` gets them from a model.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlft.config.flags import DataFlags
from vlft.config.thinking import CLOSE, OPEN, thoughts_of
from vlft.data.boxes import has_boxes
from vlft.data.encode import Encoder
from vlft.data.files.index import each
from vlft.data.rows.parts import question_of, text_of, trained_answers, up_to
from vlft.data.sample import Image, Sample, Text, Turn, Video
from vlft.errors import BadRow, ConfigError, DataError
from vlft.families import Family
from vlft.metrics.case import Case
from vlft.screen import count
from vlft.setup.rows import SHOWN_BAD_ROWS, open_rows
from vlft.text import counted

FRAMES = 8  # frames that are listed of a video given as a list of frames
Place = tuple[str, int]  # data file, and index of the row in it


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A row as one model is asked about it.

    Attributes:
        question: the row up to its last user turn with an answer, for `vlft.answering`.
        text: of that turn, with `<image>` and `<video>` where its media are.
        references: right answers as the model writes them, the row's own first, with thoughts.
    """

    question: Sample
    text: str
    references: tuple[str, ...]

    def case(self, answer: str) -> Case:
        """The answer of a model to this row, for a metric."""
        row = self.question
        return Case(
            answer=spoken(answer),
            references=tuple(map(spoken, self.references)),
            question=self.text,
            row={"file": row.file, "index": row.index, "id": row.id, "media": [path for _, path in media_of(row)]},
            full_answer=answer,
            full_references=self.references,
        )


@dataclass(frozen=True, kw_only=True)
class ReadRows:
    """The rows of some data files.

    Attributes:
        samples: rows that can be read, in the order of the files.
        bad: rows that are refused.
        prints: data file -> sha256 of its rows, in hex.
    """

    samples: tuple[Sample, ...]
    bad: tuple[BadRow, ...]
    prints: Mapping[str, str]


def read_rows(files: Sequence[str], data: DataFlags, family: Family, *, limit: int | None) -> ReadRows:
    """Parse rows. No media are opened.

    Args:
        files: data files.
        data: how they are read.
        family: its control tokens are refused.
        limit: most rows, from the first on; None: all.

    Raises:
        ConfigError: a file cannot be read.
    """
    index = open_rows(files, data, family)
    total = len(index) if limit is None else min(limit, len(index))
    samples: list[Sample] = []
    bad: list[BadRow] = []
    for row in count(itertools.islice(each(index), total), total=total, what="reading rows"):
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            samples.append(row)
    prints = {file.name: file.print().hex() for file in index.files}
    return ReadRows(samples=tuple(samples), bad=tuple(bad), prints=prints)


def place_of(row: Sample | BadRow) -> Place:
    """The name of a row by which answers are found."""
    return row.file, row.index


def refuse_bad(bad: Sequence[BadRow], total: int, data: DataFlags) -> None:
    """Refuse to evaluate while a row is refused, unless bad rows are skipped.

    Raises:
        ConfigError: names the first rows and the reasons.
    """
    if not bad or (data.on_bad_row == "skip" and len(bad) < total):
        return
    if data.on_bad_row == "skip":
        raise ConfigError(f"no row is left to evaluate: all {total:,} were refused, e.g. {bad[0]}")
    lines = "\n".join(f"  {row}" for row in bad[:SHOWN_BAD_ROWS])
    more = f"\n  and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
    raise ConfigError(
        f"{len(bad):,} of {counted(total, 'row')} cannot be evaluated:\n{lines}{more}\n"
        "  Fix them, or evaluate the rest: --on_bad_row skip"
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
    return Asked(
        question=question_of(sample), text=said(shown), references=_references(text_of(written.turns[answer]), listed)
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


def measured(samples: Sequence[Sample], encoder: Encoder, *, limit: int, longest: int) -> list[int | BadRow]:
    """Return the tokens of each row up to its last answer, or why the model cannot be asked about it.

    Headers of its media are read, and no media are decoded.

    Args:
        samples: the rows.
        encoder: of the model.
        limit: most tokens of prompt and answer together that the model supports.
        longest: most tokens of an answer.
    """

    def look(sample: Sample) -> int | BadRow:
        try:
            cost = encoder.measure(up_to(sample, trained_answers(sample)[-1]))
        except DataError as error:
            return error.row
        prompt = cost.tokens - cost.supervised
        if prompt + longest <= limit:
            return cost.tokens
        reason = (
            f"the prompt is about {prompt:,} tokens long and --max_new_tokens is {longest:,}; the model supports "
            f"{limit:,} together. Lower --max_new_tokens, or drop the row"
        )
        return BadRow(file=sample.file, index=sample.index, id=sample.id, field="conversations", reason=reason)

    return [look(sample) for sample in count(samples, total=len(samples), what="measuring rows")]


def spoken(answer: str) -> str:
    """Return an answer without its thoughts. Nothing is left of one that ends inside a thought."""
    found = thoughts_of(answer)
    if found is not None:
        return found[1]
    return "" if answer.lstrip().startswith(OPEN) and CLOSE not in answer else answer


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
