"""Files of a model folder, read strictly: JSON, the safetensors index, tensor names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlft.errors import CheckpointError
from vlft.families import Family

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def read_json(path: Path | str) -> dict[str, Any]:
    """A JSON object from disk.

    Raises:
        CheckpointError: missing, not JSON, or not an object; names the file.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. Is the folder complete?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}). Copy the folder again.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds a {type(raw).__name__}, expected an object. Copy the folder again.")
    return raw


def family_of(folder: Path | str) -> Family:
    """The family of the model in `folder`, by its `config.json`.

    Raises:
        CheckpointError: no readable config.json, or a model type that is not ours.
    """
    return Family.of(str(read_json(Path(folder) / "config.json").get("model_type")), where=str(folder))


def bin_advice(folder: Path) -> str:
    """What to do about a folder without safetensors."""
    if pickles := sorted(file.name for file in [*folder.glob("*.bin"), *folder.glob("*.pt")]):
        return (
            f"It has {pickles[0]}: pickled weights run code when opened and are not read. "
            "Load it with transformers and save_pretrained it, which writes safetensors."
        )
    return "Only safetensors weights are read: copy or download them there."


def has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def tensor_index(folder: Path | str) -> dict[str, Path]:
    """Tensor name (as the files spell it) -> safetensors file, for a model in one file or in shards.

    Raises:
        CheckpointError: no weights; an index that names missing files or tensors, or a shard with tensors that the
            index does not give it; an unreadable file.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        try:
            claimed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX}: no readable weight_map ({error!r}). Copy it again.") from None
        found = {name: file for file in sorted(set(claimed.values())) for name in names_in(folder / file)}
        missing = sorted(name for name, file in claimed.items() if found.get(name) != file)
        extra = sorted(found.keys() - claimed.keys())
        if missing or extra:
            raise CheckpointError(
                f"{folder / INDEX}: the index names {len(claimed)} tensors, the shards hold {len(found)}. "
                f"Not where it says: {some_of(missing)}; not named by it: {some_of(extra)}. Copy the folder again."
            )
        return {name: folder / file for name, file in found.items()}
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(names_in(folder / WEIGHTS), folder / WEIGHTS)
    raise CheckpointError(f"{folder}: neither {WEIGHTS} nor {INDEX}. {bin_advice(folder)}")


def names_in(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file, but {INDEX} names it. Copy the folder again.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}). Copy it again.") from None


def open_to_others(folder: Path) -> None:
    """Give a folder's files the rights that newly made files have here.

    safetensors 0.8 writes for the owner alone, and a server often runs as another user.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~mask)


def some_of(names: Iterable[str], count: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(names[:count]) or "none") + more


def module_name(family: Family, tensor: str) -> str:
    """The name transformers' modules have for a tensor, from either spelling (`visual.x` -> `model.visual.x`)."""
    for ours, _ in family.published:
        if tensor.startswith(ours):
            return tensor
    for ours, theirs in family.published:
        if tensor.startswith(theirs):
            return ours + tensor[len(theirs) :]
    return tensor
