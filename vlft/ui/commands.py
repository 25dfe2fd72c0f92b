"""Turn the form of the page into command lines of vlft. Text in, lists of words out; starts nothing and reads no file.

Every action of the page is one of these commands, so a user can copy it and type it in a terminal.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vlft.config import door, table
from vlft.errors import ConfigError
from vlft.ui.more import notes, words_of
from vlft.ui.words import place

#: Preset -> vision, merger, language, learning rate, that of the vision tower; as the scripts have them.
PRESETS = {
    "language LoRA": ("frozen", "frozen", "lora", "1e-4", ""),
    "vision + language LoRA": ("lora", "lora", "lora", "2e-4", ""),
    "full": ("full", "full", "full", "1e-5", "2e-6"),
}
MODES = ("full", "lora", "frozen")
#: Flag -> kind of its value, for the fields that are typed.
KINDS = {name: kind for verb in ("train", "plan", "check-data") for name, kind in table.kinds(verb).items()}
KEPT_CHECKPOINTS = "2"  # of a run that saves on the way


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the user has set on the page, as text. Paths are as typed; "" is not set.

    Attributes:
        step: title of the screen that is shown.
        folder: the folder that is open on the first screen.
        data: data files to train on.
        eval: data files to evaluate on.
        images: folder of the media; "": the folder of each data file.
        model: folder or hub id of the base.
        more: further flags of `vlft train`, as on a command line.
        headers_only: check without decoding pictures.
        fix_out: file for the rows that can be trained.
        dedup: leave out rows that repeat an earlier one.
        split: shares of a division, e.g. `0.9,0.1`.
        index: rows to look at, e.g. `0-3`.
        vision, merger, language: full, lora or frozen.
        rank: rank of LoRA.
        rate: learning rate.
        vision_rate: that of the vision tower; "": the same.
        epochs: passes over the data.
        batch: rows or packs per optimizer step; "": the default.
        save: steps between checkpoints; below 1: a share of the run; "": the default.
        card: GPU to estimate memory for; "": that of this machine.
        cards: number of GPUs of the plan.
        run: output folder of the run.
        question: what to ask both models.
        picture: a picture of one's own; "" for none.
        source: where the question comes from: `picture` or `row`.
        row_file, row_index: the row that is asked.
        merged: folder for the merged model.
    """

    step: str = ""
    folder: str = ""
    data: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    images: str = ""
    model: str = ""
    more: str = ""
    headers_only: bool = False
    fix_out: str = ""
    dedup: bool = False
    split: str = ""
    index: str = "0-3"
    vision: str = "frozen"
    merger: str = "frozen"
    language: str = "lora"
    rank: str = "32"
    rate: str = ""
    vision_rate: str = ""
    epochs: str = "3"
    batch: str = ""
    save: str = ""
    card: str = ""
    cards: str = ""
    run: str = ""
    question: str = ""
    picture: str = ""
    source: str = "picture"
    row_file: str = ""
    row_index: str = "0"
    merged: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Form:
        """Build the form from the values of the page's fields; None counts as not set."""
        read: dict[str, Any] = {}
        for field in fields(cls):
            value = values.get(field.name)
            if value is None:
                continue
            if isinstance(field.default, tuple):
                several = value if isinstance(value, list | tuple) else [value]
                read[field.name] = tuple(_text(one) for one in several if one)
            elif isinstance(field.default, bool):
                read[field.name] = bool(value)
            else:
                read[field.name] = _text(value).strip()
        return cls(**read)


def _text(value: object) -> str:
    """Return a text that a path or a command line can hold: a null is made visible, lone surrogates become `?`."""
    return str(value).replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()


def shown(words: Sequence[str]) -> str:
    """Return a command line as a user types it."""
    return shlex.join(["vlft", *words])


def more_words(form: Form) -> list[str]:
    """Return the words of the field for further flags.

    Raises:
        ConfigError: the errors of `vlft.ui.more.words_of`.
    """
    return words_of(form.more, form.folder)


def method_notes(form: Form) -> list[str]:
    """Return a note for each field of the plan whose value replaces a default of `--method`.

    Raises:
        ConfigError: the errors of `more_words`.
    """
    towers = {"vision": form.vision, "merger": form.merger, "language": form.language}
    return notes(more_words(form), towers, {"learning_rate": form.rate, "num_train_epochs": form.epochs})


def _names(words: Sequence[str]) -> list[str]:
    return [word[2:].partition("=")[0].replace("-", "_") for word in words if re.match("--[a-z]", word)]


def check(form: Form) -> list[str]:
    """Return `vlft check-data`.

    Raises:
        ConfigError: no data file is chosen.
    """
    return [
        "check-data",
        *_files(form.data),
        *_flags(image_folder=form.images, model_id=form.model),
        *(["--headers_only"] if form.headers_only else []),
        *more_words(form),
    ]


def fix(form: Form) -> list[str]:
    """Return `vlft check-data --fix`.

    Raises:
        ConfigError: no data file or no file to write is set.
    """
    if not form.fix_out:
        raise ConfigError("Name a file for the clean rows first, e.g. clean.jsonl in your folder.")
    dedup = ["--dedup"] if form.dedup else []
    return [*check(form), "--fix", form.fix_out, *dedup, *_flags(split=form.split)]


def look(form: Form) -> list[str]:
    """Return `vlft preview` of the first data file.

    Raises:
        ConfigError: no data file is chosen.
    """
    files = _files(form.data)
    return [
        "preview",
        files[0],
        *_flags(image_folder=form.images, model_id=form.model, index=form.index or "0"),
        *more_words(form),
    ]


def plan(form: Form) -> list[str]:
    """Return `vlft plan`.

    Raises:
        ConfigError: no data file or no base is set.
    """
    return ["plan", *_run(form), *_flags(gpu=form.card, gpus=form.cards)]


def train(form: Form) -> list[str]:
    """Return `vlft train`.

    Raises:
        ConfigError: no data file, no base or no output folder is set.
    """
    if not form.run:
        raise ConfigError("Name a folder for the run first.")
    return ["train", *_run(form), "--output_dir", form.run]


def chat(model: str, question: str, pictures: Sequence[str], videos: Sequence[str] = ()) -> list[str]:
    """Return `vlft chat` with one question.

    Raises:
        ConfigError: the question is empty.
    """
    if not question.strip():
        raise ConfigError("Write a question first.")
    media = [*(["--image", *pictures] if pictures else []), *(["--video", *videos] if videos else [])]
    return ["chat", model, *media, "--max_new_tokens", "256", "--", question]


def merge(form: Form) -> list[str]:
    """Return `vlft merge`.

    Raises:
        ConfigError: the run or the folder for the merged model is not set.
    """
    if not form.run or not form.merged:
        raise ConfigError("Name the folder of the run and a new folder for the merged model first.")
    return ["merge", form.run, form.merged]


def _run(form: Form) -> list[str]:
    if not form.model:
        raise ConfigError("Name the base model on the first screen first: a folder or a hub id.")
    more = more_words(form)
    lora = "lora" in (form.vision, form.merger, form.language)
    return [
        *_flags(model_id=form.model),
        *("--data_path", *_files(form.data)),
        *(["--eval_path", *form.eval] if form.eval else []),
        *_flags(
            image_folder=form.images,
            vision=form.vision,
            merger=form.merger,
            language=form.language,
            lora_rank=form.rank if lora else "",
            learning_rate=form.rate,
            vision_lr=form.vision_rate,
            num_train_epochs=form.epochs,
            global_batch=form.batch,
        ),
        *_unless(more, eval_strategy="epoch" if form.eval else ""),
        *_unless(more, save_steps="" if "save_strategy" in _names(more) else form.save),
        *_unless(more, save_total_limit=KEPT_CHECKPOINTS if form.save else ""),
        *more,
    ]


def _files(files: Sequence[str]) -> list[str]:
    if not files:
        raise ConfigError("Choose a data file on the first screen first.")
    return list(files)


def _unless(more: Sequence[str], **values: str) -> list[str]:
    """Return flags that the field for further flags does not set."""
    there = _names(more)
    return _flags(**{name: value for name, value in values.items() if name not in there})


def _flags(**values: str) -> list[str]:
    """Return the flags that are set.

    Raises:
        ConfigError: a value is of the wrong kind or out of range.
    """
    for name, value in values.items():
        if value and name in KINDS and (problem := KINDS[name].problem(value)) is not None:
            raise ConfigError(f"{door.problem_text(place(name), value, problem)}.")
    return [word for name, value in values.items() if value for word in (f"--{name}", value)]
