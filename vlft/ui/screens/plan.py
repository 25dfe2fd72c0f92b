"""Fourth screen: what is trained, how, and whether it fits."""

from __future__ import annotations

import json
from typing import Any

from vlft.pages.web import render
from vlft.ui.commands import MODES, PRESETS, Form, plan, shown
from vlft.ui.desk import Desk

IDLE = "A plan says what would be trained, in how many steps, and whether it fits. It trains nothing."
PARTS = ("weights", "gradients", "optimizer", "vision", "merger", "language", "logits", "working", "context", "reserve")


def build(desk: Desk) -> None:
    """Add the screen."""
    import gradio as gr

    preset = gr.Radio([*PRESETS], label="Preset", value="language LoRA")
    with gr.Row():
        vision = gr.Radio(MODES, label="Vision tower", value="frozen", min_width=240)
        merger = gr.Radio(MODES, label="Merger", value="frozen", min_width=240)
        language = gr.Radio(MODES, label="Language model", value="lora", min_width=240)
    with gr.Row():
        rank = gr.Textbox("32", label="LoRA rank", min_width=120)
        rate = gr.Textbox("1e-4", label="Learning rate", min_width=120)
        vision_rate = gr.Textbox(label="Vision learning rate", placeholder="the same", min_width=120)
        epochs = gr.Textbox("3", label="Epochs", min_width=120)
        batch = gr.Textbox("16", label="Rows per step", placeholder="one pack", min_width=120)
    with gr.Row():
        card = gr.Textbox(
            label="GPU to plan for: h100, a100-40, 4090, or its GB",
            min_width=240,
            placeholder="the one in this machine",
        )
        cards = gr.Textbox(label="Number of GPUs", placeholder="1", min_width=240)
    button = gr.Button("Plan the run", variant="primary")
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
    )
    desk.add(card=card, cards=cards)
    # In the browser: an answer of the server could come after the user has typed another rate.
    preset.input(
        None, preset, [vision, merger, language, rate, vision_rate], js=f"name => ({json.dumps(PRESETS)})[name]"
    )
    desk.panel([line, html], lambda form: view(form, desk))
    desk.action(button, lambda form: start(form, desk), message)


def start(form: Form, desk: Desk) -> None:
    """Plan the run."""
    desk.jobs.start(plan(form))


def view(form: Form, desk: Desk) -> tuple[str, str]:
    """Return the command line, and the plan."""
    words = plan(form)
    job = desk.jobs.find(words[0], words[1:])
    found: Any = job.document() if job is not None and job.word == "done" else None
    return shown(words), render("ui_plan.html.j2", title="", job=job, idle=IDLE, plan=found, parts=PARTS)
