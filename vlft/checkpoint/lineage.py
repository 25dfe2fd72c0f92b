"""Which base an adapter belongs to: where it is, how that is known, and the processor that goes with the two."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from vlft.checkpoint.door import check_processor
from vlft.checkpoint.files import ADAPTER_CONFIG
from vlft.checkpoint.folders import Located, resolve_model
from vlft.checkpoint.weights import base_fingerprint
from vlft.errors import CheckpointError
from vlft.model.load import load_processor
from vlft.model_files import read_json

# Taken group by group from the run, else from the base: half a tokenizer of each would be neither.
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
TEMPLATE_FILES = ("chat_template.json", "chat_template.jinja")


def find_base(run: str | Path, found: Located, base_model: str | None) -> tuple[str, Path]:
    """Name and folder of the base of an adapter: the user's word, else the run's.

    Args:
        run: what the user named, for messages.
        found: the adapter there.
        base_model: `--base_model`, a folder or hub id.

    Raises:
        CheckpointError: nothing names the base, or it cannot be opened.
    """
    if base_model is not None:
        return base_model, resolve_model(base_model)
    if not found.base_model:
        raise CheckpointError(f"{run}: neither vlft.json nor adapter_config.json names its base. Give --base_model.")
    try:
        return found.base_model, resolve_model(found.base_model, found.base_revision)
    except CheckpointError as error:
        raise CheckpointError(f"{run}: its base cannot be opened. {error} Or say where it is: --base_model.") from None


def check_lineage(run: str | Path, found: Located, base_id: str, base: Path) -> str:
    """How we know that an adapter belongs to this base, in words.

    Raises:
        CheckpointError: it is known not to: the run recorded the fingerprint of other weights.
    """
    if found.record is None:
        return (
            f"no vlft.json in {run}: names and shapes fit {base_id}, and adapter_config.json names "
            f"{found.base_model}; that the base's weights are the ones it was trained on cannot be checked"
        )
    there, here = found.record.base_fingerprint, base_fingerprint(base)
    if there != here:
        raise CheckpointError(
            f"{run}: trained on {found.record.base_model} with fingerprint {there}, but {base_id} has {here}: "
            "another base, or its weights have changed since. Name the right one with --base_model."
        )
    if found.record.lora is not None:
        config = read_json(found.folder / ADAPTER_CONFIG)
        for ours, theirs in (("rank", "r"), ("alpha", "lora_alpha")):
            if config.get(theirs) != found.record.lora[ours]:
                raise CheckpointError(
                    f"{run}: its {ADAPTER_CONFIG} says {theirs} {config.get(theirs)}, its vlft.json says "
                    f"{found.record.lora[ours]}: one was changed since training. Restore it from a checkpoint-N."
                )
    return f"fingerprint {here} of {base_id} is the one the run recorded"


def processor_files(run: Path, base: Path) -> list[Path]:
    """Files of processor, tokenizer and chat template that go with an adapter: the run's own, else the base's."""
    found: list[Path] = []
    for group in (PICTURE_FILES, TOKENIZER_FILES, TEMPLATE_FILES):
        ours = [run / name for name in group if (run / name).is_file()]
        found += ours or [base / name for name in group if (base / name).is_file()]
    return found


def open_processor(base: Path, adapter: Path | None = None) -> Any:
    """The stock processor of a base, or the one that a merge of an adapter into it would have; proved to work.

    Args:
        base: model folder. adapter: folder of an adapter on it.

    Raises:
        CheckpointError: files are missing or broken, or are those of another model.
    """
    files = processor_files(base if adapter is None else adapter, base)
    if adapter is None or not any(file.parent == adapter for file in files):
        check_processor(base, files)
        return load_processor(base)
    check_processor(adapter, files)
    with tempfile.TemporaryDirectory(prefix="vlft-") as joined:
        # Whether a processor is a Qwen2-VL's, transformers reads in config.json.
        for file in (base / "config.json", *files):
            Path(joined, file.name).symlink_to(file.absolute())
        return load_processor(joined, where=adapter)
