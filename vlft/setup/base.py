"""The base a run starts from: its folder, config and processor, and what the flags make of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlft.checkpoint import open_processor, resolve_model
from vlft.config.flags import DataFlags, ModelFlags
from vlft.data.collate import Collator
from vlft.data.dataset import MediaProbe
from vlft.data.encode import Encoder
from vlft.data.media.read import MediaSettings, media_settings
from vlft.data.over_length import Fit
from vlft.errors import ConfigError
from vlft.families import Family, Sizes
from vlft.model.build import media_processors
from vlft.model.load import load_config
from vlft.model.towers import Towers
from vlft.setup.schedule import pack_budget


@dataclass(frozen=True, kw_only=True)
class Base:
    """An opened base model, weights still on disk.

    Attributes:
        name: as the user gave it, a folder or a hub id.
        folder: where it lies (a snapshot folder for a hub id).
        config: transformers' config.
        family: names of its parts.
        processor: its stock processor, with the run's pixel settings written into it.
        media: those settings.
        encoder: rows -> tokens and pixels.
        towers: what the flags ask to train.
    """

    name: str
    folder: Path
    config: Any
    family: Family
    processor: Any
    media: MediaSettings
    encoder: Encoder
    towers: Towers

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding, so that files hold it once."""
        return self.sizes.text.tied

    @property
    def sizes(self) -> Sizes:
        """Of the model, by its config."""
        return self.family.sizes(self.config)

    def collator(self) -> Collator:
        """Encoded rows -> a flat batch of this base."""
        tokenizer, vision = self.processor.tokenizer, self.sizes.vision
        filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return Collator(patch_size=vision.patch, merge_size=vision.merge, filler_token=filler)


def open_base(data: DataFlags, model: ModelFlags, *, given: frozenset[str]) -> Base:
    """Open the base the flags name and settle everything that decides what a row becomes.

    Raises:
        ConfigError: a flag is missing, cannot act, or cannot be carried out.
        CheckpointError: the base is missing, not a Qwen-VL, quantised, not whole, or its processor is another model's.
    """
    if model.model_id is None:
        raise ConfigError("--model_id is missing: the base model, a folder or e.g. Qwen/Qwen2-VL-2B-Instruct")
    towers = _towers(model, given)
    folder = resolve_model(model.model_id, model.model_revision)
    config, family = load_config(folder)
    processor = open_processor(folder)
    media = _settings(processor, data)
    limit = family.sizes(config).text.max_positions
    max_length = limit if data.max_length is None else data.max_length
    if not 0 < max_length <= limit:
        raise ConfigError(f"--max_length is {max_length:,}; the model's max_position_embeddings allow 1 to {limit:,}")
    encoder = Encoder(
        family=family,
        processor=processor,
        media=media,
        max_length=max_length,
        box_format=data.box_format,
        fit=_fit(data, max_length),
    )
    serve_as_trained(processor, media)
    return Base(
        name=model.model_id,
        folder=folder,
        config=config,
        family=family,
        processor=processor,
        media=media,
        encoder=encoder,
        towers=towers,
    )


def _settings(processor: Any, data: DataFlags) -> MediaSettings:
    return media_settings(
        processor,
        image_min_pixels=data.image_min_pixels,
        image_max_pixels=data.image_max_pixels,
        video_min_pixels=data.video_min_pixels,
        video_max_pixels=data.video_max_pixels,
        fps=data.fps,
        nframes=data.nframes,
        video_max_frames=data.video_max_frames,
    )


def _fit(data: DataFlags, max_length: int) -> Fit | None:
    """What `--over_length` makes rows fit; None where it leaves them as they are."""
    if data.over_length in ("error", "skip"):
        return None
    budget = pack_budget(data)
    how: Any = data.over_length
    if budget is None:
        return Fit(how=how, tokens=max_length, patches=None)
    return Fit(how=how, tokens=min(max_length, budget.tokens), patches=budget.patches)


def stock_probe(data: DataFlags, family: Family) -> MediaProbe:
    """What can look at media before a base is chosen: the flags over the published budgets of a family.

    Raises:
        ConfigError: a flag cannot act or be carried out.
    """
    image, video = media_processors(family, *family.pixels)
    return MediaProbe(media=_settings(SimpleNamespace(image_processor=image, video_processor=video), data))


def _towers(model: ModelFlags, given: frozenset[str]) -> Towers:
    names = ("vision", "merger", "language", "lora_rank", "lora_alpha", "lora_dropout", "lora_target")
    towers = Towers(**{name: getattr(model, name) for name in names})
    idle = sorted(name for name in given if name.startswith("lora_"))
    if idle and not towers.has_lora:
        raise ConfigError(f"--{idle[0]} is given, but no tower is lora ({towers.modes}), so it cannot act. Drop it.")
    return towers


def serve_as_trained(processor: Any, media: MediaSettings) -> None:
    """Write the run's pixel and frame settings into the processor, which is saved beside the weights."""
    processor.image_processor.size = {
        "shortest_edge": media.image_min_pixels,
        "longest_edge": media.image_max_pixels,
    }
    processor.video_processor.size = {
        "shortest_edge": media.video_min_pixels,
        "longest_edge": media.video_max_pixels,
    }
    processor.video_processor.fps = media.fps if media.nframes is None else None
    processor.video_processor.num_frames = media.nframes
    processor.video_processor.max_frames = media.video_max_frames
