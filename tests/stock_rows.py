"""Rows of each kind by transformers' own processor and positions, for any family: what a flat batch must reproduce.

Nothing here uses vlft's encoder. The pixels of a flat row are the processor's own, scaled back to bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from build import picture
from models import loss_of

from vlft.data.sample import EncodedMedia, EncodedSample, Grid
from vlft.families import Family
from vlft.model.scale import PixelScale

IMAGE, VIDEO = 1, 2
FPS = 2.0  # a time step of two frames takes a second: transformers 5.17 truncates other times


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row.

    Attributes:
        flat: as a flat batch takes it.
        stock: the inputs of the stock forward.
    """

    flat: EncodedSample
    stock: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A base as transformers opens it.

    Attributes:
        base: its folder.
        family: of the base.
        model: the stock model, in float32.
        processor: its stock processor.
        rows: a row of each kind, by the name of the kind.
    """

    base: Path
    family: Family
    model: Any
    processor: Any
    rows: dict[str, Row]


def opened(base: Path, family: Family) -> Opened:
    model = getattr(transformers, family.model_class).from_pretrained(
        base, dtype=torch.float32, attn_implementation="sdpa"
    )
    processor = transformers.AutoProcessor.from_pretrained(base)
    return Opened(base=base, family=family, model=model, processor=processor, rows=rows_of(family, model, processor))


def conversation(*parts: str) -> list[dict]:
    """A user turn of these parts, `image`, `video` or text, and an answer."""
    content = [{"type": part} if part in ("image", "video") else {"type": "text", "text": part} for part in parts]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": f"An answer to {len(parts)} parts."}]},
    ]


def clip(frames: int, width: int, height: int, *, name: str) -> np.ndarray:
    """uint8 [frames, H, W, 3], moving."""
    still = np.asarray(picture(width, height, name=name))
    return np.stack([np.roll(still, 9 * i, axis=1) for i in range(frames)])


def rows_of(family: Family, model: Any, processor: Any) -> dict[str, Row]:
    """Rows of every kind. Their sizes in merged patches leave edge windows, and differ in both directions.

    Args:
        family: of the model.
        model: the stock model, for its positions.
        processor: its stock processor.
    """
    side = family.factor

    def still(columns: int, rows: int, name: str):
        return picture(columns * side, rows * side, name=name)

    def moving(frames: int, columns: int, rows: int):
        return clip(frames, columns * side, rows * side, name="coffee")

    kinds = {
        "text": (conversation("2+2?"), [], []),
        "picture": (conversation("image", "What is it?"), [still(7, 5, "china")], []),
        "pictures": (
            conversation("image", "and", "image", "or", "image", "?"),
            [still(2, 2, "flower"), still(9, 2, "astronaut"), still(4, 4, "china")],
            [],
        ),
        "video": (conversation("video", "Who?"), [], [moving(6, 5, 2)]),
        "frames": (conversation("video", "Who?"), [], [moving(2, 2, 2)]),
        "mixed": (
            conversation("video", "image", "Which?", "video", "image"),
            [still(3, 2, "coffee"), still(2, 5, "flower")],
            [moving(4, 2, 3), moving(2, 5, 2)],
        ),
    }
    return {name: _row(name, family, model, processor, *kind) for name, kind in kinds.items()}


def _row(name: str, family: Family, model: Any, processor: Any, messages: list, pictures: list, clips: list) -> Row:
    text = processor.apply_chat_template(messages, tokenize=False)
    metadata = [
        {"fps": FPS, "total_num_frames": len(one), "frames_indices": list(range(len(one))), "duration": len(one) / FPS}
        for one in clips
    ]
    asked: dict[str, Any] = {"images": pictures or None}
    if clips:
        asked |= {"videos": clips, "video_metadata": metadata, "do_sample_frames": False}
    made = dict(processor(text=[text], return_tensors="pt", **asked))
    ids = made["input_ids"]
    pads = [processor.tokenizer.convert_tokens_to_ids(pad) for pad in (family.image_pad, family.video_pad)]
    kinds = (ids == pads[0]).int() * IMAGE + (ids == pads[1]).int() * VIDEO
    stock = {key: made[key] for key in ("input_ids", "pixel_values", "image_grid_thw") if key in made}
    stock |= {key: made[key] for key in ("pixel_values_videos", "video_grid_thw") if key in made}
    if family.video_time == "seconds" and clips:
        stock["second_per_grid_ts"] = torch.tensor([2 / FPS] * len(clips))
    stock["mm_token_type_ids"] = kinds
    grids = {key: value for key, value in stock.items() if not key.startswith("pixel")}
    positions, _ = model.model.get_rope_index(**grids, attention_mask=torch.ones_like(ids))
    media = _media(made, processor, pictures=len(pictures), clips=len(clips))
    stills, videos = iter(media[: len(pictures)]), iter(media[len(pictures) :])
    order = [part["type"] for message in messages for part in message["content"] if part["type"] != "text"]
    labels = ids[0].clone()
    start = int((labels == processor.tokenizer.convert_tokens_to_ids(family.start_of_turn)).nonzero()[-1])
    labels[: start + 1 + len(processor.tokenizer("assistant\n").input_ids)] = -100
    flat = EncodedSample(
        file="stock",
        index=0,
        id=name,
        input_ids_T=ids[0],
        labels_T=labels,
        kinds_T=kinds[0].to(torch.uint8),
        positions_3T=positions[:, 0],
        media=tuple(next(stills if kind == "image" else videos) for kind in order),
        text=text,
    )
    return Row(flat=flat, stock=stock | {"use_cache": False})


def _media(made: dict, processor: Any, *, pictures: int, clips: int) -> list[EncodedMedia]:
    """The stills, then the videos, with bytes for pixels."""
    scale, found = PixelScale.of(processor), []
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (scale.mean, scale.std))
    side = processor.image_processor.patch_size
    for values, grids, is_video in (
        ("pixel_values", "image_grid_thw", False),
        ("pixel_values_videos", "video_grid_thw", True),
    ):
        if not (clips if is_video else pictures):
            continue
        patches = (made[values].unflatten(1, (3, 2, side, side)) * std + mean).round().to(torch.uint8)
        sizes = [Grid(t=t, h=h, w=w) for t, h, w in made[grids].tolist()]
        for grid, part in zip(sizes, patches.split([one.t * one.h * one.w for one in sizes]), strict=True):
            pixels_FHW3 = _whole(part, grid, merge=processor.image_processor.merge_size)
            found.append(
                EncodedMedia(grid=grid, pixels=pixels_FHW3 if is_video else pixels_FHW3[:1], is_video=is_video)
            )
    return found


def _whole(patches: torch.Tensor, grid: Grid, *, merge: int) -> torch.Tensor:
    """Reassemble pixels, uint8 [F, H, W, 3], from patches of the stock processor, [P, 3, 2, p, p]."""
    pair, side = patches.shape[2], patches.shape[-1]
    # time, block row, block column, row in block, column in block, channel, frame of pair, pixel row, pixel column
    cut = patches.reshape(grid.t, grid.h // merge, grid.w // merge, merge, merge, 3, pair, side, side)
    whole = cut.permute(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return whole.reshape(grid.t * pair, grid.h * side, grid.w * side, 3)


def stock_loss(model: Any, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of one row by the stock forward, and the logits that predict its supervised tokens."""
    return loss_of(model(**row.stock).logits, row.flat.labels_T)


def changed(row: Row) -> Row:
    """The row with other tokens and pixels, in the same places."""
    flat = row.flat
    ids = torch.where(flat.kinds_T == 0, (flat.input_ids_T + 7) % 200, flat.input_ids_T)
    media = tuple(replace(medium, pixels=255 - medium.pixels) for medium in flat.media)
    return replace(row, flat=replace(flat, input_ids_T=ids, media=media))
