"""Rows in the forms that other trainers read: one dict per row, with pictures as bytes. Writes no file.

verl's data preparation (0.9) and the dataset formats of TRL (1.16) are the sources. `vlft.convert.export` writes files.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlft.config.recipe import Recipe
from vlft.data.media.limits import overridden
from vlft.data.media.pictures import open_picture
from vlft.data.rows.parts import trained_answers
from vlft.data.sample import Image, Sample, Text, Turn

Kind = Literal["verl", "trl", "calibration"]
Pictures = Literal["original", "resized"]

PLAIN = {"JPEG": ("RGB", "L"), "PNG": ("RGB", "L"), "WEBP": ("RGB",), "BMP": ("RGB",)}  # every reader decodes alike
ORIENTATION = 0x0112  # tag of EXIF


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """A row before it takes the form of another trainer.

    Attributes:
        sample: the row, with boxes as the model writes them. Its media are pictures.
        pictures: of each picture, `bytes`, `min_pixels` and `max_pixels`.
    """

    sample: Sample
    pictures: tuple[dict[str, Any], ...]

    @property
    def question(self) -> tuple[Turn, ...]:
        """The turns before the last trained answer."""
        return self.sample.turns[: self._place]

    @property
    def answer(self) -> str:
        """The text of the last trained answer."""
        return text_of(self.sample.turns[self._place])

    @property
    def _place(self) -> int:
        return trained_answers(self.sample)[-1]


def text_of(turn: Turn, *, tag: str = "<image>") -> str:
    """The text of a turn, with a tag for each picture."""
    return "".join(part.text if isinstance(part, Text) else tag for part in turn.parts)


def picture_of(image: Image, recipe: Recipe, how: Pictures) -> dict[str, Any]:
    """Return a picture as the bytes of a file, and the limits of its pixels: `bytes`, `min_pixels`, `max_pixels`.

    Args:
        image: the picture.
        recipe: the settings of its pixels.
        how: `original`: the bytes of the file, or a PNG of the upright 8-bit RGB picture where readers decode the file
            differently (rotated by EXIF, transparent, 16 bits, animated). `resized`: a PNG of exactly the pixels that
            vlft trains; a trainer with the same limits does not resize it again.

    Raises:
        Unreadable, MediaError: the file cannot be opened or decoded.
    """
    own = overridden(recipe, image.overrides, video=False)
    limits = {"min_pixels": own.image_min_pixels, "max_pixels": own.image_max_pixels}
    if how == "resized":
        from PIL.Image import fromarray

        from vlft.data.media.decode import decode_pixels

        data = _png(fromarray(decode_pixels(image, recipe).permute(1, 2, 0).contiguous().numpy()))
    else:
        data = Path(image.path).read_bytes() if _is_plain(image.path) else _png(open_picture(image.path))
    return {"bytes": data, **limits}


def _is_plain(path: str) -> bool:
    """Whether all readers see the picture that `open_picture` returns."""
    from PIL import Image as Pillow

    with Pillow.open(path) as picture:
        return (
            picture.mode in PLAIN.get(picture.format or "", ())
            and getattr(picture, "n_frames", 1) == 1
            and "transparency" not in picture.info
            and picture.getexif().get(ORIENTATION, 1) == 1
        )


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def as_verl(row: Exportable) -> dict[str, Any]:
    """A row of verl's RLHFDataset: `<image>` in the text of `prompt`, `images` in their order, the answer as truth."""
    sample = row.sample
    return {
        "data_source": Path(sample.file).stem,
        "prompt": [{"role": turn.role, "content": text_of(turn)} for turn in row.question],
        "images": list(row.pictures),
        "ability": "vision",
        "reward_model": {"style": "rule", "ground_truth": row.answer},
        "extra_info": _where(sample),
    }


def as_trl(row: Exportable) -> dict[str, Any]:
    """A row for TRL's SFTTrainer and GRPOTrainer (`prompt`, `completion`), or of pairs for its DPOTrainer."""
    sample, answer = row.sample, _message("assistant", row.answer)
    base = {"prompt": _messages(row.question), "images": [{"bytes": one["bytes"]} for one in row.pictures]}
    if sample.rejected:
        rejected = [_message("assistant", text_of(sample.rejected[0]))]
        return {**base, "chosen": [answer], "rejected": rejected, **_where(sample)}
    return {**base, "completion": [answer], "answer": row.answer, **_where(sample)}


def as_calibration(row: Exportable) -> dict[str, Any]:
    """A whole conversation as chat messages with pictures, for `processor.apply_chat_template`."""
    sample = row.sample
    return {
        "messages": _messages(sample.turns),
        "images": [{"bytes": one["bytes"]} for one in row.pictures],
        **_where(sample),
    }


FORMS = {"verl": as_verl, "trl": as_trl, "calibration": as_calibration}


def _messages(turns: Iterable[Turn]) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": [_part(part) for part in turn.parts]} for turn in turns]


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image", "text": None}


def _where(sample: Sample) -> dict[str, Any]:
    return {"file": sample.file, "index": sample.index, "id": sample.id}
