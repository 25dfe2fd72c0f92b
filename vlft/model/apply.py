"""Prepare a loaded base for training: freeze, adapt or unfreeze each tower, and recompute activations.

Neighbours: `vlft.model.towers` says what trains, `vlft.model.lora` computes layers with LoRA.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint

from vlft.errors import ConfigError
from vlft.families import Family
from vlft.model import adapt, dora, lora, token_rows
from vlft.model.chosen import TOKENS, lora_patterns, mode_of
from vlft.model.packed import known_to_peft
from vlft.model.towers import Mode, Towers, lora_counts, plain_name


def apply_towers(
    model: torch.nn.Module,
    family: Family,
    towers: Towers,
    *,
    masters: bool,
    adapters: Literal["fused", "peft"] = "fused",
    computing: torch.dtype | None = None,
) -> torch.nn.Module:
    """Freeze, adapt or unfreeze each tower of a loaded base, in place.

    Args:
        model: top class of the family.
        family: of the model.
        towers: what to train.
        masters: convert trained parameters to float32 (others keep their dtype); for runs under bf16 autocast.
        adapters: what computes layers with LoRA: one function for layer and adapter (`vlft.model.lora`), or PEFT.
        computing: the dtype of matmuls under autocast; None: without autocast, float32.

    Returns:
        the model, wrapped by PEFT if a tower has LoRA.

    Raises:
        ConfigError: the number of adapted modules is not what the configuration implies, a parameter belongs to no
            tower, or a parameter of a tower in full would not train.
    """
    whole = set()
    for name, parameter in model.named_parameters():
        mode = _mode_of(name, family, towers)
        parameter.requires_grad_(mode == "full")
        if mode == "full":
            whole.add(name)
    if towers.has_lora:
        model = _add_lora(model, family, towers)
        if towers.use_dora:
            dora.start(model, computing or torch.float32)
        _check_whole(model, whole, family)
        token_rows.bind(model, towers.tokens)
        if adapters == "fused":
            lora.bind(model)
    if masters:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def _add_lora(model: torch.nn.Module, family: Family, towers: Towers) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    patterns = lora_patterns(family, towers)
    config = LoraConfig(
        r=towers.lora_rank,
        lora_alpha=towers.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=towers.lora_dropout,
        target_modules="|".join(f"(?:{pattern})" for pattern in patterns.values()),
        modules_to_save=full_modules(model, family, towers) or None,
        use_dora=towers.use_dora,
        use_rslora=towers.use_rslora,
        trainable_token_indices=token_rows.setting(family, model.config, towers.tokens),
        task_type="CAUSAL_LM",
    )
    wanted = lora_counts(family.sizes(model.config), towers)
    with known_to_peft(model):
        wrapped = get_peft_model(model, config)
    found = dict.fromkeys(patterns, 0)
    for name, _ in wrapped.named_modules():
        if name.endswith(".lora_A"):
            found[family.tower_of(plain_name(name))] += 1
    if found != wanted:
        raise ConfigError(
            f"LoRA matched {found} modules, expected {wanted}: this base is not built as {family.label} is"
        )
    return wrapped


def full_modules(model: torch.nn.Module, family: Family, towers: Towers) -> list[str]:
    """Modules that an adapter stores completely (PEFT's `modules_to_save`): towers in full beside towers with LoRA.

    These are the largest modules that belong to one such tower, and to its chosen blocks. PEFT cannot save a list of
    modules, so each entry of a list is named.

    Raises:
        ConfigError: a parameter of a tower in full is in no module that PEFT can save.
    """
    names: list[str] = []

    def walk(module: torch.nn.Module, name: str) -> None:
        inside = [f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters()]
        found = {(_tower_of(key, family), _mode_of(key, family, towers)) for key in inside}
        if all(mode != "full" for _, mode in found):
            return
        if len(found) == 1 and name and not isinstance(module, _LISTS):
            names.append(name)
            return
        for key, child in module.named_children():
            walk(child, f"{name}.{key}".lstrip("."))

    walk(model, "")
    lost = [
        name
        for name, _ in model.named_parameters()
        if _mode_of(name, family, towers) == "full" and not any(name.startswith(f"{one}.") for one in names)
    ]
    if lost:
        raise ConfigError(_untrained(lost, family))
    return names


#: Modules without a forward of their own, which PEFT cannot wrap.
_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict)


def _tower_of(parameter: str, family: Family) -> str:
    try:
        return family.tower_of(parameter)
    except KeyError as error:
        raise ConfigError(
            f"the model has a parameter {parameter}, which belongs to no tower of {family.label}: this base is not "
            f"built as {family.label} is"
        ) from error


def _mode_of(parameter: str, family: Family, towers: Towers) -> Mode:
    _tower_of(parameter, family)
    return mode_of(parameter, family, towers)


def _check_whole(wrapped: torch.nn.Module, whole: Collection[str], family: Family) -> None:
    """Check that the parameters that train, except LoRA matrices, are those of towers in full.

    Raises:
        ConfigError: they differ.
    """
    trained = {
        plain_name(name).replace(".modules_to_save.default.", ".")
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad and ".lora_" not in name and TOKENS not in name
    }
    if lost := sorted(set(whole) - trained):
        raise ConfigError(_untrained(lost, family))
    if extra := sorted(trained - set(whole)):
        raise ConfigError(f"{len(extra)} parameters would train that belong to no trained tower, e.g. {extra[0]}")


def _untrained(names: list[str], family: Family) -> str:
    return (
        f"{len(names)} parameters of a tower that trains in full would not train: {', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''}. An adapter cannot store them in {family.label}. "
        "Set that tower to lora or frozen, or all three towers to full."
    )


def checkpoint_activations(model: torch.nn.Module, parts: Collection[str]) -> None:
    """Recompute each block's activations in the backward pass (non-reentrant gradient checkpointing).

    Args:
        model: prepared for training, with or without PEFT.
        parts: "vision", "language" or both.
    """
    once = functools.partial(checkpoint, use_reentrant=False)
    for part in adapt.PARTS:
        if part in parts:
            adapt.recompute(model, part, once)
            for block in adapt.blocks_without_backward(model, part):
                for module in block.modules():
                    if hasattr(module, "gradient_checkpointing"):
                        module.gradient_checkpointing = False  # type: ignore[assignment]
