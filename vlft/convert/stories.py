"""Convert a row of StoryReasoning to a LLaVA row and its pictures. Opens no file.

The set (daniel3303/StoryReasoning on the Hugging Face hub) has one story per row: its pictures, a chain of thought
that lists who and what is in each picture, and the story itself, with tags such as `<gdi image1>` that link its parts
to the pictures. The converted rows have the form that the authors of the set train on: a constant system prompt, one
of ten user prompts (one of them empty) with all pictures, then the thought between `<think>` and `</think>`, and the
story. We wrote the prompts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from vlft.data.rows.embedded import ending_of
from vlft.data.rows.media_refs import FRAME_ENDINGS

COLUMNS = ("story_id", "images", "frame_count", "chain_of_thought", "story")
SPLITS = ("train", "test")

SYSTEM = (
    "You tell stories about sequences of pictures. First think, between <think> and </think>: go through the pictures "
    "one by one and note in tables who and what is in each, where it stands and what it is for, and how one picture "
    "leads to the next. Then tell the story. Wrap what you say about a picture in <gdi image1> and </gdi>, the names "
    "of characters and objects in <gdo char1> and </gdo>, what they do in <gda char1> and </gda>, and places in "
    "<gdl lm1> and </gdl>, with the numbers of your notes."
)
PROMPTS = (
    "Tell the story of these pictures.",
    "What happens from the first of these pictures to the last? Write it as a story.",
    "Here are some pictures in order. Think about who and what they show, then write a story.",
    "Write a short story that goes with this sequence of pictures.",
    "Look at the pictures one after the other and make a story of them.",
    "These pictures belong together. Find out how, and tell it.",
    "Turn this sequence into a story, and keep track of who is who.",
    "Who is in these pictures, and what becomes of them? Tell their story.",
    "Please write a story in which every one of these pictures has its place.",
    "",
)


class BadStory(Exception):
    """A row that cannot be imported; the message says which column, why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """A checked row.

    Attributes:
        id: its `story_id`.
        pictures: the bytes of each picture file, unchanged.
        endings: the file ending of each picture, from its first bytes.
        question: the user prompt, without picture tags.
        answer: the text that is trained.
    """

    id: str
    pictures: tuple[bytes, ...]
    endings: tuple[str, ...]
    question: str
    answer: str

    def record(self, paths: list[str]) -> dict[str, Any]:
        """Return the row of the data file; `paths` are the paths of the pictures, in order."""
        return {
            "id": self.id,
            "image": paths,
            "conversations": [
                {"from": "system", "value": SYSTEM},
                {"from": "human", "value": "\n".join([self.question, *["<image>"] * len(paths)])},
                {"from": "gpt", "value": self.answer},
            ],
        }


def story_of(row: dict[str, Any]) -> Story:
    """Check a row of the set.

    Args:
        row: column -> value, as read from parquet.

    Raises:
        BadStory: a value is missing or has the wrong type, or `frame_count` is not the number of pictures.
    """
    name, thought, told = (_text(row, column) for column in ("story_id", "chain_of_thought", "story"))
    images, frames = row["images"], row["frame_count"]
    if not isinstance(images, list) or not images:
        raise BadStory("images: no pictures. Download the file again, or leave the row out")
    if frames != len(images):
        raise BadStory(f"frame_count is {frames}, images holds {len(images)}. Download the file again")
    pictures = tuple(_bytes(image, i) for i, image in enumerate(images))
    return Story(
        id=name,
        pictures=pictures,
        endings=tuple(_ending(picture, i) for i, picture in enumerate(pictures)),
        question=prompt_for(name),
        answer=f"<think>\n{thought}\n</think>\n{told}",
    )


def prompt_for(story_id: str) -> str:
    """Return one of `PROMPTS`, always the same for a story."""
    return PROMPTS[int.from_bytes(hashlib.sha256(story_id.encode()).digest()[:8]) % len(PROMPTS)]


def _text(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise BadStory(f"{column}: is {kind}, where text belongs. Leave the row out")
    if not value.strip():
        raise BadStory(f"{column}: is {'blank' if value else 'empty'}. Leave the row out")
    return value


def _bytes(image: Any, i: int) -> bytes:
    """Return the bytes of a picture file. Hugging Face stores `{"bytes": ..., "path": ...}`."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(data, bytes) and data:
        return data
    named = f", only the path {image['path']!r}" if isinstance(image, dict) and image.get("path") else ""
    raise BadStory(f"images[{i}]: holds no bytes of a picture{named}. Download the set with its pictures embedded")


def _ending(picture: bytes, i: int) -> str:
    ending = ending_of(picture[:16])
    if ending in FRAME_ENDINGS or ending == ".gif":
        return ending
    raise BadStory(
        f"images[{i}]: starts with {picture[:8].hex(' ')}, which is no known picture format. Leave the row out"
    )
