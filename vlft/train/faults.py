"""What ends a run in the middle, in words: where, what, and what the user can do. Detects nothing by itself."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlft.data.collate import Batch
from vlft.errors import RunFault

SHOWN_ROWS = 8
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: What torch and safetensors put into words instead of an error number.
_FULL_WORDS = re.compile(
    r"No space left|Disk quota|File too large|PytorchStreamWriter failed|inline_container|os error (28|27|122)"
)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Which rows a micro-batch holds, for messages.

    Attributes:
        rank: process that trains it.
        place, of: which of the rank's micro-batches of this step, from 1, and how many those are.
        rows: as file[index].
        tokens, patches: of all rows.
    """

    rank: int
    place: int
    of: int
    rows: tuple[str, ...]
    tokens: int
    patches: int

    @classmethod
    def of_batch(cls, batch: Batch, *, rank: int, place: int, of: int) -> MicroBatch:
        rows = tuple(f"{file}[{index}]" for file, index in batch["rows"])
        patches = len(batch["still_patches"]) + len(batch["video_patches"]) if len(batch["vision_rows"]) else 0
        return cls(rank=rank, place=place, of=of, rows=rows, tokens=batch["counts"]["tokens"], patches=patches)

    def __str__(self) -> str:
        return f"rank {self.rank}, micro-batch {self.place} of {self.of}: {shown(self.rows)}"


def shown(rows: Sequence[str]) -> str:
    """The first few rows, and how many more there are."""
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return (", ".join(rows[:SHOWN_ROWS]) or "no rows") + more


def going_on(checkpoint: Path | None) -> str:
    """What the same command would do now."""
    if checkpoint is None:
        return "There is no checkpoint yet: run the same command again to start over."
    return f"The last good checkpoint is {checkpoint}. Run the same command again to resume from it."


def worker_died(error: BaseException, *, workers: int, checkpoint: Path | None) -> RunFault | None:
    """A loader process that ended; None where `error` is something else. torch raises it wherever the run just is."""
    if "DataLoader worker (pid" not in str(error):  # without the number it is an exception inside of one
        return None
    how = re.search(r"by signal: (\w+)|exited unexpectedly", str(error))
    ended = f"was ended by {how[1]}" if how and how[1] else "ended"
    return RunFault(
        f"a loader process {ended}. Often the system ends the largest process when memory runs out (dmesg says so): "
        f"lower --dataloader_num_workers ({workers} a process now) or --dataloader_prefetch_factor, or give the "
        f"machine more memory (in a container also /dev/shm). {going_on(checkpoint)}"
    )


def out_of_memory(
    error: BaseException, batch: MicroBatch, *, where: str, checkpoint: Path | None, checkpointed: bool, packing: bool
) -> RunFault:
    """A device (or the machine) had no room for a micro-batch.

    Args:
        checkpointed: activations are recomputed everywhere already.
    """
    first = str(error).strip().split("\n")[0]
    helps = [] if checkpointed else ["--gradient_checkpointing true (the run can go on with it)"]
    helps += [
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment",
        "a lower --pack_tokens and --pack_patches" if packing else "a lower --per_device_train_batch_size",
        "a lower --image_max_pixels or --video_max_pixels",
        "--lora_rank instead of full towers, or --deepspeed zero2",
    ]
    return RunFault(
        f"out of memory in {where}, {batch}; {batch.tokens:,} tokens, {batch.patches:,} patches.\n  {first}\n"
        f"  What helps, in this order: {'; '.join(helps)}. Other rows a step or other pixels are another run and need "
        f"a new --output_dir.\n  {going_on(checkpoint)}"
    )


def no_room(error: BaseException, *, checkpoint: Path | None) -> RunFault:
    """A device had no room outside of any micro-batch."""
    return RunFault(
        "out of memory for weights, gradients or the optimizer's states, which come with the first step.\n"
        f"  {str(error).strip().splitlines()[0]}\n"
        "  What helps: LoRA instead of full towers, --optim adamw_8bit, --deepspeed zero2 or zero3 over several GPUs, "
        f"zero2_offload on one.\n  {going_on(checkpoint)}"
    )


def not_finite(
    step: int,
    *,
    norm: float | None,
    losses: Sequence[tuple[MicroBatch, float]],
    everything: Sequence[MicroBatch],
    left_out: int | None,
    checkpoint: Path | None,
) -> str:
    """A loss or gradient that is NaN or infinite.

    Args:
        norm: of the gradient, where it was taken.
        losses: micro-batches whose loss is not finite, over all ranks, and that loss.
        everything: all micro-batches of the step.
        left_out: steps left out so far, this one included; None: the run stops.
    """
    lines = [f"step {step}: " + ("the loss" if losses else f"the gradient (norm {norm:g})") + " is not finite."]
    if losses:
        lines += [f"  {batch}: loss {loss:g}" for batch, loss in losses[:SHOWN_ROWS]]
        if len(losses) > SHOWN_ROWS:
            lines.append(f"  and {len(losses) - SHOWN_ROWS} more micro-batches")
    else:
        lines.append("  every loss is; the rows of the step are")
        lines += [f"  {batch}" for batch in everything[:SHOWN_ROWS]]
    if left_out is not None:
        return "\n".join([*lines, f"  The step is left out: no weight moved ({left_out} so far)."])
    lines.append(
        "  Look at the rows (vlft preview FILE --index N). Where they are fine, the run diverged: a lower "
        "--learning_rate, more --warmup_steps, a lower --max_grad_norm. --max_nonfinite_steps 10 leaves so many such "
        "steps out."
    )
    return "\n".join([*lines, f"  {going_on(checkpoint)}"])


def disk_full(error: BaseException, *, folder: Path, checkpoint: Path | None) -> RunFault | None:
    """A disk that took no more; None where `error` is something else."""
    if getattr(error, "errno", None) not in FULL_DISK and not _FULL_WORDS.search(str(error)):
        return None
    free = shutil.disk_usage(folder).free / 1e9
    first = str(error).strip().split("\n")[0]
    return RunFault(
        f"{folder}: the disk is full ({first}; {free:,.1f} GB are free). What was half written is removed. Make "
        f"room; a lower --save_total_limit keeps fewer checkpoints. {going_on(checkpoint)}"
    )
