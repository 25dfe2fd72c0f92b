"""Digests of what a mixed set of rows becomes: tokens, labels, positions, patches, batches and their order.

A change that is not meant to change any of them must leave `golden.json` as it is. A change that is meant to writes the
file again (`VLFT_WRITE_GOLDEN=1 pytest tests/test_golden.py`), and its commit says why.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from build import FAMILY, row, write_image
from models import collator
from patches import patches, patches_of

from vlft.data.costs.packing import Budget
from vlft.data.files.index import index_rows, parsed
from vlft.data.order import PackOrder, RowOrder

GOLDEN = Path(__file__).with_name("golden.json")
PHOTOS = {"china": (224, 168), "flower": (90, 300), "astronaut": (512, 512), "coffee": (61, 47)}

#: Every kind of row without a lossy encoder, whose pixels could differ by machine: pictures are PNG, videos are lists
#: of PNG frames.
ROWS = [
    row("<image>\nWhat is it?", "A temple.", id="still", image="china.png"),
    {
        "id": "turns",
        "image": ["flower.png", "astronaut.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nand\n<image>"},
            {"from": "gpt", "value": "\nA flower; an astronaut."},
            {"from": "human", "value": "Sûr ? 写"},
            {"from": "gpt", "value": "Yes.\n"},
        ],
    },
    row("<video>Who?", "An astronaut.", id="frames", video=[["astronaut.png"] * 3]),
    row("See <video> and <image>.", "Both.", id="both", video=[["coffee.png"] * 2], image="coffee.png"),
    row("2+2?", "4", id="text"),
    row("<image>Small.", "Small.", id="budget", image="astronaut.png", max_pixels=100 * 28 * 28),
]


def digest(value: object) -> str:
    """Return the digest of a tensor with its dtype and shape, or of the JSON of any other value."""
    if isinstance(value, torch.Tensor):
        array = value.contiguous().numpy()
        head = f"{array.dtype}{array.shape}".encode()
        return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=dataclasses.asdict).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def found(tmp_path_factory, encoder) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("golden")
    for name, (width, height) in PHOTOS.items():
        write_image(folder / f"{name}.png", width, height, name=name)
    (folder / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    samples = parsed(index_rows([str(folder / "rows.json")], image_folder=None, family=FAMILY)).samples
    encoded = [encoder.encode(sample) for sample in samples]
    costs = [encoder.measure(sample) for sample in samples]
    rows = {
        one.id: {
            "text": digest(one.text),
            "ids": digest(one.input_ids_T),
            "labels": digest(one.labels_T),
            "kinds": digest(one.kinds_T),
            "positions": digest(one.positions_3T),
            "patches": [digest(patches(medium)) for medium in one.media],
            "cost": [cost.tokens, cost.supervised, cost.patches],
        }
        for one, cost in zip(encoded, costs, strict=True)
    }
    batch: dict[str, object] = dict(collator()(encoded))
    del batch["still_pixels"], batch["video_pixels"]
    batch["still_patches"], batch["video_patches"] = patches_of([medium for one in encoded for medium in one.media])
    many = costs * 20
    packed = PackOrder(costs=many, budget=Budget(tokens=1500, patches=6000), packs_per_step=4, world=2)
    dealt = RowOrder(rows=len(many), rows_per_step=8, world=2, accumulation=2)
    return {
        "rows": rows,
        "batch": {key: digest(value) for key, value in batch.items() if key not in ("rows", "skipped")},
        "order": {
            f"{name}, epoch {epoch}, rank {rank}": digest(list(order.micro_batches(epoch, rank)))
            for name, order in (("packs", packed), ("rows", dealt))
            for epoch in (0, 1)
            for rank in (0, 1)
        },
    }


@pytest.mark.parametrize("what", ["rows", "batch", "order"])
def test_nothing_has_moved(found, what):
    if os.environ.get("VLFT_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert found[what] == json.loads(GOLDEN.read_text(encoding="utf-8"))[what]
