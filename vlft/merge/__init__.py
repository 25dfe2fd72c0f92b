"""Merge an adapter into its base: read files, write files, then measure that the merged model answers the same.

`match` plans by names and shapes, `write` writes the folder, `verify` measures, and this module calls them in order.
`quantised` has the weights of a base that was quantised in training.
It works on files, so one shard is in memory while merging, and one model while measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlft.checkpoint import (
    Located,
    find_adapter_or_model,
    open_processor,
    read_adapter,
    remark_on_carried,
    write_record,
)
from vlft.checkpoint.plain_lora import towers_of_adapter
from vlft.checkpoint.serving import serving_of_model
from vlft.errors import CheckpointError
from vlft.families.stored import parameter_of
from vlft.files import open_to_others, put_in_place, workshop
from vlft.merge.match import MergePlan, plan_merge
from vlft.merge.quantised import Onto, QuantisedBase, find_bases, quantised_base
from vlft.model.load import check_fit

if TYPE_CHECKING:
    import torch

    from vlft.merge.verify import RowCheck

__all__ = ["ONTO", "MergeReport", "merge", "towers_of_adapter"]

Dtype = Literal["keep", "bf16", "fp16", "fp32"]
_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_UNTIED = (
    "the base ties lm_head to its embedding, and the adapter changes one of the two: both are written, and "
    "tie_word_embeddings in config.json is now false"
)
#: `--onto` -> what the linear layers of the language model hold, of a run that quantised them.
ONTO = {
    "dequantised": "layers that were quantised in training have the values it computed with, so that the result "
    "answers as trained; --onto original keeps the base's own",
    "original": "layers that were quantised in training have the base's own values, with which the adapter was not "
    "trained; without --onto original the result answers as trained",
}
_WORDS = {name: word for word, name in _TORCH_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """The result of a merge and its measurements.

    Attributes:
        dtype: of the written weights, e.g. `bfloat16`; several are joined by ` + `.
        towers: tower -> full, lora or frozen, as trained.
        max_logit_diff: largest |merged - (base + adapter)| over both rows, in float32.
        tensors: number of tensors written.
        changed: number of them that the adapter changed.
        out: the merged folder.
        base_model: as the user or the run named it.
        lineage: how it is known that the adapter belongs to this base.
        rows: figures per row.
        warnings: what the user should know about the merge, which was still written.
        notes: how the adapter's folder was read.
        serve: client -> the command that serves the folder as it was trained.
        serve_notes: what no flag of a client can set, and why a client is missing.
        onto: a key of `ONTO`; None: training did not quantise the base.
        quantisation_drift: largest |merged - (quantised base + adapter)| over both rows; None likewise.
    """

    dtype: str
    towers: dict[str, str]
    max_logit_diff: float
    tensors: int
    changed: int
    out: str
    base_model: str
    lineage: str
    rows: tuple[RowCheck, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    serve: dict[str, str] = field(default_factory=dict)
    serve_notes: tuple[str, ...] = ()
    onto: Onto | None = None
    quantisation_drift: float | None = None


def merge(
    run: str | Path,
    out: str | Path,
    *,
    base_model: str | None = None,
    dtype: Dtype = "keep",
    onto: Onto | None = None,
    max_shard_size: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> MergeReport:
    """Write `out`: the base with the run's adapter in its weights, verified against base + adapter.

    Args:
        run: run folder, `checkpoint-N`, or adapter folder (also of plain peft).
        out: new or empty folder. It appears under this name only after the verification.
        base_model: folder or hub id of the base; None: the one that the run names.
        dtype: of all written tensors; `keep`: each tensor keeps its dtype in the base.
        onto: of a run that quantised its base: a key of `ONTO`; None: dequantised.
        max_shard_size: most bytes of a weight file; None: files are cut as those of the base.
        progress: called with a line of text from time to time.

    Raises:
        CheckpointError: `run` is a whole model or holds no adapter, the adapter does not belong to the base, `out` is
            not empty, the disk is full, or merged and base + adapter disagree (promise 7 of the design). Nothing is
            left at `out` then.
        ConfigError: `onto` is set, but the run did not quantise its base.
    """
    found = find_adapter_or_model(run)
    if found.kind == "full":
        raise CheckpointError(
            f"{run}: needs no merge: it is already a whole model, which transformers and vLLM load directly."
        )
    target = Path(out).expanduser().resolve()  # a link to an empty folder cannot be renamed onto
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{out}: already exists and is not empty. Use a new or empty folder, or remove it.")
    bases = find_bases(run, found, base_model)
    base_id, base, family = bases.name, bases.folder, bases.family
    trained = quantised_base(run, found, bases, onto)
    onto = None if trained is None else onto or "dequantised"
    # Imported after the folders were checked, because torch takes seconds.
    import torch

    from vlft.merge.verify import verify
    from vlft.merge.write import check_space, full_disk_is_a_user_error, write_settings, write_weights

    open_processor(base, found.folder)  # fails here, before the long writing, instead of when the merged model is used
    check_fit(base, family)
    lineage = bases.prove(run, found)
    adapter = read_adapter(found.folder, base, family)
    plan = plan_merge(adapter, base, family)
    towers = _check_towers(run, found, plan)
    wanted = None if dtype == "keep" else getattr(torch, _TORCH_NAMES[dtype])
    with full_disk_is_a_user_error(target), _workshop(target) as folder:
        check_space(target, plan, wanted)
        write_settings(base, found.folder, folder, wanted, untied=plan.untied)
        values = trained.weight if trained is not None and onto == "dequantised" else None
        written = write_weights(plan, base, folder, wanted, progress, trained_on=values, largest=max_shard_size)
        rounded = {parameter_of(family, name): tensor.dtype for name, tensor in written.items() if tensor.rounded}
        rounded_to = max(rounded.values(), key=lambda kind: torch.finfo(kind).eps, default=None)
        rows = verify(
            base=base,
            adapter=adapter,
            merged=folder,
            family=family,
            untied=plan.untied,
            stored_as=rounded,
            rounded_to=rounded_to,
            progress=progress,
            trained=trained,
            dequantised=onto == "dequantised",
        )
        warnings = _judge(run, rows, rounded_to, dtype_chosen=dtype != "keep")
        if trained is not None and onto == "dequantised":
            _judge_layers(run, rows, trained)
        if found.record is not None:
            merged_from: dict[str, Any] = {
                "merged_from": str(run),
                "max_logit_diff": max(row.difference for row in rows),
            }
            if onto is not None:
                merged_from |= {"merged_onto": onto, "trained_on": found.record.quantised}
            training = found.record.training | merged_from
            write_record(folder, replace(found.record, kind="full", quantised=None, training=training))
        open_to_others(folder)
        put_in_place(folder, target, last="config.json")  # without it the folder is no model
    serving = serving_of_model(target, family, found.record, path=str(out))
    carried = remark_on_carried(base, family) if towers["language"] != "frozen" else None
    return MergeReport(
        dtype=" + ".join(sorted({_word(tensor.dtype) for tensor in written.values()})),
        towers=towers,
        max_logit_diff=max(row.difference for row in rows),
        tensors=len(written),
        changed=len(plan.updates) + (plan.head is not None),
        out=str(out),
        base_model=base_id,
        lineage=lineage,
        rows=tuple(rows),
        warnings=warnings,
        notes=(*adapter.notes, *([_UNTIED] if plan.untied else []), *([carried] if carried else [])),
        serve=serving.commands,
        serve_notes=serving.notes,
        onto=onto,
        quantisation_drift=max((row.drift for row in rows if row.drift is not None), default=None),
    )


def _check_towers(run: str | Path, found: Located, plan: MergePlan) -> dict[str, str]:
    if found.record is None:
        return plan.towers
    if found.record.towers != plan.towers:
        raise CheckpointError(
            f"{run}: vlft.json says it trained {found.record.towers}, the adapter's tensors say {plan.towers}. "
            "The folder mixes two runs, or the adapter was not saved completely."
        )
    return found.record.towers


def _judge(
    run: str | Path, rows: list[RowCheck], rounded_to: torch.dtype | None, *, dtype_chosen: bool
) -> tuple[str, ...]:
    """Refuse a merge if a row disagrees, with the row's figures.

    Wrong arithmetic is always refused. A rounding error above the tolerance is refused if the dtype is the base's own,
    and is a warning if the user chose the dtype (`dtype_chosen`), because any merge into that dtype has it.

    Returns:
        Warnings.

    Raises:
        CheckpointError: a row disagrees.
    """
    from vlft.merge.verify import EXACT_SHARE

    warnings = []
    for row in rows:
        figures = (
            f"on a {row.row} row, logits of merged and of base + adapter differ by up to {row.difference:.3g} "
            f"(the adapter moves them by up to {row.moved:.3g}, they span {row.range:.3g}), and the top token differs "
            f"at {row.flips} positions"
        )
        if not row.faultless:
            raise CheckpointError(
                f"{run}: not merged: {figures}. It is not rounding: without rounding the difference is "
                f"{row.fault:.3g}, and {EXACT_SHARE:g} of the span is allowed. The adapter or base file is damaged, or "
                "vlft is wrong: report it."
            )
        if rounded_to is None or row.kept:
            continue
        lost = (
            f"{figures}; allowed are {row.allowed:.3g} and 0 positions. {_word(rounded_to)} is too coarse to hold what "
            "the adapter changed in the base's weights"
        )
        if not dtype_chosen:
            raise CheckpointError(
                f"{run}: not merged: {lost}. Use --dtype fp32 to keep the change, or accept the rounding with "
                f"--dtype {_WORDS[_word(rounded_to)]}."
            )
        warnings.append(f"{lost}; --dtype fp32 keeps the change.")
    coarse = [row for row in rows if not row.fine_enough]
    if coarse and rounded_to is not None:
        worst = max(coarse, key=lambda row: row.coarse or 0)
        warnings.append(
            f"{_word(rounded_to)} is too coarse for the values of the quantised base, with which training computed in "
            f"float32: on a {worst.row} row, rounding them moves logits by up to {worst.coarse:.3g} (the adapter moves "
            f"them by up to {worst.moved:.3g}). --dtype fp32 keeps them."
        )
    if not any(row.moved for row in rows):
        warnings.append("the adapter changes nothing: it was not trained, or its learning rate was 0.")
    return tuple(warnings)


def _judge_layers(run: str | Path, rows: list[RowCheck], trained: QuantisedBase) -> None:
    """Refuse a merge if quantised layers do not multiply by the weights that were merged. Raises CheckpointError."""
    from vlft.merge.verify import EXACT_SHARE

    for row in rows:
        if not row.same_weights:
            raise CheckpointError(
                f"{run}: not merged: on a {row.row} row, logits of the {trained.quantisation.kind} layers and of their "
                f"dequantised weights differ by up to {row.layers:.3g}; {EXACT_SHARE:g} of their span "
                f"({row.range:.3g}) is allowed. bitsandbytes is damaged, or vlft is wrong: report it."
            )


def _word(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


@contextmanager
def _workshop(target: Path) -> Iterator[Path]:
    """A working folder beside `target`. Files of a killed merge in it are removed."""
    folder = target.with_name(f".{target.name}.merging")
    with ExitStack() as stack:
        try:
            stack.enter_context(workshop(folder))
        except BlockingIOError:
            raise CheckpointError(f"{target}: another merge is writing it. Wait for it, or use another OUT.") from None
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written ({error.strerror}). Use an OUT that can.") from error
        yield folder
