"""Read the `objects` key of a row, as in ms-swift: boxes and names for the placeholders in its text. Opens no file."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

from vlft.data.rows.source import kind_of
from vlft.data.sample import Objects
from vlft.errors import RowRef
from vlft.families import Family
from vlft.text import short

BOX, REF = "<bbox>", "<ref-object>"
PLACEHOLDER = re.compile(f"({BOX}|{REF})")
# ms-swift's values of `bbox_type`.
TYPES: dict[object, Literal["pixels", "0-1"]] = {"real": "pixels", "norm1": "0-1"}


def objects_of(row: RowRef, raw: dict, texts: Sequence[str], pictures: int, family: Family) -> Objects | None:
    """Read the `objects` of a row and check them against its text.

    Args:
        row: the row, for messages.
        raw: the row as an object.
        texts: the texts of all turns.
        pictures: how many pictures the row has.
        family: names must not hold its control tokens.

    Returns:
        None if the row has no `objects`, or its text has no placeholder.

    Raises:
        DataError: the numbers of boxes or names and of placeholders differ, or a box or name is malformed.
    """
    found = [mark for text in texts for mark in PLACEHOLDER.findall(text)]
    value = raw.get("objects")
    if not found or value is None:
        return None
    if not isinstance(value, dict):
        raise row.bad("objects", f'is {kind_of(value)}, not an object. Write {{"ref": [...], "bbox": [...]}}')
    refs, boxes, ids = (_list(row, value, key) for key in ("ref", "bbox", "image_id"))
    for key, mark, have in (("ref", REF, refs), ("bbox", BOX, boxes)):
        if len(have) != found.count(mark):
            raise row.bad(
                f"objects.{key}",
                f"{len(have)} in it, {found.count(mark)} {mark} in the text. The numbers must be equal",
            )
    unit = value.get("bbox_type") or "real"
    if not isinstance(unit, str) or unit not in TYPES:
        raise row.bad("objects.bbox_type", f"is {short(repr(unit))}. Write one of {', '.join(map(str, TYPES))}")
    for i, ref in enumerate(refs):
        _check_ref(row, ref, f"objects.ref[{i}]", family)
    if ids and len(ids) != len(boxes):
        raise row.bad(
            "objects.image_id", f"{len(ids)} in it, {len(boxes)} boxes. Name the picture of each box, or of none"
        )
    for i, one in enumerate(ids):
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < pictures:
            raise row.bad(
                f"objects.image_id[{i}]", f"is {short(repr(one))}, the row has {pictures} pictures, counted from 0"
            )
    if boxes and not pictures:
        raise row.bad("objects.bbox", f"{len(boxes)} boxes, but the row has no picture. Add it, or drop the boxes")
    return Objects(
        refs=tuple(refs),
        boxes=tuple(_numbers(row, box, f"objects.bbox[{i}]") for i, box in enumerate(boxes)),
        unit=TYPES[unit],
        pictures=tuple(ids) or (0,) * len(boxes),  # ms-swift's own default
        guessed=pictures > 1 and not ids,
    )


def _list(row: RowRef, value: dict, key: str) -> list:
    found = value.get(key)
    if found is None:
        return []
    if not isinstance(found, list):
        raise row.bad(f"objects.{key}", f"is {kind_of(found)}, not a list")
    return found


def _check_ref(row: RowRef, ref: object, field: str, family: Family) -> None:
    if not isinstance(ref, str):
        raise row.bad(field, f"is {kind_of(ref)}, where a name belongs")
    if forged := [token for token in family.control_tokens if token in ref]:
        raise row.bad(field, f"holds {', '.join(forged)}, which {family.label} reads as the end of a turn or a picture")
    try:
        ref.encode("utf-8")
    except UnicodeEncodeError as error:
        raise row.bad(
            field, f"character {error.start} is half a character. Write the whole character or remove it"
        ) from error


def _numbers(row: RowRef, box: object, field: str) -> tuple[float, ...]:
    numbers = box if isinstance(box, list) else []
    good = all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
    if not good or len(numbers) not in (2, 4):
        raise row.bad(field, f"is {short(str(box))}, where [x1, y1, x2, y2] or a point [x, y] belongs")
    return tuple(float(number) for number in numbers)
