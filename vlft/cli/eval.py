"""`vlft eval`: how good a model's answers are on held-out rows, with intervals, and compared with other models."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from vlft import screen
from vlft.cli.command import Write, command
from vlft.cli.eval_flags import parser
from vlft.interrupts import explained
from vlft.text import counted, printable, short, table

if TYPE_CHECKING:
    from vlft.evaluation.result import Confusion, Evaluation, Figure

WORST = 5  # rows that are printed
LABELS = 12  # most labels of a table of confusions that is printed
ANSWER = 100  # characters of an answer that are printed


@command(parser)
def run(flags: argparse.Namespace, write: Write) -> int:
    """Evaluate, and print or write what was found."""
    from vlft.evaluation.evaluate import Settings, evaluate
    from vlft.evaluation.page import refuse_path, write_page
    from vlft.evaluation.run_rows import held_out_of
    from vlft.metrics import DEFAULT

    held = held_out_of(flags.model, flags.of_data) if flags.held_out else None
    settings = Settings(
        models=(flags.model, *flags.compare),
        files=tuple(flags.data) if held is None else held.files,
        data=flags.of_data if held is None else held.data,
        rows=None if held is None else held.rows,
        metrics=tuple(flags.metric or (() if flags.labels else DEFAULT)),
        box_format=flags.box_format,
        batch=flags.batch,
        max_new_tokens=flags.max_new_tokens,
        limit=flags.limit,
        out=flags.out,
        thinking=flags.thinking,
        base_model=flags.base_model,
        labels=flags.labels,
    )
    page = flags.html or settings.first_out.with_suffix(".html")
    if flags.html is not None or page.parent.is_dir():  # the folder `eval` is made when there is something to put in it
        refuse_path(page)
    with explained("The answers so far are saved. Run the same command again to continue."):
        found = evaluate(settings, say=_say)
    screen.stage("writing the page")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_page(page, found)
    screen.stage("")
    if flags.json:
        write(as_json(found, str(page)))
    else:
        print(as_text(found, str(page)))
    return 0


def as_json(found: Evaluation, page: str) -> dict[str, Any]:
    """Return the document of `vlft eval --json`."""
    each = [_model_json(found, place) for place in range(len(found.models))]
    first = {name: value for name, value in each[0].items() if name != "differences"}
    models = {"models": dict(zip(found.models, each, strict=True))} if len(each) > 1 else {}
    return first | models | {"page": page, "skipped": found.skipped}


def _model_json(found: Evaluation, place: int) -> dict[str, Any]:
    figures = {name: each[place] for name, each in found.figures.items()}
    differences = {name: each[place] for name, each in found.differences.items()}
    return {
        "rows": len(found.rows),
        "metrics": {name: figure.value for name, figure in figures.items()},
        "intervals": {name: [figure.low, figure.high] for name, figure in figures.items()},
        "differences": {name: [one.value, one.low, one.high] for name, one in differences.items() if one is not None},
        "out": found.outs[place],
        **({"confusion": _confusion_json(found.confusions[place])} if found.confusions else {}),
    }


def _confusion_json(found: Confusion) -> dict[str, Any]:
    return {"labels": list(found.labels), "counts": [list(row) for row in found.counts]}


def as_text(found: Evaluation, page: str) -> str:
    """Return what the terminal shows: figures, differences, the worst rows and the files."""
    parts = [_figures(found)]
    if len(found.models) > 1:
        parts.append(_differences(found))
    if found.confusions and len(found.confusions[0].labels) <= LABELS:
        parts.append(_confusion(found.confusions[0]))
    if worst := _worst(found):
        parts.append(worst)
    lines = [f"answers: {out}" for out in dict.fromkeys(found.outs)]
    lines.append(f"page: {page}")
    lines += [f"{counted(found.skipped, 'row')} skipped (--on_bad_row skip)"] if found.skipped else []
    return "\n\n".join([*parts, "\n".join([*lines, *(f"note: {note}" for note in found.notes)])])


def _figures(found: Evaluation) -> str:
    heads = ["", *found.models] if len(found.models) > 1 else ["", "value", "95% interval"]
    rows = []
    for name, each in found.figures.items():
        one = each[0]
        cells = [_with_interval(figure) for figure in each] if len(each) > 1 else [f"{one.value:.4f}", _interval(one)]
        rows.append([name, *cells, f"{one.rows:,}"])
    return table([*heads, "rows"], rows)


def _differences(found: Evaluation) -> str:
    first, *others = found.models
    heads = [f"difference to {first}", *others]
    rows = []
    for name, each in found.differences.items():
        rows.append([name, *("-" if one is None else _signed(one) for one in each[1:])])
    return table(heads, rows)


def _confusion(found: Confusion) -> str:
    rows = [[label, *map(str, row)] for label, row in zip(found.labels, found.counts, strict=True)]
    return table(["right \\ chosen", *found.labels], rows)


def _with_interval(figure: Figure) -> str:
    return f"{figure.value:.4f} ({_interval(figure)})"


def _interval(figure: Figure) -> str:
    return f"{figure.low:.4f} to {figure.high:.4f}"


def _signed(figure: Figure) -> str:
    return f"{figure.value:+.4f} ({figure.low:+.4f} to {figure.high:+.4f})"


def _worst(found: Evaluation) -> str:
    """Return the rows with the worst figures of the first metric."""
    name = next(iter(found.figures))
    scored = [(score, row) for row in found.rows if (score := row.scores[name][0]) is not None]
    best = (max if found.higher[name] else min)((score for score, _ in scored), default=0.0)
    scored = [one for one in scored if one[0] != best]
    if not scored:
        return ""
    scored.sort(key=lambda one: one[0], reverse=not found.higher[name])
    lines = [f"worst rows by {name}:"]
    for score, row in scored[:WORST]:
        lines.append(f"  {row.name}: {score:.4g}")
        lines.append(f"    right  {_line(row.references[0])}")
        lines.append(f"    answer {_line(row.answers[0])}{' (cut)' if row.cut[0] else ''}")
    return "\n".join(lines)


def _line(text: str) -> str:
    return printable(short(" ".join(text.split()), ANSWER)) or "(empty)"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
