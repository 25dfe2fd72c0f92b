"""Append a conversation to a data file, as a row that `vlft train` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from vlft.data.sample import Image, Text, Turn, Video
from vlft.errors import ConfigError

ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


def row_of(turns: Sequence[Turn]) -> dict[str, object]:
    """Return a conversation as a row: `conversations`, and `image` and `video` with absolute paths."""
    paths: dict[str, list[str]] = {"image": [], "video": []}
    said = []
    for turn in turns:
        text = ""
        for part in turn.parts:
            if isinstance(part, Text):
                text += part.text
            else:
                kind = "image" if isinstance(part, Image) else "video"
                text += f"<{kind}>"
                paths[kind].append(os.path.abspath(str(part.path)))
        said.append({"from": ROLES[turn.role], "value": text})
    return {"conversations": said, **{kind: found for kind, found in paths.items() if found}}


def append_row(path: str, turns: Sequence[Turn]) -> None:
    """Append a conversation to a .jsonl file, which is created if it does not exist.

    Raises:
        ConfigError: the name does not end in .jsonl, or the file cannot be written.
    """
    if Path(path).suffix != ".jsonl":
        raise ConfigError(f"/save {path}: the conversation is a row of a .jsonl file. End the name in .jsonl.")
    try:
        with open(path, "a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")  # the last line has no end
            file.write(json.dumps(row_of(turns), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
    except OSError as error:
        raise ConfigError(f"/save {path}: cannot be written ({error.strerror}). Use another file.") from error


def media_of(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    """Return kind and path of the pictures and videos of a conversation, in order."""
    parts = [part for turn in turns for part in turn.parts if not isinstance(part, Text)]
    return [("video" if isinstance(part, Video) else "image", str(part.path)) for part in parts]
