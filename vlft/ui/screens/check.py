"""Second screen: which rows cannot be trained, and why; and a file of the others."""

from __future__ import annotations

import os
from typing import Any

from vlft.pages.web import render
from vlft.ui.commands import Form, check, fix, shown
from vlft.ui.desk import Desk, absolute

PAGE = "look/report.html"
FIRST = 5  # refused rows that are listed above the page of all
IDLE = "Nothing has been checked with these settings. Check reads every row and opens every picture."
FIX_IDLE = "Write the rows that can be trained to a file of their own, and the others to quarantine.jsonl."


def build(desk: Desk) -> None:
    """Add the screen."""
    import gradio as gr

    headers = gr.Checkbox(label="Read only the headers of pictures and videos (fast)")
    button = gr.Button("Check the rows", variant="primary")
    message = desk.drawn()
    line = gr.Textbox(label="The same in a terminal", interactive=False, buttons=["copy"], elem_classes="command")
    html = desk.drawn()
    with gr.Accordion("Write the rows that can be trained", open=False):
        with gr.Row():
            out = gr.Textbox(label="File for these rows", placeholder="clean.jsonl")
            split = gr.Textbox(
                label="Divide them (optional)", placeholder="0.9,0.1", info="Shares to train and evaluate"
            )
        dedup = gr.Checkbox(label="Leave out rows that repeat an earlier row")
        with gr.Row():
            write = gr.Button("Write the file")
            use = gr.Button("Train on the written files")
        fix_message = desk.drawn()
        fix_line = gr.Textbox(
            label="The same in a terminal", interactive=False, buttons=["copy"], elem_classes="command"
        )
        fixed = desk.drawn()
    desk.add(headers_only=headers, fix_out=out, split=split, dedup=dedup)
    desk.panel([line, html], lambda form: view(form, desk))
    desk.panel([fix_line, fixed], lambda form: fix_view(form, desk))
    desk.action(button, lambda form: start(form, desk), message)
    desk.action(write, lambda form: start_fix(form, desk), fix_message)
    desk.action(use, lambda form: written(form, desk), fix_message, "data", "eval", done="These files are chosen now.")


def start(form: Form, desk: Desk) -> None:
    """Check the rows."""
    words = check(form)
    desk.jobs.start(words, extra={"--report": "look"})


def view(form: Form, desk: Desk) -> tuple[str, str]:
    """Return the command line, and what the check found."""
    words = check(form)
    job = desk.jobs.find(words[0], words[1:])
    found = job.document() if job is not None and job.word == "done" else None
    address = f"/job/{job.name}/check?{job.began}" if job is not None and found else ""
    html = render("ui_check.html.j2", title="", job=job, idle=IDLE, found=found, address=address, first=FIRST)
    return shown(words), html


def start_fix(form: Form, desk: Desk) -> None:
    """Write the rows that can be trained."""
    desk.jobs.start(fix(_there(form)))


def fix_view(form: Form, desk: Desk) -> tuple[str, str]:
    """Return the command line, and which files were written."""
    if not form.fix_out or not form.data:
        return "", render("ui_fix.html.j2", title="", job=None, idle=FIX_IDLE, written=())
    words = fix(_there(form))
    job = desk.jobs.find(words[0], words[1:])
    lines = job.said().splitlines() if job is not None and job.word == "done" else []
    return shown(words), render("ui_fix.html.j2", title="", job=job, idle=FIX_IDLE, written=lines[-6:])


def written(form: Form, desk: Desk) -> dict[str, Any]:
    """Return the written files as the fields of the first screen.

    Raises:
        ConfigError: no file has been written.
    """
    from vlft.errors import ConfigError

    there = _there(form)
    job = desk.jobs.find("check-data", fix(there)[1:])
    stem, ending = os.path.splitext(there.fix_out)
    ending = ending or ".jsonl"
    found = [f"{stem}-train{ending}", f"{stem}-eval{ending}"] if form.split else [f"{stem}{ending}"]
    if job is None or job.word != "done" or not all(os.path.isfile(path) for path in found):
        raise ConfigError("Write the file first.")
    return {"data": [found[0]], "eval": found[1:] or list(form.eval)}


def _there(form: Form) -> Form:
    from dataclasses import replace

    return replace(form, fix_out=absolute(form.fix_out, form.folder))
