"""Pixel and frame limits of one picture or video: the run's recipe, and the overrides of its row. Opens no file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlft.config.recipe import FRAME_TOKENS, Recipe
from vlft.data.media.sizes import clip_count, clip_size
from vlft.data.sample import Overrides
from vlft.errors import ConfigError
from vlft.text import counted

FEW_TOKENS = 16  # for two frames: 128 x 128 pixels with patches of 16
EXAMPLE = (10, 720, 1280)  # seconds, height and width of the video in `remark_on_limit`
VIDEO_TOKENS = 128000  # shared by all frames of a video; qwen-vl-utils 0.0.14


def overridden(recipe: Recipe, own: Overrides, *, video: bool) -> Recipe:
    """Return the run's recipe for one picture or video, with the overrides of its row.

    Raises:
        ConfigError: the row's values contradict each other or those of the run.
    """
    if own == Overrides():
        return recipe
    kind = "video" if video else "image"
    low, high = (getattr(recipe, f"{kind}_{name}_pixels") for name in ("min", "max"))
    least, most = _or(own.min_pixels, low), _or(own.max_pixels, high)
    if least > most:
        names = [
            f"min_pixels {least}" if own.min_pixels is not None else f"--{kind}_min_pixels {least}",
            f"max_pixels {most}" if own.max_pixels is not None else f"--{kind}_max_pixels {most}",
        ]
        raise ConfigError(f"{names[0]} is above {names[1]}. Change one of them, or set both in the row")
    if most < recipe.factor**2:
        raise ConfigError(f"max_pixels {most} is less than one token ({recipe.factor}x{recipe.factor} pixels)")
    frame = max(FRAME_TOKENS * recipe.factor**2, int(least * 1.05))
    if video and recipe.video_rule == "qwen-vl-utils" and own.max_pixels is not None and most > frame:
        raise ConfigError(f"max_pixels {most}: no frame gets more than {frame} pixels. Use {frame} or less")
    values: dict[str, Any] = {f"{kind}_min_pixels": least, f"{kind}_max_pixels": most}
    if own.nframes is not None or own.fps is not None:
        values |= {"nframes": own.nframes, "fps": _or(own.fps, recipe.fps)}
    if own.max_frames is not None:
        if values.get("nframes", recipe.nframes) is not None:
            raise ConfigError(f"max_frames {own.max_frames} has no effect with --nframes {recipe.nframes}. Remove one")
        values["video_max_frames"] = own.max_frames
    return replace(recipe, **values)


def remark_on_limit(recipe: Recipe, *, label: str) -> str | None:
    """Return a remark on a limit for whole videos that leaves a frame hardly any pixels; else None.

    Limits of Qwen2-VL are for one frame. With such a number, frames of later models become unreadable.

    Args:
        recipe: of the run.
        label: name of the family.
    """
    if recipe.video_rule != "processor":
        return None
    seconds, height, width = EXAMPLE
    limits = {"least": recipe.min_frames, "most": recipe.video_max_frames}
    frames = recipe.nframes or clip_count(seconds * 1000, 1000, fps=recipe.fps, **limits)
    low, high = recipe.video_min_pixels, recipe.video_max_pixels
    size = {"factor": recipe.factor, "low": low, "high": high}
    new_height, new_width = clip_size(frames, height, width, **size, frame_tokens=recipe.frame_tokens)
    tokens = new_height * new_width // recipe.factor**2
    if tokens >= FEW_TOKENS:
        return None
    seen = f"{frames} frames of {new_width}x{new_height} pixels ({counted(tokens, 'token')} for two frames)"
    return (
        f"--video_max_pixels {high}: {label} divides it among all frames of a video, so of {seconds} seconds of "
        f"{width}x{height} it sees {seen}. If {high} is meant for one frame, as for Qwen2-VL, use "
        f"{high * frames} ({high} x {frames} frames), or drop the flag."
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
