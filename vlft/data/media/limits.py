"""Pixel and frame limits of one picture or video: the run's recipe, and the overrides of its row. Opens no file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlft.config.recipe import FRAME_TOKENS, Recipe
from vlft.data.sample import Overrides
from vlft.errors import ConfigError

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


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
