"""The mildest change of flags that makes a run fit into a card's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vlft.model import memory
from vlft.model.quantise import Quantisation, packed_of
from vlft.model.towers import Towers
from vlft.model.tracing import Load
from vlft.plan.estimate import Case, Memory, ParameterBytes, estimate
from vlft.plan.optimizers import LARGE
from vlft.plan.strategies import Strategy, strategies_for


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change that makes the run fit.

    Attributes:
        flags: the flags to add.
        memory: the memory with these flags.
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
    """The mildest change that makes the run fit; None if no known change does.

    Args:
        case: the run.
        strategy: its sharding strategy.
        longest: the largest row alone; no micro-batch can be smaller.
        packing: whether the run packs rows.
        smaller: returns the same run with LoRA instead of full towers, or None if no tower is full.
    """
    ways: list[tuple[str, Case, Strategy]] = [("--gradient_checkpointing true", case, strategy)]
    share = 2
    while packing and share <= 16 and case.load.tokens // share >= longest.tokens:
        load = Load(
            lengths=(max(longest.tokens, case.load.tokens // share),),
            vision_lengths=(max(longest.patches, case.load.patches // share),),
            supervised=max(longest.supervised, case.load.supervised // share),
            key_lengths=(max(sum(longest.key_lengths), keys // share),) if (keys := sum(case.load.key_lengths)) else (),
        )
        words = f"--gradient_checkpointing true --pack_tokens {load.tokens}"
        ways.append((words, replace(case, load=load), strategy))
        share *= 2
    least = ways[-1][1]
    flagged = ways[-1][0]
    grpo = case.sampling is not None  # trains without DeepSpeed, and with 16 bits
    possible: tuple[Strategy, ...] = ("ddp",) if grpo else strategies_for(case.family)
    for other in possible[1:] if case.world > 1 else ():
        if strategy != other and not other.endswith("offload"):
            ways.append((f"--gradient_checkpointing true --deepspeed {other}", case, other))
    if (
        not grpo
        and case.towers.language == "lora"
        and not case.sizes.packed.weights
        and not strategy.startswith("zero3")
    ):
        four = packed_of(case.family, case.family.sizes(case.config), Quantisation(kind="nf4", double=True))
        fewer = replace(least, sizes=replace(least.sizes, packed=four))
        ways.append((f"{flagged} --bits 4", fewer, strategy))
    if case.optim in LARGE and strategy == "ddp":
        ways.append((f"{flagged} --optim adamw_8bit", replace(least, optim="adamw_8bit"), strategy))
    if (lora := smaller(case.towers)) is not None:
        towers, sizes = lora
        words = " ".join(f"--{tower} {mode}" for tower, mode in towers.modes.items())
        ways.append((words, replace(case, towers=towers, sizes=sizes), strategy))
        ways.append((f"{flagged} {words}", replace(least, towers=towers, sizes=sizes), strategy))
    for other in possible:
        if other.endswith("offload"):
            ways.append((f"{flagged} --deepspeed {other}", least, other))
    for flags, changed, how in ways:
        asked: memory.Choice = "true" if "--gradient_checkpointing" in flags else changed.checkpointing
        found = estimate(changed, how, checkpointing=asked)
        if found.fits:
            return Change(flags=flags, memory=found)
    return None
