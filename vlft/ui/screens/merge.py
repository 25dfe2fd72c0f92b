"""Last screen: merge the run into its base, and the lines that serve the merged model."""

from __future__ import annotations

import os
from dataclasses import replace

from vlft.errors import ConfigError
from vlft.pages.web import render
from vlft.ui.commands import Form, merge, shown
from vlft.ui.desk import Desk, absolute
from vlft.ui.jobs import Job
from vlft.ui.screens.train import there

IDLE = "Merging writes a model that loads without vlft, and measures that it answers as base and adapter do."


def build(desk: Desk) -> None:
    """Add the screen."""
    import gradio as gr

    out = gr.Textbox("output/merged", label="New folder for the merged model")
    button = gr.Button("Merge", variant="primary")
    stopper = desk.stop_button()
    message = desk.drawn()
    line = gr.Textbox(label="The same in a terminal", interactive=False, buttons=["copy"], elem_classes="command")
    html = desk.drawn()
    desk.add(merged=out)
    desk.panel([line, html], lambda form: view(form, desk))
    desk.action(button, lambda form: start(form, desk), message, about=html)
    desk.stopping(stopper, lambda form: (job_of(form, desk),), message, html)


def start(form: Form, desk: Desk) -> None:
    """Merge the run.

    Raises:
        ConfigError: the folder for the merged model holds something. Its result stays on the page.
    """
    here = _there(form)
    words, job = merge(here), job_of(form, desk)
    running = job is not None and job.word == "running"
    if not running and os.path.isdir(here.merged) and os.listdir(here.merged):
        raise ConfigError(f"{here.merged}: already exists and is not empty. Name a new folder for the merged model.")
    desk.jobs.start(words)


def view(form: Form, desk: Desk) -> tuple[str, str]:
    """Return the command line, and the result."""
    here = _there(form)
    words, job = merge(here), job_of(form, desk)
    found = job.document() if job is not None and job.word == "done" else None
    asking = shown(["chat", found["out"]]) if found else ""
    shows = {"idle": IDLE, "merged": found, "asking": asking, "run": here.run}
    return shown(words), render("ui_merge.html.j2", title="", job=job, **shows)


def job_of(form: Form, desk: Desk) -> Job | None:
    """Return the merge of the form."""
    words = merge(_there(form))
    return desk.jobs.find(words[0], words[1:])


def _there(form: Form) -> Form:
    return replace(there(form), merged=absolute(form.merged, form.folder))
