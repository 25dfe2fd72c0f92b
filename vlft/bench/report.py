"""A benchmark's document as a table for people, and as files: one JSON file each, and a Markdown line in `bench.md`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlft import text
from vlft.bench.choices import SIDES, title
from vlft.errors import ConfigError
from vlft.files import write_json

Rows = tuple[tuple[str, str, str], ...]  # title, key of the document, form of the figure
DATA_ROWS: Rows = (
    ("pictures/s", "pictures_per_s", ",.1f"),
    ("rows/s", "samples_per_s", ",.1f"),
    ("tokens/s", "tokens_per_s", ",.0f"),
    ("bytes per picture, worker to trainer", "bytes_per_picture", ",.0f"),
    ("seconds per pass", "seconds", ".2f"),
)
TRAIN_ROWS: Rows = (
    ("tokens/s (without padding)", "tokens_per_s", ",.0f"),
    ("trained tokens/s", "supervised_tokens_per_s", ",.0f"),
    ("pictures/s", "pictures_per_s", ",.1f"),
    ("padding, share of tokens", "padding_fraction", ".1%"),
    ("seconds per step (median)", "step_s", ".3f"),
    ("waiting for data, s per step", "data_wait_s", ".3f"),
    ("required TFLOP/s", "tflops", ",.1f"),
    ("MFU", "mfu", ".1%"),
    ("peak memory, GB", "peak_gb", ",.1f"),
    ("an epoch of these rows, s", "epoch_s", ",.1f"),
)
_PREDICTED = ("step_s", "mfu", "tokens_per_s", "peak_gb")
MARKDOWN_HEAD = (
    "| what | on | tokens/s | baseline | ratio | padding, ours / baseline | MFU | peak GB, ours / baseline |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def table(what: str, document: dict[str, Any]) -> str:
    """Format the figures side by side: ours, then each baseline."""
    rows: Rows = DATA_ROWS if what == "data" else TRAIN_ROWS
    if what == "data":
        alone = None if document["decode_only"] is None else {"pictures_per_s": document["decode_only"]}
        columns = {"vlft": document, "decode and resize alone": alone, "stock": document["baseline"]}
        about = f"{document['rows']:,} rows, {document['workers']} workers"
    else:
        columns = {"vlft": document} | {title(name): one for name, one in document["baselines"].items()}
        steps = f"{document['steps']} steps counted, {document['skipped_steps']} skipped"
        recompute = ", gradient checkpointing" if document["gradient_checkpointing"] else ""
        about = f"{document['preset']}{recompute}, {steps}, {document['device']}"
    shown = {name: column for name, column in columns.items() if column is not None}
    if (forecast := document.get("predicted")) is not None:
        known_of = {**forecast, "step_s": forecast["ms"] / 1e3}
        shown = {"vlft": document, "vlft, predicted": {key: known_of[key] for key in _PREDICTED}} | shown
    figures = [(title, *(_cell(column, key, form) for column in shown.values())) for title, key, form in rows]
    known = [cells for cells in figures if set(cells[1:]) != {"-"}]
    lines = [f"{document['base']} · {document['data']} · {about}", "", text.table(("", *shown), known)]
    for name, column in shown.items():
        if "failed" in column:
            lines.append(f"{name} failed: {column['failed'].splitlines()[0]}")
        elif settings := column.get("settings"):
            lines.append(f"{name}: {_settings(settings)}")
    if what == "train" and document["baselines"]:
        lines += [f"stock: {SIDES['stock']}; stock + kernels: {SIDES['kernels']}", *_left_out(document)]
    if what == "data" and document["of_decode"]:
        lines.append(f"vlft reaches {document['of_decode']:.2f} of the pictures/s of decoding and resizing alone")
    if forecast is not None:
        lines.append(
            f"predicted: a typical step of {forecast['micro_batches']} x {forecast['micro_batch']['tokens']:,} tokens, "
            f"from the data sheet of {forecast['gpu']} and assumed efficiencies"
        )
    if ratio := document["ratio"]:
        beside = " of the fastest stock run" if len(document.get("baselines", ())) > 1 else ""
        lines.append(f"vlft has {ratio['tokens_per_s']:.2f} times the tokens/s{beside}")
    return "\n".join(lines)


def _settings(settings: dict[str, Any]) -> str:
    """Format the settings of a run of the baseline."""
    recompute = ", gradient checkpointing" if settings["checkpointing"] else ""
    cudnn = f" (cuDNN: {settings['cudnn_attention']})" if "sdpa" in settings["attention"] else ""
    kernels = f", kernels: {settings['kernels']}" if settings["side"] == "kernels" else ""
    return f"{settings['batch']} rows per micro-batch{recompute}, attention: {settings['attention']}{cudnn}{kernels}"


def _left_out(document: dict[str, Any]) -> list[str]:
    return [reason] if (reason := document.get("baselines_left_out")) else []


def save(out: str, what: str, document: dict[str, Any]) -> Path:
    """Write the document to `OUT/NAME.json` and its line to `OUT/bench.md`.

    Raises:
        ConfigError: the folder cannot be written.
    """
    data = document["data"]
    stem = data.split(" mix")[0] if isinstance(data, str) else Path(data[0]).stem
    parts = [what, Path(document["base"].partition(" (")[0]).name, document.get("preset", ""), stem]
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(filter(None, parts))).strip("-")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.json", document)
        page = folder / "bench.md"
        with page.open("a", encoding="utf-8") as file:
            file.write(("" if file.tell() else MARKDOWN_HEAD) + markdown(what, document) + "\n")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror}). Use another folder.") from error
    return folder / f"{name}.json"


def markdown(what: str, document: dict[str, Any]) -> str:
    """Format one line of the table of `MARKDOWN_HEAD`."""
    other = document["baseline"] or {}
    title = f"{what} {document['base']} {document.get('preset', '')} {document['data']}".replace("  ", " ")
    ratio = (document["ratio"] or {}).get("tokens_per_s")
    on = document.get("device") or f"{document['workers']} workers"

    def both(key: str, form: str) -> str:
        return f"{_cell(document, key, form)} / {_cell(other, key, form)}"

    cells: Sequence[str] = (
        title,
        on,
        _cell(document, "tokens_per_s", ",.0f"),
        _cell(other, "tokens_per_s", ",.0f"),
        "-" if ratio is None else f"{ratio:.2f}",
        both("padding_fraction", ".1%"),
        _cell(document, "mfu", ".1%"),
        both("peak_gb", ",.1f"),
    )
    return f"| {' | '.join(cells)} |"


def _cell(column: dict[str, Any], key: str, form: str) -> str:
    value = column.get(key)
    return "-" if value is None else format(value, form)
