"""Memory of a run on one card, part by part and under each way to share it; what to change where it does not fit.

Weights, gradients and optimizer are counted exactly from the built model. Activations are foretold by
`vlft.model.activations`. What surrounds them is set down as measured by others: not yet compared with a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch

from vlft.errors import ConfigError
from vlft.families import Family
from vlft.model import loss, memory
from vlft.model.activations import Foretold, foretell
from vlft.model.towers import Towers
from vlft.model.tracing import Load, Numbers, numbers_of
from vlft.plan.cards import CONTEXT_BYTES, NCCL_BYTES

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
#: Bytes of a trained weight that an optimizer keeps on top of it; None: cannot be told by weights alone.
OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "paged_adamw_32bit"), 8),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), 2),
    **dict.fromkeys(("sgd", "adafactor"), 0),
}
BUCKET = 500_000_000  # weights in a bucket of ZeRO (DeepSpeed's default for reduce_bucket_size and its kin)
LIVE_WEIGHTS = 10**9  # that ZeRO-3 keeps whole on a device at a time (its default)


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of one process that are there in every step.

    Attributes:
        host: in the machine's memory instead, where something is offloaded.
    """

    weights: int
    gradients: int
    optimizer: int
    host: int = 0


@dataclass(frozen=True, kw_only=True)
class ParameterBytes:
    """Weights of a model in the numbers it is trained in.

    Attributes:
        trained, frozen: scalars. tensors: that are trained.
    """

    trained: int
    frozen: int
    tensors: int

    @classmethod
    def of(cls, model: torch.nn.Module) -> ParameterBytes:
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        trained = sum(size for size, trains in sizes if trains)
        return cls(
            trained=trained,
            frozen=sum(size for size, _ in sizes) - trained,
            tensors=sum(trains for _, trains in sizes),
        )


def states(sizes: ParameterBytes, numbers: Numbers, strategy: Strategy, *, world: int, optim: str) -> States:
    """What weights, gradients and optimizer take of one of `world` processes.

    Under DDP the gradients of several processes stand in buckets besides. Under DeepSpeed in 16 bits the masters are
    the optimizer's, and gradients are added up in float32 (`vlft.config.deepspeed`).
    """
    width, kept = numbers.trained.itemsize, OPTIMIZERS.get(optim, 8)
    weights = sizes.trained * width + sizes.frozen * numbers.stored.itemsize
    # AdamW counts its steps in a scalar for each tensor.
    optimizer = sizes.trained * kept + (4 * sizes.tensors if kept == 8 else 0)
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
        strategy: ddp, or a DeepSpeed preset. checkpointing: towers that recompute.
        weights .. optimizer: as in `States`. vision, merger, language: activations, kept from forward to backward;
            of the head: what it keeps of its gradient. logits: a chunk of them. working: one block, made anew or
            being differentiated. context: CUDA and NCCL. reserve: fragments, and what is not counted.
        host: in the machine's memory. card: what there is.
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

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in PARTS)

    @property
    def fits(self) -> bool:
        return self.total <= self.card

    def as_json(self) -> dict[str, Any]:
        """Bytes, with the sum and the verdict."""
        return {**asdict(self), "checkpointing": list(self.checkpointing), "total": self.total, "fits": self.fits}


PARTS = (
    *("weights", "gradients", "optimizer", "vision", "merger", "language", "logits", "working", "context", "reserve"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """All that a memory depends on.

    Attributes:
        config, family: of the base. towers: what trains. sizes: of the built model.
        stored: dtype of the base. half: bf16 or None. optim: the optimizer's name.
        load: the largest micro-batch. world: processes. card: bytes. fused: fused kernels run. device: whose kernels.
        checkpointing: `--gradient_checkpointing`.
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
    device: Literal["cpu", "cuda"] = "cuda"

    def foretold(self, strategy: Strategy, checkpointed: Sequence[str]) -> Foretold:
        """What its activations take; found once for each way to compute."""
        numbers = numbers_of(self.stored, self.half, deepspeed=strategy != "ddp")
        key = (repr(self.towers), self.load, numbers, tuple(checkpointed), self.fused, self.device)
        if key not in _FOUND:
            _FOUND[key] = foretell(
                self.config,
                self.family,
                self.towers,
                self.load,
                numbers,
                device=self.device,
                checkpointed=checkpointed,
                fused=self.fused,
            )
        return _FOUND[key]


_FOUND: dict[Any, Foretold] = {}  # for the length of a plan


def towers_that_may(case: Case) -> list[str]:
    """Towers that keep something, and so can recompute."""
    return ["vision", "language"] if case.towers.vision != "frozen" else ["language"]


def estimate(case: Case, strategy: Strategy, *, checkpointing: memory.Choice | None = None) -> Memory:
    """The memory of one process; with "auto" the fewest towers recompute that let it fit, as in training."""
    choice = checkpointing or case.checkpointing
    needs = towers_that_may(case)
    if choice == "false":
        return of_parts(case, strategy, ())
    whole = of_parts(case, strategy, tuple(needs))
    if choice == "true":
        return whole
    order = sorted(needs, key=lambda part: -case.foretold(strategy, ()).kept[part])  # type: ignore[index]
    for count in range(len(order) + 1):
        found = of_parts(case, strategy, tuple(order[:count]))
        if found.fits:
            return found
    return whole


def of_parts(case: Case, strategy: Strategy, checkpointed: tuple[str, ...]) -> Memory:
    """The memory of one process whose `checkpointed` towers recompute."""
    numbers = numbers_of(case.stored, case.half, deepspeed=strategy != "ddp")
    held = states(case.sizes, numbers, strategy, world=case.world, optim=case.optim)
    foretold = case.foretold(strategy, checkpointed)
    kept = foretold.kept
    vocabulary = case.family.sizes(case.config).text.vocab
    rows = min(max(1, case.load.supervised), loss.chunk_rows(vocabulary))
    logits = rows * vocabulary * (4 + numbers.computing.itemsize)
    context = 0 if case.device == "cpu" else CONTEXT_BYTES + (NCCL_BYTES if case.world > 1 else 0)
    activations = sum(kept.values()) + foretold.block
    left = case.card - context - held.weights
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
        working=foretold.block,
        context=context,
        # As `vlft.model.memory.fit` leaves it.
        reserve=int(activations * (memory.MARGIN - 1) + max(0, left) * (1 - memory.USABLE))
        + max(0, memory.HEAD_BYTES - logits),
        host=held.host,
        card=case.card,
    )


# ---- what to change


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something that lets it fit.

    Attributes:
        flags: to add. memory: with them.
    """

    flags: str
    memory: Memory

    def as_json(self) -> dict[str, Any]:
        return {"flags": self.flags, "memory": self.memory.as_json()}


def first_change(
    case: Case,
    strategy: Strategy,
    *,
    longest: Load,
    packing: bool,
    smaller: Callable[[Towers], tuple[Towers, ParameterBytes] | None],
) -> Change | None:
    """The mildest change that makes it fit; None where none of those known does.

    Args:
        longest: the largest row alone, below which no micro-batch can go.
        smaller: the same run with LoRA in place of full towers, or None where there is none.
    """
    ways: list[tuple[str, Case, Strategy]] = [("--gradient_checkpointing true", case, strategy)]
    share = 2
    while packing and share <= 16 and case.load.tokens // share >= longest.tokens:
        load = Load(
            lengths=(max(longest.tokens, case.load.tokens // share),),
            vision_lengths=(max(longest.patches, case.load.patches // share),),
            supervised=max(longest.supervised, case.load.supervised // share),
        )
        words = f"--gradient_checkpointing true --pack_tokens {load.tokens}"
        ways.append((words, replace(case, load=load), strategy))
        share *= 2
    least = ways[-1][1]
    told = ways[-1][0]
    for other in STRATEGIES[1:4] if case.world > 1 else ():
        if strategy != other:
            ways.append((f"--gradient_checkpointing true --deepspeed {other}", case, other))
    if case.optim in OPTIMIZERS and OPTIMIZERS[case.optim] == 8 and strategy == "ddp":
        ways.append((f"{told} --optim adamw_8bit", replace(least, optim="adamw_8bit"), strategy))
    if (lora := smaller(case.towers)) is not None:
        towers, sizes = lora
        words = " ".join(f"--{tower} {mode}" for tower, mode in towers.modes.items())
        ways.append((words, replace(case, towers=towers, sizes=sizes), strategy))
        ways.append((f"{told} {words}", replace(least, towers=towers, sizes=sizes), strategy))
    for other in ("zero2_offload", "zero3_offload"):
        ways.append((f"{told} --deepspeed {other}", least, other))
    for flags, changed, how in ways:
        asked: memory.Choice = "true" if "--gradient_checkpointing" in flags else changed.checkpointing
        found = estimate(changed, how, checkpointing=asked)
        if found.fits:
            return Change(flags=flags, memory=found)
    return None


def strategy_of(zero: str | None, offloaded: bool = False) -> Strategy:
    """The strategy of a run's `--deepspeed`.

    Raises:
        ConfigError: one that is not estimated.
    """
    word = zero or "ddp"
    for strategy in STRATEGIES:
        if word == strategy:
            return strategy
    if word == "zero1_offload":
        return "zero2_offload"
    raise ConfigError(f"--deepspeed: {word} is not among what vlft plan estimates ({', '.join(STRATEGIES)})")
