"""Which blocks and tokens an adapter trained, from its tensors or from the record of its run.

`vlft.checkpoint.start` decides with it what a run trains that starts from the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlft.checkpoint.adapter import PREFIX, Adapter
from vlft.checkpoint.record import RunRecord
from vlft.checkpoint.token_rows import ROWS
from vlft.config.blocks import as_text
from vlft.errors import CheckpointError
from vlft.families import Family, Sizes
from vlft.model.chosen import choice_in


def blocks_in(adapter: Adapter, modes: Mapping[str, str], sizes: Sizes, family: Family) -> dict[str, tuple[int, ...]]:
    """The flags that choose blocks, as the adapter's tensors imply them."""
    names: dict[str, list[str]] = {}
    for live in adapter.keys:
        name = live.removeprefix(PREFIX)
        if ROWS not in name:
            names.setdefault(family.tower_of(name), []).append(name)
    depths = {"vision": sizes.vision.depth, "language": len(sizes.text.layers)}
    found = {
        f"{tower}_blocks": choice_in(names.get(tower, ()), tower, modes[tower], depth)
        for tower, depth in depths.items()
        if modes[tower] != "frozen"
    }
    return {flag: places for flag, places in found.items() if places is not None}


def tokens_in(path: str, adapter: Adapter, family: Family, *, tied: bool, instead: str) -> tuple[int, ...]:
    """The tokens whose rows an adapter trains, in ascending order.

    Args:
        path: of the adapter, as the user wrote it.
        adapter: as read.
        family: of the base.
        tied: whether the base's head is its embedding.
        instead: what to do with an adapter that is refused, as a sentence.

    Raises:
        CheckpointError: vlft would not make exactly these rows.
    """
    rows = adapter.token_rows(family)
    if not rows:
        return ()
    wanted = sorted(family.ends[: 1 if tied else 2])
    ids = {one.ids for one in rows.values()}
    if sorted(rows) != wanted or len(ids) != 1 or list(*ids) != sorted(*ids):
        raise CheckpointError(
            f"{path}: it trains rows of {' and '.join(sorted(rows))}; vlft trains the same rows of "
            f"{' and '.join(wanted)}, in the order of their ids. {instead}"
        )
    return next(iter(ids))


def recorded(record: RunRecord) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """The same two choices, from the record of a run."""
    blocks = record.training.get("blocks", {})
    tokens = record.training.get("tokens", {})
    return {f"{tower}_blocks": tuple(places) for tower, places in blocks.items()}, tuple(sorted(tokens.values()))


def check_record(path: str, record: RunRecord, blocks: Mapping[str, tuple[int, ...]], tokens: tuple[int, ...]) -> None:
    """Compare what the tensors of an adapter imply with the record of its run. Raises CheckpointError."""
    wrote = recorded(record)
    if (dict(blocks), tokens) != wrote:
        old, new = (_as_words(*one) for one in (wrote, (blocks, tokens)))
        raise CheckpointError(
            f"{path}: vlft.json says it trained {old}, the adapter's tensors say {new}. The folder mixes two runs, or "
            "the adapter was not saved completely."
        )


def _as_words(blocks: Mapping[str, tuple[int, ...]], tokens: tuple[int, ...]) -> str:
    words = [f"{flag} {as_text(places)}" for flag, places in sorted(blocks.items())]
    return ", ".join(words or ["all blocks"]) + (f", tokens {', '.join(map(str, tokens))}" if tokens else "")
