"""Write the flags of a run as YAML that repeats the run from any directory: every path in it is absolute.

Neighbour: `vlft.config.said` reads the file for `--config`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlft.config import places, table
from vlft.config.deepspeed import PRESETS
from vlft.config.kinds import Place
from vlft.config.mix import raw_entries
from vlft.config.rewards import portable
from vlft.files import write_text

#: File beside the YAML that holds the entries of `--data_mix` with absolute paths.
MIX = "data_mix.yaml"
#: Flags whose value is a path if there is one of that name, else a hub id or a preset.
_MAYBE: Mapping[str, tuple[str, ...]] = {"model_id": (), "deepspeed": tuple(PRESETS)}


def write_yaml(path: str | Path, effective: Mapping[str, Any]) -> None:
    """Write flags so that `--config` reads them back from any directory.

    The paths in a file of `--data_mix` are relative to the working directory too, so a copy with absolute paths is
    written beside the YAML.

    Args:
        path: the YAML file.
        effective: flag -> value.

    Raises:
        ConfigError: the file of `--data_mix` cannot be read.
    """
    flags = {name: _portable(name, value) for name, value in effective.items()}
    if "data_mix" in flags:
        copy = Path(path).absolute().with_name(MIX)
        entries = [_entry(raw) for raw in raw_entries(effective["data_mix"])]
        write_text(copy, yaml.safe_dump(entries, sort_keys=False, allow_unicode=True))
        flags["data_mix"] = str(copy)
    write_text(path, yaml.safe_dump(flags, sort_keys=True, allow_unicode=True))


def _portable(name: str, value: Any) -> Any:
    """Return the value of a flag with absolute paths."""
    if name in ("eval_metric", "metric_for_best_model") and isinstance(value, str) and ".py:" in value:
        file, _, function = value.removeprefix("eval_").rpartition(":")
        return f"{_absolute(file)}:{function}"
    if isinstance(value, list):
        return [_portable(name, one) for one in value]
    if not isinstance(value, str):
        return value
    if name == "reward":
        return portable(value)
    kind = table.OF_TRAIN.get(name)
    if isinstance(kind, Place):
        return value if value in kind.words else _absolute(value)
    if name in _MAYBE and value not in _MAYBE[name] and os.path.exists(os.path.expanduser(value)):
        return _absolute(value)
    return value


def _entry(raw: Any) -> Any:
    """Return an entry of a mix with absolute paths."""
    if isinstance(raw, str):
        return _absolute(raw)
    return {**raw, **{key: _absolute(raw[key]) for key in ("path", "image_folder") if raw.get(key) is not None}}


def _absolute(path: str) -> str:
    if os.path.exists(path):
        return os.path.abspath(path)
    path = os.path.expanduser(path)
    if not os.path.isabs(path) and places.PATTERN.search(path):  # of several files
        return os.path.join(glob.escape(os.getcwd()), path)
    return os.path.abspath(path)
