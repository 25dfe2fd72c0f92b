"""Write what `save_model` saves, into a folder that holds nothing or an earlier save of the same base and kind.

`vlft.train.claim` is the same guard for the output folder of `vlft train`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vlft.api.objects import Base
from vlft.checkpoint import ADAPTER_CONFIG, RECORD, copy_configs, write_trained
from vlft.errors import ConfigError
from vlft.train.claim import holds
from vlft.train.folder import save_processor

#: The file that marks a folder of `save_model`: the kind of the model in it, and its base.
MARK = ".vlft-saved.json"
#: Files of models: of whole models and adapters, pickled ones too.
_MODELS = ("*.safetensors", "config.json", ADAPTER_CONFIG, "pytorch_model*.bin", "adapter_model.bin", "*.gguf")
_CHOOSE_ANOTHER = "Choose a new or empty folder."


def save(base: Base, model: torch.nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save an adapter or a whole model, and the processor.

    Raises:
        ConfigError: the folder is the base's own, holds a run or another model, or cannot be written.
    """
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise ConfigError(f"folder is {folder!r}, must be the path of a folder")
    live: Any = model
    out = Path(folder)
    adapter = hasattr(live, "peft_config")
    mark = {"kind": "an adapter" if adapter else "a whole model", "base": _place(base)}
    try:
        _refuse_other(out, base, mark)
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).write_text(json.dumps(mark) + "\n", encoding="utf-8")
        if adapter:
            card = out / "README.md"
            mine = card.read_bytes() if card.exists() else None
            live.save_pretrained(out, save_embedding_layers=False)  # else PEFT asks the hub for the vocabulary's size
            if mine is None:
                card.unlink(missing_ok=True)  # PEFT's empty model card
            else:
                card.write_bytes(mine)  # PEFT wrote its card into it
        else:
            opened = base.opened
            whole = dict(live.named_parameters())
            write_trained(opened.folder, out, whole, opened.family, tied=opened.tied, as_stored=True)
            copy_configs(opened.folder, out)
            for old in out.glob("model*.safetensors*"):  # of a version that named files otherwise; both would be read
                if not (opened.folder / old.name).is_file():
                    old.unlink()
        save_processor(base.processor, out)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{out}: cannot be written ({why}). Choose a folder that can be written.") from error


def _place(base: Base) -> str:
    """Return the base's folder, or its hub id."""
    name = Path(base.opened.name).expanduser()
    return str(name.resolve()) if name.is_dir() else base.opened.name


def _refuse_other(out: Path, base: Base, mark: dict[str, str]) -> None:
    """Refuse a folder whose files a save would spoil. Files that belong to no model are left alone."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file. {_CHOOSE_ANOTHER}")
    if not out.is_dir():
        return
    if out.resolve() == base.opened.folder.resolve():
        raise ConfigError(f"{out}: is the folder of the base model, which would be overwritten. {_CHOOSE_ANOTHER}")
    found = set(holds(out))
    if RECORD in found or "trainer_state.json" in found:
        raise ConfigError(f"{out}: holds a run or a merged model of vlft. {_CHOOSE_ANOTHER}")
    models = sorted(path.name for pattern in _MODELS for path in out.glob(pattern))
    if not models:
        return
    there = _read_mark(out)
    if there is None:
        raise ConfigError(f"{out}: holds a model that save_model() did not write ({models[0]}). {_CHOOSE_ANOTHER}")
    if there != mark:
        raise ConfigError(
            f"{out}: holds {there.get('kind')} of {there.get('base')}, and {mark['kind']} of {mark['base']} would be "
            f"saved into it. {_CHOOSE_ANOTHER}"
        )


def _read_mark(out: Path) -> dict[str, str] | None:
    try:
        found = json.loads((out / MARK).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None
