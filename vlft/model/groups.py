"""Parameter groups: tower x weight decay -> parameters and learning rate. Train and plan print them as a table.

Under LoRA+ (arXiv 2402.12354) the B matrices of a tower are a group of their own, with a higher learning rate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlft import text
from vlft.errors import ConfigError
from vlft.families import TOWERS, Family, Sizes
from vlft.model.chosen import TOKENS, lora_patterns, mode_of, token_weights
from vlft.model.towers import Towers, lora_counts, plain_name

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Group:
    """One line of the table, and one group of the optimizer if it is trained.

    Attributes:
        name: `vision`, `vision_no_decay`, `vision_frozen` and so on; `vision_B` for the B matrices under LoRA+,
            `language_tokens` for rows of the embedding.
        parameters: number of scalars.
        lr: peak learning rate; None if frozen.
        weight_decay: None if frozen.
        tensors: the parameters themselves; empty if only their shapes are known.
    """

    name: str
    parameters: int
    lr: float | None
    weight_decay: float | None
    tensors: tuple[torch.nn.Parameter, ...] = ()

    @property
    def trainable(self) -> bool:
        return self.lr is not None

    def as_json(self) -> dict[str, object]:
        return {"name": self.name, "parameters": self.parameters, "trainable": self.trainable, "lr": self.lr}


def parameter_groups(
    model: torch.nn.Module,
    family: Family,
    *,
    learning_rates: Mapping[str, float],
    weight_decay: float,
    loraplus_ratio: float | None = None,
) -> list[Group]:
    """Put every parameter of the model into a group.

    Args:
        model: after `apply_towers`; may be on the meta device.
        family: of the model.
        learning_rates: tower -> peak learning rate.
        weight_decay: for matrices; vectors (norms, biases, DoRA's magnitudes) get none, as in transformers' Trainer.
        loraplus_ratio: learning rate of B matrices over that of A matrices; None: they are in one group.

    Returns:
        groups in the order vision, merger, language; empty groups are left out.
    """
    parts: dict[tuple[str, str], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue  # PEFT's unused copy of a module that is trained in full
        suffix = "_frozen" if not parameter.requires_grad else "" if parameter.ndim > 1 else "_no_decay"
        if TOKENS in name:
            suffix = "_tokens"
        elif loraplus_ratio is not None and not suffix and ".lora_B." in name:
            suffix = "_B"
        parts.setdefault((family.tower_of(plain_name(name)), suffix), []).append(parameter)
    return [
        Group(
            name=tower + suffix,
            parameters=sum(_size(p) for p in parts[tower, suffix]),
            lr=None if ratio is None else learning_rates[tower] * ratio,
            weight_decay=decay,
            tensors=tuple(parts[tower, suffix]),
        )
        for tower in TOWERS
        for suffix, decay, ratio in _suffixes(weight_decay, loraplus_ratio)
        if (tower, suffix) in parts
    ]


def rates(args: Any) -> dict[str, Any]:
    """The arguments of `parameter_groups` that follow from training flags."""
    return {name: getattr(args, name) for name in ("learning_rates", "weight_decay", "loraplus_ratio")}


def _suffixes(weight_decay: float, ratio: float | None) -> tuple[tuple[str, float | None, float | None], ...]:
    """The groups of a tower: what follows its name, weight decay, and the factor of its learning rate; None: frozen."""
    return (
        ("", weight_decay, 1.0),
        ("_B", weight_decay, ratio),
        ("_tokens", weight_decay, 1.0),
        ("_no_decay", 0.0, 1.0),
        ("_frozen", None, None),
    )


def groups_of_shapes(
    family: Family,
    sizes: Sizes,
    towers: Towers,
    *,
    learning_rates: Mapping[str, float],
    weight_decay: float,
    loraplus_ratio: float | None = None,
) -> list[Group]:
    """Return the groups of `parameter_groups` for a model that is not built. They have no tensors.

    Args:
        family: of the model.
        sizes: of the model.
        towers: what trains.
        learning_rates: tower -> peak learning rate.
        weight_decay: for matrices.
        loraplus_ratio: learning rate of B matrices over that of A matrices; None: they are in one group.

    Raises:
        ConfigError: the number of adapted modules is not what the sizes imply.
    """
    patterns = lora_patterns(family, towers)
    counts: dict[tuple[str, str], int] = {}
    adapted: dict[str, int] = {tower: 0 for tower, mode in towers.modes.items() if mode == "lora"}

    def add(tower: str, suffix: str, size: int) -> None:
        counts[tower, suffix] = counts.get((tower, suffix), 0) + size

    for name, shape in family.layout(sizes).items():
        tower = family.tower_of(name)
        mode = mode_of(name, family, towers)
        suffix = "_frozen" if mode != "full" else "" if len(shape) > 1 else "_no_decay"
        add(tower, suffix, math.prod(shape))
        module, _, kind = name.rpartition(".")
        if mode == "lora" and kind == "weight" and re.fullmatch(patterns[tower], module):
            adapted[tower] += 1
            outputs, inputs = shape
            add(tower, "", towers.lora_rank * inputs)
            add(tower, "" if loraplus_ratio is None else "_B", towers.lora_rank * outputs)
            if towers.use_dora:
                add(tower, "_no_decay", outputs)
    if towers.tokens:
        add("language", "_tokens", token_weights(towers, sizes))
    if adapted != (wanted := lora_counts(sizes, towers)):
        raise ConfigError(
            f"LoRA would match {adapted} modules, expected {wanted}: this base is not built as {family.label} is"
        )
    return [
        Group(
            name=tower + suffix,
            parameters=counts[tower, suffix],
            lr=None if ratio is None else learning_rates[tower] * ratio,
            weight_decay=decay,
        )
        for tower in TOWERS
        for suffix, decay, ratio in _suffixes(weight_decay, loraplus_ratio)
        if (tower, suffix) in counts
    ]


def _size(parameter: torch.nn.Parameter) -> int:
    """Scalars in a parameter, also if ZeRO-3 has partitioned it, or if bitsandbytes has packed it."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return math.prod(state.shape)
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def table(groups: Sequence[Group], choices: Sequence[str] = ()) -> str:
    """The groups as a table in plain text, and below it the parts of towers that were chosen (`chosen.described`)."""
    rows = [
        (
            group.name,
            f"{group.parameters:,}",
            f"{group.lr:.3g}" if group.lr is not None else "frozen",
            f"{group.weight_decay:.3g}" if group.weight_decay is not None else "-",
        )
        for group in groups
    ]
    frozen = [place for place, group in enumerate(groups) if not group.trainable]
    lines = text.table(("what", "parameters", "learning rate", "weight decay"), rows, soft=frozen)
    trained = sum(g.parameters for g in groups if g.trainable)
    total = sum(g.parameters for g in groups)
    return "\n".join((lines, f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%})", *choices))
