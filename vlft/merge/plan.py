"""Plan a merge: which adapter tensors change which base tensor, and how. Reads names and shapes, no weights.

Letters: O rows of a weight (out features), I its columns (in features), R the rank of a LoRA pair.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlft.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_tied, module_name, read_json, some_of, tensor_index
from vlft.errors import CheckpointError
from vlft.families import TOWERS, Family
from vlft.files import slots_in

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# Settings of adapter_config.json that the plan acts on, or that leave W + scale * B @ A what it is.
_UNDERSTOOD = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "alpha_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Others (pissa, olora, corda, loftq, ...) change the base's weights when the adapter is attached (peft 0.21).
_PLAIN_INITS = (True, False, "gaussian", "eva")


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one base tensor becomes.

    Attributes:
        how: `lora`: W_OI + scale * B_OR @ A_RI; `replace`: the adapter's own copy (modules_to_save).
        keys: names in the adapter file: (A, B) or (copy,).
        scale: alpha / R, or alpha / sqrt(R) for rsLoRA; 1 for `replace`.
    """

    how: Literal["lora", "replace"]
    keys: tuple[str, ...]
    scale: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All there is to do.

    Attributes:
        index: base tensor name -> file, every tensor of the base.
        updates: base tensor name -> update; the others stay as they are.
        adapter_file: where the updates' keys are.
        towers: tower -> full, lora or frozen, by the adapter's keys.
    """

    index: dict[str, Path]
    updates: dict[str, Update]
    adapter_file: Path
    towers: dict[str, str]


def towers_of_adapter(keys: Iterable[str], family: Family) -> dict[str, str]:
    """What an adapter trained, read from its tensor names.

    Args:
        keys: names in adapter_model.safetensors (`base_model.model.` first), in either spelling of the model's names.
        family: of the base.

    Returns:
        Tower -> `lora` (at least one LoRA pair), `full` (only copies of whole modules, one block suffices), `frozen`.

    Raises:
        CheckpointError: a key that belongs to no tower.
    """
    towers = dict.fromkeys(TOWERS, "frozen")
    for key in keys:
        name = module_name(family, key.removeprefix(_PREFIX))
        try:
            tower = family.tower_of(name)
        except KeyError:
            raise CheckpointError(f"adapter tensor {key}: no part of {family.label}. Is it for another base?") from None
        if ".lora_" in name:
            towers[tower] = "lora"
        elif towers[tower] == "frozen":
            towers[tower] = "full"
    return towers


def plan_merge(adapter: Path, base: Path, family: Family) -> Plan:
    """Match every adapter tensor to the base tensor it changes, each exactly once.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        base: model folder.
        family: of the base.

    Raises:
        CheckpointError: a kind of adapter that W + scale * B @ A does not describe, keys left over, one half of a pair
            missing, shapes or ranks that disagree, or a change to one side of tied embeddings.
    """
    where = adapter / ADAPTER_WEIGHTS
    settings = read_json(adapter / ADAPTER_CONFIG)
    _check_settings(settings, adapter / ADAPTER_CONFIG)
    index = tensor_index(base)
    stored = {family.published_name(name): name for name in index}
    shapes = shapes_in([where])
    base_shapes = shapes_in(index.values())

    updates: dict[str, Update] = {}
    pairs: dict[str, dict[str, str]] = {}
    left_over = []
    for key in sorted(shapes):
        bare = key.removeprefix(_PREFIX)
        lora = _LORA.fullmatch(bare)
        if lora:
            pairs.setdefault(lora["module"], {})[lora["side"]] = key
        elif bare != key and family.published_name(bare) in stored and _is_saved_module(bare, family, settings):
            updates[stored[family.published_name(bare)]] = Update(how="replace", keys=(key,), scale=1.0)
        else:
            left_over.append(key)
    for module, sides in pairs.items():
        target = stored.get(family.published_name(f"{module}.weight"))
        if target is None or set(sides) != {"A", "B"} or target in updates or not sides["A"].startswith(_PREFIX):
            left_over += sides.values()
            continue
        rank, alpha = _rank_and_alpha(module_name(family, module), settings)
        _check_pair(where, target, base_shapes[target], shapes[sides["A"]], shapes[sides["B"]], rank)
        scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
        updates[target] = Update(how="lora", keys=(sides["A"], sides["B"]), scale=scale)
    if left_over:
        raise CheckpointError(
            f"{where}: {len(left_over)} of {len(shapes)} tensors have no place in {base}: {some_of(left_over)}. "
            "Is this the base it was trained on? Name the right one with --base_model."
        )
    if not updates:
        raise CheckpointError(f"{where}: holds no tensor, so there is nothing to merge. Was the run saved whole?")
    for name, update in updates.items():
        if update.how == "replace" and shapes[update.keys[0]] != base_shapes[name]:
            raise CheckpointError(
                f"{where}: {update.keys[0]} is {list(shapes[update.keys[0]])}, the base's {name} is "
                f"{list(base_shapes[name])}. Is this the base it was trained on? Name the right one with --base_model."
            )
    _check_tied(where, base, updates, stored)
    return Plan(index=index, updates=updates, adapter_file=where, towers=towers_of_adapter(shapes, family))


def shapes_in(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape over some safetensors files, from their headers."""
    return {name: slot.shape for file in sorted(set(files)) for name, slot in slots_in(file).items()}


def _check_settings(settings: dict[str, Any], where: Path) -> None:
    """Refuse, by name, every setting under which the adapted weight is not W + scale * B @ A."""
    from peft import LoraConfig

    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {settings.get('peft_type')!r}; only 'LORA' adapters are merged. "
            "Merge it with peft's own merge_and_unload."
        )
    defaults = LoraConfig().to_dict()
    odd = {
        name: value
        for name, value in settings.items()
        if name not in _UNDERSTOOD and value and value != defaults.get(name)
    }
    if settings.get("init_lora_weights", True) not in _PLAIN_INITS:
        odd["init_lora_weights"] = settings["init_lora_weights"]
    if odd:
        shown = ", ".join(f"{name}={value!r}" for name, value in sorted(odd.items()))
        raise CheckpointError(
            f"{where}: {shown}: such an adapter is more than W + scale * B @ A and is not merged here. "
            "Merge it with peft's own merge_and_unload."
        )


def _is_saved_module(bare: str, family: Family, settings: dict[str, Any]) -> bool:
    """Whether adapter_config.json names a module that holds this tensor (peft matches the ends of module names)."""
    parts = module_name(family, bare).split(".")
    owners = [".".join(parts[:end]) for end in range(1, len(parts))]
    return any(owner.endswith(wanted) for owner in owners for wanted in settings.get("modules_to_save") or ())


def _rank_and_alpha(module: str, settings: dict[str, Any]) -> tuple[int, float]:
    """Rank and alpha of one module: the first matching pattern, else the common value, by peft's own matching."""
    from peft.utils.other import get_pattern_key

    ranks: dict[str, int] = settings.get("rank_pattern") or {}
    alphas: dict[str, float] = settings.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), module), settings["r"])
    return rank, alphas.get(get_pattern_key(list(alphas), module), settings["lora_alpha"])


def _check_pair(where: Path, target: str, weight: tuple, a: tuple, b: tuple, rank: int) -> None:
    if len(weight) != 2 or a != (rank, weight[1]) or b != (weight[0], rank):
        raise CheckpointError(
            f"{where}: for {target} {list(weight)} at rank {rank} (adapter_config.json), expected A [{rank}, I] and "
            f"B [O, {rank}] of a linear layer, found A {list(a)}, B {list(b)}. "
            "Is this the base it was trained on? Name the right one with --base_model."
        )


def _check_tied(where: Path, base: Path, updates: dict[str, Update], stored: dict[str, str]) -> None:
    """Tied embeddings are one tensor in two roles; an adapter changes one role, which the files cannot say."""
    if not is_tied(read_json(base / "config.json")):
        return
    ends = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if stored.get(name) in updates]
    if ends:
        raise CheckpointError(
            f"{where}: changes {ends[0]}, which {base} ties to its twin (tie_word_embeddings): merged, both would "
            "change. Untie the base first, or train without it."
        )
