"""Rows on their way to the trainer: costs told from headers, batches out of worker processes, files that change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from build import picture, row, write_image, write_video
from PIL import Image as PIL
from torch.utils.data import DataLoader

from vlft.data.collate import Collator
from vlft.data.dataset import RowDataset, loader_options, scan
from vlft.data.encode import UNTRAINED
from vlft.data.parcel import SMALL
from vlft.data.records import parse_record
from vlft.families import FAMILIES


def parse(raw: dict, index: int = 0):
    return parse_record(raw, file="x.json", index=index, image_folder=None, family=FAMILIES["qwen2_vl"])


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory) -> list:
    """Rows over pictures and videos of every kind that is taken, one each, and rows that mix them."""
    folder = tmp_path_factory.mktemp("kinds")
    turned = PIL.Exif()
    turned[0x112] = 6
    write_image(folder / "rgb.jpg", 400, 300)
    write_image(folder / "turned.jpg", 300, 90, exif=turned)
    write_image(folder / "turned.png", 300, 90, exif=turned)
    write_image(folder / "tiny.png", 1, 1)
    write_image(folder / "narrow.png", 3, 500)
    write_image(folder / "large.jpg", 3000, 2100)
    write_image(folder / "plain.webp", 90, 130)
    for mode, name in (
        ("L", "grey.jpg"),
        ("CMYK", "cmyk.jpg"),
        ("P", "palette.png"),
        ("RGBA", "alpha.png"),
        ("1", "bits.png"),
    ):
        picture(190, 140).convert(mode).save(folder / name)
    PIL.fromarray(np.linspace(0, 65535, 60 * 90).astype(np.uint16).reshape(60, 90)).save(folder / "grey16.png")
    picture(90, 60).save(folder / "moves.gif", save_all=True, append_images=[picture(90, 60, name="flower")])
    names = sorted(path.name for path in folder.iterdir())
    clip = str(write_video(folder / "clip.mp4", 20))
    frames = [str(write_image(folder / f"frame{i}.jpg", 160, 120)) for i in range(3)]
    stills = [str(folder / name) for name in names]
    rows = [
        row("<image>What is it?", f"A picture, {name}.", image=still) for name, still in zip(names, stills, strict=True)
    ]
    rows += [
        row("<image>" * len(stills) + "All?", "Yes.", image=stills),
        row("<video>\nWhat happens?", "It slides.", video=clip),
        row("<video>\nWhat happens?", "Nothing.", video=[frames]),
        row("<image><video> and <video>?", "One of each.", image=stills[0], video=[clip, frames]),
        row("No picture: naïve 日本語 🙂?", "\n\nNone."),
        {
            "image": stills[:2],
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "<image>One?"},
                {"from": "gpt", "value": "One."},
                {"from": "gpt", "value": "And another."},
                {"from": "human", "value": "<image>\nTwo?"},
                {"from": "gpt", "value": "\nTwo."},
                {"from": "human", "value": "Three?"},
            ],
        },
    ]
    return [parse(raw, index) for index, raw in enumerate(rows)]


def test_costs_told_from_headers_are_those_of_the_encoded_rows(encoder, every_kind):
    for sample, cost in zip(every_kind, scan(every_kind, encoder, workers=0), strict=True):
        encoded = encoder.encode(sample)
        assert cost.tokens == len(encoded.input_ids_T), sample
        assert cost.supervised == int((encoded.labels_T != UNTRAINED).sum()), sample
        assert cost.patches == sum(len(medium.patches) for medium in encoded.media), sample


def test_a_batch_out_of_a_worker_is_the_batch(encoder, every_kind):
    """Small tensors travel in the message, large ones in shared memory; empty batches and lists arrive as well."""
    collate = Collator(patch_size=14, merge_size=2, filler_token=0)
    rows = RowDataset(every_kind, encoder)
    lists = [[0, 1, 2], [], list(range(len(rows))), [len(rows) - 1]]
    arrived = DataLoader(rows, batch_sampler=lists, collate_fn=collate, **loader_options(1))
    here = DataLoader(rows, batch_sampler=lists, collate_fn=collate, **loader_options(0))
    large = 0
    for batch, want in zip(arrived, here, strict=True):
        assert type(batch) is dict
        assert batch.keys() == want.keys()
        for key, value in want.items():
            if isinstance(value, torch.Tensor):
                assert batch[key].dtype == value.dtype, key
                assert batch[key].shape == value.shape, key
                assert torch.equal(batch[key], value), key
                large += value.nbytes >= SMALL
            else:
                assert batch[key] == value, key
        batch["input_ids"] += 1  # what arrives is the trainer's own
    assert large
