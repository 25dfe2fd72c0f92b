"""Fourth screen: what is trained, how, and whether it fits."""

from __future__ import annotations

import json
from typing import Any

from vlft.pages.web import render
from vlft.ui.commands import MODES, PRESETS, Form, method_notes, plan, shown
from vlft.ui.desk import Desk
from vlft.ui.jobs import Job
from vlft.ui.words import label, spoken

IDLE = "A plan says what would be trained, in how many steps, and whether it fits. It trains nothing."
#: Part of the estimate -> what it is.
PARTS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "vision": "activations, vision tower",
    "merger": "activations, merger", "language": "activations, language model", "logits": "scores of the next token",
    "working": "working space", "context": "CUDA itself", "reserve": "reserve",
}  # fmt: skip
TOWERS = {"vision": "vision tower", "merger": "merger", "language": "language model"}
KINDS = {"frozen": "frozen", "no_decay": "biases and norms", "B": "LoRA's B matrices"}


def build(desk: Desk) -> None:
    """Add the screen."""
    import gradio as gr

    preset = gr.Radio([*PRESETS], label="Kind of training", info="Sets the fields below", value="language LoRA")
    with gr.Row():
        vision, merger, language = (
            gr.Radio(MODES, label=label(name), info=info, value=mode, min_width=240)
            for name, info, mode in (
                ("vision", "The part that reads pictures", "frozen"),
                ("merger", "Turns what it read into tokens", "frozen"),
                ("language", "The part that writes", "lora"),
            )
        )
    with gr.Row():
        rank, rate, vision_rate, epochs, batch = (
            gr.Textbox(value, label=label(name), info=info, placeholder=hint, min_width=120)
            for name, value, info, hint in (
                ("lora_rank", "32", "Size of what LoRA adds", ""),
                ("learning_rate", "1e-4", "How far each step goes", ""),
                ("vision_lr", "", "Only if it differs", "the same"),
                ("num_train_epochs", "3", "How often each row is seen", ""),
                ("global_batch", "16", "Empty: as many as fit", ""),
            )
        )
    with gr.Row():
        save = gr.Textbox(
            "0.1",
            label=label("save_steps"),
            info="Steps; below 1 a share of the run. A crash loses at most this",
            min_width=240,
        )
        card = gr.Textbox(
            label=label("gpu"),
            info="h100, a100-40, 4090, or the GB of its memory",
            min_width=240,
            placeholder="the one in this machine",
        )
        cards = gr.Textbox(
            label=label("gpus"), info="Of the plan. Step 5 starts one process", placeholder="1", min_width=240
        )
    button = gr.Button("Plan the run", variant="primary")
    stopper = desk.stop_button()
    message = desk.drawn()
    line = gr.Textbox(label="The same in a terminal", interactive=False, buttons=["copy"], elem_classes="command")
    html = desk.drawn()
    desk.add(preset=preset)  # kept by the browser; commands read the towers
    desk.add(
        vision=vision,
        merger=merger,
        language=language,
        rank=rank,
        rate=rate,
        vision_rate=vision_rate,
        epochs=epochs,
        batch=batch,
        save=save,
    )
    desk.add(card=card, cards=cards)
    # In the browser: an answer of the server could come after the user has typed another rate.
    preset.input(
        None, preset, [vision, merger, language, rate, vision_rate], js=f"name => ({json.dumps(PRESETS)})[name]"
    )
    desk.panel([line, html], lambda form: view(form, desk))
    desk.action(button, lambda form: start(form, desk), message, about=html)
    desk.stopping(stopper, lambda form: (job_of(form, desk),), message, html)


def start(form: Form, desk: Desk) -> None:
    """Plan the run, in place of a plan of these data that is still running."""
    desk.jobs.start(plan(form), instead=f"plan {form.data[0]}")


def job_of(form: Form, desk: Desk) -> Job | None:
    """Return the plan of the form."""
    words = plan(form)
    return desk.jobs.find(words[0], words[1:])


def view(form: Form, desk: Desk) -> tuple[str, str]:
    """Return the command line, and the plan."""
    words, job = plan(form), job_of(form, desk)
    found: Any = job.document() if job is not None and job.word == "done" else None
    notes = [*method_notes(form), *(spoken(note) for note in found["notes"])] if found else []
    groups = [{**group, "name": group_name(group["name"])} for group in found["groups"]] if found else []
    return shown(words), render(
        "ui_plan.html.j2", title="", job=job, idle=IDLE, plan=found, parts=PARTS, notes=notes, groups=groups
    )


def group_name(name: str) -> str:
    """Return the name of a parameter group in words: `vision_no_decay` is `vision tower, biases and norms`."""
    tower, _, kind = name.partition("_")
    return TOWERS.get(tower, tower) + (f", {KINDS.get(kind, kind)}" if kind else "")
