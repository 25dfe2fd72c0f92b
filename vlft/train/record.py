"""The contents of a run's `vlft.json`: its settings, and how many rows were trained and skipped.

`run_record` writes them. Two runs are the same if all settings except those in `PROGRESS` are equal; `refuse_other_run`
compares them. `vlft.checkpoint.record` reads and writes the file.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

from vlft.checkpoint import RunRecord, base_fingerprint, library_versions, snapshot_revision
from vlft.checkpoint.best import BEST_BY, EVAL_METRICS
from vlft.checkpoint.files import module_name
from vlft.checkpoint.record import MEDIA_KEYS
from vlft.checkpoint.start import LINEAGE
from vlft.config import grpo, preference
from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.recipe import flags_of
from vlft.config.rewards import REWARD_FILES, files_of
from vlft.config.row_flags import RowFlags
from vlft.config.training import TrainFlags
from vlft.data.order import Order
from vlft.errors import BadRow, CheckpointError
from vlft.model.chosen import blocks_of
from vlft.model.quantised_files import QuantisedFiles, is_stored_quantised
from vlft.setup import Base, MeasuredRows
from vlft.setup.choices import trained_tokens
from vlft.setup.schedule import asked_for, settings_of

OPTIMIZER = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
FEATURE_RUN = "feature_run"  # key of `RunRecord.training`: the id of the run in the cache of features
#: Keys of `RunRecord.training` that may differ between a run and the resumed run. All others must be equal.
PROGRESS = ("finished", "asked", "processes", "lengths", EVAL_METRICS, FEATURE_RUN, REWARD_FILES)
#: Key -> its name in a message. Other keys are named by themselves, with spaces for underscores.
CALLED = {
    "model_type": "model type of the base",
    "base_fingerprint": "base model (fingerprint)",
    LINEAGE: "starting adapter (fingerprint)",
    "lora": "LoRA",
    "quantised": "quantised base (--bits)",
    "media": "pixel and frame settings",
    "mix": "data mix (weight, repeat, cap)",
    "missing_tags": "missing_tags",
    "over_length": "over_length",
    "eval_split": "held-out rows (--eval_split)",
    BEST_BY: "metric of the best checkpoint (--metric_for_best_model)",
    "rows": "number of rows",
    "pairs": "preference rows (--method)",
    "preference": "settings of --method {method}",
    "grpo": "settings of --method grpo",
    "columns": "columns of data files",
    "loraplus_ratio": "loraplus_ratio",
    "blocks": "chosen blocks (--language_blocks, --vision_blocks)",
    "tokens": "trained tokens (--train_tokens)",
    "drawn": "fingerprint of the rows it trains",
    "most_media": "most pictures and videos of a row",
    "chat_template": "fingerprint of the chat template",
    "tokenizer": "fingerprint of the tokenizer",
}
#: Values of keys that a record of an older version lacks: the behaviour before the flag existed. A key without an entry
#: here is not compared if the record lacks it. None: every version wrote the key.
BEFORE: dict[str, Any] = {
    **{one.name: one.default for one in flags_of(RowFlags) if one.default is not None},
    "mix": [],
    "eval_split": None,
    "pairs": False,
    "method": "sft",
    "preference": {},
    "grpo": {},
    "loraplus_ratio": None,
    "blocks": {},
    "tokens": {},
    **dict.fromkeys(("data", "rows", "max_length", "seed", "global_batch", "packing")),
}


def run_record(
    base: Base, data: DataFlags, model: ModelFlags, args: TrainFlags, measured: MeasuredRows, order: Order
) -> RunRecord:
    """The record of a run at its start."""
    recipe = base.recipe.as_json()
    return RunRecord(
        kind="adapter" if base.towers.has_lora else "full",
        base_model=str(model.model_id),
        base_revision=snapshot_revision(base.folder),
        base_fingerprint=base_fingerprint(base.folder),
        model_type=base.family.model_type,
        towers=dict(base.towers.modes),
        lora=base.towers.lora_settings(),
        media={name: recipe.pop(name) for name in MEDIA_KEYS},
        versions=library_versions(*(("trl",) if data.method == "grpo" else ())),
        training={  # in the order in which `refuse_other_run` compares them
            "finished": False,
            LINEAGE: None if base.start is None else base.start.lineage,
            "asked": asked_for(data, args),
            "processes": args.world_size,
            **_best_by(args),
            **({EVAL_METRICS: list(args.eval_metric)} if args.eval_metric else {}),
            **recipe,
            "mix": [[one.weight, one.repeat, one.cap] for one in data.training_sets] if data.data_mix else [],
            "data": data_print(measured),
            "eval_split": _held_out(data, args, measured),
            # A skipped row that has been repaired since then would shift the order of all others.
            "rows": len(measured.starts),
            "thought": measured.thought,
            "seed": args.seed,
            **settings_of(order),
            # A checkpoint's optimizer and schedule restore these, whatever the flags are when the run resumes.
            "learning_rates": args.learning_rates,
            "loraplus_ratio": args.loraplus_ratio,
            "weight_decay": args.weight_decay,
            "optim": _plain(args.optim),
            "optimizer": {name: getattr(args, name) for name in OPTIMIZER},
            "lr_scheduler_type": _plain(args.lr_scheduler_type),
            "warmup_steps": args.warmup_steps,
            "deepspeed": args.zero or False,
            "method": data.method,
            "preference": preference.settings_of(data.method, args),
            "grpo": grpo.settings_of(data.method, data, args),
            **({REWARD_FILES: files_of(args.reward)} if data.method == "grpo" else {}),
            **_choices(base),
            "drawn": rows_print(measured),
            "most_media": measured.costs.most_media,
            "lengths": {
                "asked": data.max_length,
                "longest": int(measured.costs.tokens.max(initial=0)) + base.completion,
            },
        },
        data=data_entries(measured),
        quantised=_quantised(base, args),
    )


def _held_out(data: DataFlags, args: TrainFlags, measured: MeasuredRows) -> dict[str, Any] | None:
    """What `--eval_split` asks for, and how many rows it holds out."""
    if data.eval_split is None:
        return None
    share = {"share": data.eval_split} if data.eval_split < 1 else {}
    return {**share, "rows": sum(measured.held_out.values()), "seed": args.seed}


def _best_by(args: TrainFlags) -> dict[str, Any]:
    """The metric by which evaluations are compared, if the flags choose one. A checkpoint has its best value so far."""
    if args.metric_for_best_model is None:
        return {}
    name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    return {BEST_BY: {"metric": name, "higher": bool(args.greater_is_better)}}


def _quantised(base: Base, args: TrainFlags) -> dict[str, Any] | None:
    """How the base is quantised, in which dtype it computes, and how many of its linear layers are quantised."""
    if (how := base.quantisation) is None:
        return None
    if is_stored_quantised(base.folder):
        names = [module_name(base.family, name) for name in QuantisedFiles.of(base.folder, base.family).states]
        modules = dict(Counter(map(base.family.tower_of, names)))
    else:
        text = base.sizes.text
        modules = {"language": sum(len(text.linears(layer)) for layer in text.layers)}
    dtype = str(args.half or "float32").removeprefix("torch.")
    return {"bits": how.bits, "kind": how.kind, "double": how.double, "dtype": dtype, "modules": modules}


def _choices(base: Base) -> dict[str, Any]:
    """The chosen blocks and trained tokens."""
    blocks = {tower: list(places) for tower, places in blocks_of(base.towers).items()}
    tokens = trained_tokens(base.towers, base.processor.tokenizer)
    return ({"blocks": blocks} if blocks else {}) | ({"tokens": tokens} if tokens else {})


def refuse_other_run(mine: RunRecord, other: RunRecord, where: Path) -> None:
    """Refuse to resume a run that has other settings.

    Args:
        mine: record of this run, from `run_record`.
        other: record of the run to resume, maybe of an older version.
        where: the folder of `other`.

    Raises:
        CheckpointError: names the first setting that differs, and both values.
    """
    theirs = {**BEFORE, "columns": ["none"] * len(mine.training["columns"]), **_identity(other)}
    if other.versions.get("transformers") != mine.versions.get("transformers"):
        # The fingerprint is of the tokenizer that transformers builds from the files, which its version may change.
        theirs.pop("tokenizer", None)
    for name, ours in ({"blocks": {}, "tokens": {}} | _identity(mine)).items():
        if name in theirs and theirs[name] != ours:
            called = CALLED.get(name, name.replace("_", " ")).format(method=mine.training.get("method", "sft"))
            verb = "are" if _is_plural(called) else "is"
            old, new = map(_as_text, _difference(theirs[name], ours))
            raise CheckpointError(
                f"{where}: belongs to another run: its {called} {verb} {old}, this run's {verb} {new}. "
                + (_equal_batch(other, mine) if name == "global_batch" else "")
                + "Choose another --output_dir, or pass the flags of that run (its config.yaml)."
            )


def _identity(record: RunRecord) -> dict[str, Any]:
    """The settings that identify a run, in the order in which they are compared."""
    whole = {name: getattr(record, name) for name in ("model_type", "base_fingerprint")}
    whole[LINEAGE] = (record.training.get(LINEAGE) or {}).get("fingerprint")  # its folder may have moved
    whole |= {name: getattr(record, name) for name in ("towers", "lora", "quantised", "media")}
    whole |= {name: value for name, value in record.training.items() if name not in (*PROGRESS, LINEAGE)}
    if isinstance(rates := whole.get("learning_rates"), dict):  # a frozen tower has none, whatever the flags say
        used = {tower for tower, mode in record.towers.items() if mode != "frozen"}
        used |= {"language"} if record.training.get("tokens") else set()
        trained = {tower: rate for tower, rate in rates.items() if tower in used}
        whole["learning_rates"] = trained
    return whole


def _is_plural(called: str) -> bool:
    head = called.partition(" (")[0].partition(" of ")[0]
    return head.endswith("s") and "_" not in head  # the name of a flag is singular


def _difference(old: Any, new: Any) -> tuple[Any, Any]:
    """Two values without the entries that are equal in both."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return old, new
    equal = {name for name in old.keys() & new.keys() if old[name] == new[name]}
    kept = [{name: value for name, value in one.items() if name not in equal} for one in (old, new)]
    return kept[0], kept[1]


def _as_text(value: Any) -> str:
    """A setting in a message: `tokens 400, patches 1600` instead of a dictionary."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{name} {_as_text(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(f"({_as_text(one)})" if isinstance(one, list) else _as_text(one) for one in value) or "none"
    return "none" if value is None else str(value)


def _equal_batch(other: RunRecord, mine: RunRecord) -> str:
    """The flag that gives the other run's global batch on this number of processes; "" if no such flag would do."""
    theirs, here = other.training.get("processes"), mine.training["processes"]
    accumulation, rest = divmod(other.training["global_batch"], here)
    if theirs in (None, here) or rest or mine.training["asked"]["rows"] is not None:
        return ""
    return (
        f"The global batch spans all processes. That run had {theirs}, this run has {here}: "
        f"--gradient_accumulation_steps {accumulation} makes them equal. "
    )


def _plain(value: Any) -> str:
    """The value of an enum of transformers, as text."""
    return str(getattr(value, "value", value))


def rows_print(measured: MeasuredRows) -> str:
    """A short fingerprint of the samples that are trained, and how often."""
    rows: Any = measured.rows.samples  # a RowIndex
    answers = b"" if rows.answer_of is None else rows.answer_of.tobytes()
    return hashlib.sha256(rows.file_of.tobytes() + rows.row_of.tobytes() + answers).hexdigest()[:16]


def data_print(measured: MeasuredRows) -> str:
    """A short fingerprint of the data files' rows, in order."""
    rows: Any = measured.rows.samples  # a RowIndex
    digest = hashlib.sha256()
    for file in rows.files:
        digest.update(file.print())
    return digest.hexdigest()[:16]


# ---- the rows of each data file: read, trained, skipped


def data_entries(measured: MeasuredRows) -> list[dict[str, Any]]:
    """The "data" of a run record: per file the rows read, trained and skipped, and the rows that --over_length changed.

    With `--eval_split` it also has the rows that are held out, and with a mix the rows that are not drawn and the draws
    of an epoch: rows = trained + skipped + held_out + not_drawn. If rows are split into samples, `samples` is how many
    an epoch trains.
    """
    counts, bad = measured.rows.counts, measured.rows.bad
    rows: dict[str, list[dict[str, Any]]] = {file: [] for file in counts}
    for sample, change in measured.changed:
        rows[sample.file].append({"index": sample.index, "id": sample.id, "change": change})
    empty = [
        {"file": file, "rows": count, "trained": count, "skipped": [], **_changes(rows[file])}
        for file, count in counts.items()
    ]
    refused = Counter(row.file for row in bad)
    for entry in empty:
        if held := measured.held_out.get(entry["file"]):
            entry["held_out"] = held
        if (drawn := measured.drawn.get(entry["file"])) is not None:
            left = entry["rows"] - refused[entry["file"]] - drawn.rows - entry.get("held_out", 0)
            entry |= {"draws_an_epoch": drawn.draws, "not_drawn": left}
        if measured.split:
            entry["samples"] = measured.split[entry["file"]]
    return with_skipped(empty, list(bad))


def with_skipped(data: list[dict[str, Any]], skipped: list[BadRow]) -> list[dict[str, Any]]:
    """The entries with these rows also marked as skipped."""
    result = []
    for entry in data:
        known = {row["index"] for row in entry["skipped"]}
        new = [
            {"index": row.index, "id": row.id, "field": row.field, "reason": row.reason}
            for row in skipped
            if _same(row.file, entry["file"]) and row.index not in known
        ]
        rows = sorted([*entry["skipped"], *new], key=lambda row: row["index"])
        trained = entry["rows"] - len(rows) - entry.get("not_drawn", 0) - entry.get("held_out", 0)
        result.append({**entry, "skipped": rows, "trained": trained})
    return result


def _same(one: str, other: str) -> bool:
    """Whether two spellings name the same file: config.yaml has absolute paths, the flags may have relative ones."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _changes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The number of rows with fewer pixels and with fewer media, and the rows."""
    shrunk = sum(row["change"].startswith("shrunk") for row in rows)
    return {"shrunk": shrunk, "lost_media": len(rows) - shrunk, "changed": rows}
