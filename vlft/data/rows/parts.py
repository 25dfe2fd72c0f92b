"""Cut a row into samples: the turns up to one of its answers. Only this answer is trained.

Chat templates that drop the thoughts of earlier answers need it: no single text has every answer as the model writes
it. `vlft.data.encode` decides which rows are cut.
"""

from __future__ import annotations

from dataclasses import replace

from vlft.config.thinking import thinks
from vlft.data.rows.objects import BOX, PLACEHOLDER
from vlft.data.sample import Image, Objects, Sample, Text, Turn
from vlft.errors import BadRow, DataError


def trained_answers(sample: Sample) -> list[int]:
    """The places of the turns of a row that are trained, in whole or in part; of a preference row only the last one."""
    if sample.rejected:
        return [len(sample.turns) - 1]
    return [place for place, turn in enumerate(sample.turns) if turn.trained != "none"]


def question_of(sample: Sample) -> Sample:
    """A row up to its last user turn with a trained answer. A model's answer to it can be compared with the row's."""
    answer = trained_answers(sample)[-1]
    last = max(place for place, turn in enumerate(sample.turns[:answer]) if turn.role == "user")
    thinking = thinks(text_of(sample.turns[answer]))
    return replace(sample, turns=sample.turns[: last + 1], rejected=(), thinking=thinking)


def text_of(turn: Turn) -> str:
    """The text of a turn, without its pictures and videos."""
    return "".join(part.text for part in turn.parts if isinstance(part, Text))


def up_to(sample: Sample, answer: int) -> Sample:
    """Return a row up to an answer, which is the only one that is trained. `Sample.answer` says which.

    Args:
        answer: place of its turn.

    Raises:
        DataError: a box before the end of the answer is in a picture that comes later.
    """
    turns = (*map(_untrained, sample.turns[:answer]), sample.turns[answer])
    rejected = sample.rejected if answer == len(sample.turns) - 1 else ()  # they answer the last question
    short = replace(sample, turns=turns, rejected=rejected, answer=answer)
    return short if sample.objects is None else replace(short, objects=_cut(short, sample.objects))


def _untrained(turn: Turn) -> Turn:
    parts = (replace(part, trained=False) if isinstance(part, Text) else part for part in turn.parts)
    return replace(turn, parts=tuple(parts)) if turn.role == "assistant" else turn


def _cut(sample: Sample, objects: Objects) -> Objects | None:
    """Return the names and boxes whose placeholders are in the turns of a sample."""
    texts = [part.text for turn in sample.all_turns for part in turn.parts if isinstance(part, Text)]
    found = [mark for text in texts for mark in PLACEHOLDER.findall(text)]
    boxes = found.count(BOX)
    pictures = objects.pictures[:boxes]
    count = sum(isinstance(part, Image) for part in sample.media)
    if late := [place for place in pictures if place >= count]:
        where = sample.turns[-1].field
        raise DataError(
            BadRow(
                file=sample.file,
                index=sample.index,
                id=sample.id,
                field="objects.image_id",
                reason=f"a box before the end of {where} is in picture {late[0]}, which comes after it. The answers of "
                "this row are trained one by one (--turns). Move the picture, or split the row",
            )
        )
    refs = objects.refs[: len(found) - boxes]
    if not found:
        return None
    return replace(objects, refs=refs, boxes=objects.boxes[:boxes], pictures=pictures)
