"""Boxes and points: in which numbers they are written, and what they are in another picture size. Numbers and text
only; knows no row, no file and no model family.

A box is a flat tuple x1, y1, x2, y2, a point x, y, a quadrilateral four points; sizes are (H, W) in pixels, as
everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# pixels: of the original picture, upright. 0-1000 and 0-1: shares of its width and height.
Given = Literal["pixels", "0-1000", "0-1"]
# What a family reads and writes. pixels: of the resized picture.
Unit = Literal["pixels", "0-1000"]

SLACK = 0.01  # of a side: boxes end so far outside where a tool rounded them; they are clipped

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
_STANDS_ALONE = re.compile(r"(?<![\w.])-?\d")  # a number, not the 1 of x1


class NotABox(ValueError):
    """Numbers where a box belongs that are none; the message says which."""


@dataclass(frozen=True, kw_only=True)
class BoxText:
    """A box, point or quadrilateral in a text.

    Attributes:
        numbers: x, y, x, y, ...
        form: how its numbers are written: `(x,y),(x,y)` or `[x, y, x, y]`.
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
    """A picture's sizes: `original` as it is displayed (turned as its EXIF says), `shown` as the model gets it."""

    original: tuple[int, int]
    shown: tuple[int, int]


def split(text: str, *, lenient: bool = False) -> list[str | BoxText]:
    """A text cut at the numbers of its boxes, in the notations of the Qwen-VL families.

    `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`, a point or a quadrilateral (`<|quad_start|>`) in the same way, and
    `"bbox_2d": [x1, y1, x2, y2]`, `"point_2d": [x, y]`. What stands there without a number, as in a prompt that
    explains the form, is text.

    Args:
        lenient: leave numbers that make no box in the text, as in what a model answers.

    Raises:
        NotABox: there are numbers, but not those of a box.
    """
    pieces: list[str | BoxText] = []
    done = 0
    for found in _BOX.finditer(text):
        name = "points" if found["kind"] else "list"
        inner = found[name]
        if not _STANDS_ALONE.search(inner):
            continue
        numbers = tuple(float(number) for number in re.findall(_NUMBER, inner))
        form = _POINTS if found["kind"] else _LIST
        kind = found["kind"] or found["key"]
        if not form.fullmatch(inner) or len(numbers) not in _COUNTS[kind]:
            if lenient:
                continue
            wanted = {"box": "(x1,y1),(x2,y2)", "quad": "four points (x,y)", "bbox_2d": "[x1, y1, x2, y2]"}
            raise NotABox(f"{found[0][:80]!r} is no box: {wanted.get(kind, '[x, y]')} belongs there")
        pieces += [text[done : found.start(name)], BoxText(numbers=numbers, form="points" if found["kind"] else "list")]
        done = found.end(name)
    return [*pieces, text[done:]]


def to_model(numbers: Sequence[float], given: Given, unit: Unit, sizes: PictureSizes | None) -> tuple[int, ...]:
    """What a family reads, rounded to its whole units; up to `SLACK` outside the picture is clipped to its edge.

    Args:
        sizes: of the picture; None will do where neither side speaks of pixels (`needs_sizes`).
    """
    sides = _sides(len(numbers), given, sizes.original if sizes else None)
    shares = [_clipped(number / side) for number, side in zip(numbers, sides, strict=True)]
    units = _sides(len(numbers), unit, sizes.shown if sizes else None)
    return tuple(round(share * side) for share, side in zip(shares, units, strict=True))


def to_original(numbers: Sequence[float], unit: Unit, sizes: PictureSizes) -> tuple[float, ...]:
    """What a family writes, in pixels of the original picture; not rounded."""
    units = _sides(len(numbers), unit, sizes.shown)
    sides = _sides(len(numbers), "pixels", sizes.original)
    return tuple(number / one * side for number, one, side in zip(numbers, units, sides, strict=True))


def needs_sizes(given: Given, unit: Unit) -> bool:
    """Whether `to_model` has to know the picture."""
    return "pixels" in (given, unit)


def fault(numbers: Sequence[float], given: Given, original: tuple[int, int] | None) -> str | None:
    """What is odd about a box, with both values; None where nothing is.

    Args:
        original: (H, W); None will do where `given` is not pixels.
    """
    sides = _sides(len(numbers), given, original)
    box = f"box {_words(numbers)} ({given})"
    shares = [number / side for number, side in zip(numbers, sides, strict=True)]
    if any(not 0 <= share <= 1 for share in shares):
        what = f"{box} leaves the picture, which ends at {_words(sides[:2])}"
        if all(-SLACK <= share <= 1 + SLACK for share in shares):
            return f"{what}. It is clipped"
        return f"{what}. It is trained as it stands: is that how its numbers are meant?"
    if len(numbers) == 4 and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        return f"{box} is empty: {_words(numbers[2:])} does not lie right of and below {_words(numbers[:2])}"
    return None


def _sides(count: int, how: Given | Unit, size: tuple[int, int] | None) -> list[float]:
    """What each of so many numbers is a part of: width, height, width, ..."""
    if how != "pixels":
        return [1000.0 if how == "0-1000" else 1.0] * count
    if size is None:
        raise ValueError("pixels of a picture whose size is not given")
    height, width = size
    return [float(width), float(height)] * (count // 2)


def _clipped(share: float) -> float:
    return min(max(share, 0.0), 1.0) if -SLACK <= share <= 1 + SLACK else share


def _words(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
