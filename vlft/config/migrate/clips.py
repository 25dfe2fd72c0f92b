"""Pixel limits of videos: other kits limit each frame of every model, vlft a whole clip where the model does so."""

from __future__ import annotations

import re
from pathlib import Path

from vlft.families import FAMILIES
from vlft.model_files import read_json

#: Frames of a video if nothing limits them: the default of --video_max_frames.
FRAMES = 768
#: Name of a model whose config.json is not on this machine, and that limits clips.
_NAMED = re.compile(r"qwen-?3", re.IGNORECASE)


def limits_clips(model: str) -> bool:
    """Whether a base limits the pixels of a whole clip: by its config.json, or by its name if there is none here.

    Args:
        model: folder or hub id.
    """
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        return _NAMED.search(model) is not None
    family = FAMILIES.get(str(read_json(file).get("model_type")))
    return family is not None and family.video_rule == "processor"


def as_limits_of_clips(flags: dict[str, tuple[str, ...]]) -> list[str]:
    """Change limits of a frame into limits of a clip, in place, if the base of these flags limits clips.

    Args:
        flags: name -> words.

    Returns:
        what was changed, for the user.
    """
    if not limits_clips("".join(flags.get("model_id", ()))):
        return []
    notes = []
    if (least := flags.pop("video_min_pixels", None)) is not None:
        notes.append(f"video_min_pixels {least[0]} is left out: this model limits a whole clip, and has its own limit")
    most = flags.get("video_max_pixels", ("",))[0]
    if most.isdigit():
        word = flags.get("nframes", flags.get("video_max_frames", (str(FRAMES),)))[0]
        frames = int(word) if word.isdigit() else FRAMES
        flags["video_max_pixels"] = (str(int(most) * frames),)
        notes.append(
            f"video_max_pixels: this model limits a whole clip. {most} pixels of a frame become those of {frames}"
        )
    return notes
