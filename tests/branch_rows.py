"""Preference rows by hand: the batch of one prompt with several answers, and the plain rows that it stands for.

Nothing here uses the encoder or the collator's own preference rows.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from models import collator

from vlft.data.sample import EncodedSample
from vlft.families import Family


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt with its answers.

    Attributes:
        row: a plain row, the prompt and the first answer.
        others: the tokens of the other answers.
    """

    row: EncodedSample
    others: tuple[torch.Tensor, ...]

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return int((self.row.labels_T != -100).nonzero()[0])

    @property
    def answers(self) -> tuple[torch.Tensor, ...]:
        return (self.row.input_ids_T[self.prompt :], *self.others)


#: Tokens of other answers: shorter ones, longer ones, and one of a single token.
SIZES = (3, 17, 1, 29, 8, 5)


def asked(rows: Sequence[EncodedSample]) -> list[Asked]:
    """Rows with other answers, of `SIZES` in turn. The first row has one other answer, the next two, and so on."""
    generator, sizes, found = torch.Generator().manual_seed(0), iter(SIZES), []
    for place, row in enumerate(rows):
        others = tuple(torch.randint(5, 200, (next(sizes),), generator=generator) for _ in range(1 + place % 2))
        found.append(Asked(row=row, others=others))
    return found


def plain_rows(one: Asked) -> list[EncodedSample]:
    """A row for each answer."""
    return [_laid_out(one, [answer]) for answer in one.answers]


def _laid_out(one: Asked, answers: Sequence[torch.Tensor]) -> EncodedSample:
    """The prompt, then these answers, each with the positions that follow the prompt."""
    row, prompt = one.row, one.prompt
    positions_3P = row.positions_3T[:, :prompt]
    after = [(positions_3P.max() + 1 + torch.arange(len(answer))).expand(3, -1) for answer in answers]
    return replace(
        row,
        input_ids_T=torch.cat([row.input_ids_T[:prompt], *answers]),
        labels_T=torch.cat([row.labels_T[:prompt], *answers]),
        kinds_T=torch.cat([row.kinds_T[:prompt], *(torch.zeros_like(a, dtype=torch.uint8) for a in answers)]),
        positions_3T=torch.cat([positions_3P, *after], dim=1),
    )


def plain_batch(rows: Sequence[Asked], family: Family) -> dict[str, Any]:
    """Every answer in a row of its own, with its own pictures."""
    return dict(collator(family)([plain for one in rows for plain in plain_rows(one)]))


def branch_batch(rows: Sequence[Asked], family: Family) -> dict[str, Any]:
    """Every prompt once, and all of its answers after it."""
    batch: dict[str, Any] = dict(collator(family)([_laid_out(one, one.answers) for one in rows]))
    lengths: list[int] = []
    key_lengths: list[int] = []
    kv_rows: list[int] = []
    places: list[int] = []
    predicting: list[int] = []
    start = 0
    for one in rows:
        prompt, answers = one.prompt, one.answers
        shared = range(start, start + prompt)
        places += range(prompt)
        start += prompt
        for number, answer in enumerate(answers):
            own = range(start, start + len(answer))
            lengths.append(len(own) if number else prompt + len(own))
            key_lengths.append(prompt + len(own))
            kv_rows += [*shared, *own]
            places += range(prompt, prompt + len(own))
            predicting += [shared[-1], *own[:-1]]
            start += len(answer)
    batch["position_ids"][0, 0] = torch.tensor(places)
    batch |= {
        "cu_seqlens": _bounds(lengths),
        "lengths": tuple(lengths),
        "supervised_rows": torch.tensor(predicting),
        "targets": torch.cat([answer for one in rows for answer in one.answers]),
        "branches": {
            "kv_rows": torch.tensor(kv_rows),
            "cu_seqlens_k": _bounds(key_lengths),
            "key_lengths": tuple(key_lengths),
        },
        "answers": {
            "bounds": _bounds([len(answer) for one in rows for answer in one.answers]).long(),
            "per_sample": tuple(len(one.answers) for one in rows),
        },
    }
    batch["counts"] |= {"supervised_tokens": len(predicting)}
    return batch


def copied_batch(rows: Sequence[Asked], family: Family) -> dict[str, Any]:
    """Every answer in a row of its own, with its prompt; the features of each picture are there once."""
    batch, seen = plain_batch(rows, family), dict(collator(family)([one.row for one in rows]))
    starts = [0, *itertools.accumulate(batch["lengths"])]
    seen_starts = [0, *itertools.accumulate(seen["lengths"])]
    first_answers = [0, *itertools.accumulate(len(one.answers) for one in rows)]
    cached = seen["cached"]["rows"].tolist() if "cached" in seen else []
    placed, copies = [], []
    for feature, at in enumerate([*seen["vision_rows"].tolist(), *cached]):
        sample = bisect.bisect_right(seen_starts, at) - 1
        answers = range(first_answers[sample], first_answers[sample + 1])
        place, *again = (starts[answer] + at - seen_starts[sample] for answer in answers)
        placed.append(place)
        copies += [(feature, other) for other in again]
    batch |= {key: value for key, value in seen.items() if "vision" in key or "pixels" in key}
    batch["vision_rows"], cached_rows = torch.tensor(placed).tensor_split([len(placed) - len(cached)])
    if cached:
        batch["cached"] = seen["cached"] | {"rows": cached_rows}
    of, at_rows = torch.tensor(copies).T
    batch["copies"] = {"of": of, "rows": at_rows}
    return batch


def _bounds(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
