"""Read boxes and points in text, and convert them between units and picture sizes.

Works on numbers and text only; independent of rows, files and model families.

A box is a flat tuple x1, y1, x2, y2. A point is x, y. A quadrilateral is four points. Sizes are (H, W) in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# pixels: pixels of the original picture, upright. 0-1000 and 0-1: fractions of its width and height.
Given = Literal["pixels", "0-1000", "0-1"]
# The units that a family reads and writes. pixels: pixels of the resized picture.
Unit = Literal["pixels", "0-1000"]

SLACK = 0.01  # fraction of a side; tools that round let boxes end this far outside, and these are clipped

_NUMBER = r"-?\d+(?:\.\d+)?"
_POINT = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
_POINTS = re.compile(rf"\s*{_POINT}(?:\s*,?\s*{_POINT})*\s*")
_LIST = re.compile(rf"\[\s*{_NUMBER}(?:\s*,\s*{_NUMBER})*\s*\]")
_BOX = re.compile(
    r"<\|(?P<kind>box|quad)_start\|>(?P<points>.*?)(?=<\|(?P=kind)_end\|>)"
    r"""|["'](?P<key>bbox_2d|point_2d)["']\s*:\s*(?P<list>\[[^\]]*\]?)""",
    re.DOTALL,
)
_COUNTS = {"box": (2, 4), "quad": (8,), "bbox_2d": (4,), "point_2d": (2,)}
_PLAIN_NUMBER = re.compile(r"(?<![\w.])-?\d")  # a number, not the 1 of x1


class NotABox(ValueError):
    """Numbers in the place of a box that are not a box. The message quotes them."""


@dataclass(frozen=True, kw_only=True)
class BoxText:
    """A box, point or quadrilateral in a text.

    Attributes:
        numbers: x, y, x, y, ...
        form: how the numbers are written: "points" is `(x,y),(x,y)`, "list" is `[x, y, x, y]`.
    """

    numbers: tuple[float, ...]
    form: Literal["points", "list"]

    def __str__(self) -> str:
        words = [f"{number:g}" if abs(number) < 1e6 else str(number) for number in self.numbers]
        if self.form == "list":
            return f"[{', '.join(words)}]"
        return ",".join(f"({x},{y})" for x, y in zip(words[::2], words[1::2], strict=True))


@dataclass(frozen=True, kw_only=True)
class PictureSizes:
    """The sizes of a picture, (H, W) in pixels.

    Attributes:
        original: size as displayed, after its EXIF orientation is applied.
        shown: size that the model gets.
    """

    original: tuple[int, int]
    shown: tuple[int, int]


def split(text: str, *, lenient: bool = False) -> list[str | BoxText]:
    """Split a text at the numbers of its boxes, in the notations of the Qwen-VL families.

    The notations are `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`, the same for a point or a quadrilateral
    (`<|quad_start|>`), `"bbox_2d": [x1, y1, x2, y2]` and `"point_2d": [x, y]`. A notation without numbers, as in a
    prompt that explains the format, is text.

    Args:
        lenient: keep numbers that are not a box in the text. Model outputs need this.

    Raises:
        NotABox: a notation holds numbers that are not a box.
    """
    pieces: list[str | BoxText] = []
    done = 0
    for found in _BOX.finditer(text):
        name = "points" if found["kind"] else "list"
        inner = found[name]
        if not _PLAIN_NUMBER.search(inner):
            continue
        numbers = tuple(float(number) for number in re.findall(_NUMBER, inner))
        form = _POINTS if found["kind"] else _LIST
        kind = found["kind"] or found["key"]
        if not form.fullmatch(inner) or len(numbers) not in _COUNTS[kind]:
            if lenient:
                continue
            wanted = {"box": "(x1,y1),(x2,y2)", "quad": "four points (x,y)", "bbox_2d": "[x1, y1, x2, y2]"}
            raise NotABox(f"{found[0][:80]!r} is not a box: {wanted.get(kind, '[x, y]')} belongs there")
        pieces += [text[done : found.start(name)], BoxText(numbers=numbers, form="points" if found["kind"] else "list")]
        done = found.end(name)
    return [*pieces, text[done:]]


def to_model(numbers: Sequence[float], given: Given, unit: Unit, sizes: PictureSizes | None) -> tuple[int, ...]:
    """Convert numbers to the unit of a family, rounded to whole numbers.

    Numbers outside the picture by at most `SLACK` are clipped to its edge.

    Args:
        numbers: x, y, x, y, ...
        given: unit of `numbers`.
        unit: unit of the result.
        sizes: sizes of the picture; may be None if neither unit is pixels (`needs_sizes`).
    """
    sides = _sides(len(numbers), given, sizes.original if sizes else None)
    shares = [_clipped(number / side) for number, side in zip(numbers, sides, strict=True)]
    units = _sides(len(numbers), unit, sizes.shown if sizes else None)
    return tuple(round(share * side) for share, side in zip(shares, units, strict=True))


def to_original(numbers: Sequence[float], unit: Unit, sizes: PictureSizes) -> tuple[float, ...]:
    """Convert numbers in the unit of a family to pixels of the original picture; not rounded."""
    units = _sides(len(numbers), unit, sizes.shown)
    sides = _sides(len(numbers), "pixels", sizes.original)
    return tuple(number / one * side for number, one, side in zip(numbers, units, sides, strict=True))


def needs_sizes(given: Given, unit: Unit) -> bool:
    """Return whether `to_model` needs the sizes of the picture."""
    return "pixels" in (given, unit)


def fault(numbers: Sequence[float], given: Given, original: tuple[int, int] | None) -> str | None:
    """Describe what is wrong with a box, with both values. None if nothing is.

    Args:
        numbers: x1, y1, x2, y2, or x, y.
        given: unit of `numbers`.
        original: (H, W); may be None if `given` is not pixels.
    """
    sides = _sides(len(numbers), given, original)
    box = f"box {_words(numbers)} ({given})"
    shares = [number / side for number, side in zip(numbers, sides, strict=True)]
    if any(not 0 <= share <= 1 for share in shares):
        what = f"{box} leaves the picture, which ends at {_words(sides[:2])}"
        if all(-SLACK <= share <= 1 + SLACK for share in shares):
            return f"{what}. It is clipped"
        return f"{what}. It is trained as written: check the unit of its numbers"
    if len(numbers) == 4 and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        return f"{box} is empty: {_words(numbers[2:])} is not right of and below {_words(numbers[:2])}"
    return None


def _sides(count: int, how: Given | Unit, size: tuple[int, int] | None) -> list[float]:
    """The full length for each number: width, height, width, ..."""
    if how != "pixels":
        return [1000.0 if how == "0-1000" else 1.0] * count
    if size is None:
        raise ValueError("pixels need the size of the picture")
    height, width = size
    return [float(width), float(height)] * (count // 2)


def _clipped(share: float) -> float:
    return min(max(share, 0.0), 1.0) if -SLACK <= share <= 1 + SLACK else share


def _words(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
