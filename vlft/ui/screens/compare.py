"""Sixth screen: the base and the tuned model answer the same question, side by side."""

from __future__ import annotations

from vlft.errors import ConfigError, VlftError
from vlft.pages.web import render
from vlft.ui.commands import Form, chat, shown
from vlft.ui.desk import KEPT, Choices, Desk, Kept
from vlft.ui.rows import Asked, asked_row
from vlft.ui.screens.train import base_of, there
from vlft.ui.thumbs import thumbs

STEP = "6 Compare"


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
            label="Data file (empty: the first one)", choices=[], value="", allow_custom_value=True, interactive=True
        )
        index = gr.Textbox("0", label="Row, from 0")
    button = gr.Button("Ask both models", variant="primary")
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
    desk.action(button, lambda form: start(form, desk), message)


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
        raise ConfigError(
            f"{run or 'no folder'}: no run is there to compare with its base. Train first, or name a run."
        )
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
        job = desk.jobs.find(words[0], words[1:])
        if job is None or job.word != "running":
            desk.jobs.start(words)


def view(form: Form, desk: Desk) -> tuple[str | Kept, str | Kept]:
    """Return the command lines, and both answers."""
    if form.step not in ("", STEP):
        return KEPT, KEPT  # a row of a large file takes long to read
    try:
        what, *both = commands(form)
    except VlftError as error:
        fault = "" if form.source == "picture" and not form.question else str(error)
        return "", render("ui_compare.html.j2", title="", asked=None, fault=fault)
    jobs = [desk.jobs.find(words[0], words[1:]) for words in both]
    html = render(
        "ui_compare.html.j2",
        title="",
        fault="",
        asked=what,
        pictures=thumbs(what.images),
        base=both[0][1],
        tuned=both[1][1],
        base_job=jobs[0],
        tuned_job=jobs[1],
    )
    return "\n".join(map(shown, both)), html
