"""Pixel limits of videos: other kits limit each frame of every model, vlft a whole clip where the model does so."""

from __future__ import annotations

from vlft.config.named_base import counted_like

#: Frames of a video if nothing limits them: the default of --video_max_frames.
FRAMES = 768


def as_limits_of_clips(flags: dict[str, tuple[str, ...]]) -> list[str]:
    """Change limits of a frame into limits of a clip, in place, if the base of these flags limits clips.

    Args:
        flags: name -> words.

    Returns:
        what was changed, for the user.
    """
    if counted_like("".join(flags.get("model_id", ()))).video_rule != "processor":
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
