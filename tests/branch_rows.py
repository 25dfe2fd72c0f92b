"""Preference rows by hand: the batch of one prompt with several answers, and the plain rows that it stands for.

Nothing here uses the encoder or the collator's own preference rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from models import collator

from vlft.data.sample import EncodedSample
from vlft.families import Family
from vlft.model import forward


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


def asked(rows: Sequence[EncodedSample], counts: Sequence[int]) -> list[Asked]:
    """Rows with other answers, of these numbers of tokens in turn. Rows have one other answer and two, in turn."""
    generator, sizes, found = torch.Generator().manual_seed(0), iter(counts), []
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
    batch = collator(family)([plain for one in rows for plain in plain_rows(one)])
    return {key: batch[key] for key in forward.FORWARD_KEYS}


def branch_batch(rows: Sequence[Asked], family: Family) -> dict[str, Any]:
    """Every prompt once, and all of its answers after it."""
    batch: dict[str, Any] = dict(collator(family)([_laid_out(one, one.answers) for one in rows]))
    lengths, key_lengths, kv_rows, places, predicting = [], [], [], [], []
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
    }
    return batch


def copied_batch(rows: Sequence[Asked], family: Family) -> dict[str, Any]:
    """Every answer in a row of its own, and each picture seen once."""
    plain = plain_batch(rows, family)
    seen = collator(family)([one.row for one in rows])
    batch = plain | {key: seen[key] for key in forward.FORWARD_KEYS if "vision" in key or "patches" in key}
    first, copies_of, copies_rows = [], [], []
    starts = torch.tensor([0, *plain["lengths"]]).cumsum(0).tolist()
    # Where the prompt of each row is repeated: its distance to each later copy.
    counts = [len(one.answers) for one in rows]
    bounds_seen = torch.tensor([0, *seen["lengths"]]).cumsum(0).tolist()
    for feature, at in enumerate(seen["vision_rows"].tolist()):
        sample = next(i for i in range(len(rows)) if bounds_seen[i] <= at < bounds_seen[i + 1])
        within, row = at - bounds_seen[sample], sum(counts[:sample])
        first.append(starts[row] + within)
        for copy in range(1, counts[sample]):
            copies_of.append(feature)
            copies_rows.append(starts[row + copy] + within)
    batch["vision_rows"] = torch.tensor(first, dtype=torch.int64)
    batch["copies"] = {"of": torch.tensor(copies_of), "rows": torch.tensor(copies_rows)}
    return batch


def _bounds(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
