"""Compare the answers of preference rows: their lengths, and prompts that are there again with the answers swapped.

`vlft.check.row` computes the facts of a row, `PairTally` collects them. A pair is a chosen and a rejected answer; a row
with several rejected answers has as many pairs.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vlft.data.identity import FILE_BYTES, row_digest, turns_digest
from vlft.data.sample import Sample, Text, Turn
from vlft.text import counted

UNEVEN = 2.0  # of |log(length of the chosen / length of the rejected answer)|: about 7.4 times as long


@dataclass(frozen=True, kw_only=True, slots=True)
class PairFacts:
    """The answers of a preference row.

    Attributes:
        characters: of the chosen answer, then of each rejected one.
        digests: of each pair with its prompt, then of each pair with its answers swapped, in hexadecimal without
            separators; `FILE_BYTES` each.
    """

    characters: tuple[int, ...] = ()
    digests: str = ""


def pair_facts(sample: Sample, files: bytes) -> PairFacts:
    """Return the facts about the answers of a row; nothing for a row without rejected answers.

    Args:
        sample: the row.
        files: the digests of its files.
    """
    if not sample.rejected:
        return PairFacts()

    def digest(answer: Turn, other: Turn) -> bytes:
        pair = replace(sample, turns=(*sample.turns[:-1], answer), rejected=(other,))
        return row_digest(turns_digest(pair), files)[:FILE_BYTES]

    chosen = sample.turns[-1]
    pairs = [digest(chosen, other) for other in sample.rejected]
    swapped = [digest(other, chosen) for other in sample.rejected]
    return PairFacts(
        characters=tuple(_characters(turn) for turn in (chosen, *sample.rejected)),
        digests=b"".join((*pairs, *swapped)).hex(),
    )


def _characters(turn: Turn) -> int:
    return sum(len(part.text) for part in turn.parts if isinstance(part, Text))


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What a check found out about the answers of preference rows.

    Attributes:
        pairs: number of pairs.
        longer_chosen: pairs whose chosen answer has more characters than the rejected one.
        uneven: pairs one of whose answers is at least e^2 (7.4) times as long as the other.
        swapped: rows whose prompt is in an earlier row with the same answers, the other one chosen.
    """

    pairs: int
    longer_chosen: int
    uneven: int
    swapped: int

    @property
    def remarks(self) -> tuple[str, ...]:
        """Possible problems of all rows together."""
        if 2 * self.uneven <= self.pairs:
            return ()
        return (
            f"in {self.uneven:,} of {self.pairs:,} pairs one answer is more than 7 times as long as the other (the "
            f"chosen one is longer in {self.longer_chosen:,}): the model may learn to prefer a length. Use answers "
            "of similar lengths, or --method simpo, which compares averages over tokens",
        )

    def as_json(self) -> dict[str, Any]:
        """Return the entry of `vlft check-data --json`."""
        return asdict(self) | {"warnings": list(self.remarks)}

    def __str__(self) -> str:
        share = self.longer_chosen / self.pairs
        swapped = f"; {counted(self.swapped, 'row')} swap the answers of an earlier row" if self.swapped else ""
        return f"{counted(self.pairs, 'pair')} of answers, the chosen one is longer in {share:.0%}{swapped}"


@dataclass(kw_only=True)
class PairTally:
    """Facts of preference rows, in the order of the rows: some bytes for each pair."""

    chosen: array = field(default_factory=lambda: array("q"))
    rejected: array = field(default_factory=lambda: array("q"))
    places: array = field(default_factory=lambda: array("q"))
    digests: bytearray = field(default_factory=bytearray)
    turned: bytearray = field(default_factory=bytearray)

    def take(self, place: int, seen: PairFacts) -> None:
        """Add the facts of the row at a position of the index."""
        found = bytes.fromhex(seen.digests)
        self.digests += found[: len(found) // 2]
        self.turned += found[len(found) // 2 :]
        for characters in seen.characters[1:]:
            self.chosen.append(seen.characters[0])
            self.rejected.append(characters)
            self.places.append(place)

    def swapped(self) -> Iterator[tuple[int, int]]:
        """Yield (position of a row, position of the first earlier row with its answers swapped), each row once."""
        digests, turned = (np.frombuffer(bytes(some), dtype=np.uint64) for some in (self.digests, self.turned))
        first: dict[int, int] = {}
        wanted = set(np.intersect1d(digests, turned).tolist())
        told: set[int] = set()
        for place, mine, other in zip(self.places, digests.tolist(), turned.tolist(), strict=True):
            if other in first and place not in told and first[other] != place:
                told.add(place)
                yield place, first[other]
            if mine in wanted:
                first.setdefault(mine, place)

    def result(self, swapped: int) -> Pairs | None:
        """Return the counts; None without preference rows.

        Args:
            swapped: how many rows `swapped` yields.
        """
        if not self.places:
            return None
        chosen, rejected = np.array(self.chosen), np.array(self.rejected)
        uneven = np.abs(np.log(chosen) - np.log(rejected)) > UNEVEN  # no answer is empty
        return Pairs(
            pairs=len(chosen),
            longer_chosen=int((chosen > rejected).sum()),
            uneven=int(uneven.sum()),
            swapped=swapped,
        )
