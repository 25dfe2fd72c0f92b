"""What a finished run has done, read from its folder, and the commands for its weights.

`vlft.train.run` prints it, also when a finished run is started again. `vlft.train.metrics` writes what is read here.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlft.checkpoint import RunRecord, family_of, read_record
from vlft.checkpoint.best import best_by, best_of, shown_metric, stopped_line
from vlft.checkpoint.serving import Serving, serving_of_adapter, serving_of_model
from vlft.errors import CheckpointError
from vlft.text import counted, duration


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best evaluation of a run.

    Attributes:
        step: after which it ran.
        metric: by which it is the best, as in `metrics.jsonl`: `eval_loss`, or that of `--metric_for_best_model`.
        value: of that metric.
        checkpoint: the checkpoint of that step, or None if there is none.
    """

    step: int
    metric: str
    value: float
    checkpoint: Path | None

    def as_json(self) -> dict[str, Any]:
        """The entry "best" of `vlft.json`. The checkpoint is a name in the run folder."""
        checkpoint = None if self.checkpoint is None else self.checkpoint.name
        return {"step": self.step, "metric": self.metric, "value": self.value, "checkpoint": checkpoint}


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run.

    Attributes:
        folder: the run folder.
        adapter: whether it holds an adapter, else the whole model.
        steps: optimizer steps, over all resumed parts of the run; 0 if `metrics.jsonl` cannot be read.
        seconds: that they took, with evaluations, checkpoints and reports.
        rows: trained rows; a row counts once for each epoch.
        tokens: of these rows.
        supervised: tokens with a loss.
        best: the best evaluation; None without evaluations, and if none has a value.
        valueless: metric by which evaluations are compared, if there are some and none has a value.
        stopped: where and why training stopped early; None if it did not.
        split: whether rows were split into samples, so that `rows` counts samples.
        completions: whether `rows` counts completions (`--method grpo`).
        serving: how to serve its weights as they were trained.
    """

    folder: Path
    adapter: bool
    steps: int
    seconds: float
    rows: int
    tokens: int
    supervised: int
    best: Best | None
    valueless: str | None = None
    stopped: str | None = None
    split: bool = False
    completions: bool = False
    serving: Serving = field(default_factory=Serving)

    def as_lines(self, *, best_is_final: bool) -> list[str]:
        """Return the last lines of a run.

        Args:
            best_is_final: the final weights are those of the best checkpoint (--load_best_model_at_end).
        """
        path = str(self.folder)
        run = shlex.quote(path)
        merged = shlex.quote(path.rstrip(os.sep) + "-merged")
        one = "completion" if self.completions else "sample" if self.split else "row"
        trained = f"{counted(self.rows, one)}, {counted(self.tokens, 'token')} ({self.supervised:,} with a loss)"
        lines = [f"done:   {counted(self.steps, 'step')} in {duration(self.seconds)}; {trained}"] if self.steps else []
        lines += [f"stopped: {self.stopped}"] if self.stopped is not None else []
        if self.best is not None:
            what = f"{shown_metric(self.best.metric)} {self.best.value:.4f}"
            where = "its checkpoint is not kept" if self.best.checkpoint is None else str(self.best.checkpoint)
            final = "; the output folder has its weights" if best_is_final and self.best.checkpoint is not None else ""
            lines.append(f"best:   step {self.best.step:,}, {what}; {where}{final}")
        if self.valueless is not None:
            final = "; the output folder has the weights of the last step" if best_is_final else ""
            name = shown_metric(self.valueless)
            lines.append(f"best:   no checkpoint was chosen, because no evaluation has a value of {name}{final}")
        if (self.folder / "report.html").is_file():
            lines.append(f"report: {self.folder / 'report.html'}")
        lines += [f"serve:  {command}" for command in self.serving.commands.values()]
        lines += [f"note:   {note}" for note in self.serving.notes]
        lines += [f"chat:   vlft chat {run}", f"output: {path}"]
        whole = "not needed, the folder holds the whole model"
        return [*lines, f"merge:  {f'vlft merge {run} {merged}' if self.adapter else whole}"]


def read_result(folder: Path) -> Result:
    """Read the result of a finished run from its folder."""
    record = read_record(folder)
    counts = dict.fromkeys(("samples", "tokens", "supervised_tokens"), 0)
    seconds, before, evaluations = sum(record.training.get("unlogged", {}).values()), 0, 0
    for line in _metrics(folder / "metrics.jsonl"):
        if "eval_loss" in line:
            evaluations += 1
            seconds += line["eval_runtime"] + line.get("eval_answers_s", 0.0) + line.get("eval_metric_s", 0.0)
            continue
        counts = {name: count + line[name] for name, count in counts.items()}
        seconds += line["step_s"] * (line["step"] - before) + line.get("save_s", 0.0) + line.get("report_s", 0.0)
        before = line["step"]
    return Result(
        folder=folder,
        adapter=record.kind == "adapter",
        steps=before,
        seconds=seconds,
        rows=counts["samples"],
        tokens=counts["tokens"],
        supervised=counts["supervised_tokens"],
        best=(best := read_best(folder, record)),
        valueless=best_by(record)[0] if best is None and evaluations else None,
        stopped=stopped_line(record),
        split=any("samples" in entry for entry in record.data),
        completions=record.training.get("method") == "grpo",
        serving=_serving(folder, record),
    )


def read_best(folder: Path, record: RunRecord) -> Best | None:
    """Return the best evaluation in the `metrics.jsonl` of a run; None without evaluations.

    Args:
        folder: the run folder.
        record: of the run; it names the metric.
    """
    metric, higher = best_by(record)
    lines = _metrics(folder / "metrics.jsonl")
    found = best_of(((line["step"], line[metric]) for line in lines if metric in line), higher=higher)
    if found is None:
        return None
    checkpoint = folder / f"checkpoint-{found[0]}"
    return Best(step=found[0], metric=metric, value=found[1], checkpoint=checkpoint if checkpoint.is_dir() else None)


def _serving(folder: Path, record: RunRecord) -> Serving:
    if record.kind == "adapter":
        return serving_of_adapter(record, path=str(folder))
    try:
        return serving_of_model(folder, family_of(folder), record, path=str(folder))
    except CheckpointError as error:  # of a finished run whose files were moved or damaged since
        return Serving(notes=(str(error),))


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl`; none if a user has removed or changed the file."""
    try:
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
    needed = {"step", "samples", "tokens", "supervised_tokens", "step_s"}, {"step", "eval_loss", "eval_runtime"}
    return lines if all(any(keys <= line.keys() for keys in needed) for line in lines) else []
