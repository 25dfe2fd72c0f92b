"""Measure one real step on the largest micro-batch of a plan, to compare it with the estimate.

On a GPU the peak is that of CUDA's allocator. On a CPU, as in the tests, the same code counts only tensors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlft.config.flags import ModelFlags
from vlft.config.training import TrainFlags
from vlft.data.ipc import moved
from vlft.data.sample import EncodedSample, Sample
from vlft.errors import ConfigError
from vlft.model import attention, forward, kernels, linear_attention
from vlft.model.activations import Ledger
from vlft.model.apply import apply_towers, checkpoint_activations
from vlft.model.scale import PixelScale
from vlft.setup import Base
from vlft.setup.weights import load_for_training


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """Bytes of one process, and its speed.

    Attributes:
        weights: all weights.
        gradients: all gradients.
        optimizer: optimizer state.
        vision: activations of the vision tower, saved between forward and backward.
        merger: activations of the mergers.
        language: activations of the language model.
        head: saved by the head.
        peak: most bytes allocated at one time; None without a GPU.
        seconds: duration of a second step, after the first one has warmed up the device.
        tokens: tokens of that step.
    """

    weights: int
    gradients: int
    optimizer: int
    vision: int
    merger: int
    language: int
    head: int
    peak: int | None
    seconds: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}


def measure(
    base: Base, args: TrainFlags, model_flags: ModelFlags, samples: Sequence[Sample], *, checkpointed: Sequence[str]
) -> MeasuredStep:
    """Load the model and train two steps on a micro-batch.

    Args:
        base: the opened base.
        args: flags of the run.
        model_flags: flags of the run.
        samples: rows of the micro-batch.
        checkpointed: towers that recompute their activations.

    Raises:
        ConfigError: it does not fit on the device.
        DataError: a row cannot be decoded.
    """
    device = args.device
    gpu = device.type == "cuda"
    try:
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        branches = any(sample.rejected for sample in samples)
        model, dtype = _prepared(base, args, model_flags, checkpointed, branches=branches)
        batch = _batch(base, samples, device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        model.train()
        ledger = Ledger(model, batch.values())
        _step(model, batch, optimizer, dtype, ledger)
        gradients = _bytes(p.grad for p in model.parameters())
        if gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        _step(model, batch, optimizer, dtype, None)
        if gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"--measure: the step does not fit on {device}: {str(error).splitlines()[0]}. Without --measure the plan "
            "says what would help."
        ) from error
    return MeasuredStep(
        weights=_bytes(model.parameters()),
        gradients=gradients,
        optimizer=_bytes(value for state in optimizer.state.values() for value in state.values()),
        peak=torch.cuda.max_memory_allocated(device) if gpu else None,
        seconds=seconds,
        tokens=int(batch["input_ids"].numel()),
        **ledger.kept,
    )


def _prepared(
    base: Base, args: TrainFlags, model_flags: ModelFlags, checkpointed: Sequence[str], *, branches: bool
) -> tuple[Any, torch.dtype | None]:
    """The model as `vlft.train.model_setup.prepare_model` prepares it in one process, and the dtype of autocast."""
    half = args.half
    computing = half or torch.float32
    model: Any = load_for_training(base, half=half, device=args.device)
    model.to(args.device)
    attention.install(model, model_flags.attn, dtype=computing, device=args.device, branches=branches)
    kernels.install(model, args.liger, dtype=computing, device=args.device)
    forward.bind(model, PixelScale.of(base.processor))
    linear_attention.install(model, model_flags.linear_attn, dtype=computing, device=args.device)
    model = apply_towers(model, base.family, base.towers, masters=half is not None, computing=half)
    checkpoint_activations(model, checkpointed)
    return model, half


def _batch(base: Base, samples: Sequence[Sample], device: torch.device) -> dict[str, Any]:
    rows: list[EncodedSample] = [base.encoder.encode(sample) for sample in samples]
    return moved(forward.inputs_of(base.collator()(rows)), device)


def _step(
    model: Any, batch: dict[str, Any], optimizer: torch.optim.Optimizer, half: torch.dtype | None, ledger: Ledger | None
) -> None:
    optimizer.zero_grad(set_to_none=True)
    device = batch["input_ids"].device.type
    with torch.autocast(device, dtype=half, enabled=half is not None):
        if ledger is None:
            loss = model(**batch).loss
        else:
            with ledger:
                loss = model(**batch).loss
    (loss / max(1, len(batch["targets"]))).backward()
    optimizer.step()


def _bytes(tensors: Any) -> int:
    """Bytes of all storages; a shared storage counts once."""
    found = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
    }
    return sum(found.values())
