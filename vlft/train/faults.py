"""Messages for faults that end a run in the middle: where, what, and what the user can do.

Detects no fault by itself; `vlft.train.step_guard` and `vlft.train.run` do.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from vlft.data.collate import Batch
from vlft.errors import RunFault
from vlft.train.folder import RunFolder
from vlft.train.ranks import peer_lost

SHOWN_ROWS = 8
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Texts that torch and safetensors raise for a full disk, without an error number.
_FULL_DISK_TEXT = re.compile(
    r"No space left|Disk quota|File too large|PytorchStreamWriter failed|inline_container|os error (28|27|122)"
)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The rows of a micro-batch, for messages.

    Attributes:
        rank: the process that trains it.
        place: its number among the rank's micro-batches of this step, from 1.
        of: how many micro-batches the rank has in this step.
        rows: its rows as file[index].
        tokens: of all its rows.
        patches: of all its rows.
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
        patches = len(batch["vision_positions"]) if len(batch["vision_rows"]) else 0
        return cls(rank=rank, place=place, of=of, rows=rows, tokens=batch["counts"]["tokens"], patches=patches)

    def __str__(self) -> str:
        return f"rank {self.rank}, micro-batch {self.place} of {self.of}: {shown(self.rows)}"


def shown(rows: Sequence[str]) -> str:
    """The first few rows, and how many more there are."""
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return (", ".join(rows[:SHOWN_ROWS]) or "no rows") + more


def going_on(checkpoint: Path | None) -> str:
    """What the same command will do now, as a sentence for the user."""
    if checkpoint is None:
        return "There is no checkpoint yet: run the same command again to start over."
    return f"The last good checkpoint is {checkpoint}. Run the same command again to resume from it."


def worker_died(error: BaseException, *, workers: int, checkpoint: Path | None) -> RunFault | None:
    """The fault of a loader process that ended; None if `error` is something else.

    torch raises it wherever the run is at that moment.
    """
    if "DataLoader worker (pid" not in str(error):  # without the pid it is an exception inside a worker
        return None
    how = re.search(r"by signal: (\w+)|exited unexpectedly", str(error))
    ended = f"was ended by {how[1]}" if how and how[1] else "ended"
    return RunFault(
        f"a loader process {ended}. The system often ends the largest process when memory runs out (dmesg shows it): "
        f"lower --dataloader_num_workers ({workers} a process now) or --dataloader_prefetch_factor, or give the "
        f"machine more memory (in a container also more /dev/shm). {going_on(checkpoint)}"
    )


def out_of_memory(
    error: BaseException,
    batch: MicroBatch,
    *,
    where: str,
    checkpoint: Path | None,
    checkpointed: bool,
    packing: bool,
    grpo: bool = False,
) -> RunFault:
    """The fault of a device (or the machine) that had no memory for a micro-batch.

    Args:
        error: as torch or Python raised it.
        batch: the micro-batch.
        where: the step or evaluation.
        checkpoint: the newest one.
        checkpointed: whether all activations are already recomputed.
        packing: whether the micro-batch is a pack.
        grpo: whether the step also generates completions (--method grpo), whose tokens are not known here.
    """
    first = str(error).strip().split("\n")[0]
    helps = [] if checkpointed else ["--gradient_checkpointing true (the run can resume with it)"]
    helps += [
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment",
        "a lower --pack_tokens and --pack_patches" if packing else "a lower --per_device_train_batch_size",
    ]
    if grpo:
        helps += [
            "fewer completions at a time: a lower --num_generations or --max_completion_length, or fewer prompts of a "
            "step (--global_batch)",
            "a lower --image_max_pixels",
            "lora instead of full towers",
        ]
    else:
        helps += [
            "a lower --image_max_pixels or --video_max_pixels",
            "--lora_rank instead of full towers, or --deepspeed zero2",
        ]
    size = "" if grpo else f"; {batch.tokens:,} tokens, {batch.patches:,} patches"
    return RunFault(
        f"out of memory in {where}, {batch}{size}.\n  {first}\n"
        f"  What helps, in this order: {'; '.join(helps)}. A run with other rows per step or other pixels is another "
        f"run and needs a new --output_dir.\n  {going_on(checkpoint)}"
    )


def generates(folder: RunFolder) -> bool:
    """Whether the run of a folder learns from completions that it generates."""
    return folder.record.training.get("method") == "grpo"


def no_room(error: BaseException, *, checkpoint: Path | None, grpo: bool = False) -> RunFault:
    """The fault of a device that had no memory outside any micro-batch."""
    zero = "" if grpo else ", --deepspeed zero2 or zero3 over several GPUs, zero2_offload on one"
    return RunFault(
        "out of memory for weights, gradients or the optimizer's states, which the first step allocates.\n"
        f"  {str(error).strip().splitlines()[0]}\n"
        f"  What helps: LoRA instead of full towers, --optim adamw_8bit{zero}.\n  {going_on(checkpoint)}"
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
    """The message about a loss or gradient that is NaN or infinite.

    Args:
        step: the optimizer step.
        norm: of the gradient; None if it was not computed.
        losses: micro-batches whose loss is not finite, over all ranks, each with its loss.
        everything: all micro-batches of the step.
        left_out: number of steps left out so far, this one included; None: the run stops.
        checkpoint: the newest one.
    """
    lines = [f"step {step}: " + ("the loss" if losses else f"the gradient (norm {norm:g})") + " is not finite."]
    if losses:
        lines += [f"  {batch}: loss {loss:g}" for batch, loss in losses[:SHOWN_ROWS]]
        if len(losses) > SHOWN_ROWS:
            lines.append(f"  and {len(losses) - SHOWN_ROWS} more micro-batches")
    else:
        lines.append("  Every loss is finite. The rows of the step:")
        lines += [f"  {batch}" for batch in everything[:SHOWN_ROWS]]
    if left_out is not None:
        return "\n".join([*lines, f"  The step is left out: no weight moved ({left_out} so far)."])
    lines.append(
        "  Inspect the rows (vlft preview FILE --index N). If they are fine, the run diverged: use a lower "
        "--learning_rate, more --warmup_steps or a lower --max_grad_norm. --max_nonfinite_steps 10 leaves out up to 10 "
        "such steps."
    )
    return "\n".join([*lines, f"  {going_on(checkpoint)}"])


def disk_full(error: BaseException, *, folder: Path, checkpoint: Path | None) -> RunFault | None:
    """The fault of a full disk; None if `error` is something else."""
    if getattr(error, "errno", None) not in FULL_DISK and not _FULL_DISK_TEXT.search(str(error)):
        return None
    free = shutil.disk_usage(folder).free / 1e9
    first = str(error).strip().split("\n")[0]
    return RunFault(
        f"{folder}: the disk is full ({first}; {free:,.1f} GB are free). Incomplete files were removed. Free some "
        f"space; a lower --save_total_limit keeps fewer checkpoints. {going_on(checkpoint)}"
    )


@contextlib.contextmanager
def as_messages(folder: RunFolder, *, workers: int) -> Iterator[None]:
    """Turn errors in the block into messages for the user, and release the run folder at the end.

    Args:
        folder: the run folder.
        workers: loader processes.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of the output is gone
    except (OSError, RuntimeError, SafetensorError) as error:
        newest = folder.newest()
        if isinstance(error, torch.OutOfMemoryError):
            raise no_room(error, checkpoint=newest, grpo=generates(folder)) from error
        if (fault := disk_full(error, folder=folder.path, checkpoint=newest)) is not None:
            folder.clear()
            raise fault from error
        if (fault := worker_died(error, workers=workers, checkpoint=newest)) is not None:
            raise fault from error
        if (lost := peer_lost(error)) is not None:
            raise lost from error
        raise
    finally:
        folder.release()
