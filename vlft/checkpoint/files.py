"""Names of what a run keeps in its folder, and of tensors in the spellings of module and published file."""

from __future__ import annotations

from pathlib import Path

from vlft.families import Family
from vlft.model_files import read_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def family_of(folder: Path | str) -> Family:
    """The family of the model in `folder`, by its `config.json`.

    Raises:
        CheckpointError: no readable config.json, or a model type that is not ours.
    """
    return Family.of(read_json(Path(folder) / "config.json").get("model_type"), where=str(folder))


def module_name(family: Family, tensor: str) -> str:
    """The name transformers' modules have for a tensor, from either spelling (`visual.x` -> `model.visual.x`)."""
    for ours, _ in family.published:
        if tensor.startswith(ours):
            return tensor
    for ours, theirs in family.published:
        if tensor.startswith(theirs):
            return ours + tensor[len(theirs) :]
    return tensor
