"""What an objective is, and how its losses add up over micro-batches and processes. It knows no trainer and no file.

    Sample  --encode-->  EncodedSample  --collate-->  Batch  --loss-->  Loss(sum, weight, statistics)

The trainer adds up the sums of a global step and divides by the sum of their weights. So a step is the same at any
batch size, accumulation and number of processes. A mean over each micro-batch would not be: rows of short
micro-batches would count more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch

from vlft.data.collate import Batch, Collator
from vlft.data.encode import DecodedRow, Encoder
from vlft.data.sample import EncodedSample, Sample
from vlft.errors import BadRow
from vlft.model.forward import FORWARD_KEYS, OPTIONAL_KEYS, inputs_of


class Mean(NamedTuple):
    """The share of one micro-batch in a mean over many.

    Attributes:
        sum: float [], on the device. Its gradient is not used.
        weight: adds up to what the sums are divided by, e.g. tokens or pairs.
    """

    sum: torch.Tensor
    weight: float


class Loss(NamedTuple):
    """The share of one micro-batch in the loss of a step or an evaluation.

    Attributes:
        sum: float32 [], on the device and differentiable: the sum over the micro-batch, never its mean. For a
            micro-batch without rows it is 0 and still comes from the model, because the other processes wait for this
            one's gradients.
        weight: `Objective.weight` of the micro-batch.
        statistics: some or all of `Objective.statistics`.
    """

    sum: torch.Tensor
    weight: float
    statistics: Mapping[str, Mean] = {}


class Objective(ABC):
    """What a run optimises. A subclass defines `loss` and `weight`, and overrides what else is different.

    Args:
        encoder: turns rows into tokens and pixels, with the run's settings.
        collator: puts encoded samples into a flat batch.
    """

    #: What `weight` counts. The total of an evaluation is logged as `eval_<unit>`.
    unit: ClassVar[str] = "tokens"
    #: Names of all statistics. Each is logged as a mean over micro-batches and processes: `<name>` in training,
    #: `eval_<name>` in an evaluation. Processes add them up by place, so all of them have the same list.
    statistics: ClassVar[tuple[str, ...]] = ()
    #: Keys of the batch that `loss` needs on the device. An objective that adds tensors of its own lists them here.
    tensors: ClassVar[tuple[str, ...]] = (*FORWARD_KEYS, *OPTIONAL_KEYS)

    def __init__(self, *, encoder: Encoder, collator: Collator) -> None:
        self.encoder = encoder
        self.collator = collator

    def decode(self, sample: Sample) -> DecodedRow:
        """Decode the media of a row; called in the loader's workers.

        Raises:
            DataError: a medium cannot be opened or decoded.
        """
        return self.encoder.decode(sample)

    def encode(self, sample: Sample, decoded: DecodedRow | None = None) -> EncodedSample:
        """Encode a row; called in the loader's workers. The item must cost what `encoder.measure` says of the row.

        Raises:
            DataError: the row cannot be trained on.
        """
        return self.encoder.encode(sample, decoded)

    def collate(self, items: Sequence[EncodedSample | BadRow]) -> Batch:
        """Put the items of a micro-batch, maybe none, into a batch on the CPU; called in the loader's workers."""
        return self.collator(items)

    def cross_entropy(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """float32 []: the sum of the cross-entropies of all trained tokens, the fastest loss there is."""
        return _forward(model, batch).loss

    def log_probs(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """float32 [K]: the log-probability of each trained token, for `vlft.model.loss.sum_segments` and others."""
        return _forward(model, batch, return_log_probs=True).log_probs

    @abstractmethod
    def weight(self, batch: Batch) -> float:
        """The micro-batch's share of what the step's loss is divided by; called before the forward, on the CPU."""

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """The loss of a micro-batch. It must read nothing back from the device.

        Args:
            model: as the trainer runs it: with the flat forward, maybe wrapped by PEFT, DDP or DeepSpeed.
            batch: of `collate`, with its `tensors` on the device.
        """

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """The loss of a micro-batch of an evaluation; called without gradients."""
        return self.loss(model, batch)


def _forward(model: torch.nn.Module, batch: Any, **asked: bool) -> Any:
    """The output of the flat forward (`vlft.model.forward.FlatOutput`)."""
    return model(**inputs_of(batch), **asked)


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Losses and statistics added up over micro-batches, in float64. They stay on the device until they are logged.

    Attributes:
        names: of the statistics.
        sums: float64 [] each, first the loss, then the statistics; None where nothing was added yet.
        weights: in the same order.
    """

    names: tuple[str, ...] = ()
    sums: tuple[torch.Tensor | None, ...] = ()
    weights: tuple[float, ...] = ()

    def plus(self, loss: Loss) -> Sums:
        """These sums with one more micro-batch; nothing is read from the device.

        Raises:
            ValueError: a statistic is not in `names`.
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
        """float64 [2 * (1 + S)]: sums, then weights. Add these up over processes and pass the result to `means`."""
        many = 1 + len(self.names)
        zero = torch.zeros((), dtype=torch.float64, device=device)
        sums = torch.stack([zero if one is None else one for one in self.sums or [None] * many])
        weights = torch.tensor(self.weights or [0.0] * many, dtype=torch.float64, device=device)
        return torch.cat([sums, weights])

    def read(self, *more: torch.Tensor) -> tuple[list[float], list[float]]:
        """Read these sums and more scalars from the device, all in one copy. The host waits for it.

        Returns:
            totals: as of `as_vector`, for `means`.
            more: the other values.
        """
        many = 1 + len(self.names)
        sums = self.sums or [None] * many
        scalars = [*(one for one in sums if one is not None), *more]
        found = iter(torch.stack([one.detach().double() for one in scalars]).tolist() if scalars else [])
        totals = [0.0 if one is None else next(found) for one in sums]
        return [*totals, *(self.weights or [0.0] * many)], list(found)

    def means(self, totals: Sequence[float]) -> tuple[dict[str, float | None], float]:
        """Means from the totals of `as_vector` over all processes.

        Returns:
            means: "loss" and each statistic; None where the weight is 0.
            weight: of the loss.
        """
        many = 1 + len(self.names)
        pairs = zip(("loss", *self.names), totals[:many], totals[many:], strict=True)
        return {name: total / weight if weight else None for name, total, weight in pairs}, totals[many]
