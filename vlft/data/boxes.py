"""The boxes of a row: find the picture that each belongs to, and write them in the notation of the model family.

Boxes appear in two ways: under `objects` (`vlft.data.rows.objects`), with the placeholders `<bbox>` and `<ref-object>`
in the text; or written in the text, in a convention that `--box_format` declares. `vlft.data.rows.coordinates` converts
the numbers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vlft.config.row_flags import BoxFormat
from vlft.data.media.pictures import Unreadable, picture_size
from vlft.data.media.read import refused
from vlft.data.rows.coordinates import (
    BoxText,
    Given,
    NotABox,
    PictureSizes,
    fault,
    needs_sizes,
    split,
    to_model,
    to_original,
)
from vlft.data.rows.objects import PLACEHOLDER, REF
from vlft.data.sample import Grid, Image, Part, Sample, Text
from vlft.errors import BadRow, DataError
from vlft.families import Family

_MARKS = ("<|box_start|>", "<|quad_start|>", "bbox_2d", "point_2d")  # without one of them a text holds no box


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """A box and its place in a row.

    Attributes:
        written: the box as the row has it.
        given: unit of its numbers in the row.
        pictures: indices in `Sample.media` of the pictures that the box may be in.
        field: field of its turn, or of its entry under `objects`.
        form: how to write its numbers.
        head: text that the family writes before the box; empty if the row's text has it.
        tail: text that the family writes after the box; empty if the row's text has it.
    """

    written: BoxText
    given: Given
    pictures: tuple[int, ...]
    field: str
    form: Literal["points", "list"]
    head: str = ""
    tail: str = ""


def has_boxes(sample: Sample, box_format: BoxFormat) -> bool:
    """Whether any number of the row may have to change."""
    if sample.objects is not None:
        return True
    if box_format == "as_is":
        return False
    texts = (part.text for turn in sample.all_turns for part in turn.parts if isinstance(part, Text))
    return any(mark in text for text in texts for mark in _MARKS)


def in_model_space(
    sample: Sample, grids: Sequence[Grid], *, family: Family, box_format: BoxFormat, patch_size: int
) -> Sample:
    """Return the row with its boxes as the family writes them, for pictures of the size that the model receives.

    Args:
        grids: grids of the row's media, in order.
        box_format: convention of the boxes in the text; `as_is` leaves them unchanged.
        patch_size: side of a patch, in pixels.

    Raises:
        DataError: a box cannot be read, or may be in one of several pictures of different sizes.
        MediaError: the size of a picture cannot be read.
    """
    if not has_boxes(sample, box_format):
        return sample

    @functools.cache
    def sizes(place: int) -> PictureSizes:
        grid = grids[place]
        return PictureSizes(original=_original(sample, place), shown=(grid.h * patch_size, grid.w * patch_size))

    def written(piece: str | _Placed) -> str:
        if isinstance(piece, str):
            return piece
        numbers = _converted(sample, piece, family, sizes)
        return f"{piece.head}{BoxText(numbers=numbers, form=piece.form)}{piece.tail}"

    texts = iter(["".join(map(written, pieces)) for pieces in _texts(sample, family, box_format)])
    turns = []
    for turn in sample.all_turns:
        parts = tuple(replace(part, text=next(texts)) if isinstance(part, Text) else part for part in turn.parts)
        turns.append(replace(turn, parts=parts))
    last = len(sample.turns)
    return replace(sample, turns=tuple(turns[:last]), rejected=tuple(turns[last:]))


def _refuse_cut_boxes(sample: Sample, box_format: BoxFormat) -> None:
    """Refuse a row if a trained span cuts a box or its placeholder in two: the numbers of the box are replaced."""

    def boxes(text: str) -> int:
        placeholders = len(PLACEHOLDER.findall(text)) if sample.objects is not None else 0
        return placeholders + (len(split(text, lenient=True)) // 2 if box_format != "as_is" else 0)

    for turn in sample.all_turns:
        texts = [part.text for part in turn.parts if isinstance(part, Text)]
        if turn.trained == "some" and boxes("".join(texts)) != sum(map(boxes, texts)):
            raise _bad(
                sample, turn.field, "a trained span begins or ends inside a box. Include the whole box or none of it"
            )


def remarks(sample: Sample, *, family: Family, box_format: BoxFormat) -> tuple[tuple[str, str], ...]:
    """List possible problems in the boxes of a row, as (field, remark) pairs. Opens headers of pictures.

    Raises:
        DataError, MediaError: the errors of `in_model_space`.
    """
    if not has_boxes(sample, box_format):
        return ()
    found: dict[tuple[str, str], None] = {}
    if sample.objects is not None and sample.objects.guessed:
        found["objects.image_id", "several pictures, and no image_id: all boxes are taken to be in the first"] = None
    for pieces in _texts(sample, family, box_format):
        for piece in pieces:
            if isinstance(piece, _Placed):
                size = _original(sample, piece.pictures[-1]) if piece.given == "pixels" and piece.pictures else None
                if piece.given != "pixels" or size is not None:
                    remark = fault(piece.written.numbers, piece.given, size)
                    if remark is not None:
                        found[piece.field, remark] = None
    return tuple(found)


def _converted(sample: Sample, box: _Placed, family: Family, sizes: Callable[[int], PictureSizes]) -> tuple[int, ...]:
    given, unit = box.given, family.box_unit
    if not needs_sizes(given, unit):
        return to_model(box.written.numbers, given, unit, None)
    if not box.pictures:
        raise _bad(sample, box.field, f"box {box.written}: there is no picture that it could be in. Remove it")
    ways = {to_model(box.written.numbers, given, unit, sizes(place)): place for place in box.pictures}
    if len(ways) > 1:
        names = ", ".join(
            f"{sample.media[p].field} ({'x'.join(map(str, sizes(p).original[::-1]))})" for p in box.pictures
        )
        raise _bad(
            sample,
            box.field,
            f"box {box.written} may be in any of {names}, and is not the same in each. Use one picture per turn, or "
            'write <bbox> and name the picture: "objects" with "image_id"',
        )
    return next(iter(ways))


def _original(sample: Sample, place: int) -> tuple[int, int]:
    part = sample.media[place]
    try:
        return picture_size(str(part.path))
    except Unreadable as error:
        raise refused(part, error) from error


def _texts(sample: Sample, family: Family, box_format: BoxFormat) -> Iterator[list[str | _Placed]]:
    """Yield each text of the row, in order, split at its boxes, with the placeholders filled in."""
    _refuse_cut_boxes(sample, box_format)
    pictures = tuple(i for i, part in enumerate(sample.media) if isinstance(part, Image))
    boxes = iter(enumerate(sample.objects.boxes if sample.objects else ()))
    refs = iter(sample.objects.refs if sample.objects else ())
    place = 0  # media passed
    latest: tuple[int, ...] = ()  # pictures of the latest turn that has any
    for turn in sample.all_turns:
        here: tuple[int, ...] = ()
        for part in turn.parts:
            if not isinstance(part, Text):
                here += (place,) if isinstance(part, Image) else ()
                place += 1
                continue
            # A box belongs to the picture of this turn right before it; else to those of the latest turn that has any;
            # else to those of the row.
            owners = here[-1:] or latest or pictures
            yield [
                piece
                for i, text in enumerate(PLACEHOLDER.split(part.text) if sample.objects else [part.text])
                for piece in (
                    [_filled(text, sample, boxes, refs, pictures, family)]
                    if i % 2
                    else _split_at_boxes(sample, text, owners, turn.field, box_format)
                )
            ]
        latest = here or latest


def _filled(
    mark: str,
    sample: Sample,
    boxes: Iterator[tuple[int, tuple[float, ...]]],
    refs: Iterator[str],
    pictures: tuple[int, ...],
    family: Family,
) -> str | _Placed:
    """Return the replacement of a placeholder."""
    objects = sample.objects
    assert objects is not None  # only rows with `objects` have placeholders
    tokens = family.box_style == "tokens"
    if mark == REF:
        return f"<|object_ref_start|>{next(refs)}<|object_ref_end|>" if tokens else next(refs)
    i, numbers = next(boxes)
    return _Placed(
        written=BoxText(numbers=numbers, form="list"),
        given=objects.unit,
        pictures=(pictures[objects.pictures[i]],),
        field=f"objects.bbox[{i}]",
        form="points" if tokens else "list",
        head="<|box_start|>" if tokens else "",
        tail="<|box_end|>" if tokens else "",
    )


def _split_at_boxes(
    sample: Sample, text: str, owners: tuple[int, ...], field: str, box_format: BoxFormat
) -> list[str | _Placed]:
    """Split a text at the boxes written in it."""
    if box_format == "as_is":
        return [text]
    try:
        pieces = split(text)
    except NotABox as error:
        raise _bad(sample, field, f"{error}, since --box_format is {box_format}. Fix it or remove it") from error
    return [
        piece
        if isinstance(piece, str)
        else _Placed(written=piece, given=box_format, pictures=owners, field=field, form=piece.form)
        for piece in pieces
    ]


@dataclass(frozen=True, kw_only=True)
class AnswerBox:
    """A box (or point, or quadrilateral) that a model wrote.

    Attributes:
        label: name that the model wrote right before or after the box, or None.
        model: its numbers, in the family's own unit.
        picture: path of the picture it is in; None if it may be in several, or there is no picture.
        pixels: its numbers in pixels of that picture as displayed, to a tenth; None if `picture` is None.
    """

    label: str | None
    model: tuple[float, ...]
    picture: str | None
    pixels: tuple[float, ...] | None


def boxes_in_answer(
    answer: str, asked: Sample, grid_of: Callable[[Image], Grid], *, family: Family, patch_size: int
) -> tuple[AnswerBox, ...]:
    """Find the boxes in a model's answer, and convert them to pixels of the picture in the latest turn with pictures.

    Args:
        asked: the conversation before the answer.
        grid_of: returns the grid of a picture.

    Raises:
        MediaError: a picture of the conversation can no longer be opened.
    """
    pieces = split(answer, lenient=True)
    if len(pieces) == 1:
        return ()
    shown: list[Part] = []
    for turn in asked.turns:
        shown = [part for part in turn.parts if isinstance(part, Image)] or shown
    ways = {}
    for part in shown:
        assert isinstance(part, Image)
        grid = grid_of(part)
        try:
            original = picture_size(part.path)
        except Unreadable as error:
            raise refused(part, error) from error
        ways[part.path] = PictureSizes(original=original, shown=(grid.h * patch_size, grid.w * patch_size))
    path, sizes = next(iter(ways.items())) if len(ways) == 1 else (None, None)
    found = []
    for i in range(1, len(pieces), 2):
        piece, before, after = pieces[i], str(pieces[i - 1]), str(pieces[i + 1])
        assert isinstance(piece, BoxText)
        pixels = None
        if sizes is not None:
            pixels = tuple(round(number, 1) for number in to_original(piece.numbers, family.box_unit, sizes))
        found.append(AnswerBox(label=_label(before, after), model=piece.numbers, picture=path, pixels=pixels))
    return tuple(found)


def _label(before: str, after: str) -> str | None:
    named = re.search(r"<\|object_ref_start\|>([^<]*)<\|object_ref_end\|>\s*<\|(?:box|quad)_start\|>$", before)
    if named is None:
        named = re.match(r"""[^{}]*?["']label["']\s*:\s*["']([^"']*)["']""", after)
    if named is None:
        named = re.search(r"""["']label["']\s*:\s*["']([^"']*)["'][^{}]*$""", before)
    return named[1] if named else None


def _bad(sample: Sample, field: str, reason: str) -> DataError:
    return DataError(BadRow(file=sample.file, index=sample.index, id=sample.id, field=field, reason=reason))
