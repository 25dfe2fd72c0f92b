"""Strict readers for the files of a model folder: JSON, safetensors headers, the index of shards. Need no torch.

Failed downloads leave Git LFS pointers, dead links, web pages and truncated files under valid names. The errors say
which of these a file is. The format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlft.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LFS = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html")


def absent(path: Path) -> str:
    """Say why a file is missing, and the next step: there is no such file, or it is a link to a missing file."""
    if path.is_symlink():
        return (
            f"a link to {os.readlink(path)}, which does not exist. The folder was copied without the files that its "
            "links point to, or the hub's cache was cleaned up. Download the model again, or copy it with cp -L."
        )
    return "no such file. Is the folder complete?"


def stand_in(path: Path) -> str | None:
    """Say what a file is if its content does not match its name, and the next step; None if it may match."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip().lower()
    if not head:
        return "is empty. Download it again."
    if head.startswith(_LFS):
        return "is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder, or download it again."
    if head.startswith(_PAGES):
        return "is a web page, not the file itself. Download it again."
    return None


def read_json(path: Path | str) -> dict[str, Any]:
    """Read a JSON object from disk.

    Raises:
        CheckpointError: the file is missing, not JSON, or not an object. The message names the file.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {absent(Path(path))}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        what = stand_in(Path(path)) or f"not JSON ({error}). Copy the folder again."
        raise CheckpointError(f"{path}: {what}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds a {type(raw).__name__}, expected an object. Copy the folder again.")
    return raw


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Shape and dtype of one tensor of a safetensors file; the dtype is spelled as in the format (`F32`, `BF16`)."""

    shape: tuple[int, ...]
    dtype: str


def slots_in(file: Path) -> dict[str, Slot]:
    """Map tensor names to their slots, from the header of a safetensors file. Checks the file's size against it.

    Raises:
        CheckpointError: the file is missing, is of another kind, or is truncated.
    """
    try:
        if (what := stand_in(file)) is not None:
            raise CheckpointError(f"{file}: {what}")
        with open(file, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            size = os.fstat(raw.fileno()).st_size
            if size < 8 + length:
                raise CheckpointError(
                    f"{file}: not a complete safetensors file: it has {size:,} bytes, and its header alone needs "
                    f"{length + 8:,}. It is truncated or of another kind. Copy it again."
                )
            header = json.loads(raw.read(length))
        header.pop("__metadata__", None)
        wanted = 8 + length + max((slot["data_offsets"][1] for slot in header.values()), default=0)
        found = {name: Slot(shape=tuple(slot["shape"]), dtype=slot["dtype"]) for name, slot in header.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{file}: {absent(file)}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{file}: not a complete safetensors file ({type(error).__name__}: {error}). Copy it again."
        ) from None
    if size != wanted:
        raise CheckpointError(
            f"{file}: not a complete safetensors file: it has {size:,} bytes, its header promises {wanted:,}. "
            "The download or copy ended early. Copy it again."
        )
    return found


def contents_print(file: Path) -> str:
    """Return a short fingerprint of the tensors of a safetensors file: names, shapes, dtypes and all values.

    Returns:
        16 hex digits of a sha256. Metadata of the file do not change it.

    Raises:
        CheckpointError: the errors of `slots_in`.
    """
    slots = slots_in(file)
    digest = hashlib.sha256()
    with open(file, "rb") as raw:
        header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
        for name in sorted(slots):
            digest.update(f"{name} {json.dumps(header[name], sort_keys=True)}\n".encode())
        while part := raw.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:16]


def weights_advice(folder: Path) -> str:
    """Say what to do about a folder without safetensors files."""
    if links := [name for name in (WEIGHTS, INDEX) if (folder / name).is_symlink()]:
        return f"{links[0]} is {absent(folder / links[0])}"
    if pickles := sorted(file.name for ending in ("bin", "pt", "pth") for file in folder.glob(f"*.{ending}")):
        return (
            f"It has {pickles[0]}: pickled weights run code when opened and are not read. "
            "If you trust it, load the folder with transformers (dtype='auto') and save_pretrained it into another "
            "folder: that writes safetensors."
        )
    if ggufs := sorted(file.name for file in folder.glob("*.gguf")):
        return (
            f"It has {ggufs[0]}: weights of llama.cpp are quantised and have other names, and are not read. Use the "
            "model that they were made from, as safetensors."
        )
    return "Only safetensors weights are read: copy or download them there."


def has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def tensor_index(folder: Path | str) -> dict[str, Path]:
    """Map tensor names, as the files spell them, to their safetensors file, for a model in one file or in shards.

    Raises:
        CheckpointError: there are no weights; the index names missing files or tensors; a shard holds tensors that the
            index does not assign to it; a file cannot be read.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        claimed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(claimed, dict) or not all(isinstance(file, str) for file in claimed.values()):
            raise CheckpointError(f"{folder / INDEX}: no readable weight_map. Copy it again.")
        files = sorted(set(claimed.values()))
        if gone := [file for file in files if not (folder / file).is_file()]:
            raise CheckpointError(
                f"{folder / INDEX}: names {len(files)} files, {len(gone)} of them are missing: {some_of(gone)}. "
                f"{folder / gone[0]}: {absent(folder / gone[0])}"
            )
        found = {name: file for file in files for name in slots_in(folder / file)}
        missing = sorted(name for name, file in claimed.items() if found.get(name) != file)
        extra = sorted(found.keys() - claimed.keys())
        if missing or extra:
            raise CheckpointError(
                f"{folder / INDEX}: the index names {len(claimed)} tensors, the shards hold {len(found)}. "
                f"Not in the file it names: {some_of(missing)}; not in the index: {some_of(extra)}. "
                "Copy the folder again."
            )
        return {name: folder / file for name, file in found.items()}
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(slots_in(folder / WEIGHTS), folder / WEIGHTS)
    raise CheckpointError(f"{folder}: neither {WEIGHTS} nor {INDEX}. {weights_advice(folder)}")


def stored_slots(folder: Path | str) -> dict[str, Slot]:
    """Map tensor names, as the files spell them, to their slots, for all files of a model.

    Raises:
        CheckpointError: the errors of `tensor_index`.
    """
    return {name: slot for file in sorted(set(tensor_index(folder).values())) for name, slot in slots_in(file).items()}


def some_of(names: Iterable[str], count: int = 3) -> str:
    """List the first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(names[:count]) or "none") + more


def tokenizer_settings(text: str) -> tuple[dict[str, Any], str]:
    """Split a tokenizer.json into its settings, parsed, and the text of its vocabulary and what follows.

    A vocabulary of 150,000 tokens takes half a second to parse.

    Raises:
        ValueError: the text has another form.
    """
    head, *words = re.split(r'"vocab"\s*:', text, maxsplit=1)
    if not words:
        raise ValueError("no vocabulary")
    return json.loads(head + '"vocab": null}}'), words[0]
