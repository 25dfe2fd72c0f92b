"""The page's own words: which flag is which field, and messages of the commands in the names of the fields.

A command says `--image_folder`; the page has a field of another name on its first step. This is the only place that
knows both.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from html import escape, unescape

#: Flag -> (label of its field, step). Screens take their labels from here.
FIELDS = {
    "data_path": ("Data files to train on", 1),
    "eval_path": ("Data files to evaluate on (optional)", 1),
    "image_folder": ("Folder of the pictures", 1),
    "model_id": ("Base model", 1),
    "headers_only": ("Read only the headers of pictures and videos (fast)", 2),
    "fix": ("File for these rows", 2),
    "split": ("Divide them (optional)", 2),
    "dedup": ("Leave out rows that repeat an earlier row", 2),
    "index": ("Rows of the first data file, from 0", 3),
    "vision": ("Vision tower", 4),
    "merger": ("Merger", 4),
    "language": ("Language model", 4),
    "lora_rank": ("LoRA rank", 4),
    "learning_rate": ("Learning rate", 4),
    "vision_lr": ("Vision learning rate", 4),
    "num_train_epochs": ("Epochs", 4),
    "global_batch": ("Rows per step", 4),
    "save_steps": ("Save every", 4),
    "gpu": ("GPU to plan for", 4),
    "gpus": ("Number of GPUs", 4),
    "output_dir": ("Folder of the run", 5),
}
#: Field of the sixth screen. The command that reads its row says `--index`, as that of the third screen.
ROW = ("Row, from 0", 6)
MORE = "More flags of vlft train (optional)"
#: Flags that the page sets itself.
OWN = ("json", "html", "report", "help")
_QUOTED = r"'(?:[^']|'\"'\"')*'"
_FLAG = re.compile(rf"(?P<verb>\b[Pp]ass |\b[Uu]se )?--(?P<name>[a-z_]+)\b(?: (?P<value>{_QUOTED}|[^\s'.,;:()]\S*))?")
_COMMAND = re.compile(r"(\bvlft [a-z-]+(?: (?:[^\n.;]|[.;](?!\s|$))*)?)")  # to the end of its sentence
_TEXT = re.compile(r'<(?:script|style|p class="words").*?</|(?<=>)(?P<text>[^<>]*--[^<]*)(?=<)', re.DOTALL)
_FOLDER = re.compile(rf"[Pp]ass --image_folder ({_QUOTED}|\S+)")


def label(flag: str) -> str:
    """Return the label of the field of a flag."""
    return FIELDS[flag][0]


def place(flag: str) -> str:
    """Return where the field of a flag is: `"Epochs" (step 4)`."""
    name, step = FIELDS[flag]
    return f'"{name.removesuffix(" (optional)")}" (step {step})'


def spoken(text: str) -> str:
    """Return a message of a command with the names of fields in place of flags.

    `pass --image_folder pics` becomes `set "Folder of the pictures" (step 1) to pics`. Flags without a field stay, and
    so do command lines.
    """

    def said(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"] or ""
        if name not in FIELDS:
            return found[0]
        after = f" {value}" if value else ""
        if not found["verb"] or not value:
            return f"{found['verb'] or ''}{place(name)}{after}"
        verb = "Set" if found["verb"][0].isupper() else "set"
        shown = _absolute(value) if name == "image_folder" else value
        return f"{verb} {place(name)} to {shown}"

    parts = _COMMAND.split(text)  # prose, command line, prose, ...
    return "".join(part if i % 2 else _FLAG.sub(said, part) for i, part in enumerate(parts))


def spoken_page(html: str) -> str:
    """Return the page of a check with its messages as `spoken`. The words of the rows stay as they are."""

    def said(found: re.Match[str]) -> str:
        text = found["text"]
        return found[0] if text is None else escape(spoken(unescape(text)), quote=False)

    return _TEXT.sub(said, html)


def folders_named(texts: Sequence[str]) -> list[str]:
    """Return the folders that messages advise to pass as `--image_folder`, the most frequent one first."""
    counts: dict[str, int] = {}
    for text in texts:
        for value in _FOLDER.findall(text):
            folder = _absolute(value)
            counts[folder] = counts.get(folder, 0) + 1
    return sorted(counts, key=lambda one: -counts[one])


def _absolute(value: str) -> str:
    """Return a quoted path of a message as an absolute one. Commands run where the page was started."""
    try:
        return os.path.abspath(" ".join(shlex.split(value)))
    except ValueError:
        return value
