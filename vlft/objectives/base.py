"""What an objective is, and how its losses add up over micro-batches and processes. Knows no trainer and no file.

    Sample  --encode-->  EncodedSample  --collate-->  Batch  --loss-->  Loss(sum, weight, statistics)

The trainer divides the sum of a global step by its weight, so a step is the same at any batch size, accumulation and
number of processes: each of them is a part of one sum. A loss that is a mean over its own micro-batch would not be.
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
    """A mean over many micro-batches, as far as one of them adds to it.

    Attributes:
        sum: float [], on the device; may carry a gradient, which is ignored.
        weight: what the sum is divided by in the end, e.g. tokens or pairs.
    """

    sum: torch.Tensor
    weight: float


class Loss(NamedTuple):
    """What a micro-batch adds to a step, or to an evaluation.

    Attributes:
        sum: float32 [], on the device and differentiable: the sum over the micro-batch, never its mean. A micro-batch
            without rows gives 0 with a graph through the model, else other processes wait for its gradients.
        weight: `Objective.weight` of the micro-batch.
        statistics: some or all of `Objective.statistics`.
    """

    sum: torch.Tensor
    weight: float
    statistics: Mapping[str, Mean] = {}


class Objective(ABC):
    """What a run optimises. A subclass says `loss` and `weight`, and changes what else differs.

    Args:
        encoder: rows -> tokens and pixels, with the run's settings.
        collator: encoded samples -> a flat batch.
    """

    #: What `weight` counts: an evaluation is logged with `eval_<unit>`.
    unit: ClassVar[str] = "tokens"
    #: Names of the statistics. Each is logged under its name, and as `eval_<name>`, as a mean over micro-batches and
    #: processes. Every process has to know them all, also where its own rows add to none.
    statistics: ClassVar[tuple[str, ...]] = ()
    #: Tensors of a batch that the loss takes: they go to the device. One that adds its own names them here.
    tensors: ClassVar[tuple[str, ...]] = FORWARD_KEYS

    def __init__(self, *, encoder: Encoder, collator: Collator) -> None:
        self.encoder = encoder
        self.collator = collator

    def encode(self, sample: Sample) -> EncodedSample:
        """What a row becomes; called in the loader's workers. What it costs is what the encoder measured.

        Raises:
            DataError: the row cannot be trained on.
        """
        return self.encoder.encode(sample)

    def collate(self, items: Sequence[EncodedSample | BadRow]) -> Batch:
        """Items of a micro-batch, maybe none -> the batch, on the CPU; called in the loader's workers."""
        return self.collator(items)

    def cross_entropy(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """float32 []: the sum of the cross-entropies of all trained tokens, the fastest loss there is."""
        return _forward(model, batch).loss

    def log_probs(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """float32 [K]: the log-probability of each trained token, for `vlft.model.loss.sum_segments` and others."""
        return _forward(model, batch, return_log_probs=True).log_probs

    @abstractmethod
    def weight(self, batch: Batch) -> float:
        """What the step's loss is divided by, as far as this micro-batch adds to it; known before the forward."""

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """The loss of a micro-batch whose `tensors` are on the device. Reads nothing back from it.

        Args:
            model: as the trainer runs it: bound to the flat forward, maybe within PEFT, DDP or DeepSpeed.
        """

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """The same of an evaluation's micro-batch, without gradients."""
        return self.loss(model, batch)


def _forward(model: torch.nn.Module, batch: Any, **asked: bool) -> Any:
    """What the flat forward yields (`vlft.model.forward.FlatOutput`)."""
    return model(**{key: batch[key] for key in FORWARD_KEYS}, **asked)


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Losses and statistics added up over micro-batches, in float64, on the device until they are asked for.

    Attributes:
        names: of the statistics.
        sums: float64 [] each, of the loss and then of each statistic; None where nothing was added yet.
        weights: of the same.
    """

    names: tuple[str, ...] = ()
    sums: tuple[torch.Tensor | None, ...] = ()
    weights: tuple[float, ...] = ()

    def plus(self, loss: Loss) -> Sums:
        """These and one micro-batch more; nothing is read from the device.

        Raises:
            ValueError: a statistic that the objective has not named.
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
        """float64 [2 * (1 + S)], sums and then weights, to be added up over processes and handed to `means`."""
        many = 1 + len(self.names)
        zero = torch.zeros((), dtype=torch.float64, device=device)
        sums = torch.stack([zero if one is None else one for one in self.sums or [None] * many])
        weights = torch.tensor(self.weights or [0.0] * many, dtype=torch.float64, device=device)
        return torch.cat([sums, weights])

    def means(self, totals: Sequence[float]) -> tuple[dict[str, float | None], float]:
        """What `as_vector` comes to over all processes.

        Returns:
            means: "loss" and each statistic; None where nothing was added.
            weight: of the loss.
        """
        many = 1 + len(self.names)
        pairs = zip(("loss", *self.names), totals[:many], totals[many:], strict=True)
        return {name: total / weight if weight else None for name, total, weight in pairs}, totals[many]
