"""Whether the tensors of an adapter are those that vlft would train: ranks, shapes, towers in full, adapted modules.

`vlft.checkpoint.start` asks before a run starts from an adapter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vlft.checkpoint.adapter import PREFIX, Adapter
from vlft.checkpoint.files import ADAPTER_CONFIG
from vlft.checkpoint.plain_lora import check_magnitude
from vlft.errors import CheckpointError
from vlft.families import Family, Sizes
from vlft.model.chosen import mode_of
from vlft.model.towers import Towers, lora_counts
from vlft.model_files import some_of


def instead(path: str) -> str:
    """What to do with an adapter that no run can start from, as the end of a message."""
    how = f"vlft merge {path} OUT, or peft's merge_and_unload"
    return f"Merge it first ({how}), then use --model_id OUT without --adapter."


def check_matrices(path: str, adapter: Adapter, rank: Any, slots: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the shapes of all LoRA matrices with the common rank and with the weights of the base."""
    magnitudes = adapter.magnitudes()
    for module, (a, b) in adapter.matrices().items():
        of_a, of_b = adapter.shapes[a], adapter.shapes[b]
        if of_a[:1] != (rank,) or of_b[1:] != (rank,):
            raise CheckpointError(
                f"{path}: {module} has rank {of_a[0]}, {ADAPTER_CONFIG} says r {rank}; vlft trains one rank. "
                f"{instead(path)}"
            )
        weight = slots.get(f"{module}.weight")
        if weight is not None and (of_b[0], of_a[1]) != weight:
            raise CheckpointError(
                f"{path}: its {module} is of a weight [{of_b[0]}, {of_a[1]}], the base's is {list(weight)}. Is this "
                "the base it was trained on? Pass the right one as --base_model."
            )
        if adapter.settings.get("use_dora"):
            check_magnitude(adapter, module, magnitudes.get(module), rows=of_b[0])


def check_copies(
    path: str, adapter: Adapter, towers: Towers, slots: Mapping[str, tuple[int, ...]], family: Family
) -> None:
    """Compare the tensors that are no LoRA matrices with the towers in full: all of their parameters, and no others."""
    paired = {name for both in adapter.matrices().values() for name in both} | set(adapter.magnitudes().values())
    paired |= {rows.key for rows in adapter.token_rows(family).values()}
    saved = {live.removeprefix(PREFIX): adapter.shapes[key] for live, key in adapter.keys.items() if key not in paired}
    full = [tower for tower, mode in towers.modes.items() if mode == "full"]
    wanted = {name: shape for name, shape in slots.items() if mode_of(name, family, towers) == "full"}
    if extra := sorted(saved.keys() - wanted.keys()):
        raise CheckpointError(
            f"{path}: {len(extra)} tensors belong neither to LoRA matrices nor to a tower in full: {some_of(extra)}. "
            f"{instead(path)}"
        )
    if missing := sorted(wanted.keys() - saved.keys()):
        raise CheckpointError(
            f"{path}: {' and '.join(full)} trained in part: {len(missing)} of {len(wanted)} parameters are not in the "
            f"adapter: {some_of(missing)}. {instead(path)}"
        )
    if other := sorted(name for name in saved if saved[name] != wanted[name]):
        raise CheckpointError(
            f"{path}: its {other[0]} is {list(saved[other[0]])}, the base's is {list(wanted[other[0]])}. Is this the "
            "base it was trained on? Pass the right one as --base_model."
        )


def lora_target(
    path: str,
    adapter: Adapter,
    modes: Mapping[str, Any],
    blocks: Mapping[str, tuple[int, ...]],
    sizes: Sizes,
    family: Family,
) -> str:
    """The value of `--lora_target` that adapts exactly the modules of an adapter in these blocks."""
    modules = list(adapter.matrices())
    found = Counter(family.tower_of(module) for module in modules)
    for target, patterns in (("all", family.lora_targets), ("attention", family.attention_targets)):
        towers = Towers(**modes, **blocks, lora_target=target)  # type: ignore[arg-type]
        known = all(re.fullmatch(patterns[family.tower_of(module)], module) for module in modules)
        if known and found == lora_counts(sizes, towers):
            return target
    every = lora_counts(sizes, Towers(**modes, **blocks))  # type: ignore[arg-type]
    counts = ", ".join(
        f"{found[tower]} of {count} linear layers of the {tower} tower" for tower, count in every.items()
    )
    raise CheckpointError(
        f"{path}: it adapts {counts}. --lora_target is all or attention, and this is neither. {instead(path)}"
    )
