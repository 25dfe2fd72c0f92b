"""Ways to share a run's memory between processes, by the names of `--deepspeed`."""

from __future__ import annotations

from typing import Literal, get_args

from vlft.errors import ConfigError
from vlft.families import Family

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def strategies_for(family: Family) -> tuple[Strategy, ...]:
    """The strategies that a family can train with. With experts `vlft train` refuses ZeRO-3."""
    return tuple(one for one in STRATEGIES if "experts" not in family.features or not one.startswith("zero3"))


def strategy_of(zero: str | None, offloaded: bool = False) -> Strategy:
    """The strategy of a run's `--deepspeed`.

    Raises:
        ConfigError: the strategy cannot be estimated.
    """
    word = zero or "ddp"
    for strategy in STRATEGIES:
        if word == strategy:
            return strategy
    if word == "zero1_offload":
        return "zero2_offload"
    raise ConfigError(f"--deepspeed: vlft plan cannot estimate {word}, only {', '.join(STRATEGIES)}")
