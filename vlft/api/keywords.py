"""Turn keyword arguments of the public functions into flags, parsed and checked as in `vlft train`.

`TAKES` lists which function takes which flag; `vlft.config.table` lists all flags.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import starmap
from typing import Any

from vlft.config import table
from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.kits.outcome import Becomes
from vlft.config.names import unknown
from vlft.config.parse import FlagParser
from vlft.config.said import Said
from vlft.config.training import TrainFlags
from vlft.config.translate import translate
from vlft.errors import ConfigError, UsageError

#: The value of a flag, of any type that YAML has. None: the flag's default.
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
#: Function -> the flags it takes. `open_base` takes new flags of data, `load_model` takes new flags of the model.
TAKES: Mapping[str, frozenset[str]] = {
    "open_base": frozenset((set(table.DATA) - _OF_ROWS - {"eval_path", "eval_split"}) | _BASE_ITSELF | {"use_cpu"}),
    "load_rows": frozenset(_OF_ROWS),
    "data_loader": frozenset(_OF_LOADER),
    "load_model": frozenset((set(table.MODEL) - _BASE_ITSELF) | _OF_MODEL),
    "parameter_groups": frozenset({"learning_rate", "vision_lr", "merger_lr", "weight_decay", "loraplus_ratio"}),
}


def said(flags: Mapping[str, Flag]) -> dict[str, Flag]:
    """Return the flags without the ones that are None."""
    return {name: value for name, value in flags.items() if value is not None}


def parsed(
    function: str, flags: Mapping[str, Flag], before: Mapping[str, Flag] | None = None
) -> tuple[DataFlags, ModelFlags, TrainFlags]:
    """Parse keyword arguments as `vlft train` parses flags.

    Args:
        function: the name of the called function, for messages.
        flags: its keyword arguments.
        before: the flags stored in its arguments (`Base.flags`, `Rows.flags`).

    Raises:
        UsageError: a flag is unknown, belongs to another function, or has a value of the wrong kind.
        ConfigError: a value cannot be carried out, or flags contradict each other.
    """
    if strangers := {name: value for name, value in said(flags).items() if name not in TAKES[function]}:
        raise UsageError(f"{function}(): {'; '.join(_not_taken(function, strangers))}")
    verb = "train" if function == "data_loader" else "preview"  # train also compares the flags of batches
    argv = []
    for name, value in said({**(before or {}), **flags}).items():
        words = _words(function, name, value)
        argv += [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
    try:
        data, model, args = FlagParser(verb).parse(argv).flags
    except (UsageError, ConfigError) as error:
        prefix, help_line = f"vlft {verb}: ", f"\n  All flags: vlft {verb} --help all"
        text = str(error).removeprefix(prefix).removesuffix(help_line).replace(f"vlft {verb}", "vlft train")
        raise type(error)(text) from None
    return data, model, args


def _not_taken(function: str, flags: Mapping[str, Flag]) -> Iterator[str]:
    """Yield the reason for each keyword argument that the function does not take."""
    known = set().union(*TAKES.values())
    given = {name: Said(name=name, words=_words(function, name, value)) for name, value in flags.items()}
    foreign = {name: one for name, one in given.items() if name not in table.OF_TRAIN}
    told = translate(foreign, table.kinds("train"))
    for change in (*told.changes, *told.refusals, *told.remarks):
        names = " and ".join(one.name for one in change.said)
        outcome = change.outcome
        if isinstance(outcome, Becomes):
            note = f" ({outcome.note})" if outcome.note else ""
            yield f"{names} is {', '.join(starmap(_spelled, outcome.flags.items()))} here{note}"
        else:
            yield f"{names} is not supported or has no effect here: {outcome.why}"
    explained = {one.name for change in (*told.changes, *told.refusals, *told.remarks) for one in change.said}
    for name in given:
        if name in table.OF_TRAIN:
            others = [f"{other}()" for other in TAKES if name in TAKES[other]]
            yield f"{name} belongs to {' and '.join(others)}" if others else f"{name} has no effect in your own loop"
        elif name not in explained:
            yield unknown(name, known).replace("--", "")


def _spelled(name: str, words: Sequence[str]) -> str:
    """Return a flag as a keyword argument."""
    values = [{"true": True, "false": False}.get(word, word) for word in words]
    value = values[0] if len(values) == 1 else values
    number = isinstance(value, str) and value.replace(".", "", 1).isdigit()
    return f"{name}={value if number else repr(value)}"


def _words(function: str, name: str, value: Any) -> tuple[str, ...]:
    """Return the value of a keyword argument as words of a command line."""
    if isinstance(value, bool):
        return (str(value).lower(),)
    if isinstance(value, str | int | float | os.PathLike):
        return (str(os.fspath(value) if isinstance(value, os.PathLike) else value),)
    if isinstance(value, Sequence) and value and all(isinstance(one, str | os.PathLike) for one in value):
        return tuple(map(os.fspath, value))
    raise UsageError(f"{function}(): {name} is {value!r}, must be a text, a number, true or false, or a list of texts")
