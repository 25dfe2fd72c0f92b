"""Open the base that a run starts from: its folder, config and processor, with the settings of the flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vlft.checkpoint import (
    RECORD,
    PlainProcessor,
    RunRecord,
    check_processor,
    family_of,
    open_plain,
    open_processor,
    processor_files,
    read_record,
    resolve_model,
)
from vlft.checkpoint.start import Start, prove_start, read_start, recorded_start
from vlft.config import variants
from vlft.config.checks import OF_ADAPTER
from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.recipe import Recipe, unserve
from vlft.data.dataset import MediaProbe
from vlft.data.encode import Encoder
from vlft.data.media.limits import remark_on_limit
from vlft.data.prompts import PromptEncoder, PromptProbe
from vlft.errors import ConfigError
from vlft.families import Family, Sizes
from vlft.model.load import load_config
from vlft.model.proof import prove
from vlft.model.quantise import Quantisation
from vlft.model.towers import Towers, check_experts
from vlft.model_files import read_json
from vlft.setup.choices import with_choices
from vlft.setup.quantised import format_of
from vlft.setup.schedule import pack_budget

if TYPE_CHECKING:
    from vlft.data.collate import Collator


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
        plain: whether it was opened without transformers: `config` has only sizes, and `processor` makes no pixels.
        start: the adapter that the run starts from; None: new adapters, or none.
        quantisation: of the language model's frozen linear layers; None: they keep the dtype of the files.
    """

    name: str
    folder: Path
    config: Any
    family: Family
    processor: Any
    encoder: Encoder
    towers: Towers
    plain: bool = False
    start: Start | None = None
    quantisation: Quantisation | None = None

    @property
    def recipe(self) -> Recipe:
        """All settings that determine how a row is encoded."""
        return self.encoder.recipe

    @property
    def completion(self) -> int:
        """Most tokens of a completion (`--max_completion_length`); 0 for other methods than grpo."""
        return self.encoder.completion if isinstance(self.encoder, PromptEncoder) else 0

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
        from vlft.data.collate import Collator

        tokenizer = self.processor.tokenizer
        filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return Collator(vision=self.sizes.vision, filler_token=filler, shared=self.encoder.shared)


def start_of(model: ModelFlags, *, resumed: RunRecord | None = None) -> Start | None:
    """Read the adapter of `--adapter`; None without one. Loads no weights.

    Args:
        model: flags of the model.
        resumed: record of the run that resumes. If that run started from the same folder, the folder is not read.

    Raises:
        CheckpointError: the base cannot be opened, or no run on it can start from the adapter.
    """
    if model.adapter is None or model.model_id is None:
        return None
    if resumed is not None and (start := recorded_start(model.adapter, resumed)) is not None:
        return start
    folder = resolve_model(model.model_id, model.model_revision)
    return read_start(model.adapter, model.model_id, folder, family_of(folder))


def open_base(
    data: DataFlags,
    model: ModelFlags,
    *,
    given: frozenset[str],
    plain: bool = False,
    start: Start | None = None,
) -> Base:
    """Open the base of the flags, and determine all settings for encoding rows.

    Args:
        data: flags of the data.
        model: flags of the model.
        given: names of the flags that the user set.
        plain: do without transformers, if the files allow it (`Base.plain`).
        start: of `start_of`, for a run. Without it `--adapter` has no effect, and what trains is unknown.

    Raises:
        ConfigError: a flag is missing, has no effect, differs from the adapter, or cannot be satisfied.
        CheckpointError: the base is missing, not a Qwen-VL, quantised or incomplete, or its processor belongs to
            another model.
    """
    if model.model_id is None:
        raise ConfigError("--model_id is missing: the base model, a folder or e.g. Qwen/Qwen2-VL-2B-Instruct")
    towers = _towers(model, given, start)
    folder = resolve_model(model.model_id, model.model_revision)
    check_experts(family_of(folder), language=towers.language)
    config, family, processor = _opened(folder, plain=plain)
    if (folder / RECORD).is_file():  # merged, or trained in full
        unserve(processor, read_record(folder).media, family)
    if model.linear_attn != "auto" and "recurrent" not in family.features:
        raise ConfigError(
            f"--linear_attn {model.linear_attn} has no effect: {family.label} has no gated delta nets, as Qwen3.5 has. "
            "Drop it."
        )
    sizes = family.sizes(config)
    if model.adapter is None or start is not None:
        towers = with_choices(
            towers, model, given, family=family, sizes=sizes, tokenizer=processor.tokenizer, start=start
        )
    recipe = _recipe(
        processor,
        data,
        family=family,
        tokens_per_second=sizes.vision.tokens_per_second,
        longest=sizes.text.max_positions,
    )
    recipe.serve(processor)
    return Base(
        name=model.model_id,
        folder=folder,
        config=config,
        family=family,
        processor=processor,
        encoder=_encoder(data, family=family, processor=processor, recipe=recipe),
        towers=towers,
        start=None if start is None else prove_start(start, model.model_id, folder),
        plain=isinstance(processor, PlainProcessor),
        quantisation=format_of(model, folder, given, start, towers),
    )


def _encoder(data: DataFlags, **parts: Any) -> Encoder:
    """The encoder of a method."""
    return PromptEncoder(**parts, completion=data.max_completion_length) if data.method == "grpo" else Encoder(**parts)


def remarks_on_pixels(base: Base, data: DataFlags) -> tuple[str, ...]:
    """Return remarks on pixel limits that the user set, and that leave too few pixels."""
    remark = None if data.video_max_pixels is None else remark_on_limit(base.recipe, label=base.family.label)
    return () if remark is None else (remark,)


def _opened(folder: Path, *, plain: bool) -> tuple[Any, Family, Any]:
    """Open config and processor of a base: from their files alone if `plain`, else with transformers."""
    if plain:
        family = Family.of(read_json(folder / "config.json").get("model_type"), where=str(folder))
        if (found := open_plain(folder, family)) is not None:
            config, processor = found
            check_processor(folder, processor_files(folder, folder), base=folder, read=("tokenizer.json",))
            prove(processor, config, family, where=folder)
            return config, family, processor
    config, family = load_config(folder)
    return config, family, open_processor(folder)


def _recipe(
    processor: Any, data: DataFlags, *, family: Family, tokens_per_second: int | None, longest: int | None
) -> Recipe:
    budget = pack_budget(data)
    return Recipe.of(
        processor,
        data,
        family=family,
        tokens_per_second=tokens_per_second,
        longest=longest,
        pack=None if budget is None else (budget.tokens, budget.patches),
        columns=tuple(str(one.columns or "none") for one in data.training_sets),
    )


def stock_probe(data: DataFlags, family: Family) -> MediaProbe:
    """A probe that inspects media without a base, with the flags and the published pixel limits of a family.

    Raises:
        ConfigError: a flag has no effect, or cannot be satisfied.
    """
    least, most = family.pixels
    settings = {"size": {"shortest_edge": least, "longest_edge": most}, **family.patch_sizes}
    image = SimpleNamespace(**settings)
    video = SimpleNamespace(**settings, fps=None, num_frames=None, max_frames=None)
    stock = SimpleNamespace(image_processor=image, video_processor=video, tokenizer=None)
    key = family.vision_names.tokens_per_second
    per_second = family.tiny.vision[key] if key else None
    recipe = _recipe(stock, data, family=family, tokens_per_second=per_second, longest=None)
    return (PromptProbe if data.method == "grpo" else MediaProbe)(recipe=recipe)


def _towers(model: ModelFlags, given: frozenset[str], start: Start | None) -> Towers:
    if model.adapter is not None and start is None:
        return Towers()  # the adapter decides, and rows are the same with any towers
    flags = {name: getattr(model, name) for name in (*OF_ADAPTER, "lora_dropout")}
    if start is not None:
        start.agree({name: getattr(model, name) for name in given if hasattr(model, name)})
        flags |= {name: value for name, value in start.settings.items() if name in flags}
        if flags["use_dora"] and "lora_dropout" not in given:
            flags |= variants.defaults(flags)
    towers = Towers(**flags)
    idle = sorted(name for name in given if name.startswith("lora_"))
    if idle and not towers.has_lora:
        modes = ", ".join(f"{tower} {mode}" for tower, mode in towers.modes.items())
        raise ConfigError(f"--{idle[0]} is given, but no tower is lora ({modes}), so it has no effect. Drop it.")
    return towers
