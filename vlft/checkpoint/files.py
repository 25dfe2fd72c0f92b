"""File names of adapters, the family of a model folder, and tensor names as transformers' modules spell them."""

from __future__ import annotations

from pathlib import Path

from vlft.families import Family
from vlft.model_files import read_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def family_of(folder: Path | str) -> Family:
    """The family of the model in `folder`, from its `config.json`.

    Raises:
        CheckpointError: there is no readable config.json, or the model type is not supported.
    """
    return Family.of(read_json(Path(folder) / "config.json").get("model_type"), where=str(folder))


def module_name(family: Family, tensor: str) -> str:
    """A tensor's name in transformers' modules, from its module or published name (`visual.x` -> `model.visual.x`)."""
    for ours, _ in family.published:
        if tensor.startswith(ours):
            return tensor
    for ours, theirs in family.published:
        if tensor.startswith(theirs):
            return ours + tensor[len(theirs) :]
    return tensor
