"""The recipe of a row: every setting that decides which tokens and pixels it becomes. Opens nothing, needs no torch.

`RowFlags` are the flags among them, as the user gave them. A `Recipe` has the same fields with every default filled in,
and what the base's processor adds. It is made once, and everything that asks "are these the same rows?" compares
recipes: the cache of costs by `Recipe.print`, vlft.json and the resume check by `Recipe.as_json`, chat by
`Recipe.of_run`; `Recipe.serve` writes it into the processor files that lie beside the weights.

A new flag that decides rows is one field of `RowFlags`, one line in `vlft.config.table`, and the place where it acts.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self

from vlft.errors import ConfigError

BoxFormat = Literal["as_is", "pixels", "0-1000", "0-1"]
MissingTags = Literal["error", "first"]
OverLength = Literal["error", "skip", "shrink", "drop_media"]

# qwen-vl-utils 0.0.14: no frame takes more tokens.
FRAME_TOKENS = 768
# What qwen-vl-utils takes where the processor says nothing.
UNSAID = {"fps": 2.0, "video_max_frames": 768}
#: Where a stock processor keeps a setting, so that it is read there and served from there.
SERVED = {
    "image_min_pixels": "image_processor.size.shortest_edge",
    "image_max_pixels": "image_processor.size.longest_edge",
    "video_min_pixels": "video_processor.size.shortest_edge",
    "video_max_pixels": "video_processor.size.longest_edge",
    "fps": "video_processor.fps",
    "nframes": "video_processor.num_frames",
    "video_max_frames": "video_processor.max_frames",
}
#: What the cost of a parsed row does not depend on, so that costs are not measured again for it: a parsed row has its
#: tags, and has been read by its columns; and what --over_length does to a row is `Recipe.fit`.
COSTLESS = ("over_length", "missing_tags", "columns")


def flag(default: Any, text: str) -> Any:
    """A field that is a flag, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class RowFlags:
    """Flags that decide what a row becomes; `vlft.config.flags.DataFlags` has them all. None: the base's own value."""

    image_min_pixels: int | None = flag(None, "smallest picture, in pixels (default: the base processor's)")
    image_max_pixels: int | None = flag(None, "largest picture, in pixels (default: the base processor's)")
    video_min_pixels: int | None = flag(None, "smallest video frame, in pixels (default: the base processor's)")
    video_max_pixels: int | None = flag(None, "largest video frame, in pixels (default: the base processor's)")
    fps: float | None = flag(None, "video frames per second (default: the base processor's, else 2)")
    nframes: int | None = flag(None, "frames of every video, instead of --fps; even")
    video_max_frames: int | None = flag(None, "most frames taken of a video under --fps (default: 768)")
    max_length: int | None = flag(
        None, "tokens a row may have; longer ones: --over_length (default: the model's max_position_embeddings)"
    )
    over_length: OverLength = flag(
        "error",
        "a row over --max_length or too large for a pack: refuse it, skip it, lower its pixels until it fits, or drop "
        "its last pictures and videos",
    )
    box_format: BoxFormat = flag(
        "as_is",
        "what the numbers of boxes in the text are: pixels of the original picture or shares of it, brought to what "
        "the model family expects; as_is leaves them",
    )
    missing_tags: MissingTags = flag(
        "error",
        "a row whose pictures or videos have no tag in its text: refuse it, or show all of them at the beginning of "
        "its first human turn",
    )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a row has to fit, and how it is made to.

    Attributes:
        how: lower the pixel budgets of its media, or leave out the last of them.
        tokens: a row may have, by `--max_length` and `--pack_tokens`.
        patches: a row may have, by `--pack_patches`; None without packing.
    """

    how: Literal["shrink", "drop_media"]
    tokens: int
    patches: int | None

    def over(self, tokens: int, patches: int) -> bool:
        """Whether a row of so many tokens and patches is too large."""
        return tokens > self.tokens or (self.patches is not None and patches > self.patches)

    @property
    def limit(self) -> str:
        """In words, with the flags it comes from."""
        if self.patches is None:
            return f"{self.tokens:,} tokens are allowed (--max_length)"
        return (
            f"{self.tokens:,} tokens and {self.patches:,} patches are allowed (--max_length, --pack_tokens, "
            "--pack_patches)"
        )


def _settled(name: str) -> Any:
    """A flag's field in `Recipe`, where it always has a value."""
    return field(metadata=RowFlags.__dataclass_fields__[name].metadata)


@dataclass(frozen=True, kw_only=True)
class Recipe(RowFlags):
    """`RowFlags` with every default filled in, and what else decides a row. One for a whole run, saved with it.

    Attributes:
        image_min_pixels, image_max_pixels: of a still after resizing.
        video_min_pixels, video_max_pixels: of one frame after resizing. A list of frames is resized by them twice, as
            qwen-vl-utils does; and frames of long videos get less than the maximum (`limits.VIDEO_TOKENS` for all).
        fps: frames taken a second, where `nframes` is None.
        nframes: frames taken of a video file, whatever its length.
        video_max_frames: the most that `fps` takes of a video file.
        max_length: tokens a row may have.
        fit: what rows over the limit are made to fit; None: they are refused or skipped.
        columns: of each training file, by which columns its rows are read; "none" where they stand as they are.
        patch_size: pixels of a patch's side. merge_size: patches of a merged patch's side. temporal_patch_size: frames
            of a patch.
        chat_template, tokenizer: prints of them; None without a tokenizer, or with one that cannot be printed.
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
    chat_template: str | None = None
    tokenizer: str | None = None

    @classmethod
    def of(
        cls,
        processor: Any,
        flags: RowFlags | None = None,
        *,
        longest: int | None = None,
        pack: tuple[int, int] | None = None,
        columns: tuple[str, ...] = (),
    ) -> Self:
        """The recipe of a run: what the flags say, and for None what the base's processor says.

        Args:
            processor: of the base; its tokenizer may be None, where nothing is tokenised.
            flags: None: all at their defaults.
            longest: tokens that the model allows a row; None: any number.
            pack: tokens and patches of a pack, which rows are made to fit too; None without packing.
            columns: see `Recipe`.

        Raises:
            ConfigError: a flag that contradicts another, could not act, or asks for more than the model allows.
        """
        flags = flags or RowFlags()
        _check_frames(flags)
        values = {one.name: getattr(flags, one.name) for one in flags_of(cls)}
        for one in flags_of(cls):
            # A run takes frames by their rate unless --nframes is given, whatever the base was made for.
            if values[one.name] is None and one.name in SERVED and one.name != "nframes":
                own = _read(processor, SERVED[one.name])
                values[one.name] = own or UNSAID.get(one.name, own)
        limit = sys.maxsize if longest is None else longest
        length = values["max_length"] = limit if flags.max_length is None else flags.max_length
        if not 0 < length <= limit:
            raise ConfigError(f"--max_length is {length:,}; the model's max_position_embeddings allow 1 to {limit:,}")
        image, tokenizer = processor.image_processor, processor.tokenizer
        recipe = cls(
            **values,
            fit=_fit(flags.over_length, length, pack),
            columns=columns,
            patch_size=image.patch_size,
            merge_size=image.merge_size,
            temporal_patch_size=image.temporal_patch_size,
            chat_template=None if tokenizer is None else _print(processor.chat_template or tokenizer.chat_template),
            tokenizer=None if tokenizer is None else _tokenizer_print(tokenizer),
        )
        _check_pixels(recipe, given=flags.video_max_pixels, processor=processor)
        sizes = (recipe.merge_size, recipe.temporal_patch_size)
        if sizes != (2, 2):
            raise ConfigError(f"the processor's merge and temporal patch sizes are {sizes}; vlft trains (2, 2) only.")
        return recipe

    @classmethod
    def of_model(cls, processor: Any) -> Self:
        """The recipe by which a model of no known run is served: what its processor says.

        Raises:
            ConfigError: as `of`.
        """
        return cls.of(processor, RowFlags(nframes=processor.video_processor.num_frames))

    @classmethod
    def of_run(cls, processor: Any, saved: Mapping[str, Any]) -> Self:
        """The recipe of a run, from its record.

        Args:
            processor: that was saved with its weights.
            saved: what `as_json` gave then; a flag that the run's version did not know has its default.

        Raises:
            ConfigError: as `of`, for the processor.
        """
        known = {one.name: saved[one.name] for one in flags_of(cls) if one.name in saved}
        return replace(cls.of(processor), **known)

    @property
    def factor(self) -> int:
        """Pixels of a merged patch's side: heights and widths are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def print(self) -> str:
        """A short print of all that decides what a parsed row becomes, hence what it costs."""
        return _print([(name, value) for name, value in self.as_json().items() if name not in COSTLESS])

    def as_json(self) -> dict[str, Any]:
        """Every field, as JSON gives it back."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def serve(self, processor: Any) -> None:
        """Write the settings that a stock processor knows into one, which is saved beside the weights."""
        found: dict[tuple[str, str], Any] = {}
        for name, served in SERVED.items():
            part, attribute, *key = served.split(".")
            # A processor takes frames by their rate or by their number, not by both.
            value = None if name == "fps" and self.nframes is not None else getattr(self, name)
            if key:
                found.setdefault((part, attribute), {})[key[0]] = value
            else:
                found[part, attribute] = value
        for (part, attribute), value in found.items():
            setattr(getattr(processor, part), attribute, value)


def flags_of(record: type[RowFlags]) -> list[Field[Any]]:
    """The fields of a `RowFlags` or a `Recipe` that are flags."""
    return [one for one in fields(record) if "help" in one.metadata]


def _read(processor: Any, served: str) -> Any:
    part, attribute, *key = served.split(".")
    value = getattr(getattr(processor, part), attribute)
    return value[key[0]] if key else value


def _fit(over_length: OverLength, length: int, pack: tuple[int, int] | None) -> Fit | None:
    """What `--over_length` makes rows fit; None where it leaves them as they are."""
    if over_length == "error" or over_length == "skip":
        return None
    if pack is None:
        return Fit(how=over_length, tokens=length, patches=None)
    return Fit(how=over_length, tokens=min(length, pack[0]), patches=pack[1])


def _print(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _tokenizer_print(tokenizer: Any) -> str | None:
    """A short print of how text becomes tokens."""
    if not tokenizer.is_fast:
        return None
    tokenizer("", add_special_tokens=False)  # sheds the padding and truncation of an earlier call, or of its file
    special = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if not isinstance(text, list)}
    return _print([tokenizer.backend_tokenizer.to_str(), special])


def _check_frames(flags: RowFlags) -> None:
    fps, nframes, most = flags.fps, flags.nframes, flags.video_max_frames
    if fps is not None and nframes is not None:
        raise ConfigError(f"--fps {fps} and --nframes {nframes} both say how many frames a video gets. Give one.")
    if fps is not None and fps <= 0:
        raise ConfigError(f"--fps {fps}: takes no frame. Give a number above 0.")
    for name, frames in (("--nframes", nframes), ("--video_max_frames", most)):
        if frames is not None and (frames < 2 or frames % 2):
            raise ConfigError(f"{name} {frames}: frames go in pairs. Give an even number, 2 or more.")
    if nframes is not None and most is not None and nframes > most:
        raise ConfigError(f"--nframes {nframes} is above --video_max_frames {most}. Change one of them.")


def _check_pixels(recipe: Recipe, *, given: int | None, processor: Any) -> None:
    side = recipe.factor
    for kind in ("image", "video"):
        low, high = getattr(recipe, f"{kind}_min_pixels"), getattr(recipe, f"{kind}_max_pixels")
        if low < 1:
            raise ConfigError(
                f"--{kind}_min_pixels {low}: a picture has at least 1 pixel. Give 4 * {side} * {side}, say."
            )
        if low > high:
            raise ConfigError(f"--{kind}_min_pixels {low} is above --{kind}_max_pixels {high}. Change one of them.")
        if high < side**2:
            raise ConfigError(f"--{kind}_max_pixels {high} is less than one token ({side}x{side} pixels). Give more.")
    most = max(FRAME_TOKENS * side**2, int(recipe.video_min_pixels * 1.05))
    if given is not None and given > most and given != processor.video_processor.size["longest_edge"]:
        raise ConfigError(
            f"--video_max_pixels {given}: no frame gets more than {most} pixels, here as in qwen-vl-utils. "
            f"Give {most} or less."
        )
