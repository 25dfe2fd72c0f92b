"""Flags that choose parts of a tower: `--language_blocks`, `--vision_blocks`, `--train_tokens`. Imports nothing heavy.

Neighbours: `vlft.config.checks` calls `problems` before anything is parsed. `vlft.setup.choices` compares the values
with the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vlft.config.deepspeed import names_zero3
from vlft.config.values import Values
from vlft.errors import ConfigError

#: Flag -> the tower whose blocks it chooses.
OF_TOWER = {"vision_blocks": "vision", "language_blocks": "language"}
ALL = "all"  # the value of these flags without a choice

_ITEM = re.compile(r"(?:(last|first):)?([0-9]{1,6})(?:-([0-9]{1,6}))?")
_HOW = "Write last:8, first:4, or places from 0 such as 0-3,28"


def places_of(text: str, depth: int, *, flag: str) -> tuple[int, ...] | None:
    """The places of the chosen blocks.

    Args:
        text: value of the flag: `all`, or items separated by commas: `last:8`, `first:4`, `28`, `0-3`.
        depth: number of blocks of the tower.
        flag: its name, for messages.

    Returns:
        places in ascending order; None for `all`.

    Raises:
        ConfigError: it is not written like this, a block is not there, or blocks are repeated or not in order.
    """
    if text.strip() == ALL:
        return None
    found: list[int] = []
    for item in text.split(","):
        start, stop = _bounds(item.strip(), text, depth, flag=flag)
        if stop > depth or start < 0:
            raise ConfigError(
                f"--{flag} {text}: {item.strip()} is not there: the tower has {depth} blocks, 0 to {depth - 1}. Choose "
                f"among these, or last:{depth} for all of them."
            )
        if found and start <= found[-1]:
            how = "twice" if start in found else "after a later one"
            raise ConfigError(f"--{flag} {text}: block {start} comes {how}. Name each block once, in ascending order.")
        found += range(start, stop)
    return tuple(found)


def _bounds(item: str, text: str, depth: int, *, flag: str) -> tuple[int, int]:
    """The first block of an item, and the one after its last. Raises ConfigError."""
    if (match := _ITEM.fullmatch(item)) is None or (match[1] and match[3]):
        what = f"{item!r} is no choice of blocks" if item else "a part between commas is empty"
        raise ConfigError(f"--{flag} {text}: {what}. {_HOW}.")
    side, one, other = match[1], int(match[2]), match[3]
    if side:
        if one < 1:
            raise ConfigError(f"--{flag} {text}: {item} chooses no block. Choose at least 1, or freeze the tower.")
        return (depth - one, depth) if side == "last" else (0, one)
    last = one if other is None else int(other)
    if last < one:
        raise ConfigError(f"--{flag} {text}: {item} descends. Write {last}-{one}.")
    return one, last + 1


def as_text(places: Sequence[int] | None) -> str:
    """Places as the flag spells them, in the shortest way without `last` and `first`: `0-3,28`."""
    if places is None:
        return ALL
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][1] + 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def tokens_of(text: str) -> tuple[str, ...]:
    """The tokens of `--train_tokens`, without spaces around them.

    Raises:
        ConfigError: one is empty, or appears twice.
    """
    tokens = tuple(one.strip() for one in text.split(","))
    if "" in tokens:
        raise ConfigError(f"--train_tokens {text}: a part between commas is empty. Write '<x>,<y>'.")
    if twice := [one for one in tokens if tokens.count(one) > 1]:
        raise ConfigError(f"--train_tokens {text}: {twice[0]} appears twice. Name each token once.")
    return tokens


def problems(values: Values, verb: str) -> Iterator[str]:
    """Yield a message for each combination of these flags with others that cannot be carried out."""
    if verb == "bench":
        for flag in (*OF_TOWER, "train_tokens"):
            if values.given(flag):
                yield (
                    f"--{flag} {values.of(flag)}: vlft bench compares with a stock trainer that trains whole towers. "
                    "Drop it. vlft plan and metrics.jsonl of a run have the memory and speed of such a run."
                )
        return
    for flag, tower in OF_TOWER.items():
        if values.given(flag):
            yield from _blocks(values, flag, tower)
    if values.given("train_tokens"):
        yield from _tokens(values)


def _blocks(values: Values, flag: str, tower: str) -> Iterator[str]:
    text = str(values.of(flag))
    try:  # only how it is written: the depth is that of the base
        places_of(text, 10**7, flag=flag)
    except ConfigError as error:
        yield str(error)
    if text != ALL and _mode(values, tower) == "frozen":
        yield f"--{flag} {text} has no effect: --{tower} is frozen. Drop it, or set --{tower} to full or lora."


def _tokens(values: Values) -> Iterator[str]:
    text = values.of("train_tokens")
    try:
        tokens_of(str(text))
    except ConfigError as error:
        yield str(error)
    modes = {tower: _mode(values, tower) for tower in ("vision", "merger", "language")}
    if modes["language"] == "full":
        why = "" if not values.given("language_blocks") else " With --language_blocks the embedding stays frozen."
        yield (
            f"--train_tokens {text} has no effect with --language full, which trains the whole embedding.{why} Drop "
            "it, or use --language lora."
        )
    elif None not in modes.values() and "lora" not in modes.values():
        yield (
            f"--train_tokens {text}: no tower is lora. The rows of these tokens are stored in an adapter. Set at least "
            "one tower to lora."
        )
    if names_zero3(values.of("deepspeed")):
        yield (
            f"--train_tokens {text} with --deepspeed {values.of('deepspeed')}: ZeRO-3 splits the embedding over the "
            "processes, and the trained rows are needed outside of the module that collects it. Use --deepspeed zero2, "
            "or no --deepspeed."
        )


def _mode(values: Values, tower: str) -> str | None:
    """How a tower trains; None if the adapter of `--adapter` decides, which is read later."""
    return None if values.given("adapter") and not values.given(tower) else values.of(tower)
