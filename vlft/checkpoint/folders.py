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
from vlft.errors import CheckpointError, ConfigError
from vlft.model_files import INDEX, WEIGHTS, absent, has_weights, read_json, weights_advice

# Weights only as safetensors: .bin files are pickles, which run code when they are opened.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_model(model_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a base model: a local folder, or a hub id's folder in the hub's cache.

    Args:
        model_id: a folder, or a hub id such as `Qwen/Qwen2-VL-2B-Instruct`. A folder of that name takes precedence.
        revision: branch, tag or commit of a hub id; has no effect for a folder.

    Returns:
        Folder with config.json and safetensors weights.

    Raises:
        CheckpointError: there is no such folder or hub model, the hub cannot be reached and nothing is cached, the
            folder is an adapter or has no config.json, or its weights are not safetensors; also the errors of
            `check_base`.
    """
    folder = Path(model_id).expanduser()
    if not folder.is_dir():
        refuse_missing(model_id)
        folder = _download(str(model_id), revision)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{model_id}: {_no_model(folder)}")
    if not has_weights(folder):
        raise CheckpointError(
            f"{model_id}: neither {WEIGHTS} nor {INDEX} in {folder.absolute()}. {weights_advice(folder)}"
        )
    check_base(folder)
    return folder


def resolve_complete(path: str | Path, base_model: str | None) -> Path:
    """Return the folder of a model that is no adapter.

    Args:
        path: folder or hub id.
        base_model: the base that the user names for it, which only an adapter needs.

    Raises:
        CheckpointError: the errors of `resolve_model`.
        ConfigError: `base_model` is set.
    """
    if base_model is not None:
        raise ConfigError(f"--base_model {base_model}: {path} is a complete model and needs no base. Drop it.")
    return resolve_model(path)


def refuse_missing(model_id: str | Path) -> None:
    """Refuse what is neither a folder nor the form of a hub id. Asks no hub.

    Raises:
        CheckpointError: the message says what it is instead.
    """
    folder = Path(model_id).expanduser()
    if not folder.is_dir() and (folder.exists() or not _HUB_ID.fullmatch(str(model_id))):
        what = "a file, not a model folder" if folder.exists() else "no such model folder"
        raise CheckpointError(
            f"{model_id}: {what} (looked for {folder.absolute()}). "
            "Give a folder with config.json and *.safetensors, or a hub id such as Qwen/Qwen2-VL-2B-Instruct."
        )


def _no_model(folder: Path) -> str:
    """What a folder without config.json is instead, and what to use."""
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        return f"an adapter, not a whole model. Give its base, {base!r}, or merge it: vlft merge {folder} OUT."
    if (what := _near_by(folder)) is not None:
        return what
    ggufs = weights_advice(folder) + " " if any(folder.glob("*.gguf")) else ""
    return (
        f"no config.json in {folder.absolute()}, so it is no model folder. {ggufs}Give the folder that holds "
        "config.json and *.safetensors, or a hub id such as Qwen/Qwen2-VL-2B-Instruct."
    )


def _near_by(folder: Path) -> str | None:
    """The model or adapter to which a folder leads that is neither itself; None if there is none."""
    if (folder / "config.json").is_symlink() and not (folder / "config.json").exists():
        return f"config.json is {absent(folder / 'config.json')}"
    if snapshots := sorted(path.parent for path in folder.glob("snapshots/*/config.json")):
        return f"the hub cache's folder of a model. Give the snapshot in it, {snapshots[-1]}."
    if adapters := sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}")):
        return f"no weights there, but an adapter in {adapters[-1]}. Give that folder to vlft merge or vlft chat."
    return None


def _download(model_id: str, revision: str | None) -> Path:
    """A hub model's folder in the cache, downloaded if needed. Every failure is raised as a CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    what = f"{model_id}" + (f" at revision {revision}" if revision else "")
    looked = f"{what}: no folder {Path(model_id).absolute()}, and as a hub id"
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=HUB_FILES))
    except GatedRepoError:
        reason = "it is gated. Accept its terms on its page, then `hf auth login`"
    except RevisionNotFoundError:
        reason = "there is no such revision. Use one of its branches, tags or commits"
    except RepositoryNotFoundError:
        reason = "the hub has no such model (or it is private: `hf auth login`). Check the spelling"
    except (HfHubHTTPError, OSError, ValueError) as error:
        # LocalEntryNotFoundError (offline, not cached) is an OSError, HFValidationError a ValueError (hub 1.33)
        first = str(error).strip().split("\n")[0].rstrip(".")
        reason = (
            f"it could not be fetched and is not in the cache ({type(error).__name__}: {first}). "
            "Check the spelling and the network, or download it elsewhere and pass its folder"
        )
    raise CheckpointError(f"{looked} {reason}.")


def snapshot_revision(folder: Path | str) -> str | None:
    """The commit of a folder of the hub's cache (`.../snapshots/<commit>`); None for any other folder."""
    folder = Path(folder)
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name) else None


@dataclass(frozen=True, kw_only=True)
class Located:
    """Weights found under a path the user gave.

    Attributes:
        folder: the folder of the weights.
        kind: an adapter, or a whole model.
        record: vlft.json beside them; None if another tool wrote them.
        base_model: the base they were trained from, as named by vlft.json or else by adapter_config.json; None for a
            model without a record.
        base_revision: commit of a hub base; None if unknown.
    """

    folder: Path
    kind: Literal["adapter", "full"]
    record: RunRecord | None
    base_model: str | None
    base_revision: str | None


def find_adapter_or_model(path: str | Path) -> Located:
    """Find the weights of a run folder, a `checkpoint-N`, an adapter folder of plain peft, or a model folder.

    Raises:
        CheckpointError: there is no such folder or it has no weights (for an unfinished run, the message names the
            newest checkpoint), the adapter has no config or is a pickle, or the record contradicts the files.
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
            f"{path}: {ADAPTER_WEIGHTS} without {ADAPTER_CONFIG}: the scaling is unknown. Copy the folder again."
        )
    if not adapter and not model:
        raise CheckpointError(f"{path}: {_why_nothing(folder)}")
    # `save_pretrained` of a model after `merge_and_unload` leaves an adapter beside a whole model.
    if adapter and has_weights(folder):
        raise CheckpointError(
            f"{path}: holds both {ADAPTER_WEIGHTS} and a whole model. Move one of them to its own folder."
        )
    kind: Literal["adapter", "full"] = "adapter" if adapter else "full"
    if record is not None and record.kind != kind:
        raise CheckpointError(
            f"{path}: {RECORD} says {record.kind!r}, the files are {kind!r}. Copy the whole run folder again."
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
            "holds neither an adapter nor weights: the run has not finished. "
            f"Run its command again to finish it, or use its newest checkpoint, {newest}."
        )
    if (folder / "adapter_model.bin").is_file():
        return "its adapter is adapter_model.bin, a pickle, which runs code when opened and is not read. " + convert(
            folder / "adapter_model.bin"
        )
    if shards := sorted(found.name for found in folder.glob("global_step*")):
        return (
            f"its weights are still DeepSpeed's shards, in {shards[-1]}. Convert them to safetensors with the kit that "
            "trained them (zero_to_fp32.py)."
        )
    if (folder / ADAPTER_CONFIG).is_file():
        return f"{ADAPTER_CONFIG} without {ADAPTER_WEIGHTS}. Copy the folder again."
    if (what := _near_by(folder)) is not None:
        return what
    return (
        f"holds neither {ADAPTER_WEIGHTS} nor {WEIGHTS} with config.json. {weights_advice(folder)} "
        "Give a run's --output_dir, one of its checkpoint-N, or an adapter folder."
    )


def _numbered(folder: Path) -> bool:
    return folder.is_dir() and re.fullmatch(r"checkpoint-\d+", folder.name) is not None
