"""Merge an adapter into its base: read files, write files, then measure that both answer alike.

`plan` matches names, `write` makes the folder, `verify` measures; this is the story. It works on files alone, so one
shard is in memory while merging, and one model while measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlft.checkpoint import (
    Located,
    check_lineage,
    family_of,
    find_adapter_or_model,
    find_base,
    open_processor,
    read_adapter,
    write_record,
)
from vlft.errors import CheckpointError
from vlft.files import open_to_others, put_in_place, workshop
from vlft.merge.match import MergePlan, plan_merge, towers_of_adapter
from vlft.merge.verify import EXACT_SHARE, RowCheck, verify
from vlft.merge.write import check_space, full_disk_is_a_user_error, write_settings, write_weights
from vlft.model.load import check_fit

if TYPE_CHECKING:
    import torch

__all__ = ["MergeReport", "RowCheck", "merge", "towers_of_adapter"]

Dtype = Literal["keep", "bf16", "fp16", "fp32"]
_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_UNTIED = (
    "the base ties lm_head to its embedding, and the adapter changes one of the two: both are written, and "
    "tie_word_embeddings in config.json is now false"
)
_WORDS = {name: word for word, name in _TORCH_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did and what it measured.

    Attributes:
        dtype: of the written weights, e.g. `bfloat16`; several joined by ` + `.
        towers: tower -> full, lora or frozen, as trained.
        max_logit_diff: largest |merged - (base + adapter)| over both rows, in float32.
        tensors: written.
        changed: of them, changed by the adapter.
        out: the merged folder.
        base_model: as the user or the run named it.
        lineage: how it is known that the adapter belongs to this base.
        rows: figures per row.
        warnings: what the user should know of a merge that was done all the same.
        notes: how the adapter's folder was read.
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


def merge(
    run: str | Path,
    out: str | Path,
    *,
    base_model: str | None = None,
    dtype: Dtype = "keep",
    progress: Callable[[str], None] = lambda line: None,
) -> MergeReport:
    """Write `out`: the base with the run's adapter in its weights, verified against base + adapter.

    Args:
        run: run folder, `checkpoint-N`, or adapter folder (one of plain peft too).
        out: new or empty folder. It appears under this name only once verified.
        base_model: folder or hub id of the base, where it is not where the run says.
        dtype: `keep`: each tensor's own in the base; else of all of them.
        progress: called with a line of text now and then.

    Raises:
        CheckpointError: `run` is a whole model or holds no adapter, the adapter does not belong to the base, `out` is
            taken, the disk is full, or merged and base + adapter disagree (promise 7 of the design). Nothing is left
            at `out` then.
    """
    import torch

    found = find_adapter_or_model(run)
    if found.kind == "full":
        raise CheckpointError(
            f"{run}: needs no merge: it is already a whole model, which transformers and vLLM load as it is."
        )
    target = Path(out).expanduser().resolve()  # a link to an empty folder cannot be renamed onto
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{out}: already there and not empty. Give a new or empty folder, or remove it.")
    base_id, base = find_base(run, found, base_model)
    family = family_of(base)
    open_processor(base, found.folder)  # before an hour of writing, not when the merged model is asked
    check_fit(base, family)
    lineage = check_lineage(run, found, base_id, base)
    adapter = read_adapter(found.folder, base, family)
    plan = plan_merge(adapter, base, family)
    towers = _check_towers(run, found, plan)
    wanted = None if dtype == "keep" else getattr(torch, _TORCH_NAMES[dtype])
    with full_disk_is_a_user_error(target), _workshop(target) as folder:
        check_space(target, plan, wanted)
        write_settings(base, found.folder, folder, wanted, untied=plan.untied)
        written = write_weights(plan, base, folder, wanted, progress)
        rounded = {family.published_name(name): tensor.dtype for name, tensor in written.items() if tensor.rounded}
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
        )
        warnings = _judge(run, rows, rounded_to, told=dtype != "keep")
        if found.record is not None:
            merged_from = {"merged_from": str(run), "max_logit_diff": max(row.difference for row in rows)}
            write_record(folder, replace(found.record, kind="full", training=found.record.training | merged_from))
        open_to_others(folder)
        put_in_place(folder, target, last="config.json")  # without it the folder is no model
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
        notes=(*adapter.notes, *([_UNTIED] if plan.untied else [])),
    )


def _check_towers(run: str | Path, found: Located, plan: MergePlan) -> dict[str, str]:
    if found.record is None:
        return plan.towers
    if found.record.towers != plan.towers:
        raise CheckpointError(
            f"{run}: vlft.json says it trained {found.record.towers}, the adapter's tensors say {plan.towers}. "
            "The folder mixes two runs, or the adapter was not saved whole."
        )
    return found.record.towers


def _judge(run: str | Path, rows: list[RowCheck], rounded_to: torch.dtype | None, *, told: bool) -> tuple[str, ...]:
    """Refuse to call it merged where a row disagrees, with its figures.

    Wrong arithmetic is always refused. What rounding to the base's own dtype costs is refused above the tolerance,
    since nobody asked for it; where the user named the dtype (`told`) the same is a warning, since any merge into that
    dtype costs it.

    Returns:
        Warnings.
    """
    warnings = []
    for row in rows:
        figures = (
            f"on a {row.row} row, logits of merged and of base + adapter differ by up to {row.difference:.3g} "
            f"(the adapter moves them by up to {row.moved:.3g}, they span {row.range:.3g}), the top token at "
            f"{row.flips} positions"
        )
        if not row.faultless:
            raise CheckpointError(
                f"{run}: not merged: {figures}. It is not rounding: rounding apart it is {row.fault:.3g}, allowed is "
                f"{EXACT_SHARE:g} of the span. The adapter or base file is damaged, or vlft is wrong: report it."
            )
        if rounded_to is None or row.kept:
            continue
        lost = (
            f"{figures}; allowed are {row.allowed:.3g} and 0. {_word(rounded_to)} is too coarse beside the base's "
            "weights to hold what the adapter changed"
        )
        if not told:
            raise CheckpointError(
                f"{run}: not merged: {lost}. Keep it with --dtype fp32, or accept the rounding with "
                f"--dtype {_WORDS[_word(rounded_to)]}."
            )
        warnings.append(f"{lost}; --dtype fp32 keeps it.")
    if not any(row.moved for row in rows):
        warnings.append("the adapter moves nothing: it was not trained, or at a learning rate of 0.")
    return tuple(warnings)


def _word(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


@contextmanager
def _workshop(target: Path) -> Iterator[Path]:
    """A folder beside `target` to work in; the leftovers of a killed merge in it are removed."""
    folder = target.with_name(f".{target.name}.merging")
    with ExitStack() as stack:
        try:
            stack.enter_context(workshop(folder))
        except BlockingIOError:
            raise CheckpointError(f"{target}: another merge is writing it. Wait for it, or give another OUT.") from None
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written ({error.strerror}). Give an OUT that can.") from error
        yield folder
