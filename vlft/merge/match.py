"""Plan a merge: which adapter tensors change which base tensor, and how.

Reads names and shapes; it reads weights only to compare the copies of a tied embedding and head.

Letters: O rows of a weight (out features), I columns of a weight (in features), R rank of a LoRA pair.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlft.checkpoint import (
    ADAPTER_CONFIG,
    PREFIX,
    Adapter,
    is_tied,
    read_json,
    some_of,
    tensor_index,
)
from vlft.checkpoint.plain_lora import check_magnitude, check_plain, towers_of_adapter
from vlft.errors import CheckpointError
from vlft.families import Family
from vlft.model_files import slots_in

#: Parts of key names of adapters that are more than two matrices per weight.
_ODD_PARTS = r"lora_embedding_|lora_magnitude_vector|lora_bias|hada_|lokr_|oft_|ia3_"


@dataclass(frozen=True, kw_only=True)
class Update:
    """How one base tensor changes.

    Attributes:
        how: `lora`: W_OI + scale * B_OR @ A_RI; `dora`: the same with rows of the lengths in m_O; `replace`: a copy in
            the adapter's folder; `rows`: W_OI with some rows from the adapter; `keep`: unchanged.
        file: the file of the adapter's folder that holds the keys.
        keys: names in that file: (A, B) or with DoRA (A, B, m), and W if it is not the base's; (copy,) or ().
        scale: alpha / R, or alpha / sqrt(R) for rsLoRA; 1 otherwise.
        ids: the rows that `rows` replaces.
    """

    how: Literal["lora", "dora", "replace", "rows", "keep"]
    file: Path
    keys: tuple[str, ...]
    scale: float = 1.0
    ids: tuple[int, ...] = ()

    @property
    def onto(self) -> tuple[str, ...]:
        """The name of W in the adapter's file, if LoRA changes that tensor and not the base's; otherwise ()."""
        return self.keys[{"lora": 2, "dora": 3}.get(self.how, len(self.keys)) :]


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """All changes of a merge.

    Attributes:
        index: base tensor name -> file, for every tensor of the base.
        updates: base tensor name -> update; the other tensors do not change.
        untied: whether the base ties head and embedding and the merged ones differ; config.json then changes.
        head: how to make the head from the tied embedding; None if the base's files hold a head, or it stays tied.
        ends: names of embedding and head in the merged files.
        towers: tower -> full, lora or frozen, from the adapter's keys.
    """

    index: dict[str, Path]
    updates: dict[str, Update]
    untied: bool
    head: Update | None
    ends: tuple[str, str]
    towers: dict[str, str]


def plan_merge(adapter: Adapter, base: Path, family: Family) -> MergePlan:
    """Match every tensor of an adapter's folder to the base tensor it changes, each exactly once.

    Args:
        adapter: as read for this base.
        base: model folder.
        family: of the base.

    Raises:
        CheckpointError: neither W + scale * B @ A nor DoRA describes this kind of adapter, keys are left over, one
            half of a pair is missing, or shapes or ranks disagree.
    """
    where = adapter.file
    check_plain(
        adapter.settings,
        adapter.folder / ADAPTER_CONFIG,
        refusal="is not merged here. Merge it with peft's own merge_and_unload",
    )
    index = tensor_index(base)
    stored = {family.published_name(name): name for name in index}
    sizes = {family.published_name(name): shape for name, shape in shapes_in(index.values()).items()}
    tied = is_tied(read_json(base / "config.json"))
    first, last = ends = family.published_name(family.embedding), family.published_name(family.head)
    if tied:
        sizes.setdefault(last, sizes[first])
    changes: dict[str, Update] = {}
    saved_whole = adapter.embeddings(family)
    left_over = []
    pairs = adapter.pairs()
    rows = _rows(adapter, family, sizes, tied=tied)
    paired = {key for pair in pairs.values() for key in pair.keys} | {one.keys[0] for one in rows.values()}
    dora = bool(adapter.settings.get("use_dora"))
    for live in sorted(adapter.keys):
        key, bare = adapter.keys[live], live.removeprefix(PREFIX)
        if key in paired:
            continue
        name = family.published_name(bare)
        if name in sizes and (bare in saved_whole or adapter.owner(bare, family) is not None):
            _check_copy(where, key, adapter.shapes[key], name, sizes[name])
            changes[name] = Update(how="replace", file=where, keys=(key,))
        else:
            left_over.append(key)
    for module, pair in pairs.items():
        name = family.published_name(f"{module}.weight")
        replaced = changes.get(name)
        if name not in sizes or (replaced is not None and f"{module}.weight" not in saved_whole):
            left_over += pair.keys
            continue
        _check_pair(where, name, sizes[name], adapter.shapes[pair.a], adapter.shapes[pair.b], pair.rank)
        if dora:
            check_magnitude(adapter, module, pair.magnitude, rows=sizes[name][0])
        scale = pair.alpha / (math.sqrt(pair.rank) if adapter.settings.get("use_rslora") else pair.rank)
        onto = replaced.keys if replaced is not None else ()  # peft also saves an embedding that it adapts
        changes[name] = Update(how="dora" if dora else "lora", file=where, keys=(*pair.keys, *onto), scale=scale)
    if left_over:
        raise CheckpointError(_no_place(where, left_over, len(adapter.shapes), base))
    for name, update in rows.items():
        if name in changes:
            raise CheckpointError(
                f"{where}: {update.keys[0]} changes rows of {name}, which {changes[name].keys[0]} changes too. The "
                "order of the two is unknown. Merge it with the kit that trained it."
            )
        changes[name] = update
    for bare, (file, key) in adapter.copies.items():
        name = family.published_name(bare)
        if name in changes:
            raise CheckpointError(
                f"{file}: {key} replaces {name}, which the adapter changes too. The order of the two is unknown. Merge "
                "it with the kit that trained it."
            )
        changes[name] = Update(how="replace", file=file, keys=(key,))
    if not changes:
        raise CheckpointError(f"{where}: holds no tensor, so there is nothing to merge. Was the run saved completely?")
    shared = {family.published_name(bare) for bare in adapter.replaced(family)}
    untied = tied and _unties(changes, shared, ends)
    if untied and first not in changes and last in changes and changes[last].onto:
        changes[first] = Update(how="replace", file=where, keys=changes[last].onto)  # it was the tied tensor
    head = None
    if tied and not untied and last in changes:  # one tensor has both roles, so both take the value
        changes.setdefault(first, changes.pop(last))
    if first in rows and tied and last in stored:
        changes[last] = rows[first]  # some tools also write the tied head
    if untied and last not in stored:
        head = changes.pop(last, Update(how="keep", file=where, keys=()))
    return MergePlan(
        index=index,
        updates={stored[name]: update for name, update in changes.items()},
        untied=untied,
        head=head,
        ends=(stored.get(first, first), last),
        towers=towers_of_adapter([*adapter.keys, *adapter.copies], family),
    )


def _rows(adapter: Adapter, family: Family, sizes: Mapping[str, tuple[int, ...]], *, tied: bool) -> dict[str, Update]:
    """Published name of embedding or head -> the rows that the adapter replaces in it.

    Raises:
        CheckpointError: a row is not in the base, or the rows of a tied embedding and head differ.
    """
    found = adapter.token_rows(family)
    for name, rows in found.items():
        shape, wanted = adapter.shapes[rows.key], sizes[family.published_name(name)]
        if len(shape) != 2 or shape[1:] != wanted[1:] or max(rows.ids) >= wanted[0]:
            raise CheckpointError(
                f"{adapter.file}: {rows.key} {list(shape)} is of tokens up to {max(rows.ids)}, the base's {name} is "
                f"{list(wanted)}. Is this the base it was trained on? Pass the right one as --base_model."
            )
    if tied and family.head in found:  # peft keeps both equal only if it wraps the embedding alone
        raise CheckpointError(
            f"{adapter.folder / ADAPTER_CONFIG}: trainable_token_indices names the head, which is the embedding in "
            "this base, and has other rows for it. Merge it with peft's own merge_and_unload, into a base that is not "
            "tied."
        )
    return {
        family.published_name(name): Update(how="rows", file=adapter.file, keys=(rows.key,), ids=rows.ids)
        for name, rows in found.items()
    }


def _unties(changes: dict[str, Update], shared: Collection[str], both: tuple[str, str]) -> bool:
    """Whether tied embedding and head differ after these changes.

    peft adapts each of them separately, and a change of one does not change the other. A tensor that replaces the
    base's own (`shared`) changes both, unless each has its own replacement.
    """
    import torch
    from safetensors import safe_open

    ends = [name for name in both if name in changes]
    if not ends:
        return False
    if any(changes[name].how in ("lora", "dora") for name in ends):
        return True
    if changes[ends[0]].how == "rows":
        return False  # `_rows` refuses rows of one of the two
    if len(ends) == 1:
        return ends[0] not in shared
    values = []
    for name in ends:
        with safe_open(changes[name].file, framework="pt") as file:
            values.append(file.get_tensor(changes[name].keys[0]))
    return not torch.equal(*values)


def _no_place(where: Path, keys: list[str], count: int, base: Path) -> str:
    """Why tensors of an adapter cannot be merged, and what to do."""
    what = f"{where}: {len(keys)} of {count} tensors have no place in {base}: {some_of(keys)}. "
    odd = sorted({part for key in keys for part in key.split(".") if re.match(_ODD_PARTS, part)})
    if odd:
        return what + f"{', '.join(odd)} is more than W + scale * B @ A. Merge it with peft's own merge_and_unload."
    return what + "Is this the base it was trained on? Pass the right one as --base_model."


def _check_copy(where: Path, key: str, found: tuple[int, ...], name: str, wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise CheckpointError(
            f"{where}: {key} is {list(found)}, the base's {name} is {list(wanted)}. "
            "Is this the base it was trained on? Pass the right one as --base_model."
        )


def shapes_in(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape for the tensors of safetensors files, from their headers."""
    return {name: slot.shape for file in sorted(set(files)) for name, slot in slots_in(file).items()}


def _check_pair(where: Path, target: str, weight: tuple, a: tuple, b: tuple, rank: int) -> None:
    if len(weight) != 2 or a != (rank, weight[1]) or b != (weight[0], rank):
        raise CheckpointError(
            f"{where}: for {target} {list(weight)} at rank {rank} (adapter_config.json), expected A [{rank}, I] and "
            f"B [O, {rank}] of a linear layer, found A {list(a)}, B {list(b)}. "
            "Is this the base it was trained on? Pass the right one as --base_model."
        )
