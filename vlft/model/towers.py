"""Which towers train, and how: {vision, merger, language} x {full, lora, frozen}. Turns a loaded base into that.

Language-only LoRA is frozen/frozen/lora, vision+language LoRA lora/lora/lora, full full/full/full.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from vlft.errors import ConfigError
from vlft.families import TOWERS, Family

Mode = Literal["full", "lora", "frozen"]


@dataclass(frozen=True, kw_only=True)
class Towers:
    """What is trained.

    Attributes:
        vision: the ViT's patch embedding and blocks.
        merger: the two linears (and norm) between ViT and language model.
        language: the language model, its embedding and head.
        lora_rank, lora_alpha, lora_dropout: of every LoRA matrix; the update is scaled by alpha / rank.
        lora_target: "all" linears of a tower's blocks, or its "attention" linears (a merger has none of its own: both
            its linears are adapted either way).

    Raises:
        ConfigError: nothing would be trained, or a combination that cannot be held in one adapter.
    """

    vision: Mode = "frozen"
    merger: Mode = "frozen"
    language: Mode = "lora"
    lora_rank: int = 32
    lora_alpha: float = 64
    lora_dropout: float = 0.05
    lora_target: Literal["all", "attention"] = "all"

    def __post_init__(self) -> None:
        modes = self.modes
        if set(modes.values()) == {"frozen"}:
            raise ConfigError(
                "nothing would be trained: --vision, --merger and --language are all frozen. Set at least one to full "
                "or lora."
            )
        if self.language == "full" and "lora" in modes.values():
            lora = [tower for tower, mode in modes.items() if mode == "lora"]
            raise ConfigError(
                f"--language full beside --{lora[0]} lora is refused: the adapter would hold the language model a "
                f"second time. Use --{lora[0]} full, or --language lora."
            )
        if self.has_lora:
            if self.lora_rank < 1:
                raise ConfigError(f"--lora_rank is {self.lora_rank}, must be at least 1")
            if self.lora_alpha <= 0:
                raise ConfigError(
                    f"--lora_alpha is {self.lora_alpha:g}, so LoRA would change nothing; give more than 0"
                )
            if not 0 <= self.lora_dropout < 1:
                raise ConfigError(f"--lora_dropout is {self.lora_dropout}, must be in [0, 1)")

    @property
    def modes(self) -> dict[str, Mode]:
        return {tower: getattr(self, tower) for tower in TOWERS}

    @property
    def has_lora(self) -> bool:
        """Whether the result is an adapter (else full weights)."""
        return "lora" in self.modes.values()

    def lora_settings(self) -> dict[str, Any] | None:
        """The LoRA settings for the run record, or None."""
        settings = {k.removeprefix("lora_"): v for k, v in asdict(self).items() if k.startswith("lora_")}
        return settings if self.has_lora else None


def apply_towers(model: torch.nn.Module, family: Family, towers: Towers, *, masters: bool) -> torch.nn.Module:
    """Freeze, adapt or free each tower of a loaded base, in place.

    Args:
        model: top class of the family.
        family: its names.
        towers: what to train.
        masters: bring everything that is trained to float32 (the rest keeps its dtype); for runs under bf16 autocast.

    Returns:
        the model, wrapped by PEFT where a tower has LoRA.

    Raises:
        ConfigError: the number of adapted modules is not what the configuration implies.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(towers.modes[family.tower_of(name)] == "full")
    if towers.has_lora:
        model = _add_lora(model, family, towers)
    if masters:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def _add_lora(model: torch.nn.Module, family: Family, towers: Towers) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    patterns = family.lora_targets if towers.lora_target == "all" else family.attention_targets
    adapted = [tower for tower, mode in towers.modes.items() if mode == "lora"]
    config = LoraConfig(
        r=towers.lora_rank,
        lora_alpha=towers.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=towers.lora_dropout,
        target_modules="|".join(f"(?:{patterns[tower]})" for tower in adapted),
        modules_to_save=full_modules(model, family, towers) or None,
        task_type="CAUSAL_LM",
    )
    wanted = lora_counts(model.config, towers)
    wrapped = get_peft_model(model, config)
    found = dict.fromkeys(adapted, 0)
    for name, _ in wrapped.named_modules():
        if name.endswith(".lora_A"):
            found[family.tower_of(plain_name(name))] += 1
    if found != wanted:
        raise ConfigError(f"LoRA matched {found} modules, want {wanted}: this base is not built as {family.label} is")
    return wrapped


def lora_counts(config: Any, towers: Towers) -> dict[str, int]:
    """Linear layers that LoRA must adapt, per tower that has LoRA, from the base's config."""
    everything = towers.lora_target == "all"
    counts = {
        "vision": config.vision_config.depth * (4 if everything else 2),
        "merger": 2,
        "language": config.text_config.num_hidden_layers * (7 if everything else 4),
    }
    return {tower: counts[tower] for tower, mode in towers.modes.items() if mode == "lora"}


def full_modules(model: torch.nn.Module, family: Family, towers: Towers) -> list[str]:
    """Modules that an adapter holds whole (PEFT's `modules_to_save`) for towers trained in full beside LoRA ones.

    PEFT cannot hold a ModuleList, so the ViT is named block by block.
    """
    visual: Any = model.get_submodule("model.visual")
    whole = [name for name, part in visual.named_children() if not isinstance(part, torch.nn.ModuleList)]
    whole += [f"blocks.{i}" for i in range(len(visual.blocks))]
    return [
        f"model.visual.{name}"
        for name in whole
        if any(True for _ in visual.get_submodule(name).parameters())
        and towers.modes[family.tower_of(f"model.visual.{name}.")] == "full"
    ]


def plain_name(name: str) -> str:
    """A parameter or module name as the unwrapped model has it, without PEFT's or DDP's prefixes."""
    for prefix in ("module.", "base_model.model."):
        name = name.removeprefix(prefix)
    return name


def checkpoint_activations(model: torch.nn.Module, parts: Collection[str]) -> None:
    """Recompute each block's activations in the backward pass (gradient checkpointing), without reentrance.

    Args:
        model: prepared, or wrapped by PEFT.
        parts: "vision", "language" or both.

    Not through `gradient_checkpointing_enable`: that also hooks the ViT's patch embedding so that its output needs a
    gradient, which sends a frozen ViT through backward and recomputation (seen on transformers 5.17 and 5.23).
    """
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    for part in parts:
        tower = base.model.visual if part == "vision" else base.model.language_model
        tower._set_gradient_checkpointing(
            enable=True, gradient_checkpointing_func=functools.partial(checkpoint, use_reentrant=False)
        )
