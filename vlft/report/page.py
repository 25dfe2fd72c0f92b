"""Build the page of a run: the variables of `report.html.j2`, from top to bottom. `vlft.pages.charts` draws curves."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import numpy as np

from vlft.checkpoint import family_of
from vlft.checkpoint.best import LOSS, best_by, shown_metric, stopped_line
from vlft.checkpoint.serving import Serving, serving_of_adapter, serving_of_model
from vlft.errors import CheckpointError
from vlft.pages import charts
from vlft.pages.charts import Chart, Series, chart
from vlft.pages.web import render
from vlft.report.answers import asked_row, title_of
from vlft.report.completions import shown_rows
from vlft.report.figures import best_evaluation, last, number, rate, spent
from vlft.report.read import Run
from vlft.report.state import state_of
from vlft.report.statistics import charts_of, facts_of
from vlft.text import duration, scaled

SHOWN_SKIPPED = 50
SHOWN_TEXT = 4000  # characters of a question or an answer
METHODS = {"dpo": "DPO: ", "orpo": "ORPO: ", "simpo": "SimPO: ", "grpo": "GRPO: "}  # in the head of the page
NOT_SETTINGS = ("left_out_steps", "unlogged")  # keys of `training` in a record that are not settings


def as_html(run: Run, *, ended: bool = False, rewritten: bool = False) -> str:
    """Return the page. All texts are escaped, and a browser runs only the script of vlft.

    Args:
        run: the run.
        ended: the run itself says that it ends now.
        rewritten: the run writes this file again while it continues, so that the page can reload itself.
    """
    return render("report.html.j2", script="report.js", **context(run, ended=ended, rewritten=rewritten))


def context(run: Run, *, ended: bool = False, rewritten: bool = False) -> dict[str, Any]:
    """Return the variables of the template `report.html.j2`."""
    record, lines = run.record, run.lines
    now = time.time()
    state = state_of(run, ended=ended, now=now)
    name = f"{run.folder.absolute().name}: {record.base_model}"
    logged = len(lines["step"])
    settings = {**record.media, **{k: v for k, v in record.training.items() if k not in NOT_SETTINGS}}
    settings |= {f"lora_{key}": value for key, value in (record.lora or {}).items()}
    return {
        "title": f"vlft: {name}",
        "name": name,
        "trains": METHODS.get(str(record.training.get("method")), "")
        + ", ".join(f"{tower} {how}" for tower, how in record.towers.items()),
        "now": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(now)),
        "written": round(now * 1000),
        "state": state,
        "left": duration(state.left) if math.isfinite(state.left) else "",
        "live": rewritten and state.word == "running",
        "broken": run.broken,
        "damaged": run.damaged,
        "missing": run.missing,
        "facts": [(fact, value, "") for fact, value in _facts(run)] if logged else [],
        "charts": _charts(run),
        "thinned_from": logged if logged > charts.MOST else 0,
        "thinned_to": charts.MOST,
        "spent": _spent(run) if logged else [],
        "saving_known": bool(np.isfinite(lines["save_s"]).all()),
        "asked": [asked_row(one) for one in run.answered],
        "notes": run.notes,
        "sampled": shown_rows(run.sampled),
        "kept": len(run.sampled),
        "shown_text": SHOWN_TEXT,
        **_rows(run),
        "left_out": record.training.get("left_out_steps") or [],
        "most_left_out": SHOWN_SKIPPED,
        "versions": list(record.versions.items()),
        "base": {
            "model": record.base_model,
            "revision": record.base_revision,
            "fingerprint": record.base_fingerprint,
        },
        "settings": list(settings.items()),
        "config": run.config,
        "serving": _serving(run),
    }


def _serving(run: Run) -> Serving | None:
    """How to serve the weights of a finished run; None before, or if the folder no longer holds them."""
    record, path = run.record, str(run.folder)
    if not record.training.get("finished"):
        return None
    if record.kind == "adapter":
        return serving_of_adapter(record, path=path)
    try:
        return serving_of_model(run.folder, family_of(run.folder), record, path=path)
    except CheckpointError:
        return None


def _facts(run: Run) -> list[tuple[str, str]]:
    lines = run.lines
    tokens, trained = (float(np.nansum(lines[name])) for name in ("tokens", "supervised_tokens"))
    padding = lines["padding_fraction"]
    computed = float(np.nansum(lines["tokens"] / (1 - padding)))  # positions: tokens and padding
    grpo = run.record.training.get("method") == "grpo"
    facts = [("loss, last line", number(last(lines["loss"])))]
    if (best := best_evaluation(run)) is not None:
        metric = best_by(run.record)[0]
        name = "best evaluation" if metric == LOSS else f"best {shown_metric(metric)}"
        facts.append((f"{name}, step {best[0]:,}", number(best[1])))
    if (stopped := stopped_line(run.record)) is not None:
        facts.append(("stopped early", stopped))
    facts += [
        *facts_of(run),
        ("tokens", scaled(tokens)),
        ("trained tokens", f"{scaled(trained)} ({trained / tokens:.0%})" if tokens else "0"),
        ("completions trained on" if grpo else "rows trained on", scaled(float(np.nansum(lines["samples"])))),
        ("pictures, videos", " + ".join(scaled(float(np.nansum(lines[name]))) for name in ("images", "videos"))),
        ("tokens per second", scaled(rate(run))),
        ("peak memory", f"{number(last(lines['peak_gb']))} GB"),
        (
            "padding of prompts and completions" if grpo else "padding",
            f"{1 - tokens / computed:.1%}" if computed else "0.0%",
        ),
    ]
    mfu = lines["mfu"]
    if np.isfinite(mfu).any():
        facts.append(("MFU, median", f"{np.nanmedian(mfu):.1%}"))
    return facts


def _charts(run: Run) -> list[Chart]:
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
        *charts_of(run),
        chart("learning rate", [Series(name=n, x=x, y=y) for n, y in run.rates.items()], from_zero=True),
        chart("gradient norm", [line("before clipping", "grad_norm")], from_zero=True),
        chart("tokens per second", [line("all processes", "tokens_per_s")], shown=scaled, from_zero=True),
        chart("seconds per step", [line("step", "step_s"), waits], from_zero=True),
        chart("peak memory, GB", [line("largest process", "peak_gb")], from_zero=True),
        chart("MFU, %", [line("all processes", "mfu", 100)], from_zero=True),
    ]
    return [one for one in drawn if one is not None]


def _spent(run: Run) -> list[dict[str, Any]]:
    """Return how the seconds of the run were spent."""
    seconds = spent(run)
    total = sum(seconds.values()) or 1.0
    return [{"name": name, "seconds": part, "share": part / total} for name, part in seconds.items()]


def _rows(run: Run) -> dict[str, Any]:
    """Return the rows of each file (read = trained + skipped), and the skipped rows with their reasons."""
    data = run.record.data
    skipped = [(entry["file"], row) for entry in data for row in entry["skipped"]]
    fields = Counter(row["field"].split("[")[0] for _, row in skipped)
    return {
        "files": [
            {
                "name": entry["file"],
                "also": _also(entry),
                "rows": entry["rows"],
                "trained": entry["trained"],
                "skipped": len(entry["skipped"]),
            }
            for entry in data
        ],
        "skipped": [
            {"title": title_of(file, row), "field": row["field"], "reason": row["reason"]}
            for file, row in skipped[:SHOWN_SKIPPED]
        ],
        "more_skipped": max(0, len(skipped) - SHOWN_SKIPPED),
        "by_field": [f"{count:,} by {field}" for field, count in fields.most_common(8)],
    }


def _also(entry: dict[str, Any]) -> list[str]:
    """Return further counts of a file: rows held out, not drawn by a mix, or changed by `--over_length`."""
    words = {
        "held_out": "held out to evaluate",
        "not_drawn": "not drawn",
        "draws_an_epoch": "draws per epoch",
        "shrunk": "shrunk to fit",
        "lost_media": "lost media to fit",
    }
    return [f"{entry[key]:,} {word}" for key, word in words.items() if entry.get(key)]
