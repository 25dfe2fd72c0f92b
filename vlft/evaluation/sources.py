"""Where answers come from: a model, or a file of answers. Reads small files only, and imports no torch.

Neighbours: `vlft.evaluation.ask` opens models, `vlft.evaluation.answers_file` keeps what they say,
`vlft.evaluation.matched` reads files of answers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlft.checkpoint import family_of, find_adapter_or_model, find_base, quantisation_to_answer, resolve_complete
from vlft.errors import ConfigError
from vlft.evaluation.matched import FileSource, read_answers
from vlft.families import Family

ENDINGS = (".jsonl", ".ndjson")
#: Files of a model folder that decide its answers; weights are compared by size and time.
_SMALL, _WEIGHTS = ("*.json", "*.jinja", "merges.txt", "vocab.txt"), "*.safetensors"
#: Files of a run folder that its answers do not depend on.
_IDLE = frozenset(("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"))


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model to ask.

    Attributes:
        name: as the user wrote it.
        family: of the model.
        base_model: `--base_model`, if it is an adapter.
        print: hash of its files and of its base's.
    """

    name: str
    family: Family
    base_model: str | None
    print: str


Source = ModelSource | FileSource


def is_file(name: str) -> bool:
    """Whether a word of the command line names a file of answers."""
    return name.lower().endswith(ENDINGS) and not Path(name).expanduser().is_dir()


def sources_of(names: Sequence[str], base_model: str | None) -> tuple[Source, ...]:
    """Find the models and files of answers.

    Args:
        names: run folders, checkpoints, adapters, models or files of answers.
        base_model: `--base_model`, for adapters.

    Raises:
        CheckpointError: a model is missing or incomplete.
        ConfigError: a file cannot be read, a name is there twice, or `base_model` has no effect.
    """
    real = [os.path.abspath(Path(name).expanduser()) for name in names]
    for name, path in zip(names, real, strict=True):
        if real.count(path) > 1:
            raise ConfigError(f"{name}: is named twice. A model is compared with others: name each once.")
    found = tuple(read_answers(name) if is_file(name) else _model_source(name, base_model) for name in names)
    if base_model is not None and not any(isinstance(one, ModelSource) and one.base_model for one in found):
        raise ConfigError(f"--base_model {base_model}: none of {', '.join(names)} is an adapter. Drop it.")
    return found


def _model_source(name: str, base_model: str | None) -> ModelSource:
    located = find_adapter_or_model(name) if Path(name).expanduser().is_dir() else None
    folders = []
    if located is not None and located.kind == "adapter":
        _, folder = find_base(name, located, base_model)
        folders.append(located.folder)
    else:
        folder, base_model = resolve_complete(name, None), None
    quantisation_to_answer(name, None if located is None else located.record, folder)
    return ModelSource(name=name, family=family_of(folder), base_model=base_model, print=_print_of([*folders, folder]))


def _print_of(folders: Sequence[Path]) -> str:
    found: list[tuple[Any, ...]] = []
    for folder in folders:
        for path in sorted(path for pattern in _SMALL for path in folder.glob(pattern) if path.name not in _IDLE):
            found.append((path.name, hashlib.sha256(path.read_bytes()).hexdigest()))
        for path in sorted(folder.glob(_WEIGHTS)):
            stat = path.stat()
            found.append((path.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:32]
