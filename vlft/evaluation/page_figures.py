"""The upper part of the page of an evaluation: figures, intervals and differences, and which label was taken for which.

All positions are shares of the width of a drawing, from the left. The template `evaluation.html.j2` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from vlft.evaluation.result import AnsweredRow, Confusion, Evaluation, Figure
from vlft.text import label, plural

NARROWEST = 0.1  # least width of an axis, as a share of its largest value: noise must not fill the drawing
WHOLE_TABLE = 20  # labels of a table of confusions; of more labels the most frequent confusions are listed
CONFUSED = 30  # confusions of this list


def drawn_metrics(found: Evaluation) -> list[dict[str, Any]]:
    """Return the metrics for the template: an axis, and for each model an interval on it and its difference."""
    return [_metric(found, name) for name in found.figures]


def _metric(found: Evaluation, name: str) -> dict[str, Any]:
    figures, higher = found.figures[name], found.higher.get(name, True)
    start, end, ticks = axis([value for one in figures for value in (one.low, one.value, one.high)])

    def at(value: float) -> float:
        return min(1.0, max(0.0, (value - start) / (end - start)))

    differences = found.differences.get(name) or (None,) * len(figures)
    models = []
    for place, (figure, difference) in enumerate(zip(figures, differences, strict=True)):
        known = all(map(math.isfinite, (figure.low, figure.value, figure.high)))
        models.append(
            {
                "name": found.models[place],
                "place": place,
                "figure": number(figure.value),
                "low": number(figure.low),
                "high": number(figure.high),
                "rows": rows_text(figure.rows, len(found.rows)),
                "known": known,
                "drawn": (at(figure.low), at(figure.value), at(figure.high)) if known else None,
                "difference": _difference(found, name, place, difference) if difference is not None else None,
            }
        )
    return {
        "name": name,
        "text": found.texts.get(name, ""),
        "higher": higher,
        "ticks": [{"at": at(tick), "label": label(tick)} for tick in ticks],
        "models": models,
        "rows": models[0]["rows"] if len({figure.rows for figure in figures}) == 1 else "",
    }


def _difference(found: Evaluation, name: str, place: int, difference: Figure) -> dict[str, Any]:
    """Return a difference to the first model, in words and counts of rows."""
    higher = found.higher.get(name, True)
    better, worse, equal = changes(found.rows, name, place, higher)
    low, value, high = difference.low, difference.value, difference.high
    if not all(map(math.isfinite, (low, value, high))):
        verdict = "unknown"
    elif low <= 0 <= high:
        verdict = "equal" if low == value == high == 0 else "unclear"
    else:
        verdict = "better" if (low > 0) == higher else "worse"
    return {
        "verdict": verdict,
        "value": signed(value),
        "low": signed(low),
        "high": signed(high),
        "better": better,
        "worse": worse,
        "equal": equal,
    }


def changes(rows: Iterable[AnsweredRow], name: str, place: int, higher: bool) -> tuple[int, int, int]:
    """Count rows in which a model's score is better, worse and equal to the first model's."""
    better = worse = equal = 0
    for row in rows:
        change = change_of(row, name, place, higher)
        if change is not None:
            better += change > 0
            worse += change < 0
            equal += change == 0
    return better, worse, equal


def change_of(row: AnsweredRow, name: str, place: int, higher: bool) -> float | None:
    """Return how much better a model's score is than the first model's; None where one has no score."""
    scores = row.scores.get(name)
    if not scores or (first := finite(scores[0])) is None or (own := finite(scores[place])) is None:
        return None
    return own - first if higher else first - own


def finite(score: float | None) -> float | None:
    """Return the score, or None if it is not finite."""
    return float(score) if score is not None and math.isfinite(score) else None


def axis(values: Iterable[float]) -> tuple[float, float, tuple[float, ...]]:
    """Return start, end and ticks of an axis on which all finite values lie. Shares get an axis within 0 to 1."""
    good = [value for value in values if math.isfinite(value)]
    if not good:
        return 0.0, 1.0, (0.0, 0.5, 1.0)
    low, high = min(good), max(good)
    shares = low >= 0 and high <= 1
    least = NARROWEST * (1.0 if shares else max(abs(low), abs(high), 1e-9))
    room = max((high - low) * 0.1, (least - (high - low)) / 2)
    low, high = low - room, high + room
    if shares:
        low, high = max(0.0, min(low, 1 - least)), min(1.0, max(high, least))
    step = _step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, tuple(round(i * step, 12) for i in range(first, last + 1))


def _step(rough: float) -> float:
    """Return 1, 2, 2.5 or 5 times a power of ten, at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next((power * factor for factor in (1, 2, 2.5, 5) if power * factor >= rough * (1 - 1e-9)), power * 10)


def number(value: float) -> str:
    """Format a figure: `0.812`, `12.35`, `1,234`; `-` if it is not finite."""
    if not math.isfinite(value):
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.2f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2g}"


def signed(value: float) -> str:
    """Format a difference with its sign: `+0.120`, `−0.034`, `0`; `-` if it is not finite."""
    if not math.isfinite(value):
        return "-"
    return "0" if value == 0 else f"{'+' if value > 0 else '−'}{number(abs(value))}"


def confusion_of(model: str, place: int, found: Confusion) -> dict[str, Any]:
    """Return how often each label was chosen for each right label, as a table or, of many labels, as a list."""
    labels, counts = found.labels, found.counts
    total = sum(map(sum, counts))
    right = sum(row[i] for i, row in enumerate(counts))
    return {
        "model": model,
        "place": place,
        "total": total,
        "right": right,
        "labels": labels if len(labels) <= WHOLE_TABLE else (),
        "lines": [_line(labels[i], i, row) for i, row in enumerate(counts)] if len(labels) <= WHOLE_TABLE else [],
        "listed": _confused(labels, counts) if len(labels) > WHOLE_TABLE else [],
        "kinds": sum(bool(count) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j),
        "most": CONFUSED,
    }


def _line(name: str, place: int, counts: Sequence[int]) -> dict[str, Any]:
    total = sum(counts)
    cells = [
        {"count": count, "share": count / total if total else 0.0, "right": i == place}
        for i, count in enumerate(counts)
    ]
    return {"name": name, "cells": cells, "total": total, "right": counts[place] / total if total else None}


def _confused(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    wrong = [(count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if count and i != j]
    most = sorted(wrong, key=lambda one: -one[0])[:CONFUSED]
    return [{"right": labels[i], "chosen": labels[j], "count": count, "of": sum(counts[i])} for count, i, j in most]


def rows_text(rows: int, total: int) -> str:
    """Return `all 2,000 rows` or `1,200 of 2,000 rows`."""
    return f"all {total:,} {plural(total, 'row')}" if rows == total else f"{rows:,} of {total:,} {plural(total, 'row')}"
