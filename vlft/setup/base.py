"""Open the base that a run starts from: its folder, config and processor, with the settings of the flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlft.checkpoint import open_processor, resolve_model
from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.recipe import Recipe
from vlft.data.collate import Collator
from vlft.data.dataset import MediaProbe
from vlft.data.encode import Encoder
from vlft.errors import ConfigError
from vlft.families import Family, Sizes
from vlft.model.build import media_processors
from vlft.model.load import load_config
from vlft.model.towers import Towers
from vlft.setup.schedule import pack_budget


@dataclass(frozen=True, kw_only=True)
class Base:
    """An opened base model. Its weights are not loaded.

    Attributes:
        name: as the user wrote it, a folder or a hub id.
        folder: the folder on disk (a snapshot folder for a hub id).
        config: transformers' config.
        family: of the config.
        processor: its stock processor, with the run's pixel settings applied.
        encoder: rows -> tokens and pixels.
        towers: what trains, by the flags.
    """

    name: str
    folder: Path
    config: Any
    family: Family
    processor: Any
    encoder: Encoder
    towers: Towers

    @property
    def recipe(self) -> Recipe:
        """All settings that determine how a row is encoded."""
        return self.encoder.recipe

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding, so that files store it once."""
        return self.sizes.text.tied

    @property
    def sizes(self) -> Sizes:
        """The sizes of the model, from its config."""
        return self.family.sizes(self.config)

    def collator(self) -> Collator:
        """A collator: encoded rows -> a flat batch for this base."""
        tokenizer, vision = self.processor.tokenizer, self.sizes.vision
        filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return Collator(patch_size=vision.patch, merge_size=vision.merge, filler_token=filler)


def open_base(data: DataFlags, model: ModelFlags, *, given: frozenset[str]) -> Base:
    """Open the base of the flags, and determine all settings for encoding rows.

    Args:
        data: flags of the data.
        model: flags of the model.
        given: names of the flags that the user set.

    Raises:
        ConfigError: a flag is missing, has no effect, or cannot be satisfied.
        CheckpointError: the base is missing, not a Qwen-VL, quantised or incomplete, or its processor belongs to
            another model.
    """
    if model.model_id is None:
        raise ConfigError("--model_id is missing: the base model, a folder or e.g. Qwen/Qwen2-VL-2B-Instruct")
    towers = _towers(model, given)
    folder = resolve_model(model.model_id, model.model_revision)
    config, family = load_config(folder)
    processor = open_processor(folder)
    recipe = _recipe(processor, data, longest=family.sizes(config).text.max_positions)
    recipe.serve(processor)
    return Base(
        name=model.model_id,
        folder=folder,
        config=config,
        family=family,
        processor=processor,
        encoder=Encoder(family=family, processor=processor, recipe=recipe),
        towers=towers,
    )


def _recipe(processor: Any, data: DataFlags, *, longest: int | None) -> Recipe:
    budget = pack_budget(data)
    return Recipe.of(
        processor,
        data,
        longest=longest,
        pack=None if budget is None else (budget.tokens, budget.patches),
        columns=tuple(str(one.columns or "none") for one in data.training_sets),
    )


def stock_probe(data: DataFlags, family: Family) -> MediaProbe:
    """A probe that inspects media without a base, with the flags and the published pixel limits of a family.

    Raises:
        ConfigError: a flag has no effect, or cannot be satisfied.
    """
    image, video = media_processors(family, *family.pixels)
    stock = SimpleNamespace(image_processor=image, video_processor=video, tokenizer=None)
    return MediaProbe(recipe=_recipe(stock, data, longest=None))


def _towers(model: ModelFlags, given: frozenset[str]) -> Towers:
    names = ("vision", "merger", "language", "lora_rank", "lora_alpha", "lora_dropout", "lora_target")
    towers = Towers(**{name: getattr(model, name) for name in names})
    idle = sorted(name for name in given if name.startswith("lora_"))
    if idle and not towers.has_lora:
        raise ConfigError(f"--{idle[0]} is given, but no tower is lora ({towers.modes}), so it has no effect. Drop it.")
    return towers
