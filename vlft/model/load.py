"""Open a base: its config, processor and weights, always with safetensors and without remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vlft.errors import CheckpointError
from vlft.families import Family


def load_config(folder: str | Path) -> tuple[Any, Family]:
    """The base's config and family.

    Raises:
        CheckpointError: no `config.json`, unreadable, or of a model type that is not ours.
    """
    from transformers import AutoConfig

    path = Path(folder) / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no config.json there, so it is no model folder. Check --model_id.") from error
    except (json.JSONDecodeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). Download the model again.") from error
    family = Family.of(model_type, where=str(folder))
    return AutoConfig.from_pretrained(folder), family


def load_processor(folder: str | Path) -> Any:
    """The stock processor of a model folder.

    Raises:
        CheckpointError: processor files are missing or broken.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: its processor cannot be loaded ({error}). It needs tokenizer.json, "
            "preprocessor_config.json (or processor_config.json) and a chat template beside the weights."
        ) from error
    if not hasattr(processor, "image_processor"):
        raise CheckpointError(
            f"{folder}: holds a tokenizer but no picture processor (preprocessor_config.json or processor_config.json "
            "is missing). Copy it from the model you started from."
        )
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise CheckpointError(
            f"{folder}: has no chat template, so conversations cannot be rendered. Copy chat_template.jinja (or "
            "chat_template.json) from the model you started from."
        )
    return processor


def load_base(folder: str | Path, family: Family, *, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The base model, on the CPU, with sdpa attention.

    Args:
        folder: model folder.
        family: of its config.
        dtype: of the loaded weights; None keeps what the files hold.

    Raises:
        CheckpointError: weights missing, left over, of another shape, or not safetensors.
    """
    import transformers

    model_class = getattr(transformers, family.model_class)
    try:
        model, info = model_class.from_pretrained(
            folder,
            dtype=dtype or "auto",
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: its weights cannot be loaded ({error}). Download the model again.") from error
    # transformers fills what it does not find with random numbers and warns; a base must be whole.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(str(name) for name in info[kind])
            raise CheckpointError(
                f"{folder}: {len(names)} tensors are {kind.split('_')[0]} for {family.model_class}, e.g. {names[0]}. "
                "Download the model again."
            )
    return model


def empty_model(config: Any, family: Family) -> torch.nn.Module:
    """The architecture on the meta device: names and shapes, no memory (for `vlft plan`)."""
    import transformers

    with torch.device("meta"):
        return getattr(transformers, family.model_class)(config)
