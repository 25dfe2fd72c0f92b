"""The cache of a frozen vision tower's features in a run: what the loaders see of it, and what the run adds.

The features of a step are copied to the host without waiting, and a thread writes them. Two rules make a run the same
whether it is killed and resumed or not, and however fast its processes write:

- In an epoch the loaders see what the run stored before that epoch, and what other runs stored. `on_epoch_begin` waits
  until all processes have written.
- A checkpoint is saved after the features of its steps are written. A resumed run has the same id (`vlft.json`), so
  the features of steps that it repeats are computed again, in the same packs.
"""

from __future__ import annotations

import contextlib
import copy
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainerCallback

from vlft.config.training import TrainFlags
from vlft.data.features.reader import CachedMedia
from vlft.data.features.writer import GB, Writer, cache_root, check_root
from vlft.model import adapt
from vlft.model.features import Features
from vlft.model.prints import tower_print
from vlft.model.scale import PixelScale
from vlft.objectives import Objective
from vlft.setup import Base
from vlft.train.folder import RunFolder
from vlft.train.ranks import barrier, gather, on_rank_zero
from vlft.train.record import FEATURE_RUN
from vlft.train.zero import shares_weights

BEFORE_TRAINING = -1  # stamp of features that the first epoch sees: below its limit of 0
WAITING = 4  # micro-batches that wait to be written; the step waits if a disk is slower than the GPU


@dataclass(frozen=True, kw_only=True)
class _Computed:
    """Features of a micro-batch that are on their way to the disk.

    Attributes:
        stack_LNH: on the host.
        ready: waits until the copy is complete.
        keys: key and number of features of each medium; without a key it is not stored.
        stamp: optimizer steps that were complete.
    """

    stack_LNH: torch.Tensor
    ready: Callable[[], object]
    keys: tuple[tuple[bytes | None, int], ...]
    stamp: int


class FeatureCache(TrainerCallback):
    """The cache of one run. The trainer calls `recording` around each forward pass, and has it as a callback.

    Args:
        model: ready to train, with whole weights.
        base: the opened base.
        args: the training flags.
        chosen: kernel -> the one that runs.
        run: id of the run, `run_id`.
        steps: optimizer steps of an epoch.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        base: Base,
        args: TrainFlags,
        chosen: Mapping[str, str],
        *,
        run: str,
        steps: int,
    ) -> None:
        self._run = int(run, 16)
        self.root = cache_root(args.vision_cache, os.environ)
        dtype = args.half or torch.float32
        # Under DeepSpeed frozen weights are 16-bit too, and TF32 changes matrix products in float32.
        choices = {**chosen, "deepspeed": str(args.zero is not None), "tf32": str(args.tf32)}
        del choices["gradient checkpointing"]  # computes the same
        scale = PixelScale.of(base.processor)
        self.tower = tower_print(model, scale, dtype=dtype, device=args.device, choices=choices)
        self.limit = int(args.vision_cache_gb * GB)
        self.steps = steps
        self.used, self.computed, self.stored = 0, 0, 0
        self._all_ranks_see = shares_weights(args)
        self._name = f"{base.family.model_type}-{self.tower[:16]}"
        self._writer = Writer(self.root, self._name, run=self._run, limit=self.limit, note=_note)
        self._queue: queue.Queue[_Computed | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._current: tuple[tuple[tuple[bytes | None, int], ...], int] | None = None
        self._training: CachedMedia | None = None
        self._evaluation: CachedMedia | None = None
        adapt.watch_features(model, self._take)

    def as_line(self, coming: int) -> str:
        """What the folder holds at the start of a run, and the bytes of the run's own features."""
        held = self._writer.held()
        return (
            f"vision cache: {self.root} holds {held.bytes / GB:.3g} of at most {self.limit / GB:g} GB, with "
            f"{held.media:,} pictures and videos of this tower ({self._name}); those of this run take at most "
            f"{coming / GB:.3g} GB"
        )

    # ---- what the loaders see

    def reading(self, objective: Objective, *, evaluation: bool) -> Objective:
        """Return a copy of the objective that takes features from the cache."""
        media = CachedMedia(self.root / self._name, tower=self.tower, run=self._run)
        if evaluation:
            self._evaluation = media
        else:
            self._training = media
        made = copy.copy(objective)
        made.encoder = replace(objective.encoder, cached=media)
        return made

    def collating(self, objective: Objective) -> None:
        """Let batches without patches skip the tower, unless its weights are shared out: then all ranks call it."""
        objective.collator.filler_picture = self._all_ranks_see

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(self._training, before=state.global_step // self.steps * self.steps)

    def before_evaluation(self, step: int) -> None:
        """Show the evaluation what was stored before this step. All ranks must call it."""
        self._show(self._evaluation, before=step)

    def _show(self, media: CachedMedia | None, *, before: int) -> None:
        self.drain()
        barrier()
        if media is not None:
            media.limit.value = before

    # ---- what the run adds

    @contextlib.contextmanager
    def recording(self, batch: Any, step: int | None) -> Iterator[None]:
        """Store what the tower computes of this micro-batch within the context.

        Args:
            batch: a micro-batch, also without pictures.
            step: optimizer steps that are complete; None: the reference is computed, which the first epoch follows.
        """
        keys = batch.get("feature_keys", ())
        self.used += batch["cached"]["media"] if "cached" in batch else 0
        self.computed += len(keys)
        self._current = (keys, BEFORE_TRAINING if step is None else step) if keys else None
        try:
            yield
        finally:
            self._current = None

    def _take(self, features: Features) -> None:
        if self._current is None or not self._writer.adds:
            return
        keys, stamp = self._current
        stack_LNH = features.stack_LNH.detach()
        ready: Callable[[], object] = _no_wait
        if stack_LNH.device.type != "cpu":
            host = torch.empty(stack_LNH.shape, dtype=stack_LNH.dtype, pin_memory=True)
            stack_LNH = host.copy_(stack_LNH, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)
            copied.record()
            ready = copied.synchronize
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="vlft-features", daemon=True)
            self._thread.start()
        self._queue.put(_Computed(stack_LNH=stack_LNH, ready=ready, keys=keys, stamp=stamp))

    def _write(self) -> None:
        while (one := self._queue.get()) is not None:
            try:
                one.ready()
                parts = one.stack_LNH.split([count for _, count in one.keys], dim=1)
                named = [(key, part) for (key, _), part in zip(one.keys, parts, strict=True) if key is not None]
                self.stored += self._writer.add(named, stamp=one.stamp)
            except Exception as error:  # noqa: BLE001 - a thread that ends would leave the trainer waiting for it
                self._writer.adds = False
                _note(f"--vision_cache {self.root}: nothing more is added, because of {error!r}")
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def drain(self) -> None:
        """Wait until everything that was computed so far is written."""
        self._queue.join()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self.drain()

    def close(self) -> None:
        """Write what is left, and let other runs use the files."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self._writer.close()

    def as_result(self) -> str:
        """How the cache was used on all ranks, in one line. Every rank must call it."""
        counts = gather((self.used, self.computed, self.stored))
        used, computed, stored = (sum(some) for some in zip(*counts, strict=True))
        return (
            f"vision cache: features of {used:,} pictures and videos were taken from it, {computed:,} were computed, "
            f"and {stored:,} of them stored"
        )


def check_folder(args: TrainFlags) -> None:
    """Make the folder of the cache.

    Raises:
        ConfigError: it is a file, cannot be written, or there is none.
    """
    check_root(cache_root(args.vision_cache, os.environ))


def run_id(folder: RunFolder) -> str:
    """Return the id of the run in the cache on every rank, and enter it into the record. A resumed run keeps its id."""
    run = on_rank_zero(lambda: folder.record.training.get(FEATURE_RUN) or secrets.token_hex(8))
    folder.keep_id(run)
    return run


def _no_wait() -> None:
    pass


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
