"""First screen: choose a folder, data files and a base model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vlft.errors import ConfigError
from vlft.pages.web import render
from vlft.ui.commands import Form, method_notes
from vlft.ui.desk import Choices, Desk, message
from vlft.ui.folders import find
from vlft.ui.words import MORE, label

#: Bases that are named in the list; any other folder or hub id can be typed.
BASES = (
    "Qwen/Qwen2-VL-2B-Instruct",
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "Qwen/Qwen3-VL-2B-Instruct",
    "Qwen/Qwen3-VL-8B-Instruct",
)
UP = ".. (the folder above)"


def build(desk: Desk) -> None:
    """Add the screen."""
    import gradio as gr

    first = view(Form(folder=desk.folder))  # the first screen is whole before the browser asks for anything
    with gr.Row(equal_height=True):
        folder = gr.Textbox(desk.folder, label="Folder on this machine", scale=4, min_width=280)
        # Of several choices: Gradio 6.31 fails in the browser if the choices of the other kind shrink while it is open.
        inner = gr.Dropdown(
            label="Go to", choices=[], value=[], multiselect=True, max_choices=1, scale=2, interactive=True
        )
        button = gr.Button("Open", variant="primary", scale=1)
    note = desk.drawn()
    listing = desk.drawn(first[-1])
    with gr.Row():
        data = gr.Dropdown(
            label=label("data_path"),
            min_width=280,
            choices=[],
            multiselect=True,
            allow_custom_value=True,
            interactive=True,
        )
        evaluation = gr.Dropdown(
            label=label("eval_path"),
            min_width=280,
            choices=[],
            multiselect=True,
            allow_custom_value=True,
            interactive=True,
        )
    with gr.Row():
        images = gr.Textbox(
            label=label("image_folder"),
            min_width=280,
            placeholder="the folder of each data file",
            info="Only if it is another one",
        )
        model = gr.Dropdown(
            label=label("model_id"),
            elem_classes="typed",
            min_width=280,
            choices=[*BASES],
            value="",
            allow_custom_value=True,
            interactive=True,
            info="The model that is trained further: a folder, or its name on Hugging Face",
        )
    more = gr.Textbox(
        label=MORE,
        placeholder="--max_length 4096 --on_bad_row skip",
        elem_classes="command",
        info="They act on every screen, as on a command line",
    )
    wrong = desk.drawn()
    desk.add(folder=folder, data=data, eval=evaluation, images=images, model=model, more=more)
    desk.panel([inner, data, evaluation, model, listing], view)
    desk.panel([wrong], lambda form: (of_more(form),))
    desk.action(button, opened, note, "folder", "data", "model")


def view(form: Form) -> tuple[Any, ...]:
    """Return the choices of the four lists, and what the folder holds."""
    files: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    found, fault = None, ""
    try:
        found = find(form.folder)
    except ConfigError as error:
        fault = str(error)
    else:
        files, models, folders = tuple(path for path, _ in found.data), found.models, found.folders
    return (
        Choices(choices=(UP, *folders)),
        Choices.around(form.data, *files),
        Choices.around(form.eval, *files),
        Choices.around((form.model,), *models, *BASES),
        render("ui_data.html.j2", title="", found=found, fault=fault),
    )


def opened(form: Form) -> dict[str, Any]:
    """Open a folder: its only data file, or its only model, is chosen if none is. The listing says if it cannot be."""
    try:
        found = find(form.folder)
    except ConfigError:
        return {}
    files = [path for path, _ in found.data]
    here = str(found.folder) + os.sep
    kept = [path for path in form.data if path.startswith(here)]
    return {
        "folder": str(found.folder),
        "data": kept or (files if len(files) == 1 else []),
        "model": form.model or (found.models[0] if len(found.models) == 1 else ""),
    }


def of_more(form: Form) -> str:
    """Return what is wrong with the field for further flags, or what it changes in step 4, as HTML."""
    try:
        return message(" ".join(method_notes(form)), "warn")
    except ConfigError as error:
        return message(str(error), "bad")


def moved(folder: str, chosen: Sequence[str] | None) -> tuple[str, list[str]]:
    """Return the folder after a choice in the list of folders, and that nothing is chosen in the list then."""
    if not chosen:
        return folder, []
    inner = chosen[0]
    above = os.path.dirname(folder.rstrip(os.sep)) or os.sep
    return (above if inner == UP else os.path.join(folder, inner)), []
