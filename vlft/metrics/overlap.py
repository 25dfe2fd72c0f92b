"""iou and iou_hit_rate: do the boxes of an answer lie where the right boxes do?

Boxes are in the numbers that the model writes, in the right answers too, so no picture is needed. What a box is named
does not count. Letters: N boxes of the right answer, M boxes of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from vlft.metrics.case import Case, Metric, mean
from vlft.metrics.names import NAMES

Box = tuple[float, float, float, float]  # x1, y1, x2, y2

HIT = 0.5  # least IoU of a hit, as in RefCOCO

_NUMBER = r"-?\d+(?:\.\d+)?"
_POINT = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
# The marks of Qwen2-VL around points; then a list of numbers, with or without the key bbox_2d; then two points alone,
# which is what is left of Qwen2-VL's notation where the marks were left out with the special tokens.
_BOX = re.compile(
    rf"<\|(?P<kind>box|quad)_start\|>\s*(?P<points>{_POINT}(?:(?:\s*,)?\s*{_POINT})*)\s*<\|(?P=kind)_end\|>"
    rf"|\[(?P<list>\s*{_NUMBER}(?:\s*,\s*{_NUMBER})*\s*)\]"
    rf"|(?P<pair>{_POINT}(?:\s*,)?\s*{_POINT})"
)


def boxes(text: str) -> list[Box]:
    """Return the boxes that a text writes, in order.

    They are `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`, `"bbox_2d": [x1, y1, x2, y2]` and any other list of four
    numbers, and `(x1,y1),(x2,y2)`. A quadrilateral counts as the box around it. Points are no boxes.
    """
    found = []
    for match in _BOX.finditer(text):
        numbers = [float(number) for number in re.findall(_NUMBER, match["points"] or match["list"] or match["pair"])]
        if len(numbers) == 4 and match["kind"] != "quad":
            found.append((numbers[0], numbers[1], numbers[2], numbers[3]))
        elif len(numbers) == 8 and match["kind"] == "quad":
            found.append((min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])))
    return found


def iou(first: Box, second: Box) -> float:
    """Return intersection over union. Two equal boxes without an area have 1; other boxes without an area have 0."""
    if first == second:
        return 1.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [max(0.0, x2 - x1) * max(0.0, y2 - y1) for x1, y1, x2, y2 in (first, second)]
    shared = width * height
    return shared / (sum(areas) - shared)


def best_total(gains_NM: Sequence[Sequence[float]]) -> float:
    """Return the largest sum of gains where each row takes part at most once, and each column too.

    Source: the Hungarian method with potentials (Kuhn 1955, Munkres 1957), O(N^2 M) for N <= M.

    Args:
        gains_NM: gains, none below 0.
    """
    # A row or column without any gain cannot add to the sum. Most boxes of an answer that never ends are such.
    gains_NM = [gains_M for gains_M in gains_NM if any(gains_M)]
    gains_NM = list(zip(*(gains_N for gains_N in zip(*gains_NM, strict=True) if any(gains_N)), strict=True))
    if not gains_NM:
        return 0.0
    if len(gains_NM) > len(gains_NM[0]):
        gains_NM = list(zip(*gains_NM, strict=True))
    columns = len(gains_NM[0])
    row_of = [-1] * (columns + 1)  # column -> its row; the last column stands for the row that looks for one
    price_N, price_M = [0.0] * len(gains_NM), [0.0] * (columns + 1)
    for row in range(len(gains_NM)):
        row_of[columns] = row
        at = columns
        slack, came_from, seen = [float("inf")] * columns, [columns] * columns, [False] * (columns + 1)
        while row_of[at] != -1:
            seen[at] = True
            here, nearest = row_of[at], columns
            for column in range(columns):
                if not seen[column]:
                    cost = -gains_NM[here][column] - price_N[here] - price_M[column]
                    if cost < slack[column]:
                        slack[column], came_from[column] = cost, at
                    if nearest == columns or slack[column] < slack[nearest]:
                        nearest = column
            step = slack[nearest]
            for column in range(columns + 1):
                if seen[column]:
                    price_N[row_of[column]] += step
                    price_M[column] -= step
                elif column < columns:
                    slack[column] -= step
            at = nearest
        while at != columns:
            row_of[at] = row_of[came_from[at]]
            at = came_from[at]
    return sum(gains_NM[row_of[column]][column] for column in range(columns) if row_of[column] != -1)


def _best(pair: Callable[[list[Box], list[Box]], tuple[float, float]]) -> Callable[[Case], tuple[float, float] | None]:
    """Return the `score` of the reference with the highest share, of those that have a box."""

    def score(case: Case) -> tuple[float, float] | None:
        answer = boxes(case.answer)
        scored = [pair(answer, right) for reference in case.references if (right := boxes(reference))]
        return max(scored, key=lambda one: one[0] / one[1], default=None)

    return score


def _mean_iou(answer: list[Box], right: list[Box]) -> tuple[float, float]:
    """Match boxes one to one so that the sum of IoU is largest. Boxes without a partner on either side count 0."""
    total = best_total([[iou(one, other) for other in answer] for one in right])
    return total / max(len(answer), len(right)), 1.0


def _hits(answer: list[Box], right: list[Box]) -> tuple[float, float]:
    """Match as many right boxes as possible with IoU of at least 0.5. Further boxes of the answer do not count."""
    hits = best_total([[float(iou(one, other) >= HIT) for other in answer] for one in right])
    return hits, float(len(right))


METRICS = (
    Metric(name="iou", text=NAMES["iou"], score=_best(_mean_iou), value=mean, needs="a box in its answer"),
    Metric(
        name="iou_hit_rate", text=NAMES["iou_hit_rate"], score=_best(_hits), value=mean, needs="a box in its answer"
    ),
)
