"""The stock side of the benchmarks: rows as stock transformers prepares and pads them, without code of vlft.

Pictures are opened with Pillow and passed to the model's own processor, in one call per row. Videos go through
qwen-vl-utils, as in the model card. Batches are padded on the right. Both sides receive parsed rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from vlft.config.recipe import Recipe
from vlft.data.sample import Image, Sample, Text, Video
from vlft.families import Family

IGNORED = -100
PIXELS = ("pixel_values", "pixel_values_videos")
GRIDS = ("image_grid_thw", "video_grid_thw")
COUNTS = "counts"  # the only key of a batch that is not for the model


@dataclass(frozen=True, kw_only=True)
class StockRows(Dataset):
    """Rows that the stock processor turns into tensors on access, in the loader's worker.

    Attributes:
        samples: parsed rows.
        processor: processor of the base, with the run's pixel settings.
        recipe: the same settings, for videos.
        family: names of the control tokens.
    """

    samples: Sequence[Sample]
    processor: Any
    recipe: Recipe
    family: Family

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.samples[index]
        messages: list[dict[str, Any]] = [
            {"role": turn.role, "content": [self._part(part) for part in turn.parts]} for turn in sample.turns
        ]
        text = self.processor.apply_chat_template(messages, tokenize=False)
        options: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
        if any(isinstance(part, Video) for part in sample.media):
            options |= _videos(messages)
        elif sample.media:
            options["images"] = [_open(part["image"]) for m in messages for part in m["content"] if "image" in part]
        row = dict(self.processor(**options))
        row["labels"] = self._labels(row["input_ids"][0])[None]
        return row

    def _part(self, part: Text | Image | Video) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        recipe = self.recipe
        if isinstance(part, Image):
            budget = {"min_pixels": recipe.image_min_pixels, "max_pixels": recipe.image_max_pixels}
            return {"type": "image", "image": part.path, **budget}
        frames = {"fps": recipe.fps} if recipe.nframes is None else {"nframes": recipe.nframes}
        if recipe.nframes is None and part.path is not None:
            frames["max_frames"] = recipe.video_max_frames
        return {
            "type": "video",
            "video": part.path if part.path is not None else list(part.frames),
            "min_pixels": recipe.video_min_pixels,
            "max_pixels": recipe.video_max_pixels,
            **frames,
        }

    def _labels(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Label the tokens of answers, including the token that ends each; all others are ignored."""
        head, end = _marks(self.processor.tokenizer, self.family.start_of_turn, self.family.end_of_turn)
        labels_T = torch.full_like(ids_T, IGNORED)
        ids = ids_T.tolist()
        place = 0
        while place < len(ids):
            if ids[place : place + len(head)] == head:
                start = place + len(head)
                place = ids.index(end, start) + 1
                labels_T[start:place] = ids_T[start:place]
            else:
                place += 1
        return labels_T


def _open(path: str) -> Any:
    from PIL import Image as Pillow

    return Pillow.open(path).convert("RGB")


def _videos(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Build the processor's arguments for a row with videos, as in the model card: videos are already resized."""
    from qwen_vl_utils import process_vision_info

    images, videos, options = process_vision_info(messages, return_video_kwargs=True, return_video_metadata=True)
    frames, metadata = zip(*videos, strict=True)
    return {
        "images": images,
        "videos": list(frames),
        "video_metadata": list(metadata),
        "do_resize": False,
        **options,
    }


@functools.cache
def _marks(tokenizer: Any, start_of_turn: str, end_of_turn: str) -> tuple[list[int], int]:
    head = tokenizer(f"{start_of_turn}assistant\n", add_special_tokens=False).input_ids
    return head, tokenizer.convert_tokens_to_ids(end_of_turn)


@dataclass(frozen=True, kw_only=True)
class PaddingCollator:
    """Rows of `StockRows` -> one right-padded batch, and its counts of tokens.

    Attributes:
        pad: the tokenizer's padding token.
        trained_only: also say in which columns a row is trained on, so that transformers computes logits only there.
            A number as `logits_to_keep` cannot do that, since transformers shifts all labels by one. A tensor of
            columns can, together with `shift_labels` (transformers 5.17 to 5.23).
    """

    pad: int
    trained_only: bool = False

    def __call__(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
        """Collate rows. Pixels and grids of all rows are concatenated, as the stock forward takes them."""
        fillers = {"input_ids": self.pad, "attention_mask": 0, "mm_token_type_ids": 0, "labels": IGNORED}
        batch: dict[str, Any] = {}
        for name, filler in fillers.items():
            if name in rows[0]:
                columns = [row[name][0] for row in rows]
                batch[name] = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=filler)
        for name in (*PIXELS, *GRIDS):
            if parts := [row[name] for row in rows if row.get(name) is not None]:
                batch[name] = torch.cat(parts)
        if self.trained_only:
            targets_BT = batch["labels"][:, 1:]
            columns_K = (targets_BT != IGNORED).any(0).nonzero()[:, 0]
            batch |= {"logits_to_keep": columns_K, "shift_labels": targets_BT[:, columns_K].contiguous()}
        real = int(batch["attention_mask"].sum())
        videos = batch.get("video_grid_thw", torch.zeros(0, 3))
        batch[COUNTS] = {
            "tokens": real,
            "places": batch["input_ids"].numel(),
            # the first token of a row is never a target
            "supervised_tokens": int((batch["labels"][:, 1:] != IGNORED).sum()),
            "images": len(batch.get("image_grid_thw", ())),
            "frames": int(2 * videos[:, 0].sum()),
            "samples": len(rows),
            "pixel_bytes": sum(batch[name].nbytes for name in PIXELS if name in batch),
        }
        return batch


def stock_collator(processor: Any, *, trained_only: bool = False) -> Callable[[Any], dict[str, Any]]:
    """Build the collator that pads with this processor's padding token. `trained_only`: see `PaddingCollator`."""
    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return PaddingCollator(pad=pad, trained_only=trained_only)
