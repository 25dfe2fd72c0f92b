"""Rows on their way to the trainer: costs told from headers, batches out of worker processes, files that change."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from build import FAMILY, picture, row, write_image, write_json, write_video
from models import tiny_sizes
from PIL import Image as PIL
from torch.utils.data import DataLoader

from vlft.cli.main import main
from vlft.data.collate import Collator
from vlft.data.dataset import RowDataset, scan
from vlft.data.encode import UNTRAINED
from vlft.data.ipc import SMALL
from vlft.data.rows.records import parse_record
from vlft.data.sample import Cost
from vlft.data.workers import loader_options
from vlft.errors import BadRow
from vlft.setup import weights


def parse(raw: dict, index: int = 0):
    return parse_record(raw, file="x.json", index=index, image_folder=None, family=FAMILY)


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
    for sample, cost in zip(every_kind, scan(every_kind, encoder.measure, workers=0), strict=True):
        encoded = encoder.encode(sample)
        assert cost.tokens == len(encoded.input_ids_T), sample
        assert cost.supervised == int((encoded.labels_T != UNTRAINED).sum()), sample
        patches = (medium.pixels.nbytes // (3 * 14 * 14 * (1 + medium.is_video)) for medium in encoded.media)
        assert cost.patches == sum(patches), sample


def flattened(batch):
    """(names, value) of everything in a batch, also inside its dicts."""
    for key, value in batch.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", one) for inner, one in flattened(value))
        else:
            yield key, value


def test_a_batch_out_of_a_worker_is_the_batch(encoder, every_kind):
    """Small tensors travel in the message, large ones in shared memory; empty batches and lists arrive as well."""
    collate = Collator(vision=tiny_sizes("qwen2_5_vl").vision, filler_token=0)
    rows = RowDataset(every_kind, encoder)
    lists = [[0, 1, 2], [], list(range(len(rows))), [len(rows) - 1]]
    arrived = DataLoader(rows, batch_sampler=lists, collate_fn=collate, **loader_options(1))
    here = DataLoader(rows, batch_sampler=lists, collate_fn=collate, **loader_options(0))
    large = 0
    for batch, want in zip(arrived, here, strict=True):
        assert type(batch) is dict
        got, wanted = dict(flattened(batch)), dict(flattened(want))
        assert got.keys() == wanted.keys() > {"vision_meta.window_index", "vision_meta.window_lengths"}
        for key, value in wanted.items():
            if isinstance(value, torch.Tensor):
                assert got[key].dtype == value.dtype, key
                assert got[key].shape == value.shape, key
                assert torch.equal(got[key], value), key
                large += value.nbytes >= SMALL
            else:
                assert got[key] == value, key
        batch["input_ids"] += 1  # what arrives is the trainer's own
    assert large


# ------------------------------------------------------------------------------------- files that change meanwhile


@pytest.fixture
def three(tmp_path):
    """Rows of one picture, of two, and of none."""
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"{name}.jpg", 200, 150)
    at = [str(tmp_path / f"{name}.jpg") for name in ("a", "b", "c")]
    raw = [
        row("<image>What?", "A temple.", image=at[0]),
        row("<image><image>What?", "Temples.", image=at[1:], id="two"),
        row("What?", "Nothing."),
    ]
    return [parse(one, index) for index, one in enumerate(raw)]


def test_a_picture_replaced_after_it_was_measured_is_a_bad_row(encoder, three, tmp_path):
    costs = list(scan(three, encoder.measure, workers=0))
    rows = RowDataset(three, encoder, costs)
    assert [bad for bad in map(rows.__getitem__, range(3)) if isinstance(bad, BadRow)] == []
    write_image(tmp_path / "a.jpg", 90, 90)
    write_image(tmp_path / "c.jpg", 90, 90)
    now = list(scan(three, encoder.measure, workers=0))
    one, two, none = (rows[index] for index in range(3))
    for bad, index in ((one, 0), (two, 1)):
        assert isinstance(bad, BadRow)
        then = f"{costs[index].tokens} tokens, {costs[index].patches} patches then"
        assert f"changed since it was measured: {then}, {now[index].tokens}, {now[index].patches} now" in bad.reason
    assert (one.index, one.field, two.index, two.id, two.field) == (0, "image", 1, "two", "image")
    assert not isinstance(none, BadRow)
    # The same size again: nothing that was planned has changed.
    write_image(tmp_path / "a.jpg", 200, 150, name="flower")
    assert not isinstance(rows[0], BadRow)


def test_as_many_costs_as_rows(encoder, three):
    with pytest.raises(ValueError, match="1 costs for 3 samples"):
        RowDataset(three, encoder, [Cost(tokens=1, supervised=1, patches=0)])


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_run_does_as_on_bad_row_says_with_a_file_that_changed(base, tmp_path, monkeypatch, capsys, on_bad_row):
    """The picture is replaced once all rows are measured, before the first step."""
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.jpg", 200, 150)
    data = write_json(tmp_path / "rows.json", [row("<image>?", "Yes.", image=f"{name}.jpg") for name in ("a", "b")])
    load = weights.load_base

    def replaced(*args, **kwargs):
        write_image(tmp_path / "b.jpg", 90, 90)
        return load(*args, **kwargs)

    monkeypatch.setattr(weights, "load_base", replaced)
    out = tmp_path / "run"
    argv = ["train", "--model_id", str(base), "--data_path", str(data), "--output_dir", str(out)]
    argv += [
        "--num_train_epochs",
        "1",
        "--dataloader_num_workers",
        "0",
        "--on_bad_row",
        on_bad_row,
        "--use_cpu",
        "true",
    ]
    status = main(argv)
    err = capsys.readouterr().err
    assert "rows.json[1].image: one of its files changed since it was measured" in err
    if on_bad_row == "error":
        assert status == 1
        return
    assert status == 0
    (entry,) = json.loads((out / "vlft.json").read_text())["data"]
    assert (entry["rows"], entry["trained"], [bad["index"] for bad in entry["skipped"]]) == (2, 1, [1])
