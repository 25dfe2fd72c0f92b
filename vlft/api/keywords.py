"""Keyword arguments of the public functions -> flags, parsed and checked as `vlft train` does.

Which function takes which flag stands here; `vlft.config.table` says which flags there are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from vlft.config import table
from vlft.config.flags import DataFlags, ModelFlags, TrainFlags
from vlft.config.parse import FlagParser
from vlft.errors import ConfigError, UsageError

#: The value of a flag: what YAML could hold. None is the flag's own default.
Flag = str | int | float | bool | os.PathLike[str] | Sequence[str] | Sequence[os.PathLike[str]] | None

_OF_ROWS = {
    *("data_path", "data_mix", "image_folder", "columns", "missing_tags", "on_bad_row"),
    *("allow_outside_folder", "allow_remote_media", "dataloader_num_workers"),
}
_OF_LOADER = {
    *("global_batch", "gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("seed", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"),
}
_OF_MODEL = {"bf16", "gradient_checkpointing", "use_liger_kernel", "seed"}
_BASE_ITSELF = {"model_id", "model_revision"}
#: Function -> the flags it takes. A new flag of data goes to `open_base`, one of the model to `load_model`.
TAKES: Mapping[str, frozenset[str]] = {
    "open_base": frozenset((set(table.DATA) - _OF_ROWS - {"eval_path"}) | _BASE_ITSELF | {"use_cpu"}),
    "load_rows": frozenset(_OF_ROWS),
    "data_loader": frozenset(_OF_LOADER),
    "load_model": frozenset((set(table.MODEL) - _BASE_ITSELF) | _OF_MODEL),
    "parameter_groups": frozenset({"learning_rate", "vision_lr", "merger_lr", "weight_decay"}),
}


def said(flags: Mapping[str, Flag]) -> dict[str, Flag]:
    """Without the flags that are left at their defaults."""
    return {name: value for name, value in flags.items() if value is not None}


def parsed(
    function: str, flags: Mapping[str, Flag], before: Mapping[str, Flag] | None = None
) -> tuple[DataFlags, ModelFlags, TrainFlags]:
    """Flags as `vlft train` parses them.

    Args:
        function: that was called, for messages.
        flags: its keyword arguments. before: flags of what it was handed.

    Raises:
        UsageError, ConfigError: as `FlagParser.parse`; or a flag belongs to another function.
    """
    known = set().union(*TAKES.values())
    for name in said(flags):
        if name in TAKES[function] or name not in table.OF_TRAIN:
            continue  # what nobody knows is refused below, with what may have been meant
        others = [f"{other}()" for other in TAKES if name in TAKES[other]]
        where = f"Give it to {' or '.join(others)}" if name in known else "In a loop of your own it has no effect"
        raise UsageError(f"{function}(): it does not take {name}. {where}")
    verb = "train" if function == "data_loader" else "preview"  # train compares the flags of batches, too
    argv = [word for name, value in said({**(before or {}), **flags}).items() for word in _words(function, name, value)]
    try:
        data, model, args = FlagParser(verb, (DataFlags, ModelFlags, TrainFlags)).parse(argv).flags
    except (UsageError, ConfigError) as error:
        text = str(error).replace(f"vlft {verb}: ", f"{function}(): ", 1).replace(f"vlft {verb}", "vlft train")
        raise type(error)(text) from None
    return data, model, args


def _words(function: str, name: str, value: Any) -> list[str]:
    """A keyword argument as words of a command line."""
    if isinstance(value, bool):
        return [f"--{name}={str(value).lower()}"]
    if isinstance(value, str | int | float | os.PathLike):
        return [f"--{name}={os.fspath(value) if isinstance(value, os.PathLike) else value}"]
    if isinstance(value, Sequence) and value and all(isinstance(one, str | os.PathLike) for one in value):
        return [f"--{name}", *map(os.fspath, value)]
    raise UsageError(f"{function}(): {name} is {value!r}, must be a text, a number, true or false, or a list of texts")
