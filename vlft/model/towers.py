"""Which towers train, and how: {vision, merger, language} x {full, lora, frozen}. Needs no torch.

Language-only LoRA is frozen/frozen/lora, vision+language LoRA lora/lora/lora, full full/full/full. `vlft.model.apply`
prepares a loaded base for it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vlft.config.deepspeed import names_zero3
from vlft.errors import ConfigError
from vlft.families import TOWERS, Family, Sizes

Mode = Literal["full", "lora", "frozen"]


@dataclass(frozen=True, kw_only=True)
class Towers:
    """What is trained.

    Attributes:
        vision: the ViT's patch embedding and blocks.
        merger: the two linears (and norm) between ViT and language model.
        language: the language model, its embedding and head.
        lora_rank: of every LoRA matrix.
        lora_alpha: the LoRA update is scaled by alpha / rank.
        lora_dropout: probability of dropout on LoRA's inputs.
        lora_target: "all" linears of a tower's blocks, or its "attention" linears. A merger has no attention: both its
            linears are adapted either way.
        use_dora: whether adapters are DoRA's.
        use_rslora: the update is scaled by alpha / sqrt(rank) instead.
        language_blocks: places of the language model's blocks that train; None: all, and what is outside of blocks.
        vision_blocks: likewise of the vision tower.
        tokens: ids whose embeddings also train, in ascending order.

    Raises:
        ConfigError: nothing would be trained, or one adapter cannot store the combination.
    """

    vision: Mode = "frozen"
    merger: Mode = "frozen"
    language: Mode = "lora"
    lora_rank: int = 32
    lora_alpha: float = 64
    lora_dropout: float = 0.05
    lora_target: Literal["all", "attention"] = "all"
    use_dora: bool = False
    use_rslora: bool = False
    language_blocks: tuple[int, ...] | None = None
    vision_blocks: tuple[int, ...] | None = None
    tokens: tuple[int, ...] = ()

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
        for tower, blocks in (("vision", self.vision_blocks), ("language", self.language_blocks)):
            if blocks is not None and modes[tower] == "frozen":
                raise ConfigError(f"--{tower}_blocks has no effect: --{tower} is frozen. Drop it.")
        if self.tokens and (self.language == "full" or not self.has_lora):
            raise ConfigError(
                "--train_tokens needs an adapter, and a language model that does not train in full. Use --language "
                "lora, or --language frozen beside another tower with lora."
            )
        if self.has_lora:
            if self.lora_rank < 1:
                raise ConfigError(f"--lora_rank is {self.lora_rank}, must be at least 1")
            if self.lora_alpha <= 0:
                raise ConfigError(f"--lora_alpha is {self.lora_alpha:g}, so LoRA would change nothing; use more than 0")
            if not 0 <= self.lora_dropout < 1:
                raise ConfigError(f"--lora_dropout is {self.lora_dropout}, must be in [0, 1)")

    @property
    def modes(self) -> dict[str, Mode]:
        return {tower: getattr(self, tower) for tower in TOWERS}

    @property
    def has_lora(self) -> bool:
        """Whether the result is an adapter, and not full weights."""
        return "lora" in self.modes.values()

    def lora_settings(self) -> dict[str, Any] | None:
        """The LoRA settings for the run record, or None. A variant is named if it is used."""
        if not self.has_lora:
            return None
        settings = {k.removeprefix("lora_"): v for k, v in asdict(self).items() if k.startswith("lora_")}
        variants = {"dora": self.use_dora, "rslora": self.use_rslora}
        return settings | {name: True for name, used in variants.items() if used}

    @property
    def scaling(self) -> float:
        """The factor of every LoRA update."""
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.use_rslora else self.lora_rank)

    def as_line(self) -> str:
        """LoRA's settings with the factor of its updates as text; "" without LoRA."""
        if not self.has_lora:
            return ""
        name = " with ".join([*(["DoRA"] if self.use_dora else []), *(["rsLoRA"] if self.use_rslora else [])]) or "LoRA"
        line = f"{name} rank {self.lora_rank}, alpha {self.lora_alpha:g}: updates scaled by {self.scaling:.4g}"
        if not self.use_rslora or self.lora_rank == 1:
            return line
        plain = self.lora_alpha / self.lora_rank
        return (
            f"{line}, {self.scaling / plain:.3g} times the {plain:.3g} without --use_rslora: a learning rate or an "
            "alpha that suits plain LoRA may be too high"
        )


def check_experts(family: Family, *, language: str | None = None, deepspeed: str | None = None) -> None:
    """Refuse settings that a model with experts cannot be trained with.

    Args:
        family: of the model.
        language: how the language model trains.
        deepspeed: `--deepspeed`, a preset or a file.

    Raises:
        ConfigError: the family has experts, and one of the settings would train or share them.
    """
    if "experts" not in family.features:
        return
    if language == "full":
        raise ConfigError(
            f"--language full: the language model of {family.label} chooses among experts for each token. Experts and "
            "their router stay frozen in vlft: they are nearly all of the weights, and training them needs them spread "
            "over many GPUs. Use --language lora, which trains the other linear layers of the language model, or "
            "--language frozen."
        )
    if names_zero3(deepspeed):
        raise ConfigError(
            f"--deepspeed {deepspeed}: ZeRO-3 splits the weights over the processes, and would collect every expert of "
            f"every layer of {family.label} on each GPU for each micro-batch, although each token uses few of them: a "
            "step takes minutes. Use --deepspeed zero2, or no --deepspeed; each GPU then holds the whole model."
        )


def lora_counts(sizes: Sizes, towers: Towers) -> dict[str, int]:
    """Number of linear layers that LoRA must adapt, for each tower with LoRA."""
    vision, text = sizes.vision, sizes.text
    blocks = {"vision": [vision.block] * vision.depth, "language": [text.linears(layer) for layer in text.layers]}
    chosen = {"vision": towers.vision_blocks, "language": towers.language_blocks}
    linears = {
        tower: [one for place, block in enumerate(found) if _is_in(place, chosen[tower]) for one in block]
        for tower, found in blocks.items()
    }
    everything = towers.lora_target == "all"
    counts = {tower: sum(everything or one.role != "mlp" for one in found) for tower, found in linears.items()}
    counts["merger"] = len(vision.merger) * vision.mergers
    return {tower: counts[tower] for tower, mode in towers.modes.items() if mode == "lora"}


def _is_in(place: int, chosen: tuple[int, ...] | None) -> bool:
    return chosen is None or place in chosen


def plain_name(name: str) -> str:
    """The name of a parameter or module in the unwrapped model, without PEFT's or DDP's prefixes."""
    for prefix in ("module.", "base_model.model."):
        name = name.removeprefix(prefix)
    return name
