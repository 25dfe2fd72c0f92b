"""The recipe of a row: every setting that decides which tokens and pixels it becomes. Opens no file, needs no torch.

`vlft.config.row_flags.RowFlags` holds the flags as the user set them. A `Recipe` has the same fields with every default
filled in, and the settings of the base's processor. It is built once, and code that compares rows compares recipes: the
cost cache by `Recipe.print`, vlft.json and the resume check by `Recipe.as_json`, chat by `Recipe.of_run`.
`Recipe.serve` writes it into the processor files next to the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any, Self

from vlft.config.fit import Fit, fit_of
from vlft.config.prints import print_of, tokenizer_print
from vlft.config.row_flags import RowFlags
from vlft.config.thinking import ENABLE, switches_of, template_arguments
from vlft.errors import ConfigError
from vlft.families import DEFAULT, Family, VideoRule, VideoTime

# The most tokens of a frame and the fewest frames of a video with a frame rate, in qwen-vl-utils 0.0.14.
FRAME_TOKENS, LEAST_FRAMES = 768, 4
# Frames per second of a list of frames, in qwen-vl-utils 0.0.14.
LIST_FPS = 2.0
# The defaults of qwen-vl-utils for settings that a processor lacks.
UNSAID = {"fps": 2.0, "video_max_frames": 768}
#: Setting -> the attribute of a stock processor that it is read from and written to.
SERVED = {
    "image_min_pixels": "image_processor.size.shortest_edge",
    "image_max_pixels": "image_processor.size.longest_edge",
    "video_min_pixels": "video_processor.size.shortest_edge",
    "video_max_pixels": "video_processor.size.longest_edge",
    "fps": "video_processor.fps",
    "nframes": "video_processor.num_frames",
    "video_max_frames": "video_processor.max_frames",
}
#: Settings that do not change the cost of a parsed row, so a change of them does not invalidate cached costs.
#: `missing_tags` and `columns` act while a row is parsed; `Recipe.fit` holds what --over_length does to a row.
COSTLESS = ("over_length", "missing_tags", "columns")


def _settled(name: str) -> Any:
    """Return the field of a flag in `Recipe`, where it always has a value."""
    return field(metadata=RowFlags.__dataclass_fields__[name].metadata)


@dataclass(frozen=True, kw_only=True)
class Recipe(RowFlags):
    """`RowFlags` with every default filled in, and all other settings that decide a row. Each run has and saves one.

    Attributes:
        image_min_pixels: least pixels of a still after resizing.
        image_max_pixels: most pixels of a still after resizing.
        video_min_pixels: least pixels after resizing: of a frame, or under the rule `processor` of all frames of a
            clip together. Under the other rule a list of frames is resized twice, as in qwen-vl-utils.
        video_max_pixels: most pixels after resizing, of a frame or a clip likewise. Under the rule of qwen-vl-utils
            frames of long videos get fewer (`limits.VIDEO_TOKENS` for all frames together).
        fps: frames per second, if `nframes` is None.
        nframes: frames of a video file of any length; None: `fps` decides.
        video_max_frames: most frames of a video file with `fps`.
        frames_fps: frames per second of a list of frames; None if the model does not use the time of frames.
        max_length: most tokens of a row.
        fit: the size that rows over the limit are made to fit; None: they are refused or skipped.
        columns: for each training file, the columns its rows are read by; "none" if rows are used unchanged.
        patch_size: side of a patch, in pixels.
        merge_size: side of a merged patch, in patches.
        temporal_patch_size: frames of a patch.
        video_rule: who chooses frames and their size (`Family.video_rule`).
        video_time: how the model knows the time of a video's steps (`Family.video_time`).
        tokens_per_second: positions of one second, if `video_time` is `seconds`.
        min_frames: fewest frames of a video file with `fps`, if it has as many.
        frame_tokens: most tokens of a frame; None: only the pixels of the clip are limited.
        chat_template: hash of the chat template; None without a tokenizer.
        tokenizer: hash of the tokenizer; None without a tokenizer, or if it is not a fast one.
        switches: arguments on thinking that the chat template takes.
    """

    image_min_pixels: int = _settled("image_min_pixels")
    image_max_pixels: int = _settled("image_max_pixels")
    video_min_pixels: int = _settled("video_min_pixels")
    video_max_pixels: int = _settled("video_max_pixels")
    fps: float = _settled("fps")
    video_max_frames: int = _settled("video_max_frames")
    max_length: int = _settled("max_length")
    fit: Fit | None = None
    columns: tuple[str, ...] = ()
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    video_rule: VideoRule = "qwen-vl-utils"
    video_time: VideoTime = "index"
    tokens_per_second: int | None = None
    min_frames: int = LEAST_FRAMES
    frame_tokens: int | None = FRAME_TOKENS
    chat_template: str | None = None
    tokenizer: str | None = None
    switches: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        processor: Any,
        flags: RowFlags | None = None,
        *,
        family: Family = DEFAULT,
        tokens_per_second: int | None = None,
        longest: int | None = None,
        pack: tuple[int, int] | None = None,
        columns: tuple[str, ...] = (),
    ) -> Self:
        """Build the recipe of a run from its flags. The base's processor has the values of flags that are None.

        Args:
            processor: the base's processor. Its tokenizer may be None if nothing is tokenised.
            flags: the flags of the user; None: all defaults.
            family: of the base.
            tokens_per_second: of the base (`VisionSizes`), for a family whose positions count seconds.
            longest: most tokens of a row that the model allows; None: no limit.
            pack: tokens and patches of a pack, which rows must also fit; None without packing.
            columns: for each training file, the columns its rows are read by.

        Raises:
            ConfigError: a flag contradicts another, has no effect, or exceeds what the model allows.
        """
        if family.video_time == "seconds" and tokens_per_second is None:
            raise ValueError(f"{family.label} needs tokens_per_second")
        flags = flags or RowFlags()
        if flags.nframes is None and flags.fps is None and (own := _read(processor, SERVED["nframes"])):
            flags = replace(flags, nframes=own)
        _check_frames(flags)
        values = {one.name: getattr(flags, one.name) for one in flags_of(cls)}
        for one in flags_of(cls):
            if values[one.name] is None and one.name in SERVED and one.name != "nframes":
                own = _read(processor, SERVED[one.name])
                values[one.name] = own or UNSAID.get(one.name, own)
        if family.video_time != "index":
            values["frames_fps"] = flags.frames_fps or LIST_FPS
        elif flags.frames_fps is not None:
            raise ConfigError(
                f"--frames_fps {flags.frames_fps:g} has no effect: {family.label} does not use the time of frames. "
                "Drop it, or set --model_id to a model that does."
            )
        limit = sys.maxsize if longest is None else longest
        length = values["max_length"] = limit if flags.max_length is None else flags.max_length
        if not 0 < length <= limit:
            raise ConfigError(f"--max_length is {length:,}; the model's max_position_embeddings allow 1 to {limit:,}")
        image, tokenizer = processor.image_processor, processor.tokenizer
        template = None if tokenizer is None else processor.chat_template or tokenizer.chat_template
        recipe = cls(
            **values,
            pairs=flags.pairs,
            fit=fit_of(flags.over_length, length, pack),
            columns=columns,
            patch_size=image.patch_size,
            merge_size=image.merge_size,
            temporal_patch_size=image.temporal_patch_size,
            video_rule=family.video_rule,
            video_time=family.video_time,
            tokens_per_second=tokens_per_second,
            **(_own_limits(processor.video_processor) if family.video_rule == "processor" else {}),
            chat_template=None if tokenizer is None else print_of(template),
            tokenizer=None if tokenizer is None else tokenizer_print(tokenizer),
            switches=switches_of(template),
        )
        if flags.thinking != "auto" and tokenizer is not None and ENABLE not in recipe.switches:
            raise ConfigError(
                f"--thinking {flags.thinking}: the base's chat template does not take {ENABLE}, so the flag has no "
                "effect. Drop it."
            )
        _check_pixels(recipe, given=flags.video_max_pixels, processor=processor)
        sizes = (recipe.merge_size, recipe.temporal_patch_size)
        if sizes != (2, 2):
            raise ConfigError(f"the processor's merge and temporal patch sizes are {sizes}; vlft supports (2, 2) only.")
        return recipe

    @classmethod
    def of_run(
        cls,
        processor: Any,
        saved: Mapping[str, Any],
        *,
        family: Family = DEFAULT,
        tokens_per_second: int | None = None,
    ) -> Self:
        """Build the recipe of a run from its record.

        Args:
            processor: the processor that was saved with its weights.
            saved: the result of `as_json` of that run. Flags that an older version lacks get their defaults.
            family: of the model.
            tokens_per_second: of the model, as for `of`.

        Raises:
            ConfigError: vlft does not support the processor's settings.
        """
        known = {one.name: saved[one.name] for one in flags_of(cls) if one.name in saved}
        return replace(cls.of(processor, family=family, tokens_per_second=tokens_per_second), **known)

    @property
    def factor(self) -> int:
        """Side of a merged patch, in pixels. Heights and widths are multiples of it."""
        return self.patch_size * self.merge_size

    def template_arguments(self, thinking: bool | None) -> dict[str, bool]:
        """Return the arguments of the chat template.

        Args:
            thinking: whether the model thinks before its next answer; None: the template's default.
        """
        return template_arguments(self.switches, self.turns, thinking)

    @property
    def print(self) -> str:
        """Short hash of all settings that decide what a parsed row becomes, and so what it costs."""
        return print_of([(name, value) for name, value in self.as_json().items() if name not in COSTLESS])

    @property
    def _capped(self) -> bool:
        """Whether a stock processor divides a limit among the frames of a video, as `cap_pixels_per_frame`."""
        if self.video_rule == "processor":
            return self.frame_tokens is not None
        return shares_pixels(self.video_min_pixels, self.video_max_pixels)

    def as_json(self) -> dict[str, Any]:
        """Return every field as JSON would load it (lists for tuples)."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def serve(self, processor: Any) -> None:
        """Write the settings that a stock processor supports into `processor`, which is saved with the weights."""
        found: dict[tuple[str, str], Any] = {}
        for name, served in SERVED.items():
            part, attribute, *key = served.split(".")
            # A processor samples frames by their rate or by their number, not by both.
            value = None if name == "fps" and self.nframes is not None else getattr(self, name)
            if key:
                found.setdefault((part, attribute), {})[key[0]] = value
            else:
                found[part, attribute] = value
        # Said in full: without it transformers 5.23 applies no limit per frame, and a later version is to apply it.
        found["video_processor", "cap_pixels_per_frame"] = self._capped
        if self.video_rule == "processor":
            found["video_processor", "do_sample_frames"] = True
        else:
            # Frames are not sampled by default, as in the base: clients hand over frames that they have sampled.
            low, high = self.video_min_pixels, self.video_max_pixels
            found["video_processor", "size"]["longest_edge"] = frame_limit(low, high, side=self.factor)
        for (part, attribute), value in found.items():
            setattr(getattr(processor, part), attribute, value)


def unserve(processor: Any, saved: Mapping[str, Any], family: Family) -> None:
    """Write back the limit of videos with which a run was trained, where `Recipe.serve` wrote that of a frame.

    Both are the same to clips. Lists of frames are resized by the first, and other `--video_min_pixels` allow more.

    Args:
        processor: that was saved with the weights of the run.
        saved: the settings of that run.
        family: of the model.
    """
    video, image = processor.video_processor, processor.image_processor
    low, high = saved["video_min_pixels"], saved["video_max_pixels"]
    side = image.patch_size * image.merge_size
    if family.video_rule == "qwen-vl-utils" and video.size["longest_edge"] == frame_limit(low, high, side=side):
        video.size = {"shortest_edge": video.size["shortest_edge"], "longest_edge": high}


def frame_limit(low: int, high: int, *, side: int) -> int:
    """Return the most pixels that a frame of a short video gets under the rule of qwen-vl-utils.

    It is below `high` where that is more than `FRAME_TOKENS` tokens, as in the published files of Qwen2-VL.

    Args:
        low: `video_min_pixels`.
        high: `video_max_pixels`.
        side: of a merged patch, in pixels.
    """
    return min(high, max(FRAME_TOKENS * side**2, int(low * 1.05)))


def shares_pixels(low: int, high: int) -> bool:
    """Whether frames of a long video get fewer pixels than `high` under the rule of qwen-vl-utils.

    Their share is at least 1.05 times `low`. Transformers lets it exceed a `high` below that; qwen-vl-utils does not.
    """
    return high >= int(low * 1.05)


def flags_of(record: type[RowFlags]) -> list[Field[Any]]:
    """Return the fields of `RowFlags` or `Recipe` that are flags."""
    return [one for one in fields(record) if "help" in one.metadata]


def _read(processor: Any, served: str) -> Any:
    part, attribute, *key = served.split(".")
    value = getattr(getattr(processor, part), attribute)
    return value[key[0]] if key else value


def _own_limits(video: Any) -> dict[str, Any]:
    """Return the limits of a processor that chooses frames itself; without a cap it limits pixels per clip only."""
    capped = getattr(video, "cap_pixels_per_frame", None)
    tokens = getattr(video, "max_video_tokens", None) or FRAME_TOKENS
    return {"min_frames": getattr(video, "min_frames", LEAST_FRAMES), "frame_tokens": tokens if capped else None}


def _check_frames(flags: RowFlags) -> None:
    fps, nframes, most = flags.fps, flags.nframes, flags.video_max_frames
    if fps is not None and nframes is not None:
        raise ConfigError(f"--fps {fps} and --nframes {nframes} both set how many frames a video gets. Keep one.")
    if fps is not None and fps <= 0:
        raise ConfigError(f"--fps {fps}: takes no frame. Use a number above 0.")
    if flags.frames_fps is not None and flags.frames_fps <= 0:
        raise ConfigError(f"--frames_fps {flags.frames_fps}: no time would pass. Use a number above 0.")
    for name, frames in (("--nframes", nframes), ("--video_max_frames", most)):
        if frames is not None and (frames < 2 or frames % 2):
            raise ConfigError(f"{name} {frames}: frames go in pairs. Use an even number, 2 or more.")
    if nframes is not None and most is not None and nframes > most:
        raise ConfigError(f"--nframes {nframes} is above --video_max_frames {most}. Change one of them.")


def _check_pixels(recipe: Recipe, *, given: int | None, processor: Any) -> None:
    side = recipe.factor
    for kind in ("image", "video"):
        low, high = getattr(recipe, f"{kind}_min_pixels"), getattr(recipe, f"{kind}_max_pixels")
        if low < 1:
            raise ConfigError(
                f"--{kind}_min_pixels {low}: a picture has at least 1 pixel. Use, for example, {4 * side * side}."
            )
        if low > high:
            raise ConfigError(f"--{kind}_min_pixels {low} is above --{kind}_max_pixels {high}. Change one of them.")
        if high < side**2:
            raise ConfigError(f"--{kind}_max_pixels {high} is less than one token ({side}x{side} pixels). Use more.")
    if recipe.video_rule == "processor":
        return
    most = max(FRAME_TOKENS * side**2, int(recipe.video_min_pixels * 1.05))
    if given is not None and given > most and given != processor.video_processor.size["longest_edge"]:
        raise ConfigError(
            f"--video_max_pixels {given}: no frame gets more than {most} pixels, as in qwen-vl-utils. Use {most} or "
            "less."
        )
