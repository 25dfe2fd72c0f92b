"""Build the page about several runs: the variables of `compare.html.j2`.

Curves lie over each other, and a run has the same colour in all of them. The key names runs by what differs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vlft.pages.charts import Chart, Series, chart
from vlft.pages.web import render
from vlft.report.answers import title_of
from vlft.report.figures import best_evaluation, last, number, rate, spent
from vlft.report.read import Answered, Run
from vlft.report.state import state_of
from vlft.text import duration, scaled, short

KEYED = 3  # settings that name a run in the key of a chart
KEYED_TEXT = 40  # characters of a value there
SHOWN_ROWS = 50  # rows whose answers are compared
SHOWN_TEXT = 4000  # characters of a question or an answer
#: Keys of config.yaml that say where a run is written, not what it does.
PLACES = ("output_dir", "logging_dir", "run_name", "resume_from_checkpoint")
#: Keys of `training` in a record that are not settings.
PROGRESS = ("finished", "asked", "lengths", "left_out_steps", "unlogged", "evaluation_due", "steps")
#: Settings that say the most come first; the others follow in the order of their files.
FIRST = (
    *("model_id", "vision", "merger", "language", "learning_rate", "vision_lr", "merger_lr"),
    *("lora_rank", "lora_alpha", "global_batch", "max_steps", "num_train_epochs", "data_path", "seed"),
)


def compared(runs: Sequence[Run]) -> str:
    """Return the page about two or more runs."""
    return render("compare.html.j2", script="charts.js", **context(runs))


def context(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the variables of the template `compare.html.j2`."""
    names = names_of([run.folder for run in runs])
    differing = settings_that_differ(runs)
    keys = [_key(name, place, differing) for place, name in enumerate(names)]
    now = time.time()
    return {
        "title": f"vlft: {', '.join(names)}",
        "names": names,
        "now": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(now)),
        "results": [_result(name, run, now) for name, run in zip(names, runs, strict=True)],
        "differing": list(differing.items()),
        "charts": _charts(runs, keys),
        "asked": _asked(runs, names),
        "answering": sum(bool(run.answered) for run in runs),
        "shown_text": SHOWN_TEXT,
    }


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that are all different, of equally many parts."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-count:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def settings_that_differ(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    """Return the settings in config.yaml and vlft.json that are not the same in all runs: name -> value of each run.

    A setting of vlft.json that repeats one of config.yaml is left out. A setting that a run lacks is `-`.
    """
    found: dict[str, tuple[str, ...]] = {}
    for of_runs in ([_config(run) for run in runs], [_record(run) for run in runs]):
        earlier = set(found.values())
        for name in dict.fromkeys(name for settings in of_runs for name in settings):
            values = tuple(_as_text(settings.get(name)) for settings in of_runs)
            if len(set(values)) > 1 and values not in earlier:
                found[name] = values
    order = {name: place for place, name in enumerate(FIRST)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def _config(run: Run) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(run.config)
    except (yaml.YAMLError, ValueError):  # ValueError: a date or number out of range
        return {}
    return {str(k): v for k, v in settings.items() if k not in PLACES} if isinstance(settings, dict) else {}


def _record(run: Run) -> dict[str, Any]:
    """Return the settings of a record, nested ones by a name with dots."""
    record = run.record
    training = {key: value for key, value in record.training.items() if key not in PROGRESS}
    base = {"base_model": record.base_model, "base_fingerprint": record.base_fingerprint}
    nested = {"lora": record.lora or {}, "version of": record.versions}
    return base | dict(_flat(record.towers | record.media | training)) | dict(_flat(nested))


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key} ")
        else:
            yield f"{before}{key}".replace("learning_rates ", "learning rate of "), value


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_as_text, value)) or "none"
    if value is None:
        return "-"
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"  # equal to the same number without a decimal point
    return str(value).lower() if isinstance(value, bool) else str(value)


def _key(name: str, place: int, differing: Mapping[str, tuple[str, ...]]) -> str:
    """Return the text of a run in the key of a chart: its name, and the first settings that differ, each in its way."""
    telling = {
        values: setting for setting, values in reversed(list(differing.items()))
    }  # the first setting of equal ones
    words = [
        f"{setting} {short(os.path.basename(values[place]), KEYED_TEXT)}"
        for setting, values in differing.items()
        if telling[values] == setting
    ]
    return f"{name}: {', '.join(words[:KEYED])}" if words else name


def _result(name: str, run: Run, now: float) -> dict[str, Any]:
    losses = run.lines["loss"]
    found: dict[str, Any] = {
        "name": name,
        "folder": str(run.folder),
        "state": state_of(run, ended=False, now=now).progress,
    }
    found |= {"missing": run.missing, "broken": run.broken, "lowest": "-", "evaluated": "-", "best": "-"}
    if np.isfinite(losses).any():
        lowest = int(np.nanargmin(losses))
        found["lowest"] = f"{number(losses[lowest])} (step {run.lines['step'][lowest]:,.0f})"
    if (best := best_evaluation(run)) is not None:
        found["best"] = f"{number(best[1])} (step {best[0]:,})"
        found["evaluated"] = number(last(run.evaluations["eval_loss"]))
    return found | {
        "loss": number(last(losses)),
        "tokens": scaled(float(np.nansum(run.lines["tokens"]))),
        "rate": scaled(rate(run)),
        "time": duration(sum(spent(run).values())),
    }


def _charts(runs: Sequence[Run], keys: Sequence[str]) -> list[Chart]:
    def over(title: str, values: Sequence[np.ndarray], *, evaluated: bool = False, **options: Any) -> Chart | None:
        lines = []
        for place, (run, key, y) in enumerate(zip(runs, keys, values, strict=True)):
            x = run.evaluations["step"] if evaluated else run.lines["step"]
            lines.append(Series(name=key, x=x, y=y, dots=evaluated, place=place))
        return chart(title, lines, **options)

    def columns(name: str, scale: float = 1.0) -> list[np.ndarray]:
        return [run.lines[name] * scale for run in runs]

    drawn = [
        over("loss", columns("loss")),
        over("evaluation loss", [run.evaluations["eval_loss"] for run in runs], evaluated=True),
        *(
            over(name, [run.statistics.get(name, np.full(len(run.lines["step"]), np.nan)) for run in runs])
            for name in dict.fromkeys(name for run in runs for name in run.statistics)
        ),
        over("learning rate, the highest of the parts", [_highest_rate(run) for run in runs], from_zero=True),
        over("gradient norm before clipping", columns("grad_norm"), from_zero=True),
        over("tokens per second", columns("tokens_per_s"), shown=scaled, from_zero=True),
        over("seconds per step", columns("step_s"), from_zero=True),
        over("peak memory, GB", columns("peak_gb"), from_zero=True),
        over("MFU, %", columns("mfu", 100), from_zero=True),
    ]
    return [one for one in drawn if one is not None]


def _highest_rate(run: Run) -> np.ndarray:
    """Return the highest learning rate of a line [L], NaN where there is none."""
    highest = np.full(len(run.lines["step"]), np.nan)
    for rates in run.rates.values():
        highest = np.fmax(highest, rates)
    return highest


def _asked(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows that at least two runs have answered, each with the last answer of each run."""
    rows: dict[Any, dict[str, Any]] = {}
    for name, run in zip(names, runs, strict=True):
        for one in run.answered:
            if one.answers:
                step, text, cut = one.answers[-1]
                row = rows.setdefault(_same_row(one), {"answered": one, "answers": []})
                row["answers"].append({"name": name, "step": step, "text": text, "cut": cut})
    shared = [row for row in rows.values() if len(row["answers"]) > 1][:SHOWN_ROWS]
    return [
        {
            "title": title_of(row["answered"].row["file"], row["answered"].row),
            "turns": list(row["answered"].row.get("turns", ())),
            "right": row["answered"].row.get("right", ""),
            "answers": row["answers"],
        }
        for row in shared
    ]


def _same_row(one: Answered) -> tuple[str, ...]:
    """Return what identifies a row for runs that name its file by different paths."""
    row = one.row
    said = [str(turn) for turn in row.get("turns", ())]
    return (os.path.basename(row["file"]), str(row["index"]), str(row.get("right", "")), *said)
