"""Flags that decide what a row becomes, as the user set them. `vlft.config.recipe` fills in their defaults.

`vlft.config.flags.DataFlags` inherits them. To add one: add a field to `RowFlags`, a line to `vlft.config.table`, and
the code that uses it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vlft.config.fit import OverLength
from vlft.config.thinking import Thinking, Turns

BoxFormat = Literal["as_is", "pixels", "0-1000", "0-1"]
MissingTags = Literal["error", "first"]


def flag(default: Any, text: str) -> Any:
    """Return a dataclass field for a flag.

    Args:
        default: the flag's default.
        text: its help text.
    """
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class RowFlags:
    """Flags that decide what a row becomes. `vlft.config.flags.DataFlags` inherits them. None: the base's value."""

    image_min_pixels: int | None = flag(None, "least pixels of a picture (default: the base processor's)")
    image_max_pixels: int | None = flag(None, "most pixels of a picture (default: the base processor's)")
    video_min_pixels: int | None = flag(
        None, "least pixels of a video frame; of a whole video for Qwen3-VL and later (default: the base processor's)"
    )
    video_max_pixels: int | None = flag(
        None, "most pixels of a video frame; of a whole video for Qwen3-VL and later (default: the base processor's)"
    )
    fps: float | None = flag(None, "video frames per second (default: the base processor's, else 2)")
    nframes: int | None = flag(
        None, "frames of every video, an even number; instead of --fps (default: the base processor's)"
    )
    video_max_frames: int | None = flag(None, "most frames of a video with --fps (default: 768)")
    frames_fps: float | None = flag(
        None,
        "frames per second of videos that are lists of frames, for models that use the time of a frame (default: 2)",
    )
    max_length: int | None = flag(
        None,
        "most tokens of a row; --over_length decides about longer rows (default: the model's max_position_embeddings)",
    )
    over_length: OverLength = flag(
        "error",
        "a row over --max_length or too large for a pack. error: refuse it; skip: skip it; shrink: lower its pixels "
        "until it fits; drop_media: drop its last pictures and videos",
    )
    box_format: BoxFormat = flag(
        "as_is",
        "unit of the boxes in the text: pixels of the original picture, or fractions of its size (0-1000, 0-1). They "
        "are converted to the unit that the model expects; as_is: not converted",
    )
    missing_tags: MissingTags = flag(
        "error",
        "a row whose pictures or videos have no tag in its text. error: refuse it; first: put all of them at the start "
        "of its first human turn",
    )
    thinking: Thinking = flag(
        "auto",
        "for bases whose chat template takes enable_thinking. on: answers have <think> blocks, which are trained; off: "
        "answers have none, and the prompt ends with an empty block; auto: as each answer shows",
    )
    turns: Turns = flag(
        "auto",
        "rows with several answers. auto: one sample, or one for each answer if the chat template drops earlier "
        "thoughts; split: one for each answer; last: only the last answer is trained",
    )
    #: Whether rows are read as preference rows. Not a flag of its own: `--method` decides.
    pairs: bool = False
