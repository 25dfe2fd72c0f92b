"""Rows in the forms that other trainers read: one dict per row, with pictures as bytes. Writes no file.

verl's data preparation (0.9) and the dataset formats of TRL (1.16) are the sources. `vlft.convert.export` writes files.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlft.config.recipe import Recipe
from vlft.config.thinking import APART, thoughts_of
from vlft.data.media.limits import overridden
from vlft.data.media.pictures import BROKEN_PICTURE, Unreadable, open_picture
from vlft.data.media.read import still_size_of
from vlft.data.rows.parts import trained_answers
from vlft.data.sample import Image, Sample, Text, Turn

Kind = Literal["verl", "trl", "calibration"]
Pictures = Literal["original", "resized"]

PLAIN = {"JPEG": ("RGB", "L"), "PNG": ("RGB", "L"), "WEBP": ("RGB",), "BMP": ("RGB",)}  # every reader decodes alike
VERL_TAG = re.compile("<(image|video|audio)>")  # of RLHFDataset, verl 0.9
ORIENTATION = 0x0112  # tag of EXIF


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """A row before it takes the form of another trainer.

    Attributes:
        sample: the row, with boxes as the model writes them. Its media are pictures.
        pictures: of each picture, `bytes`, `min_pixels` and `max_pixels`.
        arguments: of the chat template, as for training.
        apart: whether the chat template takes the thoughts of an answer apart from its text.
    """

    sample: Sample
    pictures: tuple[dict[str, Any], ...]
    arguments: dict[str, bool] = field(default_factory=dict)
    apart: bool = False

    @property
    def question(self) -> tuple[Turn, ...]:
        """The turns before the last trained answer."""
        return self.sample.turns[: self._place]

    @property
    def answer(self) -> str:
        """The text of the last trained answer."""
        return text_of(self.sample.turns[self._place])

    @property
    def truth(self) -> str:
        """The answer without its thoughts, for a reward function to compare with."""
        found = thoughts_of(self.answer)
        return self.answer if found is None else found[1]

    @property
    def _place(self) -> int:
        return trained_answers(self.sample)[-1]


def text_of(turn: Turn, *, tag: str = "<image>") -> str:
    """The text of a turn, with a tag for each picture."""
    return "".join(part.text if isinstance(part, Text) else tag for part in turn.parts)


def verl_tag_in(sample: Sample) -> tuple[str, str] | None:
    """Find a text that verl would split, as it stands for a medium there: the field of its turn, and the mark."""
    for turn in sample.turns:
        for part in turn.parts:
            found = VERL_TAG.search(part.text) if isinstance(part, Text) else None
            if found is not None:
                return turn.field, found[0]
    return None


def picture_of(image: Image, recipe: Recipe, how: Pictures, *, limits: bool = True) -> dict[str, Any]:
    """Return a picture as the bytes of a file, and the limits of its pixels: `bytes`, `min_pixels`, `max_pixels`.

    Args:
        image: the picture.
        recipe: the settings of its pixels.
        how: `original`: the bytes of the file, or a PNG of the upright 8-bit RGB picture where readers decode the file
            differently (rotated by EXIF, transparent, 16 bits, animated). `resized`: a PNG of exactly the pixels that
            vlft trains; a trainer with the same limits does not resize it again.
        limits: whether the other trainer takes the limits of each picture. If not, a picture with limits of its own
            (`own_limits`) is written as with `resized`.

    Raises:
        Unreadable, MediaError: the file cannot be opened or decoded, or the other trainer would resize the picture to
            another size.
    """
    own = overridden(recipe, image.overrides, video=False)
    alone = not limits and own_limits(image, recipe)
    if how == "resized" or alone:
        from PIL.Image import fromarray

        from vlft.data.media.decode import decode

        [pixels_HW3] = decode(image, recipe).pixels
        height, width, _ = pixels_HW3.shape
        if alone and (then := still_size_of(height, width, recipe)) != (height, width):
            raise Unreadable(
                f"{image.path}: its row's own limits make it {width}x{height} pixels, and the other trainer, which has "
                f"one limit for all rows, {then[1]}x{then[0]}. Use limits in the row that are within those of the run"
            )
        data = _png(fromarray(pixels_HW3.numpy()))
    else:
        picture = open_picture(image.path)  # also of a plain file: its pixels may be damaged or end early
        data = Path(image.path).read_bytes() if _is_plain(image.path) else _png(picture)
    return {"bytes": data, "min_pixels": own.image_min_pixels, "max_pixels": own.image_max_pixels}


def own_limits(image: Image, recipe: Recipe) -> bool:
    """Whether the row sets limits for the pixels of a picture that are not those of the run."""
    own = overridden(recipe, image.overrides, video=False)
    of_run = recipe.image_min_pixels, recipe.image_max_pixels
    return (own.image_min_pixels, own.image_max_pixels) != of_run


def _is_plain(path: str) -> bool:
    """Whether all readers see the picture that `open_picture` returns."""
    from PIL import Image as Pillow

    try:
        with Pillow.open(path) as picture:
            return (
                picture.mode in PLAIN.get(picture.format or "", ())
                and getattr(picture, "n_frames", 1) == 1
                and "transparency" not in picture.info
                and picture.getexif().get(ORIENTATION, 1) == 1
            )
    except BROKEN_PICTURE:  # of its metadata: `open_picture` has read the pixels
        return False


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def as_verl(row: Exportable) -> dict[str, Any]:
    """A row of verl's RLHFDataset: `<image>` in the text of `prompt`, `images` in their order, the answer as truth."""
    sample = row.sample
    return {
        "data_source": Path(sample.file).stem,
        "prompt": [_plain(turn.role, text_of(turn), apart=row.apart) for turn in row.question],
        "images": list(row.pictures),
        "ability": "vision",
        "reward_model": {"style": "rule", "ground_truth": row.truth},
        "extra_info": _where(sample),
    }


def as_trl(row: Exportable) -> dict[str, Any]:
    """A row for TRL's SFTTrainer and GRPOTrainer (`prompt`, `completion`), or of pairs for its DPOTrainer."""
    sample, answer = row.sample, _message("assistant", row.answer, apart=row.apart)
    base: dict[str, Any] = {
        "prompt": _messages(row.question, apart=row.apart),
        "images": [{"bytes": one["bytes"]} for one in row.pictures],
    }
    if row.arguments:
        base["chat_template_kwargs"] = row.arguments
    if sample.rejected:
        rejected = [_message("assistant", text_of(sample.rejected[0]), apart=row.apart)]
        return {**base, "chosen": [answer], "rejected": rejected, **_where(sample)}
    return {**base, "completion": [answer], "answer": row.truth, **_where(sample)}


def as_calibration(row: Exportable) -> dict[str, Any]:
    """A whole conversation as chat messages with pictures, for `processor.apply_chat_template`."""
    sample = row.sample
    return {
        "messages": _messages(sample.turns, apart=row.apart),
        "images": [{"bytes": one["bytes"]} for one in row.pictures],
        **({"chat_template_kwargs": row.arguments} if row.arguments else {}),
        **_where(sample),
    }


FORMS = {"verl": as_verl, "trl": as_trl, "calibration": as_calibration}


def _messages(turns: Iterable[Turn], *, apart: bool) -> list[dict[str, Any]]:
    return [_turn(turn, apart=apart) for turn in turns]


def _turn(turn: Turn, *, apart: bool) -> dict[str, Any]:
    if apart and all(isinstance(part, Text) for part in turn.parts):
        return _message(turn.role, text_of(turn), apart=True)
    return {"role": turn.role, "content": [_part(part) for part in turn.parts]}


def _message(role: str, text: str, *, apart: bool) -> dict[str, Any]:
    plain = _plain(role, text, apart=apart)
    return plain | {"content": [{"type": "text", "text": plain["content"]}]}


def _plain(role: str, text: str, *, apart: bool) -> dict[str, Any]:
    """A message whose content is text, with the thoughts of an answer in it or apart from it."""
    found = thoughts_of(text) if apart and role == "assistant" else None
    return {"role": role, "content": text} if found is None else {"role": role, "content": found[1], APART: found[0]}


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image", "text": None}


def _where(sample: Sample) -> dict[str, Any]:
    return {"file": sample.file, "index": sample.index, "id": sample.id}
