"""Third screen: rows as the model sees them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from vlft.errors import ConfigError
from vlft.pages.web import render
from vlft.ui.commands import Form, look, shown
from vlft.ui.desk import Desk
from vlft.ui.jobs import Job
from vlft.ui.rows import row_count
from vlft.ui.words import label

PAGE = "rows.html"
RANGE = re.compile(r"([0-9]{1,12})(?:-([0-9]{1,12}))?")
IDLE = "Show rows as tokens, with the trained ones marked, and pictures as the model sees them."


def build(desk: Desk) -> None:
    """Add the screen."""
    import gradio as gr

    with gr.Row(equal_height=True):
        index = gr.Textbox("0-3", label=label("index"), info="e.g. 17 or 3,8,40-44", scale=3, min_width=300)
        button = gr.Button("Show the rows", variant="primary", scale=2, min_width=150)
        back = gr.Button("Earlier", scale=1, min_width=84)
        on = gr.Button("Later", scale=1, min_width=84)
    stopper = desk.stop_button()
    message = desk.drawn()
    line = gr.Textbox(label="The same in a terminal", interactive=False, buttons=["copy"], elem_classes="command")
    html = desk.drawn()
    desk.add(index=index)
    desk.panel([line, html], lambda form: view(form, desk))
    desk.action(button, lambda form: start(form, desk), message, "index", about=html)
    desk.action(back, lambda form: turned(form, -1, desk), message, "index", about=html)
    desk.action(on, lambda form: turned(form, 1, desk), message, "index", about=html)
    desk.stopping(stopper, lambda form: (job_of(form, desk),), message, html)


def start(form: Form, desk: Desk) -> dict[str, Any]:
    """Show the rows. A range that ends behind the last row is shortened."""
    index = within(form.index, count(form)) or form.index
    words = look(replace(form, index=index))
    desk.jobs.start(words, extra={"--html": PAGE}, instead=f"look {form.data[0]}")
    return {"index": index}


def turned(form: Form, by: int, desk: Desk) -> dict[str, Any]:
    """Show the rows before or after the ones in the field.

    Raises:
        ConfigError: no row is there, or the field holds several numbers.
    """
    there = count(form)
    index = within(shifted(form.index, by), there)
    if index is None or index == form.index:
        ends = "Row 0 is the first one." if by < 0 else f"Row {(there or 0) - 1} is the last one of {form.data[0]}."
        raise ConfigError(ends)
    form = replace(form, index=index)
    job = job_of(form, desk)
    if job is None or job.word not in ("running", "done") or job.outdated:
        start(form, desk)
    return {"index": index}


def job_of(form: Form, desk: Desk) -> Job | None:
    """Return the preview of the form."""
    words = look(form)
    return desk.jobs.find(words[0], words[1:])


def count(form: Form) -> int | None:
    """Return the number of rows of the first data file, None if it is unknown."""
    return row_count(form.data[0], form.images) if form.data else None


def view(form: Form, desk: Desk) -> tuple[str, str]:
    """Return the command line, and the rows."""
    words, job = look(form), job_of(form, desk)
    there = job is not None and job.word == "done" and (job.folder / PAGE).is_file()
    address = f"/job/{job.name}/look?{job.began}" if there and job is not None else ""
    return shown(words), render("ui_look.html.j2", title="", job=job, idle=IDLE, address=address)


def within(index: str, count: int | None) -> str | None:
    """Return a range without the rows behind the last one; None if none is left. Another text is returned as it is."""
    found = RANGE.fullmatch(index.replace(" ", ""))
    if found is None or count is None:
        return index
    first, last = int(found[1]), int(found[2] or found[1])
    if first >= count:
        return None
    return f"{first}-{count - 1}" if last >= count > first + 1 else str(first) if last >= count else index


def shifted(index: str, by: int) -> str:
    """Return the next rows after `0-3`: `4-7`, or the ones before.

    Raises:
        ConfigError: the field holds several numbers.
    """
    found = RANGE.fullmatch(index.replace(" ", ""))
    if found is None:
        raise ConfigError(f"Rows {index[:40]!r}: Earlier and Later need one number or one range, e.g. 0-3.")
    first, last = int(found[1]), int(found[2] or found[1])
    count = max(1, last - first + 1)
    start = max(0, first + by * count)
    return f"{start}-{start + count - 1}" if count > 1 else str(start)
