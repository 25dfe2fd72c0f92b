"""Line charts: compute the positions of points, ticks and labels. Needs no library and no network.

The template `charts.html.j2` draws them as HTML and SVG. A chart of many points is thinned: it is split into `MOST`
intervals, and shows the mean of each as a line, and its smallest and largest value as a lighter band.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlft.text import label

MOST = 500  # points of a line
OUTLIER = 2.5  # a chart ends at this multiple of the range that holds 90% of its points


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart.

    Attributes:
        name: name in the key.
        x: steps, float64 [L].
        y: values, float64 [L]. There is no point where y is not finite.
        dots: whether points are also drawn as dots; for lines of few points.
        place: decides the colour; None: the place among the lines of the chart.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    dots: bool = False
    place: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Thin:
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    last: float
    thinned: bool


def thin(series: Series) -> _Thin:
    """Reduce a series to at most `MOST` points. Points that are not finite are removed."""
    good = np.isfinite(series.y) & np.isfinite(series.x)
    x, y = series.x[good], series.y[good]
    if len(x) <= MOST:
        return _Thin(x=x, y=y, low=y, high=y, last=float(y[-1]) if len(y) else math.nan, thinned=False)
    starts = np.linspace(0, len(x), MOST, endpoint=False).astype(int)
    counts = np.diff(starts, append=len(x))
    last = np.append(starts[1:], len(x)) - 1
    return _Thin(
        x=x[last],
        y=np.add.reduceat(y, starts) / counts,
        low=np.minimum.reduceat(y, starts),
        high=np.maximum.reduceat(y, starts),
        last=float(y[-1]),
        thinned=True,
    )


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line as it is drawn.

    Attributes:
        place: from 0; it decides the colour, and how the line is dashed if there are more lines than colours.
        name: name in the key.
        last: its last value, as text.
        paths: (kind, SVG path) in a box of 1000 x 1000. Kinds are `band`, "" (the line itself) and `dots`.
    """

    place: int
    name: str
    last: str
    paths: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A label on an axis.

    Attributes:
        at: position as a share of the axis, from the top or from the left.
        label: the text.
        kind: CSS class.
    """

    at: float
    label: str
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What `charts.html.j2` draws.

    Attributes:
        title: text above the chart.
        lines: lines in the order of the key.
        above: number of points above the top of the chart.
        ticks: labels of the vertical axis.
        steps: labels of the horizontal axis.
        points: JSON for the script that shows the values under a pointer.
    """

    title: str
    lines: tuple[Line, ...]
    above: int
    ticks: tuple[Mark, ...]
    steps: tuple[Mark, ...]
    points: str


def chart(
    title: str,
    series: Sequence[Series],
    *,
    shown: Callable[[float], str] = lambda value: f"{value:.4g}",
    from_zero: bool = False,
) -> Chart | None:
    """Return a chart over steps; None if no series has a point.

    Args:
        title: text above the chart.
        series: the lines.
        shown: formats the last value of each line as text.
        from_zero: whether the vertical axis begins at 0 even if all values are far from it.
    """
    thinned = [(one, points) for one in series if len((points := thin(one)).x)]
    if not thinned:
        return None
    left = min(float(p.x[0]) for _, p in thinned)
    right = max(float(p.x[-1]) for _, p in thinned)
    low, high = _range([p for _, p in thinned], from_zero=from_zero)
    ticks = _ticks(low, high, 4)
    low, high = ticks[0], ticks[-1]

    def at(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return positions in a box of 1000 x 1000, with y downwards."""
        wide = (x - left) / (right - left) * 1000 if right > left else np.full(len(x), 500.0)
        return np.stack([wide, 1000 - (np.clip(y, low, high) - low) / (high - low) * 1000], axis=1)

    lines, data = [], []
    for place, (one, points) in enumerate(thinned):
        paths = []
        if points.thinned:
            there, back = at(points.x, points.high), at(points.x, points.low)[::-1]
            paths.append(("band", f"M{_path(there)}L{_path(back)}Z"))
        middle = at(points.x, points.y)
        paths.append(("", f"M{_path(middle)}"))
        if one.dots or len(middle) == 1:
            paths.append(("dots", "".join(f"M{x:.1f} {y:.1f}h0" for x, y in middle)))
        colour = place if one.place is None else one.place
        lines.append(Line(place=colour, name=one.name, last=shown(points.last), paths=tuple(paths)))
        rounded = [float(f"{y:.5g}") for y in points.y]
        data.append({"name": one.name, "x": [int(x) for x in points.x], "y": rounded})
    span = {"from": left, "to": right, "slack": max(1.0, (right - left) / MOST), "series": data}
    if right == left:
        span |= {"from": left - 1, "to": right + 1}
    return Chart(
        title=title,
        lines=tuple(lines),
        above=sum(int((points.high > high).sum()) for _, points in thinned),
        ticks=tuple(Mark(at=1 - (tick - low) / (high - low), label=label(tick)) for tick in ticks),
        steps=tuple(_steps(left, right)),
        points=json.dumps(span, separators=(",", ":")),
    )


def _path(places: np.ndarray) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _range(lines: Sequence[_Thin], *, from_zero: bool) -> tuple[float, float]:
    """Return the lowest and highest value to show, limited so that one spike does not flatten the rest."""
    low = min(float(line.low.min()) for line in lines)
    high = max(float(line.high.max()) for line in lines)
    if from_zero:
        low = min(0.0, low)
    values = np.concatenate([line.high for line in lines])
    limit = low + OUTLIER * (float(np.quantile(values, 0.9)) - low)
    if len(values) >= 50 and high > limit > low:
        high = limit
    if high <= low:
        pad = abs(high) * 0.1 or 1.0
        low, high = (low if from_zero else low - pad), high + pad
    return low, high


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Return about `about` round values that enclose `low` and `high`."""
    rough = (high - low) / about
    unit = 10 ** math.floor(math.log10(rough))
    step = unit * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _steps(left: float, right: float) -> list[Mark]:
    """Return the labels below the chart: the first, middle and last step."""
    if right == left:
        return [Mark(at=0.5, label=f"step {left:,.0f}")]
    middle = round((left + right) / 2)
    ends = [Mark(at=0, label=f"step {left:,.0f}", kind="first"), Mark(at=1, label=f"{right:,.0f}", kind="last")]
    if left < middle < right:
        ends.insert(1, Mark(at=(middle - left) / (right - left), label=f"{middle:,}"))
    return ends
