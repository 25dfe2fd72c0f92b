"""Find things on disk: a base model by folder or hub id, a run's adapter or weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlft.checkpoint.adapter import convert
from vlft.checkpoint.door import check_base
from vlft.checkpoint.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from vlft.checkpoint.record import RECORD, RunRecord, read_record
from vlft.errors import CheckpointError
from vlft.model_files import INDEX, WEIGHTS, absent, has_weights, read_json, weights_advice

# Weights as safetensors only: .bin files are pickles, which run code when they are opened.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_model(model_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a base model: a local one as it is, a hub id through the hub's cache.

    Args:
        model_id: a folder, or a hub id such as `Qwen/Qwen2-VL-2B-Instruct`. A folder of that name wins.
        revision: branch, tag or commit of a hub id; ignored for a folder.

    Returns:
        Folder with config.json and safetensors weights.

    Raises:
        CheckpointError: no such folder or hub model, the hub cannot be reached and nothing is cached, the folder is an
            adapter or has no config.json, its weights are not safetensors, or as `check_base`.
    """
    folder = Path(model_id).expanduser()
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(str(model_id)) or folder.exists():
            what = "a file, not a model folder" if folder.exists() else "no such model folder"
            raise CheckpointError(
                f"{model_id}: {what} (looked for {folder.absolute()}). "
                "Give a folder with config.json and *.safetensors, or a hub id such as Qwen/Qwen2-VL-2B-Instruct."
            )
        folder = _download(str(model_id), revision)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{model_id}: {_no_model(folder)}")
    if not has_weights(folder):
        raise CheckpointError(
            f"{model_id}: neither {WEIGHTS} nor {INDEX} in {folder.absolute()}. {weights_advice(folder)}"
        )
    check_base(folder)
    return folder


def _no_model(folder: Path) -> str:
    """What a folder without config.json is instead, and what to give."""
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        return f"an adapter, not a whole model. Give its base, {base!r}."
    if (what := _near_by(folder)) is not None:
        return what
    ggufs = weights_advice(folder) + " " if any(folder.glob("*.gguf")) else ""
    return (
        f"no config.json in {folder.absolute()}, so it is no model folder. {ggufs}Give the folder that holds "
        "config.json and *.safetensors, or a hub id such as Qwen/Qwen2-VL-2B-Instruct."
    )


def _near_by(folder: Path) -> str | None:
    """Where a folder leads to that is no model or adapter itself; None where to nothing."""
    if (folder / "config.json").is_symlink() and not (folder / "config.json").exists():
        return f"config.json is {absent(folder / 'config.json')}"
    if snapshots := sorted(path.parent for path in folder.glob("snapshots/*/config.json")):
        return f"the hub cache's folder of a model. Give the snapshot in it, {snapshots[-1]}."
    if adapters := sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}")):
        return f"no weights there, but an adapter in {adapters[-1]}. Give that folder to vlft merge or vlft chat."
    return None


def _download(model_id: str, revision: str | None) -> Path:
    """A hub model's folder in the cache, fetched if need be. Every way to fail is one CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    what = f"{model_id}" + (f" at revision {revision}" if revision else "")
    looked = f"{what}: no folder {Path(model_id).absolute()}, and as a hub id"
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=HUB_FILES))
    except GatedRepoError:
        reason = "it is gated. Accept its terms on its page, then `hf auth login`"
    except RevisionNotFoundError:
        reason = "there is no such revision. Name a branch, tag or commit of it"
    except RepositoryNotFoundError:
        reason = "the hub does not know it (or it is private: `hf auth login`). Check the spelling"
    except (HfHubHTTPError, OSError, ValueError) as error:
        # LocalEntryNotFoundError (offline, not cached) is an OSError, HFValidationError a ValueError (hub 1.33)
        first = str(error).strip().split("\n")[0].rstrip(".")
        reason = (
            f"it could not be fetched and is not in the cache ({type(error).__name__}: {first}). "
            "Check the spelling and the network, or download it elsewhere and give its folder"
        )
    raise CheckpointError(f"{looked} {reason}.")


def snapshot_revision(folder: Path | str) -> str | None:
    """The commit a folder of the hub's cache holds (`.../snapshots/<commit>`); None for any other folder."""
    folder = Path(folder)
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name) else None


@dataclass(frozen=True, kw_only=True)
class Located:
    """Weights found under a path the user gave.

    Attributes:
        folder: where the weights lie.
        kind: an adapter, or a whole model.
        record: vlft.json beside them; None where another tool wrote them.
        base_model: what they were trained from, by vlft.json or else by adapter_config.json; None for a model without
            a record.
        base_revision: commit of a hub base, where known.
    """

    folder: Path
    kind: Literal["adapter", "full"]
    record: RunRecord | None
    base_model: str | None
    base_revision: str | None


def find_adapter_or_model(path: str | Path) -> Located:
    """Weights of a run folder, a `checkpoint-N`, a bare adapter folder of plain peft, or a model folder.

    Raises:
        CheckpointError: no such folder, no weights in it (an unfinished run: the newest checkpoint is named), an
            adapter without its config or as a pickle, or a record that contradicts the files.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"{path}: no such folder (looked for {folder.absolute()}). "
            "Give a run's --output_dir, one of its checkpoint-N, or an adapter folder."
        )
    record = read_record(folder) if (folder / RECORD).is_file() else None
    adapter = (folder / ADAPTER_WEIGHTS).is_file()
    model = (folder / "config.json").is_file() and has_weights(folder)
    if adapter and not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{path}: {ADAPTER_WEIGHTS} without {ADAPTER_CONFIG}: its scaling is unknown. Copy the folder again."
        )
    if not adapter and not model:
        raise CheckpointError(f"{path}: {_why_nothing(folder)}")
    # An adapter beside a whole model is what `save_pretrained` of a model after `merge_and_unload` leaves behind.
    if adapter and has_weights(folder):
        raise CheckpointError(
            f"{path}: holds both {ADAPTER_WEIGHTS} and a whole model. Move one of them to its own folder."
        )
    kind: Literal["adapter", "full"] = "adapter" if adapter else "full"
    if record is not None and record.kind != kind:
        raise CheckpointError(
            f"{path}: {RECORD} says {record.kind!r}, the files are {kind!r}. Copy the run folder again, whole."
        )
    if record is not None:
        return Located(
            folder=folder,
            kind=kind,
            record=record,
            base_model=record.base_model,
            base_revision=record.base_revision,
        )
    settings = read_json(folder / ADAPTER_CONFIG) if adapter else {}
    return Located(
        folder=folder,
        kind=kind,
        record=None,
        base_model=settings.get("base_model_name_or_path"),
        base_revision=settings.get("revision"),
    )


def _why_nothing(folder: Path) -> str:
    numbered = [(int(found.name.split("-")[1]), found) for found in folder.glob("checkpoint-*") if _numbered(found)]
    if numbered:
        newest = max(numbered)[1]
        return (
            "neither an adapter nor weights there: the run has not finished. "
            f"Run its command again to finish it, or use its newest checkpoint, {newest}."
        )
    if (folder / "adapter_model.bin").is_file():
        return "its adapter is adapter_model.bin, a pickle, which runs code when opened and is not read. " + convert(
            folder / "adapter_model.bin"
        )
    if shards := sorted(found.name for found in folder.glob("global_step*")):
        return (
            f"its weights are still DeepSpeed's own, in {shards[-1]}. Put them together with the kit that trained "
            "them (zero_to_fp32.py), as safetensors."
        )
    if (folder / ADAPTER_CONFIG).is_file():
        return f"{ADAPTER_CONFIG} without {ADAPTER_WEIGHTS}. Copy the folder again."
    if (what := _near_by(folder)) is not None:
        return what
    return (
        f"neither {ADAPTER_WEIGHTS} nor {WEIGHTS} with config.json there. {weights_advice(folder)} "
        "Give a run's --output_dir, one of its checkpoint-N, or an adapter folder."
    )


def _numbered(folder: Path) -> bool:
    return folder.is_dir() and re.fullmatch(r"checkpoint-\d+", folder.name) is not None
