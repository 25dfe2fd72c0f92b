"""Estimate the memory of a run on one card: part by part, for each sharding strategy, and what to change if it is full.

Weights, gradients and optimizer are counted exactly from the built model. `vlft.model.activations` estimates
activations. The overhead of CUDA and NCCL is from measurements by others. The sum is not yet compared with a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from vlft.families import Family
from vlft.model import activations, loss, memory
from vlft.model.cards import CONTEXT_BYTES, NCCL_BYTES
from vlft.model.quantise import Packed
from vlft.model.towers import Towers
from vlft.model.traced import Delta
from vlft.model.tracing import Load, Numbers, numbers_of
from vlft.plan.optimizers import Trained, state_bytes
from vlft.plan.sampling import Sampling
from vlft.plan.strategies import Strategy

BUCKET = 500_000_000  # weights in a bucket of ZeRO (DeepSpeed's default for reduce_bucket_size and similar settings)
LIVE_WEIGHTS = 10**9  # weights that ZeRO-3 gathers on a device at one time (its default)


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes that one process holds throughout training.

    Attributes:
        weights: on the card.
        gradients: on the card.
        optimizer: on the card.
        host: offloaded to the machine's memory.
    """

    weights: int
    gradients: int
    optimizer: int
    host: int = 0


@dataclass(frozen=True, kw_only=True)
class ParameterBytes:
    """Number of weights of a model.

    Attributes:
        trained: trained scalars.
        frozen: frozen scalars.
        tensors: trained tensor -> how many there are of it.
        packed: what is quantised of the frozen ones.
    """

    trained: int
    frozen: int
    tensors: Mapping[Trained, int]
    packed: Packed = Packed()

    @classmethod
    def of(cls, model: torch.nn.Module, packed: Packed | None = None) -> ParameterBytes:
        """The numbers of a built model, which may be on the meta device, and is not quantised."""
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        tensors = Counter(
            Trained(shape=tuple(p.shape), embedding=id(p) in embeddings) for p in model.parameters() if p.requires_grad
        )
        trained = sum(count * one.size for one, count in tensors.items())
        frozen = sum(p.numel() for p in model.parameters()) - trained
        return cls(trained=trained, frozen=frozen, tensors=tensors, packed=packed or Packed())


def states(
    sizes: ParameterBytes,
    numbers: Numbers,
    strategy: Strategy,
    *,
    world: int,
    optim: str,
    optim_args: str | None = None,
) -> States:
    """Memory for weights, gradients and optimizer in one of `world` processes.

    Under DDP with several processes, buckets hold a second copy of the gradients. Under DeepSpeed in 16 bits, the
    masters belong to the optimizer, which sees flat tensors, and gradients are accumulated in float32
    (`vlft.config.deepspeed`).
    """
    width = numbers.trained.itemsize
    dense = sizes.frozen - sizes.packed.weights
    weights = sizes.trained * width + dense * numbers.stored.itemsize + sizes.packed.nbytes
    tensors: Counter[Trained] = Counter()
    for one, count in sizes.tensors.items():
        tensors[one if strategy == "ddp" else one.flat] += count
    optimizer = state_bytes(optim, tensors, optim_args)
    if strategy == "ddp":
        return States(weights=weights, gradients=sizes.trained * width * (2 if world > 1 else 1), optimizer=optimizer)
    masters = sizes.trained * 4 if width < 4 else 0
    optimizer = (optimizer + masters) // world
    gradients = sizes.trained * 4
    bucket = min(sizes.trained, BUCKET) * width
    host = 0
    if strategy != "zero1":
        gradients = gradients // world + bucket
    if strategy.startswith("zero3"):
        live = min(sizes.trained + sizes.frozen, LIVE_WEIGHTS) * width
        shared = weights // world
        weights = live + (0 if strategy == "zero3_offload" else shared)
        host += shared if strategy == "zero3_offload" else 0
    if strategy.endswith("offload"):
        host += optimizer + sizes.trained * 4 // world
        gradients, optimizer = bucket, 0
    return States(weights=weights, gradients=gradients, optimizer=optimizer, host=host)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process on its card.

    Attributes:
        strategy: ddp, or a DeepSpeed preset.
        checkpointing: towers that recompute their activations.
        weights: all weights.
        gradients: of trained weights.
        optimizer: optimizer state.
        vision: activations of the vision tower, saved between forward and backward.
        merger: activations of the mergers.
        language: activations of the language model.
        logits: one chunk of logits, and the gradients that the head saves.
        working: the activations of one block during its recomputation or its backward pass.
        context: used by CUDA and NCCL themselves.
        reserve: fragmentation, and tensors that are not counted.
        host: in the machine's memory.
        card: memory of the card.
        completions: tokens and pixels of all completions of a step (GRPO).
        sampling: the cache of completions while they are sampled, with logits or prompts at work. Nothing is kept for a
            backward pass meanwhile (GRPO).
    """

    strategy: Strategy
    checkpointing: tuple[str, ...]
    weights: int
    gradients: int
    optimizer: int
    vision: int
    merger: int
    language: int
    logits: int
    working: int
    context: int
    reserve: int
    host: int
    card: int
    completions: int = 0
    sampling: int = 0

    @property
    def total(self) -> int:
        """Of the larger phase: the training of a micro-batch, or the sampling of completions before it."""
        training = sum(getattr(self, name) for name in PARTS)
        others = self.weights + self.optimizer + self.completions + self.context + self.reserve
        return max(training, others + self.sampling)

    @property
    def fits(self) -> bool:
        return self.total <= self.card

    def as_json(self) -> dict[str, Any]:
        """All parts in bytes, their sum, and whether they fit."""
        return {**asdict(self), "checkpointing": list(self.checkpointing), "total": self.total, "fits": self.fits}


PARTS = (
    *("weights", "gradients", "optimizer", "vision", "merger", "language", "logits", "working", "completions"),
    *("context", "reserve"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that the memory of a run depends on.

    Attributes:
        config: transformers' config of the base.
        family: of the base.
        towers: what trains.
        sizes: number of weights of the built model.
        stored: dtype of the base's files.
        half: bf16, or None for float32.
        optim: name of the optimizer.
        optim_args: `--optim_args`.
        load: the largest micro-batch.
        world: number of processes.
        card: bytes of the card.
        checkpointing: `--gradient_checkpointing`.
        fused: whether fused kernels run.
        delta: what computes the delta rule of gated delta nets.
        device: the device whose kernels are assumed.
        sampling: what a step samples (GRPO); None for other methods.
    """

    config: Any
    family: Family
    towers: Towers
    sizes: ParameterBytes
    stored: torch.dtype
    half: torch.dtype | None
    optim: str
    load: Load
    world: int
    card: int
    checkpointing: memory.Choice
    fused: bool = True
    delta: Delta = "fla"
    device: Literal["cpu", "cuda"] = "cuda"
    optim_args: str | None = None
    sampling: Sampling | None = None

    def activation_bytes(self, strategy: Strategy, checkpointed: Sequence[str]) -> activations.Estimate:
        """The memory of activations; what was traced for it is cached."""
        numbers = numbers_of(self.stored, self.half, deepspeed=strategy != "ddp")
        sizes = self.family.sizes(self.config)
        key = (sizes, repr(self.towers), self.load, numbers, self.fused, self.delta, self.device)
        if key not in _SAVED:
            _SAVED[key] = activations.Saved(
                config=self.config,
                family=self.family,
                towers=self.towers,
                load=self.load,
                numbers=numbers,
                device=self.device,
                fused=self.fused,
                delta=self.delta,
            )
        return _SAVED[key].estimate(checkpointed)


_SAVED: dict[Any, activations.Saved] = {}  # cached for the rest of the process


def towers_that_may(case: Case) -> list[str]:
    """Towers that save activations, so that recomputing them helps."""
    return ["vision", "language"] if case.towers.vision != "frozen" else ["language"]


def estimate(case: Case, strategy: Strategy, *, checkpointing: memory.Choice | None = None) -> Memory:
    """The memory of one process. With "auto", the fewest towers recompute that make it fit, as in training."""
    choice = checkpointing or case.checkpointing
    needs = towers_that_may(case)
    if choice == "false":
        return of_parts(case, strategy, ())
    whole = of_parts(case, strategy, tuple(needs))
    if choice == "true":
        return whole
    order = sorted(needs, key=lambda part: -case.activation_bytes(strategy, ()).kept[part])  # type: ignore[index]
    for count in range(len(order) + 1):
        found = of_parts(case, strategy, tuple(order[:count]))
        if found.fits:
            return found
    return whole


def of_parts(case: Case, strategy: Strategy, checkpointed: tuple[str, ...]) -> Memory:
    """The memory of one process whose `checkpointed` towers recompute."""
    numbers = numbers_of(case.stored, case.half, deepspeed=strategy != "ddp")
    held = states(case.sizes, numbers, strategy, world=case.world, optim=case.optim, optim_args=case.optim_args)
    saved = case.activation_bytes(strategy, checkpointed)
    kept = saved.kept
    sizes = case.family.sizes(case.config)
    vocabulary = sizes.text.vocab
    rows = min(max(1, case.load.supervised), loss.chunk_rows(vocabulary))
    logits = rows * vocabulary * (4 + numbers.computing.itemsize)
    context = 0 if case.device == "cpu" else CONTEXT_BYTES + (NCCL_BYTES if case.world > 1 else 0)
    activated = sum(kept.values()) + saved.block
    left = case.card - context - held.weights
    step, itemsize = case.sampling, numbers.computing.itemsize
    return Memory(
        strategy=strategy,
        checkpointing=checkpointed,
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        vision=kept["vision"],
        merger=kept["merger"],
        language=kept["language"],
        logits=logits + kept["head"],
        working=saved.block + case.sizes.packed.largest * numbers.computing.itemsize,
        context=context,
        # What `vlft.model.memory.fit` leaves free.
        reserve=int(activated * (memory.MARGIN - 1) + max(0, left) * (1 - memory.USABLE))
        + max(0, memory.HEAD_BYTES - logits),
        host=held.host,
        card=case.card,
        completions=0 if step is None else step.held(sizes),
        sampling=0 if step is None else step.sampled(sizes, itemsize, block=saved.block),
    )
