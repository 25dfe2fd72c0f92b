"""Second screen: which rows cannot be trained, and why; and a file of the others."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from vlft.errors import ConfigError
from vlft.pages.web import render
from vlft.ui.commands import Form, check, fix, shown
from vlft.ui.desk import Desk, absolute
from vlft.ui.jobs import Job
from vlft.ui.words import folders_named, label, spoken

PAGE = "look/report.html"
FIRST = 5  # refused rows that are listed above the page of all
IDLE = "Nothing has been checked with these settings. Check reads every row and opens every picture."
FIX_IDLE = "Write the rows that can be trained to a file of their own, and the others to quarantine.jsonl."


def build(desk: Desk) -> None:
    """Add the screen."""
    import gradio as gr

    headers = gr.Checkbox(label=label("headers_only"))
    button = gr.Button("Check the rows", variant="primary")
    stopper = desk.stop_button()
    message = desk.drawn()
    line = gr.Textbox(label="The same in a terminal", interactive=False, buttons=["copy"], elem_classes="command")
    advice = gr.Button("Use the folder that was found", elem_classes="advice")
    html = desk.drawn()
    with gr.Accordion("Write the rows that can be trained", open=False):
        with gr.Row():
            out = gr.Textbox("clean.jsonl", label=label("fix"), info="A new file, in the open folder")
            split = gr.Textbox(label=label("split"), placeholder="0.9,0.1", info="Shares to train and evaluate")
        dedup = gr.Checkbox(label=label("dedup"))
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
    desk.action(button, lambda form: start(form, desk), message, about=html)
    desk.action(advice, lambda form: advised(form, desk), message, "images", done="Check the rows again.", about=html)
    desk.action(write, lambda form: start_fix(form, desk), fix_message, about=fixed)
    desk.stopping(stopper, lambda form: (job_of(form, desk), fix_of(form, desk)), message, html)
    desk.action(use, lambda form: written(form, desk), fix_message, "data", "eval", done="These files are chosen now.")


def start(form: Form, desk: Desk) -> None:
    """Check the rows."""
    words = check(form)
    desk.jobs.start(words, extra={"--report": "look"}, instead=f"check {form.data[0]}")


def view(form: Form, desk: Desk) -> tuple[str, str]:
    """Return the command line, and what the check found."""
    words, job = check(form), job_of(form, desk)
    found = job.document() if job is not None and job.word == "done" else None
    listed = job is not None and found and (job.folder / PAGE).is_file()
    address = f"/job/{job.name}/check?{job.began}" if job is not None and listed else ""
    bad = [{**row, "reason": spoken(row["reason"])} for row in found["bad"][:FIRST]] if found else []
    advice = folder_found(found)
    html = render(
        "ui_check.html.j2", title="", job=job, idle=IDLE, found=found, address=address, bad=bad, advice=advice
    )
    return shown(words), html


def job_of(form: Form, desk: Desk) -> Job | None:
    """Return the check of the form."""
    words = check(form)
    return desk.jobs.find(words[0], words[1:])


def fix_of(form: Form, desk: Desk) -> Job | None:
    """Return the job that writes the rows of the form."""
    if not form.fix_out:
        return None
    words = fix(_there(form))
    return desk.jobs.find(words[0], words[1:])


def folder_found(found: Any) -> str:
    """Return the folder of the pictures that a check advises, "" if none."""
    named = folders_named([row["reason"] for row in found["bad"]]) if found else []
    return named[0] if named and os.path.isdir(named[0]) else ""


def advised(form: Form, desk: Desk) -> dict[str, Any]:
    """Return the folder of the pictures that the check found.

    Raises:
        ConfigError: it is gone.
    """
    job = job_of(form, desk)
    folder = folder_found(job.document()) if job is not None else ""
    if not folder:
        raise ConfigError("The folder that was found is gone. Check the rows again.")
    return {"images": folder}


def start_fix(form: Form, desk: Desk) -> None:
    """Write the rows that can be trained.

    Raises:
        ConfigError: a file of this name exists. The job that wrote it stays on the page.
    """
    words, job = fix(_there(form)), fix_of(form, desk)
    running = job is not None and job.word == "running"
    if there := [] if running else [path for path in targets(form) if os.path.isfile(path)]:
        raise ConfigError(f"{there[0]}: already exists. Name a new file, or remove it.")
    desk.jobs.start(words)


def fix_view(form: Form, desk: Desk) -> tuple[str, str]:
    """Return the command line, and which files were written."""
    if not form.fix_out or not form.data:
        return "", render("ui_fix.html.j2", title="", job=None, idle=FIX_IDLE, written=())
    words, job = fix(_there(form)), fix_of(form, desk)
    if job is not None and job.word == "done" and "error: --fix" in job.said():
        job = replace(job, word="failed")  # the rows were checked, and their file could not be written
    lines = job.said().splitlines() if job is not None and job.word == "done" else []
    return shown(words), render("ui_fix.html.j2", title="", job=job, idle=FIX_IDLE, written=lines[-6:])


def written(form: Form, desk: Desk) -> dict[str, Any]:
    """Return the written files as the fields of the first screen.

    Raises:
        ConfigError: no file has been written.
    """
    found, job = targets(form), fix_of(form, desk)
    if job is None or job.word != "done" or not all(os.path.isfile(path) for path in found):
        raise ConfigError("Write the file first.")
    return {"data": [found[0]], "eval": found[1:] or list(form.eval)}


def targets(form: Form) -> list[str]:
    """Return the files that are written."""
    stem, ending = os.path.splitext(_there(form).fix_out)
    ending = ending or ".jsonl"
    return [f"{stem}-train{ending}", f"{stem}-eval{ending}"] if form.split else [f"{stem}{ending}"]


def _there(form: Form) -> Form:
    return replace(form, fix_out=absolute(form.fix_out, form.folder))
