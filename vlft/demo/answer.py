"""Greedy answers, one row at a time. A stand-in until `vlft.chat` is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vlft.data.encode import KIND_TEXT, UNTRAINED
from vlft.demo.score import open_scored
from vlft.model import forward


def answers(model: Path, file: Path, places: Sequence[int], *, most: int = 60) -> list[str]:
    """What a model says to the questions of some rows, by greedy decoding."""
    base, net, samples, collate = open_scored(model, file)
    end = base.processor.tokenizer.convert_tokens_to_ids(base.family.end_of_turn)
    said = []
    for place in places:
        row = base.encoder.encode(samples[place])
        start = int((row.labels_T != UNTRAINED).nonzero()[0])
        row = replace(
            row, input_ids_T=row.input_ids_T[:start], labels_T=row.labels_T[:start], kinds_T=row.kinds_T[:start],
            positions_3T=row.positions_3T[:, :start],
        )  # fmt: skip
        for _ in range(most):
            row = replace(
                row,
                input_ids_T=torch.cat([row.input_ids_T, torch.tensor([0])]),
                labels_T=torch.cat([torch.full_like(row.labels_T, UNTRAINED), torch.tensor([0])]),
                kinds_T=torch.cat([row.kinds_T, torch.tensor([KIND_TEXT], dtype=torch.uint8)]),
                positions_3T=torch.cat([row.positions_3T, row.positions_3T[:, -1:].max() + torch.ones(3, 1).long()], 1),
            )
            flat = collate([row])
            with torch.no_grad():
                logits = net(**{k: v for k, v in flat.items() if k in forward.FORWARD_KEYS}, return_logits=True).logits
            row.input_ids_T[-1] = logits[-1].argmax()
            if int(row.input_ids_T[-1]) == end:
                break
        said.append(base.processor.tokenizer.decode(row.input_ids_T[start:], skip_special_tokens=True))
    return said
