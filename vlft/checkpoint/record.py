"""The run record, `vlft.json`: the base, the towers and the data from which a run folder's weights come.

`vlft.train.record` fills it.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from vlft import __version__
from vlft.errors import CheckpointError
from vlft.families import TOWERS
from vlft.files import write_json

RECORD = "vlft.json"
FORMAT = 1

Kind = Literal["adapter", "full"]
TOWER_SETTINGS = ("full", "lora", "frozen")
MEDIA_KEYS = (
    "image_min_pixels",
    "image_max_pixels",
    "video_min_pixels",
    "video_max_pixels",
    "fps",
    "nframes",
    "video_max_frames",
)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The contents of `vlft.json`.

    Attributes:
        kind: whether the weights beside it are an adapter or a whole model.
        base_model: hub id or folder of the base, as `resolve_model` accepts it.
        base_revision: commit of a hub id; None for a folder.
        base_fingerprint: `base_fingerprint(folder)` of the base.
        model_type: as in the base's `config.json`.
        towers: vision, merger and language -> full, lora or frozen.
        lora: rank, alpha, dropout, target; None if no tower has LoRA.
        media: the settings of `MEDIA_KEYS`: pixels of a picture or frame, frames per second, frames; None: no limit.
        versions: package -> version that trained it.
        training: settings that identify the run (seed, global batch, data fingerprint, ...), and its progress; free
            form, read by `vlft.train`.
        data: per file `{"file", "rows", "trained", "skipped": [{"index", "id", "field", "reason"}]}`; with
            `--eval_split` also `"held_out"`, for a mix `"not_drawn"` and `"draws_an_epoch"`.
        quantised: `{"bits", "kind", "double", "dtype", "modules": {tower: count}}`: how the base's linear layers were
            quantised, the dtype in which they computed, and how many; None: they were not, or the version is older.

    Raises:
        CheckpointError: the kind or a tower setting is unknown, a media setting is missing, or rows do not add up.
    """

    kind: Kind
    base_model: str
    base_revision: str | None
    base_fingerprint: str
    model_type: str
    towers: dict[str, str]
    lora: dict[str, Any] | None
    media: dict[str, Any]
    versions: dict[str, str]
    training: dict[str, Any]
    data: list[dict[str, Any]]
    quantised: dict[str, Any] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by name: the run's recipe (`vlft.config.recipe.Recipe.of_run`) and others."""
        return self.training | self.media

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise CheckpointError(f"{RECORD}: kind is {self.kind!r}, expected one of {get_args(Kind)}.")
        wrong = {tower: setting for tower, setting in self.towers.items() if setting not in TOWER_SETTINGS}
        if wrong or set(self.towers) != set(TOWERS):
            raise CheckpointError(
                f"{RECORD}: towers is {self.towers}, expected {TOWERS}, each one of {TOWER_SETTINGS}."
            )
        if set(self.media) != set(MEDIA_KEYS):
            raise CheckpointError(f"{RECORD}: media has {sorted(self.media)}, expected {sorted(MEDIA_KEYS)}.")
        for entry in self.data:
            rows, trained, skipped = entry["rows"], entry["trained"], len(entry["skipped"])
            not_drawn, held_out = entry.get("not_drawn", 0), entry.get("held_out", 0)
            if rows != trained + skipped + not_drawn + held_out:
                raise CheckpointError(
                    f"{RECORD}: {entry['file']}: {rows} rows read, but {trained} trained + {skipped} skipped "
                    f"+ {not_drawn} not drawn + {held_out} held out; a row was lost or counted twice."
                )


def library_versions(*more: str) -> dict[str, str]:
    """Versions of vlft and of the packages that affect what a run computes, without those that are not installed.

    Args:
        more: packages of this run besides those of every run.
    """
    found = {"vlft": __version__}
    for package in ("torch", "transformers", "peft", "accelerate", "safetensors", "deepspeed", "liger-kernel", *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_record(folder: Path | str, record: RunRecord) -> Path:
    """Write `folder/vlft.json` atomically: a reader never sees an incomplete file."""
    path = Path(folder) / RECORD
    write_json(path, {"format": FORMAT, **asdict(record)}, durable=True)
    return path


def read_record(folder: Path | str) -> RunRecord:
    """Read `folder/vlft.json`.

    Raises:
        CheckpointError: it is missing, not JSON, of a newer format, lacks keys, or contradicts itself.
    """
    path = Path(folder) / RECORD
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: has no {RECORD}, so it is no run folder of vlft. Use the --output_dir of a run."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}). Restore it from a checkpoint-N of the same run.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds a {type(raw).__name__}, expected an object.")
    written = raw.pop("format", None)
    if not isinstance(written, int) or written > FORMAT:
        raise CheckpointError(
            f"{path}: format is {written!r}, this vlft reads up to {FORMAT}. Update vlft to the version that wrote it."
        )
    names = {field.name for field in fields(RunRecord)}
    needed = {field.name for field in fields(RunRecord) if field.default is MISSING}
    if missing := sorted(needed - raw.keys()):
        raise CheckpointError(
            f"{path}: lacks {', '.join(missing)} (has {', '.join(sorted(raw))}). Was it edited by hand?"
        )
    try:  # keys that a later version of the same format added are ignored
        return RunRecord(**{name: raw[name] for name in names & raw.keys()})
    except CheckpointError as error:
        raise CheckpointError(f"{Path(folder)}/{error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: malformed ({type(error).__name__}: {error}). Was it edited by hand?") from None
