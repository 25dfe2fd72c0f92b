"""Third screen: rows as the model sees them."""

from __future__ import annotations

import re
from typing import Any

from vlft.errors import ConfigError
from vlft.pages.web import render
from vlft.ui.commands import Form, look, shown
from vlft.ui.desk import Desk

PAGE = "rows.html"
IDLE = "Show rows as tokens, with the trained ones marked, and pictures as the model sees them."


def build(desk: Desk) -> None:
    """Add the screen."""
    import gradio as gr

    with gr.Row(equal_height=True):
        index = gr.Textbox("0-3", label="Rows of the first data file, from 0", info="e.g. 17 or 3,8,40-44", scale=3)
        back = gr.Button("Earlier", scale=1, min_width=80)
        on = gr.Button("Later", scale=1, min_width=80)
        button = gr.Button("Show the rows", variant="primary", scale=2)
    message = gr.HTML(padding=False)
    line = gr.Textbox(label="The same in a terminal", interactive=False, buttons=["copy"], elem_classes="command")
    html = gr.HTML(padding=False)
    desk.add(index=index)
    desk.panel([line, html], lambda form: view(form, desk))
    desk.action(button, lambda form: start(form, desk), message)
    desk.action(back, lambda form: turned(form, -1, desk), message, "index")
    desk.action(on, lambda form: turned(form, 1, desk), message, "index")


def start(form: Form, desk: Desk) -> None:
    """Show the rows."""
    words = look(form)
    desk.jobs.start(words, extra={"--html": PAGE})


def turned(form: Form, by: int, desk: Desk) -> dict[str, Any]:
    """Show the rows before or after the ones in the field."""
    from dataclasses import replace

    index = shifted(form.index, by)
    words = look(replace(form, index=index))
    if desk.jobs.find(words[0], words[1:]) is None:
        desk.jobs.start(words, extra={"--html": PAGE})
    return {"index": index}


def view(form: Form, desk: Desk) -> tuple[str, str]:
    """Return the command line, and the rows."""
    words = look(form)
    job = desk.jobs.find(words[0], words[1:])
    there = job is not None and job.word == "done" and (job.folder / PAGE).is_file()
    address = f"/job/{job.name}/look?{job.began}" if there and job is not None else ""
    return shown(words), render("ui_look.html.j2", title="", job=job, idle=IDLE, address=address)


def shifted(index: str, by: int) -> str:
    """Return the next rows after `0-3`: `4-7`, or the ones before.

    Raises:
        ConfigError: the field holds several numbers.
    """
    found = re.fullmatch(r"([0-9]{1,12})(?:-([0-9]{1,12}))?", index.replace(" ", ""))
    if found is None:
        raise ConfigError(f"Rows {index[:40]!r}: Earlier and Later need one number or one range, e.g. 0-3.")
    first, last = int(found[1]), int(found[2] or found[1])
    count = max(1, last - first + 1)
    start = max(0, first + by * count)
    return f"{start}-{start + count - 1}" if count > 1 else str(start)
