"""A `Run` as one web page: what is known of it from top to bottom. What of it needs a picture, `charts` draws."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import numpy as np

from vlft.pages.web import document, safe
from vlft.report import charts
from vlft.report.answers import answers, id_of
from vlft.report.charts import Series, chart
from vlft.report.read import Run

SHOWN_SKIPPED = 50

_STYLE = """
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.6rem;margin:.8rem 0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.5rem .7rem}
.facts b{display:block;font-size:1.15rem;font-variant-numeric:tabular-nums}
.facts span{color:var(--soft);font-size:.8rem}
.bar{display:flex;height:1.1rem;border-radius:.3rem;overflow:hidden;margin:.5rem 0;background:var(--line)}
.bar i{background:var(--c)}
.said{white-space:pre-wrap;margin:.3rem 0}.who{color:var(--soft);font-size:.8rem}
.strip{display:flex;flex-wrap:wrap;gap:.4rem;margin:.5rem 0}
.strip img{height:5.5rem;max-width:100%;border-radius:.3rem;border:1px solid var(--line)}
.answers td{vertical-align:top;text-align:left;white-space:pre-wrap}.answers td:first-child{white-space:nowrap;
color:var(--soft);text-align:right;width:1%}
details{margin:.6rem 0}summary{cursor:pointer}
td{overflow-wrap:anywhere}
"""


def as_html(run: Run) -> str:
    """The page. All texts are escaped; of its scripts a browser runs only ours."""
    record = run.record
    title = f"{run.folder.absolute().name}: {record.base_model}"
    trains = ", ".join(f"{tower} {how}" for tower, how in record.towers.items())
    parts = [
        f"<h1>{safe(title)}</h1><p>{safe(trains)}</p>",
        _state(run),
        _facts(run),
        _charts(run),
        _time(run),
        answers(run),
        _rows(run),
        _settings(run),
    ]
    return document(
        title=f"vlft: {title}", style=charts.STYLE + _STYLE, body="\n".join(filter(None, parts)), script=charts.SCRIPT
    )


# ---- what it comes to


def _state(run: Run) -> str:
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    steps = run.lines["step"]
    if not len(steps):
        return f'<p class="soft">No step has been logged yet. Page of {now}.</p>'
    last, most = int(steps[-1]), run.lines["max_steps"][-1]
    of = f" of {int(most):,}" if np.isfinite(most) else ""
    if run.record.training.get("finished"):
        state = f"finished after {last:,} step{'s' * (last != 1)}"
    else:
        state = f"not finished: step {last:,}{of}{_left(run, last, most)}"
    broken = f' <span class="warn">{run.broken} lines of its files could not be read.</span>' if run.broken else ""
    return f'<p>{state}. <span class="soft">Page of {now}.</span>{broken}</p>'


def _left(run: Run, last: int, most: float) -> str:
    steps = np.diff(run.lines["step"], prepend=0)
    per_step = run.seconds[-100:].sum() / max(1, steps[-100:].sum())
    if not np.isfinite(most) or not np.isfinite(per_step):
        return ""
    return f", {_duration(float(per_step * (most - last)))} of steps to go at the rate of the last ones"


def _facts(run: Run) -> str:
    lines = run.lines
    if not len(lines["step"]):
        return ""
    total = float(np.nansum(run.seconds))
    tokens, trained = (float(np.nansum(lines[name])) for name in ("tokens", "supervised_tokens"))
    padding = lines["padding_fraction"]
    weighted = float(np.nansum(padding * lines["tokens"]) / tokens) if tokens else 0.0
    facts = [("loss, last line", _number(_last(lines["loss"])))]
    losses = run.evaluations["eval_loss"]
    if np.isfinite(losses).any():
        best = int(np.nanargmin(losses))
        facts.append((f"best evaluation, step {int(run.evaluations['step'][best]):,}", _number(losses[best])))
    facts += [
        ("tokens", _many(tokens)),
        ("of them trained", f"{_many(trained)} ({trained / tokens:.0%})" if tokens else "0"),
        ("rows trained on", _many(float(np.nansum(lines["samples"])))),
        ("pictures, videos", " + ".join(_many(float(np.nansum(lines[name]))) for name in ("images", "videos"))),
        ("tokens a second", _many(tokens / total) if total else "-"),
        ("peak memory", f"{_number(_last(lines['peak_gb']))} GB"),
        ("padding", f"{weighted:.1%}"),
    ]
    mfu = lines["mfu"]
    if np.isfinite(mfu).any():
        facts.append(("MFU, median", f"{np.nanmedian(mfu):.1%}"))
    boxes = "".join(f"<div><b>{safe(value)}</b><span>{safe(name)}</span></div>" for name, value in facts)
    return f'<div class="facts">{boxes}</div>'


# ---- curves


def _charts(run: Run) -> str:
    lines, evaluated = run.lines, run.evaluations
    x = lines["step"]

    def line(name: str, column: str, scale: float = 1.0) -> Series:
        return Series(name=name, x=x, y=lines[column] * scale)

    steps = np.diff(x, prepend=0)
    waits = Series(name="of it waiting for data", x=x, y=lines["data_wait_s"] / np.maximum(steps, 1))
    drawn = [
        chart(
            "loss",
            [
                line("training", "loss"),
                Series(name="evaluation", x=evaluated["step"], y=evaluated["eval_loss"], dots=True),
            ],
        ),
        chart("learning rate", [Series(name=n, x=x, y=y) for n, y in run.rates.items()], from_zero=True),
        chart("gradient norm", [line("before clipping", "grad_norm")], from_zero=True),
        chart("tokens a second", [line("all processes", "tokens_per_s")], shown=_many, from_zero=True),
        chart("seconds a step", [line("step", "step_s"), waits], from_zero=True),
        chart("peak memory, GB", [line("largest process", "peak_gb")], from_zero=True),
        chart("MFU, %", [line("all processes", "mfu", 100)], from_zero=True),
    ]
    if not any(drawn):
        return ""
    thinned = ""
    if len(x) > charts.MOST:
        thinned = (
            f" {len(x):,} logged lines are shown as {charts.MOST} points: the line is their mean, the shade reaches "
            "from the smallest to the largest."
        )
    return (
        f'<h2>Curves</h2><p class="soft">Point at one, or tap it, for its values.{thinned}</p>'
        f'<div class="charts">{"".join(drawn)}</div>'
    )


def _time(run: Run) -> str:
    """Seconds by what they went into, of rank 0 where ranks differ."""
    lines = run.lines
    if not len(lines["step"]):
        return ""
    wait = float(np.nansum(lines["data_wait_s"]))
    unlogged = run.record.training.get("unlogged") or {}
    spent = {
        "steps": max(0.0, float(np.nansum(run.seconds)) - wait),
        "waiting for data": wait,
        "evaluation": float(np.nansum(run.evaluations["eval_runtime"])),
        "answers for this page": float(np.nansum(run.evaluations["eval_answers_s"])),
        "saving checkpoints": float(np.nansum(lines["save_s"])) + float(unlogged.get("save_s", 0)),
        "writing this page": float(np.nansum(lines["report_s"])) + float(unlogged.get("report_s", 0)),
    }
    total = sum(spent.values()) or 1.0
    bar = "".join(
        f'<i style="--c:var(--s{i % charts.COLORS});width:{seconds / total * 100:.2f}%"></i>'
        for i, seconds in enumerate(spent.values())
    )
    rows = "".join(
        f'<tr><td><span class="key" style="--c:var(--s{i % charts.COLORS})">{name}</span></td>'
        f"<td>{_duration(seconds)}</td><td>{seconds / total:.1%}</td></tr>"
        for i, (name, seconds) in enumerate(spent.items())
    )
    left = ""
    if not np.isfinite(lines["save_s"]).all():
        left = '<p class="soft">Lines of an older version do not say how long saving took.</p>'
    return (
        f'<h2>Where the time went</h2><div class="bar">{bar}</div><table><tbody>{rows}</tbody></table>{left}'
        '<p class="soft">From the first step on; loading, measuring rows and the final weights are not in it.</p>'
    )


# ---- answers


# ---- rows and settings


def _rows(run: Run) -> str:
    """Rows read = trained + skipped, with reasons; steps that were left out."""
    data, training = run.record.data, run.record.training
    files = "".join(
        f"<tr><td>{safe(entry['file'])}{_also(entry)}</td><td>{entry['rows']:,}</td><td>{entry['trained']:,}</td>"
        f"<td>{len(entry['skipped']):,}</td></tr>"
        for entry in data
    )
    skipped = [(entry["file"], row) for entry in data for row in entry["skipped"]]
    reasons = "".join(
        f"<li>{safe(file)}[{row['index']}]{safe(id_of(row))} {safe(row['field'])}: {safe(row['reason'])}</li>"
        for file, row in skipped[:SHOWN_SKIPPED]
    )
    if len(skipped) > SHOWN_SKIPPED:
        fields = Counter(row["field"].split("[")[0] for _, row in skipped)
        words = ", ".join(f"{count:,} by {field}" for field, count in fields.most_common(8))
        reasons += f"<li>and {len(skipped) - SHOWN_SKIPPED:,} more, all in vlft.json; in all {safe(words)}</li>"
    listed = f"<details open><summary>Skipped, and why</summary><ul>{reasons}</ul></details>" if reasons else ""
    left_out = training.get("left_out_steps") or []
    steps = ", ".join(f"{step:,}" for step in left_out[:SHOWN_SKIPPED]) + (
        " ..." if len(left_out) > SHOWN_SKIPPED else ""
    )
    said = (
        f"{len(left_out):,} left out for a loss or gradient that was not finite: {steps}"
        if left_out
        else "none left out"
    )
    return (
        '<h2>Rows</h2><div class="scroll"><table><thead><tr><th>file</th><th>read</th><th>to train</th><th>skipped</th>'
        f"</tr></thead><tbody>{files}</tbody></table></div>{listed}<p>Steps: {said}.</p>"
        '<p class="soft">Rows skipped while training are entered with each checkpoint and at the end.</p>'
    )


def _also(entry: dict[str, Any]) -> str:
    """What became of rows besides: a mix does not draw all, and --over_length changes some."""
    words = {
        "not_drawn": "not drawn",
        "draws_an_epoch": "draws an epoch",
        "shrunk": "shrunk to fit",
        "lost_media": "lost media to fit",
    }
    said = ", ".join(f"{entry[key]:,} {word}" for key, word in words.items() if entry.get(key))
    return f'<br><span class="soft">{said}</span>' if said else ""


def _settings(run: Run) -> str:
    record = run.record
    versions = " &middot; ".join(f"{safe(name)} {safe(version)}" for name, version in record.versions.items())
    pairs = {**record.media, **{k: v for k, v in record.training.items() if k not in ("left_out_steps", "unlogged")}}
    if record.lora:
        pairs |= {f"lora_{name}": value for name, value in record.lora.items()}
    lines = "".join(f"<tr><td>{safe(name)}</td><td>{safe(value)}</td></tr>" for name, value in pairs.items())
    revision = f", revision {safe(record.base_revision)}" if record.base_revision else ""
    return (
        f"<h2>Settings</h2><p>{versions}</p><p>base: {safe(record.base_model)}{revision}, fingerprint "
        f"{safe(record.base_fingerprint)}</p><details><summary>What decides the run (vlft.json)</summary>"
        f'<div class="scroll"><table><tbody>{lines}</tbody></table></div></details>'
        f"<details><summary>Flags that acted (config.yaml)</summary><pre>{safe(run.config)}</pre></details>"
    )


# ---- numbers in words


def _last(column: np.ndarray) -> float:
    good = column[np.isfinite(column)]
    return float(good[-1]) if len(good) else math.nan


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _many(value: float) -> str:
    """12,345 or 12.3 M."""
    if not math.isfinite(value):
        return "-"
    return (
        f"{value:,.0f}"
        if abs(value) < 1e6
        else f"{value / 1e6:,.1f} M"
        if abs(value) < 1e9
        else f"{value / 1e9:,.2f} G"
    )


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
