"""Fifth screen: start a run, watch it while it trains, stop it. Runs that were started in a terminal are shown too."""

from __future__ import annotations

import os
import re
from typing import Any

from vlft.errors import ConfigError
from vlft.pages.web import render
from vlft.text import scaled
from vlft.ui.commands import Form, shown, train
from vlft.ui.desk import Choices, Desk, absolute
from vlft.ui.folders import find
from vlft.ui.jobs import Job, read, stop
from vlft.ui.runs import MOST_ROWS, RECORD, Watched, answered, newest
from vlft.ui.runs import stop as stop_run
from vlft.ui.small import document
from vlft.ui.thumbs import thumbs
from vlft.ui.words import label

IDLE = "No run is in this folder yet."
SHOWN_ANSWERS = 6


def build(desk: Desk) -> None:
    """Add the screen."""
    import gradio as gr

    run = gr.Dropdown(
        label=label("output_dir"),
        elem_classes="typed",
        info="A new folder to start a run, or the folder of any run to watch it",
        choices=[],
        value="output/run",
        allow_custom_value=True,
        interactive=True,
    )
    with gr.Row():
        start_button = gr.Button("Start training", variant="primary")
        stop_button = gr.Button("Stop and save", variant="stop", elem_classes="stopping")
    message = desk.drawn()
    line = gr.Textbox(label="The same in a terminal", interactive=False, buttons=["copy"], elem_classes="command")
    html = desk.drawn()
    desk.add(run=run)
    desk.panel([run], lambda form: (Choices.around((form.run,), *known(form)),))
    desk.panel([line, html], lambda form: view(form, desk))
    desk.action(start_button, lambda form: start(form, desk), message, "run", about=html)
    saving = "The run finishes its step, saves and ends."
    desk.action(stop_button, lambda form: end(form, desk), message, done=saving, about=html)


def known(form: Form) -> tuple[str, ...]:
    """Return the run folders in the open folder."""
    try:
        return find(form.folder).runs
    except ConfigError:
        return ()


def start(form: Form, desk: Desk) -> dict[str, Any]:
    """Start the run.

    Raises:
        ConfigError: a field is missing, or a run trains in this folder or has finished there.
    """
    here = there(form)
    words, job = train(here), job_of(here.run, desk)
    if job is not None and job.word == "running" and job.words == tuple(words):
        return {}  # a second click: the page shows the run
    run = desk.runs.watch(here.run)
    if run.pid is not None:
        raise ConfigError(f"{here.run}: a run is training there right now. Stop it, or name another folder.")
    if run.word == "finished":
        raise ConfigError(f"{here.run}: the run in this folder has finished. Name a new folder to train again.")
    desk.jobs.start(words, about=[os.path.realpath(here.run)])
    return {"run": here.run}


def end(form: Form, desk: Desk) -> None:
    """Stop the run in the folder, whoever started it.

    Raises:
        ConfigError: no run trains there.
    """
    run = there(form).run
    job, pid = job_of(run, desk), desk.runs.watch(run).pid
    if job is not None and job.word == "running":
        stop(job)
    elif pid:
        stop_run(pid)
    else:
        raise ConfigError(f"{run}: no run is training there.")


def view(form: Form, desk: Desk) -> tuple[str, str]:
    """Return the command line, and the run so far."""
    if not form.run:
        return "", render("ui_message.html.j2", title="", text="Name a folder for the run.", kind="soft")
    here = there(form)
    run, job = desk.runs.watch(here.run), job_of(here.run, desk)
    try:
        line = shown(train(here))
    except ConfigError as error:
        line, asked = "", str(error)
    else:
        asked = ""
    running = job is not None and job.word == "running"
    there_is = bool(run.record) or run.pid is not None or running
    starting = running and (run.step is None or job is None or run.logged < job.began)
    alive = running or run.pid is not None
    curves = desk.runs.curves(run.folder)
    rows, notes = answered(run.folder) if there_is else ([], [])
    html = render(
        "ui_train.html.j2",
        title="",
        run=run,
        idle="" if there_is else f"{IDLE} {asked}".strip(),
        fault=fault(job, run),
        log=job.explained() if job is not None else "",
        ending=job.ending() if job is not None else "",
        starting=starting,
        since=job.seconds if job is not None else 0.0,
        next=next_start(run) if there_is and not alive and run.word != "finished" else "",
        elsewhere=run.pid is not None and not running,
        facts=facts(curves.last),
        charts=curves.charts() if there_is else [],
        rows=[_row(row) for row in rows[:MOST_ROWS]],
        sampled=[_row(row) for row in newest(run.folder)] if there_is else [],
        notes=notes,
    )
    return line, html


def fault(job: Job | None, run: Watched) -> str:
    """Return what ended the run before its end, "" if nothing did."""
    if job is None or job.word in ("running", "done") or run.pid is not None:
        return ""
    if job.word == "stopped":
        return "The run was stopped and saved." if run.saved is not None else "The run was stopped before it saved."
    if job.word == "lost":
        return "The run was killed, by the system or by somebody. Often the memory was full."
    return "The run ended with an error:"


def next_start(run: Watched) -> str:
    """Return what Start training does with a run that has not finished."""
    if run.saved is None:
        return "No checkpoint was saved. Start training begins at step 1."
    return f"Start training again resumes it from its checkpoint of step {run.saved:,}."


def facts(last: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (name, figure, CSS class) of the last logged line."""
    shown = {
        "reward": "reward",
        "loss": "loss",
        "tokens_per_s": "tokens per second",
        "step_s": "seconds per step",
        "peak_gb": "GB at the peak",
    }
    found = [(title, last.get(name)) for name, title in shown.items()]
    return [
        (title, scaled(value) if 1000 <= value < 1e15 else f"{value:.3g}", "")
        for title, value in found
        if isinstance(value, int | float)
    ]


def job_of(run: str, desk: Desk) -> Job | None:
    """Return the run that was last started here in a folder."""
    return read(desk.jobs.root / desk.jobs.key("train", [os.path.realpath(run)]))


def there(form: Form) -> Form:
    """Return the form with the run as an absolute path."""
    from dataclasses import replace

    return replace(form, run=absolute(form.run, form.folder))


def base_of(run: str) -> str:
    """Return the base of a run, "" if it is unknown."""
    found = document(os.path.join(run, RECORD)).get("base_model")
    return found if isinstance(found, str) and "\0" not in found else ""


def _row(row: dict[str, Any]) -> dict[str, Any]:
    name = f" (id {row['id']})" if row["id"] is not None else ""
    said = row.get("answers", ())
    if len(said) > SHOWN_ANSWERS:
        said = [said[0], *said[1 - SHOWN_ANSWERS :]]
    return {
        "title": f"{row['file']}[{row['index']}]{name}",
        "turns": [{**turn, "text": _words(turn["text"], len(row["media"]))} for turn in row["turns"]],
        "right": row["right"],
        "answers": said,
        "said": row.get("said"),
        "pictures": thumbs(row["media"]),
    }


def _words(text: str, media: int) -> str:
    """Return the text of a turn without the marks of the row's media, which are shown above it."""
    return re.sub(r"<(?:image|video)>\n?", "", text, count=media).strip() if media else text
