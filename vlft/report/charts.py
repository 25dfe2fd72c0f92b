"""Line charts as HTML and SVG, drawn here: no library, no network. Labels are HTML, so that a phone can read them.

A chart of many points is thinned: each of `MOST` stretches shows its mean, and lightly its smallest and largest value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlft.pages.web import safe

MOST = 500  # points of a line
OUTLIER = 2.5  # a chart ends at so many times the spread that 90% of its points have
COLORS = 6

STYLE = """
:root{--s0:#2463c9;--s1:#c2571a;--s2:#0b7a53;--s3:#8a3fb3;--s4:#a8851b;--s5:#b0305f}
@media(prefers-color-scheme:dark){:root{--s0:#7fb2ff;--s1:#ff9d5c;--s2:#5fd6a5;--s3:#cf9af0;--s4:#e5c454;--s5:#ff8db5}}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1rem}
.chart{margin:0;background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .8rem .5rem;
min-width:0;display:flex;flex-direction:column}
.chart figcaption{display:flex;flex-wrap:wrap;gap:.1rem .8rem;align-items:baseline;font-size:.85rem;color:var(--soft)}
.chart figcaption b{font-size:.95rem;color:var(--ink)}
.key::before{content:"";display:inline-block;width:.8rem;height:.2rem;border-radius:.1rem;margin-right:.3rem;
vertical-align:middle;background:var(--c)}
.plot{position:relative;margin:.6rem 0 1.3rem 3.4rem;flex:1;min-height:11rem;border-left:1px solid var(--line);
touch-action:pan-y}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:hidden}
.plot path{fill:none;stroke-width:1.8;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke:var(--c)}
.plot path.band{fill:var(--c);stroke:none;opacity:.16}.plot path.dots{stroke-width:7;stroke-linecap:round}
.plot .y{position:absolute;left:0;right:0;border-top:1px solid var(--line)}
.plot .y span{position:absolute;right:calc(100% + .35rem);top:-.6rem;font-size:.75rem;line-height:1.2rem;
color:var(--soft);white-space:nowrap}
.plot .x{position:absolute;top:calc(100% + .2rem);font-size:.75rem;color:var(--soft);transform:translateX(-50%);
white-space:nowrap}
.plot .x.first{transform:none}.plot .x.last{transform:translateX(-100%)}
.hair{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);display:none}
.read{position:absolute;top:.2rem;max-width:92%;background:var(--card);border:1px solid var(--line);padding:.1rem .4rem;
border-radius:.3rem;font-size:.8rem;display:none;pointer-events:none}
.clipped{font-size:.75rem;color:var(--soft)}
"""

#: Shows the values of the nearest point under a pointer or finger.
SCRIPT = """
for (const plot of document.querySelectorAll('.plot')) {
  const data = JSON.parse(plot.dataset.points), hair = plot.querySelector('.hair'), box = plot.querySelector('.read');
  const show = event => {
    const area = plot.getBoundingClientRect(), at = (event.clientX - area.left) / area.width;
    const x = data.from + at * (data.to - data.from);
    let near = null;
    const lines = data.series.map(one => {
      let best = 0;
      one.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(one.x[best] - x)) best = i; });
      if (near === null || Math.abs(one.x[best] - x) < Math.abs(near - x)) near = one.x[best];
      return [one, best];
    });
    if (near === null) return;
    const words = lines.filter(([one, i]) => Math.abs(one.x[i] - near) <= data.slack)
      .map(([one, i]) => one.name + ' ' + Number(one.y[i].toPrecision(4)));
    box.textContent = 'step ' + near.toLocaleString('en') + ': ' + words.join(', ');
    const left = (near - data.from) / (data.to - data.from || 1);
    hair.style.left = left * 100 + '%';
    box.style.left = left < .5 ? 'auto' : '.2rem'; box.style.right = left < .5 ? '.2rem' : 'auto';
    hair.style.display = box.style.display = 'block';
  };
  plot.addEventListener('pointermove', show); plot.addEventListener('pointerdown', show);
  plot.addEventListener('pointerleave', () => { hair.style.display = box.style.display = 'none'; });
}
"""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart.

    Attributes:
        name: in the key.
        x, y: float64 of one length; where y is not finite there is no point.
        dots: points are drawn, too; for few of them.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class _Thin:
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    thinned: bool


def thin(series: Series) -> _Thin:
    """A series of at most `MOST` points, without those that are not finite."""
    good = np.isfinite(series.y) & np.isfinite(series.x)
    x, y = series.x[good], series.y[good]
    if len(x) <= MOST:
        return _Thin(x=x, y=y, low=y, high=y, thinned=False)
    starts = np.linspace(0, len(x), MOST, endpoint=False).astype(int)
    counts = np.diff(starts, append=len(x))
    last = np.append(starts[1:], len(x)) - 1
    return _Thin(
        x=x[last],
        y=np.add.reduceat(y, starts) / counts,
        low=np.minimum.reduceat(y, starts),
        high=np.maximum.reduceat(y, starts),
        thinned=True,
    )


def chart(
    title: str,
    series: Sequence[Series],
    *,
    shown: Callable[[float], str] = lambda value: f"{value:.4g}",
    from_zero: bool = False,
) -> str:
    """A chart over steps; empty where no series has a point.

    Args:
        shown: a value in words, for the last one of each line.
        from_zero: the axis begins at 0, also where values do not come near.
    """
    lines = [(one, points) for one in series if len((points := thin(one)).x)]
    if not lines:
        return ""
    left = min(float(p.x[0]) for _, p in lines)
    right = max(float(p.x[-1]) for _, p in lines)
    low, high = _range([p for _, p in lines], from_zero=from_zero)
    ticks = _ticks(low, high, 4)
    low, high = ticks[0], ticks[-1]
    above = sum(int((points.high > high).sum()) for _, points in lines)

    def at(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Places in a box of 1000 x 1000, y down."""
        wide = (x - left) / (right - left) * 1000 if right > left else np.full(len(x), 500.0)
        return np.stack([wide, 1000 - (np.clip(y, low, high) - low) / (high - low) * 1000], axis=1)

    paths, keys, data = [], [], []
    for place, (one, points) in enumerate(lines):
        color = f"--c:var(--s{place % COLORS})"
        if points.thinned:
            there, back = at(points.x, points.high), at(points.x, points.low)[::-1]
            paths.append(f'<path class="band" style="{color}" d="M{_path(there)}L{_path(back)}Z"/>')
        middle = at(points.x, points.y)
        paths.append(f'<path style="{color}" d="M{_path(middle)}"/>')
        if one.dots or len(middle) == 1:
            dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in middle)
            paths.append(f'<path class="dots" style="{color}" d="{dots}"/>')
        keys.append(f'<span class="key" style="{color}">{safe(one.name)} {safe(shown(float(points.y[-1])))}</span>')
        rounded = [float(f"{y:.5g}") for y in points.y]
        data.append({"name": one.name, "x": [int(x) for x in points.x], "y": rounded})
    span = {"from": left, "to": right, "slack": max(1.0, (right - left) / MOST), "series": data}
    if right == left:
        span |= {"from": left - 1, "to": right + 1}
    remark = f'<span class="clipped">{above:,} point{"s" * (above != 1)} above the chart</span>' if above else ""
    marks = "".join(
        f'<div class="y" style="top:{100 - (tick - low) / (high - low) * 100:.2f}%"><span>{safe(_short(tick))}</span>'
        "</div>"
        for tick in ticks
    )
    return (
        f'<figure class="chart"><figcaption><b>{safe(title)}</b>{"".join(keys)}{remark}</figcaption>'
        f'<div class="plot" data-points="{safe(json.dumps(span, separators=(",", ":")))}">{marks}{_steps(left, right)}'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{safe(title)}">'
        f'{"".join(paths)}</svg><div class="hair"></div><div class="read"></div></div></figure>'
    )


def _path(places: np.ndarray) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _range(lines: Sequence[_Thin], *, from_zero: bool) -> tuple[float, float]:
    """Lowest and highest value to show: one spike shall not flatten the rest."""
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
    """Round values from below `low` to above `high`."""
    rough = (high - low) / about
    unit = 10 ** math.floor(math.log10(rough))
    step = unit * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _steps(left: float, right: float) -> str:
    """First, middle and last step below the chart."""
    if right == left:
        return f'<span class="x" style="left:50%">step {left:,.0f}</span>'
    middle = round((left + right) / 2)
    between = f'<span class="x" style="left:{(middle - left) / (right - left) * 100:.1f}%">{middle:,}</span>'
    return (
        f'<span class="x first" style="left:0">step {left:,.0f}</span>{between if left < middle < right else ""}'
        f'<span class="x last" style="left:100%">{right:,.0f}</span>'
    )


def _short(value: float) -> str:
    """A label of an axis: 12k, 1.5M, 2e-05."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2g}"
