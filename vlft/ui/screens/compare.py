"""Sixth screen: the base and the tuned model answer the same question, side by side."""

from __future__ import annotations

import os

from vlft.errors import ConfigError, VlftError
from vlft.pages.web import render
from vlft.ui.commands import Form, chat, shown
from vlft.ui.desk import KEPT, Choices, Desk, Kept
from vlft.ui.jobs import Job
from vlft.ui.rows import Asked, asked_row
from vlft.ui.screens.train import base_of, there
from vlft.ui.thumbs import thumbs
from vlft.ui.words import ROW, spoken

STEP = "6 Compare"
IDLE = "Ask a question: the base and the tuned model answer it side by side."


def build(desk: Desk) -> None:
    """Add the screen."""
    import gradio as gr

    source = gr.Radio(
        [("A picture of my own", "picture"), ("A row of a data file", "row")], value="picture", label="Ask about"
    )
    with gr.Row(visible=True) as own:
        picture = gr.File(label="Picture", file_types=["image"], height=120)
        question = gr.Textbox(label="Question", lines=3)
    with gr.Row(visible=False) as rows:
        file = gr.Dropdown(
            label="Data file (empty: the first one)",
            elem_classes="typed",
            choices=[],
            value="",
            allow_custom_value=True,
            interactive=True,
        )
        index = gr.Textbox("0", label=ROW[0])
    button = gr.Button("Ask both models", variant="primary")
    stopper = desk.stop_button()
    message = desk.drawn()
    line = gr.Textbox(
        label="The same in a terminal", interactive=False, buttons=["copy"], elem_classes="command", lines=2
    )
    html = desk.drawn()
    desk.add(source=source, picture=picture, question=question, row_file=file, row_index=index)
    source.change(
        lambda one: (gr.update(visible=one == "picture"), gr.update(visible=one == "row")),
        source,
        [own, rows],
        queue=False,
        api_visibility="private",
    )
    desk.panel([file], lambda form: (Choices.around((form.row_file,), *form.eval, *form.data),))
    desk.panel([line, html], lambda form: view(form, desk))
    desk.action(button, lambda form: start(form, desk), message, about=html)
    desk.stopping(stopper, lambda form: jobs_of(form, desk), message, html)


def asked(form: Form) -> Asked:
    """Return the question of the form.

    Raises:
        VlftError: there is none, or its row cannot be read.
    """
    if form.source == "row":
        file = form.row_file or next(iter((*form.eval, *form.data)), "")
        return asked_row(file, form.row_index, form.images)
    if not form.question:
        raise ConfigError("Write a question first.")
    return Asked(question=form.question, images=(form.picture,) if form.picture else ())


def commands(form: Form) -> tuple[Asked, list[str], list[str]]:
    """Return the question, and the command lines for the base and for the tuned model.

    Raises:
        VlftError: there is no question, or no run to ask.
    """
    run = there(form).run
    base = base_of(run) if run else ""
    if not base:
        raise ConfigError(no_run(run))
    what = asked(form)
    base_words = chat(base, what.question, what.images, what.videos)
    return what, base_words, chat(run, what.question, what.images, what.videos)


def start(form: Form, desk: Desk) -> None:
    """Ask both models.

    Raises:
        VlftError: there is no question, or no run to ask.
    """
    _, *both = commands(form)
    for words in both:
        desk.jobs.start(words)


def jobs_of(form: Form, desk: Desk) -> list[Job | None]:
    """Return the jobs that ask the base and the tuned model."""
    return [desk.jobs.find(words[0], words[1:]) for words in commands(form)[1:]]


def no_run(run: str) -> str:
    """Return that there is no run to ask."""
    where = f"No run is in {run} yet" if run else "No run is chosen"
    return f"{where}. Train one, or choose its folder, in step 5."


def view(form: Form, desk: Desk) -> tuple[str | Kept, str | Kept]:
    """Return the command lines, and both answers."""
    if form.step not in ("", STEP):
        return KEPT, KEPT  # a row of a large file takes long to read
    try:
        what, *both = commands(form)
    except VlftError as error:
        run = there(form).run
        missing = "" if base_of(run) else no_run(run)
        idle = missing or (IDLE if _empty(form) else "")
        fault = "" if idle else spoken(str(error))
        return "", render(
            "ui_compare.html.j2", title="", asked=None, fault=fault, idle=idle, run="" if missing else run
        )
    jobs = [desk.jobs.find(words[0], words[1:]) for words in both]
    html = render(
        "ui_compare.html.j2",
        title="",
        fault="",
        idle="",
        run=there(form).run,
        uploaded=os.path.basename(form.picture) if form.source == "picture" else "",
        asked=what,
        pictures=thumbs(what.images),
        base=both[0][1],
        tuned=both[1][1],
        base_job=jobs[0],
        tuned_job=jobs[1],
    )
    return "\n".join(shown(_own(words, form.picture)) for words in both), html


def _empty(form: Form) -> bool:
    return form.source == "picture" and not form.question


def _own(words: list[str], picture: str) -> list[str]:
    """Return a command line with the name of an uploaded picture in place of the path of its copy."""
    return [os.path.basename(word) if picture and word == picture else word for word in words]
