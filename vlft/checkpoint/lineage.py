"""Find the base of an adapter, check that it is the right one, and open the processor that goes with both."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from vlft.checkpoint.door import check_processor
from vlft.checkpoint.files import ADAPTER_CONFIG, family_of
from vlft.checkpoint.folders import Located, resolve_model
from vlft.checkpoint.weights import base_fingerprint
from vlft.errors import CheckpointError
from vlft.families import FAMILIES
from vlft.model_files import read_json

# Each group comes whole from the run, else from the base: a tokenizer with files of both would be neither.
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
    """Name and folder of the base of an adapter: `base_model` if it is set, else the base that the adapter names.

    Args:
        run: the folder the user passed, for messages.
        found: the adapter in it.
        base_model: `--base_model`, a folder or hub id.

    Raises:
        CheckpointError: nothing names the base, it cannot be opened, or it is of another family than the adapter.
    """
    if base_model is not None:
        folder = resolve_model(base_model)
        refuse_other_family(run, found, base_model, folder)
        return base_model, folder
    if not found.base_model:
        raise CheckpointError(f"{run}: neither vlft.json nor adapter_config.json names its base. Set --base_model.")
    try:
        folder = resolve_model(found.base_model, found.base_revision)
    except CheckpointError as error:
        raise CheckpointError(f"{run}: its base cannot be opened. {error} Or set --base_model.") from None
    refuse_other_family(run, found, found.base_model, folder)
    return found.base_model, folder


def refuse_other_family(run: str | Path, found: Located, base_id: str, base: Path) -> None:
    """Refuse a base of another family than the one the adapter was trained on, as far as the files name that one.

    Args:
        run: the folder the user passed, for messages.
        found: the adapter in it.
        base_id: name of the base.
        base: its folder.

    Raises:
        CheckpointError: names both families.
    """
    here, there = family_of(base), None
    named = Path(found.base_model or "").expanduser() / "config.json"
    if found.record is not None:
        there = found.record.model_type
    elif found.base_model and named.is_file():
        there = read_json(named).get("model_type")
    if there is None or here.is_of(there):
        return
    theirs = f"{FAMILIES[there].label} ({there})" if there in FAMILIES else f"model of the type {there!r}"
    raise CheckpointError(
        f"{run}: its adapter was trained on {found.base_model}, a {theirs}; {base_id} is a {here.label} "
        f"({here.model_type}). An adapter fits only the model it was trained on. Pass that one as --base_model."
    )


def check_lineage(run: str | Path, found: Located, base_id: str, base: Path) -> str:
    """How it is known that an adapter belongs to this base, as a sentence for the user.

    Args:
        run: the folder the user passed, for messages.
        found: the adapter in it.
        base_id: name of the base.
        base: its folder.

    Raises:
        CheckpointError: the run recorded the fingerprint of other weights, or rank or alpha were changed since.
    """
    if found.record is None:
        return (
            f"no vlft.json in {run}: names and shapes fit {base_id}, and adapter_config.json names "
            f"{found.base_model}; whether the adapter was trained on these weights cannot be checked"
        )
    there, here = found.record.base_fingerprint, base_fingerprint(base)
    if there != here:
        raise CheckpointError(
            f"{run}: trained on {found.record.base_model} with fingerprint {there}, but {base_id} has {here}: "
            "it is another base, or its weights have changed since. Pass the right one as --base_model."
        )
    if found.record.lora is not None:
        config = read_json(found.folder / ADAPTER_CONFIG)
        for ours, theirs in (("rank", "r"), ("alpha", "lora_alpha")):
            if config.get(theirs) != found.record.lora[ours]:
                raise CheckpointError(
                    f"{run}: its {ADAPTER_CONFIG} says {theirs} {config.get(theirs)}, its vlft.json says "
                    f"{found.record.lora[ours]}: one of them was changed after training. Restore it from a "
                    "checkpoint-N."
                )
    return f"fingerprint {here} of {base_id} is the one the run recorded"


def processor_files(run: Path, base: Path) -> list[Path]:
    """Files of processor, tokenizer and chat template for an adapter: each group from the run, else from the base."""
    found: list[Path] = []
    for group in (PICTURE_FILES, TOKENIZER_FILES, TEMPLATE_FILES):
        ours = [run / name for name in group if (run / name).is_file()]
        found += ours or [base / name for name in group if (base / name).is_file()]
    return found


def open_processor(base: Path, adapter: Path | None = None) -> Any:
    """The stock processor of a base, or of the merge of an adapter into it; proved to work.

    Args:
        base: model folder.
        adapter: folder of an adapter on it; None: the base's own processor.

    Raises:
        CheckpointError: files are missing or broken, or belong to another model.
    """
    from vlft.model.load import load_processor  # imports torch, which readers of a run's record do not need

    files = processor_files(base if adapter is None else adapter, base)
    if adapter is None or not any(file.parent == adapter for file in files):
        check_processor(base, files, base=base)
        return load_processor(base)
    check_processor(adapter, files, base=base)
    with tempfile.TemporaryDirectory(prefix="vlft-") as joined:
        # transformers chooses the class of the processor by config.json.
        for file in (base / "config.json", *files):
            Path(joined, file.name).symlink_to(file.absolute())
        return load_processor(joined, where=adapter)
