"""Refuse a base that cannot be used, from its small files alone and before rows are read.

`check_base` checks the model, `check_processor` checks the files that make tokens and patches. `vlft.model.load` proves
that the tokenizer, the chat template and the weights work.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from vlft.errors import CheckpointError
from vlft.families import Family
from vlft.model_files import absent, read_json, tensor_index

#: Endings of the names under which quantised copies of a model are published.
_QUANTISED_NAME = re.compile(r"-(unsloth-)?(bnb-)?(awq|gptq|fp8|nf4|4bit|8bit|int[48]|w[48]a\d+)\b.*$", re.IGNORECASE)


def check_base(folder: Path) -> Family:
    """Check a model folder's config.json, generation_config.json and the headers of its weights.

    Returns:
        The family of the model.

    Raises:
        CheckpointError: a file is not JSON, the model type is not supported, or the weights are quantised or
            incomplete.
    """
    config = read_json(folder / "config.json")
    family = Family.of(config.get("model_type"), where=str(folder))
    _refuse_quantised(folder, config)
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")  # it is copied into trained and merged folders
    tensor_index(folder)
    return family


def _refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    found = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if found is None:
        return
    words = found if isinstance(found, dict) else {}
    bits = next((f"{n} bits" for n in (4, 8) if words.get(f"load_in_{n}bit")), None)
    method = words.get("quant_method") or (f"bitsandbytes, {bits}" if bits else "an unnamed method")
    unquantised, cut = _QUANTISED_NAME.subn("", str(config.get("_name_or_path") or folder.name))
    raise CheckpointError(
        f"{folder}: its weights are quantised: config.json has a quantization_config ({method}). Only weights in "
        "float32, bfloat16 or float16 are read. Use the unquantised model"
        + (f", probably {unquantised}." if cut else ", e.g. Qwen/Qwen2-VL-2B-Instruct.")
    )


def check_processor(folder: Path, files: Sequence[Path], *, read: Collection[str] = ()) -> None:
    """Refuse a tokenizer or picture processor with files that are missing or broken.

    Args:
        folder: for messages.
        files: of tokenizer, picture processor and chat template, from any folders.
        read: names of files that were already read.

    Raises:
        CheckpointError: names what is missing, or the file that is not JSON.
    """
    names = {file.name for file in files}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        missing = [name for name in ("tokenizer.json", "vocab.json", "merges.txt") if name not in names]
        dead = next((f" {name} is {absent(folder / name)}" for name in missing if (folder / name).is_symlink()), "")
        raise CheckpointError(
            f"{folder}: has no tokenizer: {', '.join(missing)} missing. A tokenizer is tokenizer.json, or vocab.json "
            f"and merges.txt.{dead or ' Copy them from the model you started from.'}"
        )
    if not names & {"preprocessor_config.json", "processor_config.json"}:
        raise CheckpointError(
            f"{folder}: has no picture processor: neither preprocessor_config.json nor processor_config.json. "
            "Copy it from the model you started from."
        )
    for file in files:
        if file.suffix == ".json" and file.name not in read:
            read_json(file)
