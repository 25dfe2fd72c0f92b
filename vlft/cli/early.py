"""Refuse wrong folders before torch is imported. The verbs check them again when they open them."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlft.checkpoint import (
    check_sharing,
    family_of,
    find_adapter_or_model,
    find_base,
    quantisation_to_answer,
    require_bitsandbytes,
    resolve_complete,
    resolve_model,
)
from vlft.checkpoint.start import read_start, recorded_start
from vlft.config.checks import contradictions
from vlft.config.parse import train_types
from vlft.config.values import Values
from vlft.errors import ConfigError
from vlft.families import Family
from vlft.model.quantise import Quantisation
from vlft.model.quantised_files import QuantisedFiles, is_stored_quantised
from vlft.model.towers import check_experts
from vlft.train.claim import record_there, refuse_other


def check_run(values: Mapping[str, Any], *, here: bool = False) -> None:
    """Check the base and the output folder of a run. Only the process of rank 0 does.

    Args:
        values: the flags that were set.
        here: whether this machine carries it out, and so needs the packages.

    Raises:
        CheckpointError: the base is missing or cannot be used, no run on it can start from the adapter, the output
            folder holds something else than a run on a base of this family, or a package is missing.
        ConfigError: the base has experts, which the flags would train or share; or the adapter differs from the flags.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    family = base = None
    if "model_id" in values:
        base = resolve_model(values["model_id"], values.get("model_revision"))
        family = family_of(base)
        check_experts(family, language=values.get("language"), deepspeed=values.get("deepspeed"))
    if "output_dir" in values:
        refuse_other(Path(values["output_dir"]), family=family)
    decided = dict(values)
    if "adapter" in values and base is not None and family is not None:
        decided |= _check_adapter(values, base, family)
    if base is not None and family is not None:
        _check_quantised(decided, base, family, here=here)


def _check_quantised(values: Mapping[str, Any], base: Path, family: Family, *, here: bool) -> None:
    """Check that a quantised base can be trained as the flags say, and that this machine can do it."""
    stored = QuantisedFiles.of(base, family).quantisation if is_stored_quantised(base) else None
    check_sharing(str(values["model_id"]), stored, values.get("deepspeed"))
    flags: dict[str, Any] = {"bits": "16", "quant_type": "nf4", "double_quant": True} | dict(values)
    double = str(flags["double_quant"]).lower() == "true"
    found = stored or Quantisation.of(bits=str(flags["bits"]), quant_type=flags["quant_type"], double=double)
    if here and found is not None:
        require_bitsandbytes(values["model_id"], found)


def _check_adapter(values: Mapping[str, Any], base: Path, family: Family) -> dict[str, Any]:
    """Check the adapter to start from against the base and the flags, and the flags with what it decides.

    Returns:
        The flags that it decides.
    """
    start = None
    if "output_dir" in values:
        there = record_there(values["output_dir"], values.get("resume_from_checkpoint"))
        start = None if there is None else recorded_start(values["adapter"], there)
    if start is None:
        start = read_start(values["adapter"], values["model_id"], base, family)
    start.agree(values)
    decided = {name: value for name, value in {**values, **start.settings}.items() if name != "adapter"}
    words = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in decided.items()}
    for problem in contradictions(Values(words), "train"):
        raise ConfigError(f"{problem} The adapter {start.name} sets {_shown(start.settings)}.")
    return dict(start.settings)


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"--{name} {value}" for name, value in settings.items())


def checked_types(values: Mapping[str, Any], extra: Namespace) -> tuple[type, ...]:
    """Check the folders, then return the dataclasses of a training run. Raises the errors of `check_run`."""
    check_run(values, here=True)
    return train_types(values, extra)


def check_model(path: str, base_model: str | None) -> None:
    """Check a run, an adapter or a model to chat with.

    Raises:
        CheckpointError: it is missing or incomplete, its base cannot be opened, or needs a package.
        ConfigError: `base_model` is set for a model that needs none.
    """
    found = find_adapter_or_model(path) if Path(path).expanduser().is_dir() else None
    if found is not None and found.kind == "adapter":
        _, folder = find_base(path, found, base_model)
    else:
        folder = resolve_complete(path, base_model)
    quantisation_to_answer(path, None if found is None else found.record, folder)
