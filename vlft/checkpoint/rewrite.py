"""Write the files of a model again with some tensors changed. The others keep their names, layouts, dtypes and bytes.

Merges and full runs use it, so that tensors which transformers does not load (`Family.carried`) are kept. One shard at
a time is in memory. `vlft.families.stored` matches parameters with the tensors of files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.checkpoint.shards import Shards
from vlft.errors import CheckpointError
from vlft.families import Family
from vlft.families.stored import Source, is_carried, match
from vlft.model_files import INDEX, read_json, some_of, stored_slots, tensor_index

if TYPE_CHECKING:
    import torch

#: Name of a tensor, and its value -> the tensors to write in its place.
Change = Callable[[str, "torch.Tensor"], Iterable[tuple[str, "torch.Tensor"]]]


def rewrite(
    base: Path,
    out: Path,
    change: Change,
    *,
    progress: Callable[[str], None] = lambda line: None,
    doing: str = "write",
    largest: int | None = None,
) -> None:
    """Write every weight file of a model under its own name into another folder, and its index.

    Args:
        base: folder of the model.
        out: folder to write to.
        change: called once for each tensor; may return none, or several.
        progress: called with a line of text per file.
        doing: first word of that line.
        largest: cut the tensors into new files of at most this many bytes (`Shards`); None: as the model's files.

    Raises:
        CheckpointError: the errors of `tensor_index`.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    files = sorted(set(tensor_index(base).values()))
    weight_map: dict[str, str] = {}
    shards = None if largest is None else Shards(out, largest, {"format": "pt"})
    for number, file in enumerate(files, start=1):
        progress(f"{doing}: {file.name} ({number} of {len(files)})")
        with safe_open(file, framework="pt") as stored:
            names = stored.keys()
            made = (one for name in names for one in change(name, stored.get_tensor(name)))
            if shards is not None:
                for one in made:
                    shards.add(*one)
                continue
            shard = dict(made)
            metadata = stored.metadata() or {"format": "pt"}
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, out / file.name, metadata=metadata)
        weight_map |= dict.fromkeys(shard, file.name)
    if shards is not None:
        shards.finish()
    elif (base / INDEX).is_file():
        _write_index(base, out, weight_map, [file.name for file in files])


def _write_index(base: Path, out: Path, weight_map: Mapping[str, str], files: Iterable[str]) -> None:
    index = read_json(base / INDEX)
    before, after = (sum(map(_content, (folder / name for name in files))) for folder in (base, out))
    if index["weight_map"] == weight_map and before == after:
        shutil.copyfile(base / INDEX, out / INDEX)
        return
    order = [*(name for name in index["weight_map"] if name in weight_map), *weight_map]
    index["weight_map"] = {name: weight_map[name] for name in order}
    index.setdefault("metadata", {})["total_size"] = after
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _content(file: Path) -> int:
    """Bytes of the tensors of a safetensors file."""
    with open(file, "rb") as raw:
        return file.stat().st_size - 8 - int.from_bytes(raw.read(8), "little")


def write_trained(
    base: Path, out: Path, trained: Mapping[str, torch.Tensor], family: Family, *, tied: bool, as_stored: bool
) -> None:
    """Write a model whose trained parameters replace those of its base.

    Args:
        base: folder of the base.
        out: folder to write to.
        trained: parameter in transformers -> value, on any device. A tied head may be missing.
        family: of the base.
        tied: whether the head is the embedding; it is then not written.
        as_stored: cast to the dtype that the tensor has in the base's files.

    Raises:
        CheckpointError: the files of the base have no such parameter, or one of another shape.
    """
    head = family.published_name(family.head)
    ours = {name: value for name, value in trained.items() if not (tied and name == family.head)}
    slots = {name: slot.shape for name, slot in stored_slots(base).items()}
    found = match(family, {name: tuple(value.shape) for name, value in ours.items()}, slots)
    if lost := sorted(ours.keys() - found.sources.keys()):
        raise CheckpointError(
            f"{base}: {len(lost)} trained parameters have no place in its files, e.g. {some_of(lost)}. The files have "
            "changed since the run started."
        )
    values = {
        stored: part
        for name, source in found.sources.items()
        for stored, part in zip(source.names, parts(ours[name], source), strict=True)
    }

    def change(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        if tied and family.published_name(name) == head:
            return []
        if name in values:
            value = values[name].detach()
            tensor = value.to("cpu", tensor.dtype if as_stored else value.dtype)
        return [(name, tensor)]

    rewrite(base, out, change)


def remark_on_carried(base: Path, family: Family) -> str | None:
    """What to know about the tensors of a model that are copied and not trained; None if it has none."""
    count = sum(is_carried(family, name) for name in tensor_index(base))
    if not count:
        return None
    return (
        f"{count} tensors of the base under {', '.join(family.carried)} (heads for further tokens) are copied "
        "unchanged. They fit the language model of the base, so speculative decoding with them may accept fewer tokens."
    )


def copy_configs(base: Path, out: Path) -> None:
    """Copy config.json and, if there is one, generation_config.json of a model, byte by byte."""
    for name in ("config.json", "generation_config.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)


def parts(parameter: torch.Tensor, source: Source) -> list[torch.Tensor]:
    """The parts of a parameter that the tensors of a file hold, as views, in the order of `source.names`."""
    if source.layout == "transposed":
        return [parameter.transpose(1, 2)]
    if source.layout == "each":
        return [part for expert in parameter for part in expert.chunk(source.matrices)]
    return [parameter]
