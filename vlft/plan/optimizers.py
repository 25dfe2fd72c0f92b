"""Bytes of an optimizer's state, counted from the shapes of what it trains.

Each count is that of the optimizer's own code: torch 2.15, transformers 5.17 to 5.23, bitsandbytes 0.50, torchao 0.18.
Neighbours: `vlft.config.table` lists the names of `--optim`, `vlft.plan.estimate` adds the bytes to the other parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

FLOAT = 4
#: Smaller tensors keep their state in float32 (bitsandbytes' `min_8bit_size`; torchao has the same number).
SMALLEST = 4096
#: Weights that share a scale (bitsandbytes' blockwise optimizers, and transformers' setting for torchao).
BLOCK = 256
#: Names with two float32 moments for each weight, so that 8-bit moments save three quarters.
LARGE = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained tensor, as an optimizer sees it.

    Attributes:
        shape: its shape.
        embedding: whether it is the weight of an embedding, which bitsandbytes' optimizers keep in 32 bits.
    """

    shape: tuple[int, ...]
    embedding: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def flat(self) -> Trained:
        """The tensor as a part of a flat one, as ZeRO hands it to the optimizer."""
        return Trained(shape=(self.size,))


Args = Mapping[str, str]
#: A trained tensor, `--optim_args` -> bytes of its state.
Rule = Callable[[Trained, Args], int]


def _floats(count: int, *, step: bool = True) -> Rule:
    """Return the rule of an optimizer with `count` float32 values for each weight, and a step count as a tensor."""
    return lambda one, args: count * FLOAT * one.size + (FLOAT if step else 0)


def _sgd(one: Trained, args: Args) -> int:
    return FLOAT * one.size if float(args.get("momentum", 0)) else 0


def _rmsprop(one: Trained, args: Args) -> int:
    moments = 1 + (float(args.get("momentum", 0)) > 0) + (args.get("centered", "").lower() in ("true", "1", "yes"))
    return moments * FLOAT * one.size + FLOAT


def _adafactor(one: Trained, args: Args) -> int:
    """One value for each row and column of a matrix, or one for each weight of a vector; and a root mean square."""
    if len(one.shape) < 2:
        return FLOAT * (one.size + 1)
    *outer, rows, columns = one.shape
    return FLOAT * (math.prod(outer) * (rows + columns) + 1)


def _blockwise(states: int, bits: int = 8, *, whole: bool = False, tables: int = 0) -> Rule:
    """Return the rule of quantised moments with a float32 scale for each block.

    Args:
        states: moments for each weight.
        bits: of a moment.
        whole: a tensor that does not consist of whole blocks is not quantised (torchao).
        tables: bytes of tables that each tensor has for itself, with its step count (torchao).
    """

    def rule(one: Trained, args: Args) -> int:
        if one.size < SMALLEST or (whole and one.size % BLOCK) or (one.embedding and not whole):
            return states * FLOAT * one.size + (FLOAT if whole else 0)
        return states * (one.size * bits // 8 + FLOAT * -(-one.size // BLOCK)) + tables

    return rule


_ONE, _TWO, _THREE = (_floats(count, step=False) for count in (1, 2, 3))
_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), _floats(2)),
    "adagrad": _floats(1),
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "adafactor": _adafactor,
    "paged_adamw_32bit": _TWO,
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), _ONE),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), _THREE),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), _blockwise(2)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), _blockwise(1)),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), _blockwise(3)),
    "adamw_torch_8bit": _blockwise(2, whole=True, tables=FLOAT * (1 + 2 * 256)),
    "adamw_torch_4bit": _blockwise(2, 4, whole=True, tables=FLOAT * (1 + 2 * 16)),
}
#: The tables of the 256 values of an 8-bit moment, which all tensors share: with a sign, and without for a square.
_TABLES: Mapping[str, int] = {
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 256 * FLOAT),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2 * 256 * FLOAT),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), 2 * 256 * FLOAT),
}


def state_bytes(optim: str, tensors: Mapping[Trained, int], optim_args: str | None = None) -> int:
    """Return the bytes of an optimizer's state after its first step.

    Args:
        optim: a name of `--optim`; one that is not counted here is taken for AdamW.
        tensors: trained tensor -> how many there are of it.
        optim_args: `--optim_args`, checked.
    """
    args = dict(_pairs(optim_args or ""))
    rule = _RULES.get(optim, _RULES["adamw_torch"])
    quantised = any(one.size >= SMALLEST and not one.embedding for one in tensors)
    return sum(count * rule(one, args) for one, count in tensors.items()) + quantised * _TABLES.get(optim, 0)


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for part in filter(None, text.replace(" ", "").split(",")):
        key, _, value = part.partition("=")
        yield key, value
