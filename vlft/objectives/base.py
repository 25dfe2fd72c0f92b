"""The interface of an objective, and sums of its losses over micro-batches and processes. Independent of the trainer.

    Sample  --encode-->  EncodedSample  --collate-->  Batch  --loss-->  Loss(sum, weight, statistics)

The trainer divides the sum of a global step by its weight. So a step does not depend on batch size, accumulation and
number of processes: each micro-batch adds to one sum. This would not hold for a mean over each micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch

from vlft.data.collate import Batch, Collator
from vlft.data.encode import Encoder
from vlft.data.sample import EncodedSample, Sample
from vlft.errors import BadRow
from vlft.model.forward import FORWARD_KEYS


class Mean(NamedTuple):
    """The contribution of one micro-batch to a mean over many.

    Attributes:
        sum: float [], on the device; a gradient is ignored.
        weight: the contribution to the divisor, e.g. the number of tokens or pairs.
    """

    sum: torch.Tensor
    weight: float


class Loss(NamedTuple):
    """The contribution of a micro-batch to a step, or to an evaluation.

    Attributes:
        sum: float32 [], on the device and differentiable: the sum over the micro-batch, never its mean. A micro-batch
            without rows has 0 with a graph through the model; otherwise other processes wait for its gradients.
        weight: `Objective.weight` of the micro-batch.
        statistics: some or all of `Objective.statistics`.
    """

    sum: torch.Tensor
    weight: float
    statistics: Mapping[str, Mean] = {}


class Objective(ABC):
    """What a run optimises. A subclass defines `loss` and `weight`, and may override the other methods.

    Args:
        encoder: rows -> tokens and pixels, with the run's settings.
        collator: encoded samples -> a flat batch.
    """

    #: What `weight` counts. An evaluation logs its weight as `eval_<unit>`.
    unit: ClassVar[str] = "tokens"
    #: Names of the statistics. Each is logged under its name, and as `eval_<name>`, as a mean over micro-batches and
    #: processes. All processes need the same names, also if the rows of a process contribute to none of them.
    statistics: ClassVar[tuple[str, ...]] = ()
    #: Tensors of a batch that the loss uses; they are copied to the device. An objective adds its own tensors here.
    tensors: ClassVar[tuple[str, ...]] = FORWARD_KEYS

    def __init__(self, *, encoder: Encoder, collator: Collator) -> None:
        self.encoder = encoder
        self.collator = collator

    def encode(self, sample: Sample) -> EncodedSample:
        """Encode a row. Called in the loader's workers. The cost of a row is the one that the encoder measured.

        Raises:
            DataError: the row cannot be used for training.
        """
        return self.encoder.encode(sample)

    def collate(self, items: Sequence[EncodedSample | BadRow]) -> Batch:
        """Make a batch on the CPU of the items of a micro-batch, possibly none. Called in the loader's workers."""
        return self.collator(items)

    def cross_entropy(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """float32 []: the sum of the cross-entropies of all trained tokens. This is the fastest loss."""
        return _forward(model, batch).loss

    def log_probs(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """float32 [K]: the log-probability of each trained token, for example for `vlft.model.loss.sum_segments`."""
        return _forward(model, batch, return_log_probs=True).log_probs

    @abstractmethod
    def weight(self, batch: Batch) -> float:
        """The contribution of this micro-batch to the divisor of the step's loss; known before the forward pass."""

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """The loss of a micro-batch. It must not read values back from the device.

        Args:
            model: as the trainer runs it: with the flat forward, possibly wrapped by PEFT, DDP or DeepSpeed.
            batch: the micro-batch, with `tensors` on the device.
        """

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """The loss of a micro-batch in an evaluation, without gradients."""
        return self.loss(model, batch)


def _forward(model: torch.nn.Module, batch: Any, **options: bool) -> Any:
    """The result of the flat forward (`vlft.model.forward.FlatOutput`)."""
    return model(**{key: batch[key] for key in FORWARD_KEYS}, **options)


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums of losses and statistics over micro-batches, in float64. They stay on the device until they are read.

    Attributes:
        names: of the statistics.
        sums: float64 [] each, of the loss and then of each statistic; None if nothing was added yet.
        weights: of the loss and then of each statistic.
    """

    names: tuple[str, ...] = ()
    sums: tuple[torch.Tensor | None, ...] = ()
    weights: tuple[float, ...] = ()

    def plus(self, loss: Loss) -> Sums:
        """The sums with one more micro-batch. Nothing is read from the device.

        Raises:
            ValueError: the loss has a statistic that is not in `names`.
        """
        if unknown := sorted(set(loss.statistics) - set(self.names)):
            raise ValueError(f"statistics {unknown} are not among Objective.statistics {list(self.names)}")
        means = [loss, *map(loss.statistics.get, self.names)]
        before = zip(self.sums or [None] * len(means), self.weights or [0.0] * len(means), strict=True)
        sums, weights = [], []
        for mean, (old, weight) in zip(means, before, strict=True):
            new = None if mean is None else mean.sum.detach().double()
            sums.append(new if old is None else old if new is None else old + new)
            weights.append(weight + (0.0 if mean is None else mean.weight))
        return replace(self, sums=tuple(sums), weights=tuple(weights))

    def as_vector(self, device: torch.device) -> torch.Tensor:
        """float64 [2 * (1 + S)] for S statistics: sums, then weights. Sum it over processes and pass it to `means`."""
        many = 1 + len(self.names)
        zero = torch.zeros((), dtype=torch.float64, device=device)
        sums = torch.stack([zero if one is None else one for one in self.sums or [None] * many])
        weights = torch.tensor(self.weights or [0.0] * many, dtype=torch.float64, device=device)
        return torch.cat([sums, weights])

    def means(self, totals: Sequence[float]) -> tuple[dict[str, float | None], float]:
        """Compute means from the sum of `as_vector` over all processes.

        Returns:
            means: of "loss" and each statistic; None if nothing was added.
            weight: of the loss.
        """
        many = 1 + len(self.names)
        pairs = zip(("loss", *self.names), totals[:many], totals[many:], strict=True)
        return {name: total / weight if weight else None for name, total, weight in pairs}, totals[many]
