"""Pixel and frame budgets: what the flags ask, laid over what the base processor says. Opens nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vlft.data.sample import Overrides
from vlft.errors import ConfigError

# qwen-vl-utils 0.0.14: no frame takes more than 768 tokens, and all frames of a video share this many.
FRAME_TOKENS = 768
VIDEO_TOKENS = 128000
DEFAULT_FPS = 2.0
DEFAULT_MAX_FRAMES = 768


@dataclass(frozen=True, kw_only=True)
class MediaSettings:
    """How media become patches; one for a whole run, saved with it.

    Attributes:
        image_min_pixels, image_max_pixels: of a still after resizing.
        video_min_pixels, video_max_pixels: of one frame after resizing. A list of frames is resized by them twice, as
            qwen-vl-utils does; and frames of long videos get less than the maximum (`VIDEO_TOKENS` for all of them).
        fps: frames taken a second, where `nframes` is None.
        nframes: frames taken of a video file, whatever its length.
        video_max_frames: the most that `fps` takes of a video file.
        patch_size: pixels of a patch's side. merge_size: patches of a merged patch's side. temporal_patch_size: frames
            of a patch.
    """

    image_min_pixels: int
    image_max_pixels: int
    video_min_pixels: int
    video_max_pixels: int
    fps: float
    nframes: int | None
    video_max_frames: int
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2

    @property
    def factor(self) -> int:
        """Pixels of a merged patch's side: heights and widths are multiples of it."""
        return self.patch_size * self.merge_size


def media_settings(
    processor: Any,
    *,
    image_min_pixels: int | None = None,
    image_max_pixels: int | None = None,
    video_min_pixels: int | None = None,
    video_max_pixels: int | None = None,
    fps: float | None = None,
    nframes: int | None = None,
    video_max_frames: int | None = None,
) -> MediaSettings:
    """The settings of a run: what the flags say, and for None what the base processor says.

    Args:
        processor: of the base model. Where it is silent on fps and most frames: 2.0 and 768, as qwen-vl-utils.

    Raises:
        ConfigError: a flag that contradicts another, or that could not act.
    """
    image, video = processor.image_processor, processor.video_processor
    if fps is not None and nframes is not None:
        raise ConfigError(f"--fps {fps} and --nframes {nframes} both say how many frames a video gets. Give one.")
    if fps is not None and fps <= 0:
        raise ConfigError(f"--fps {fps}: takes no frame. Give a number above 0.")
    for flag, frames in (("--nframes", nframes), ("--video_max_frames", video_max_frames)):
        if frames is not None and (frames < 2 or frames % 2):
            raise ConfigError(f"--{flag[2:]} {frames}: frames go in pairs. Give an even number, 2 or more.")
    if nframes is not None and video_max_frames is not None and nframes > video_max_frames:
        raise ConfigError(f"--nframes {nframes} is above --video_max_frames {video_max_frames}. Change one of them.")
    settings = MediaSettings(
        image_min_pixels=_or(image_min_pixels, image.size["shortest_edge"]),
        image_max_pixels=_or(image_max_pixels, image.size["longest_edge"]),
        video_min_pixels=_or(video_min_pixels, video.size["shortest_edge"]),
        video_max_pixels=_or(video_max_pixels, video.size["longest_edge"]),
        fps=_or(fps, video.fps or DEFAULT_FPS),
        nframes=nframes,
        video_max_frames=_or(video_max_frames, video.max_frames or DEFAULT_MAX_FRAMES),
        patch_size=image.patch_size,
        merge_size=image.merge_size,
        temporal_patch_size=image.temporal_patch_size,
    )
    _check_pixels(settings, given=video_max_pixels, base=video.size["longest_edge"])
    sizes = (settings.merge_size, settings.temporal_patch_size)
    if sizes != (2, 2):
        raise ConfigError(f"the processor's merge and temporal patch sizes are {sizes}; vlft trains (2, 2) only.")
    return settings


def overridden(settings: MediaSettings, own: Overrides, *, video: bool) -> MediaSettings:
    """The run's settings for one picture or video whose row says more of them.

    Raises:
        ConfigError: what the row says cannot be, beside what it leaves to the run; as for flags.
    """
    if own == Overrides():
        return settings
    kind = "video" if video else "image"
    low, high = (getattr(settings, f"{kind}_{name}_pixels") for name in ("min", "max"))
    least, most = _or(own.min_pixels, low), _or(own.max_pixels, high)
    if least > most:
        names = [
            f"min_pixels {least}" if own.min_pixels is not None else f"--{kind}_min_pixels {least}",
            f"max_pixels {most}" if own.max_pixels is not None else f"--{kind}_max_pixels {most}",
        ]
        raise ConfigError(f"{names[0]} is above {names[1]}. Change one of them, or give both in the row")
    if most < settings.factor**2:
        raise ConfigError(f"max_pixels {most} is less than one token ({settings.factor}x{settings.factor} pixels)")
    frame = max(FRAME_TOKENS * settings.factor**2, int(least * 1.05))
    if video and own.max_pixels is not None and most > frame:
        raise ConfigError(f"max_pixels {most}: no frame gets more than {frame} pixels. Give {frame} or less")
    values: dict[str, Any] = {f"{kind}_min_pixels": least, f"{kind}_max_pixels": most}
    if own.nframes is not None or own.fps is not None:
        values |= {"nframes": own.nframes, "fps": _or(own.fps, settings.fps)}
    if own.max_frames is not None:
        if values.get("nframes", settings.nframes) is not None:
            raise ConfigError(f"max_frames {own.max_frames} cannot act beside --nframes {settings.nframes}. Drop one")
        values["video_max_frames"] = own.max_frames
    return replace(settings, **values)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_pixels(settings: MediaSettings, *, given: int | None, base: int) -> None:
    for kind in ("image", "video"):
        low, high = getattr(settings, f"{kind}_min_pixels"), getattr(settings, f"{kind}_max_pixels")
        if low < 1:
            raise ConfigError(
                f"--{kind}_min_pixels {low}: a picture has at least 1 pixel. "
                f"Give 4 * {settings.factor} * {settings.factor}, say."
            )
        if low > high:
            raise ConfigError(f"--{kind}_min_pixels {low} is above --{kind}_max_pixels {high}. Change one of them.")
        if high < settings.factor**2:
            raise ConfigError(
                f"--{kind}_max_pixels {high} is less than one token ({settings.factor}x{settings.factor} pixels). "
                "Give more."
            )
    most = max(FRAME_TOKENS * settings.factor**2, int(settings.video_min_pixels * 1.05))
    if given is not None and given > most and given != base:
        raise ConfigError(
            f"--video_max_pixels {given}: no frame gets more than {most} pixels, here as in qwen-vl-utils. "
            f"Give {most} or less."
        )
