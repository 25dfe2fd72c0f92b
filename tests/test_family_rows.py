"""Rows of every family: ids, grids, positions and pixels equal those of its stock processor and model."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from build import picture, row, write_image
from stock import stock, stock_positions

from vlft.config.recipe import Recipe, RowFlags
from vlft.data.encode import Encoder
from vlft.data.rows.records import parse_record
from vlft.families import FAMILIES
from vlft.model.load import load_base, load_config, load_processor
from vlft.model.scale import PixelScale

NTSC = Fraction(30000, 1001)
DENSE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips of 29.97 frames per second, of 77 and 120 frames, and photographs."""
    import av

    folder = tmp_path_factory.mktemp("clips")
    wide = np.asarray(picture(300, 120, name="coffee"))
    for name, frames in (("short", 77), ("long", 120)):
        with av.open(str(folder / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=NTSC)
            stream.width, stream.height, stream.pix_fmt = 180, 120, "yuv420p"
            for i in range(frames):
                view = np.ascontiguousarray(wide[:, i : i + 180])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
            container.mux(stream.encode())
    write_image(folder / "wide.png", 400, 90)
    write_image(folder / "tall.png", 101, 307, name="flower")
    return folder


ROWS = {
    "text": row("2+2?", "4"),
    "picture": row("<image>What?", "A temple.", image="wide.png"),
    "pictures": row("<image>and<image>\nCompare.", "Both.", image=["wide.png", "tall.png"]),
    "video, odd": row("<video>What?", "It slides.", video="short.mp4"),
    "video, even": row("<video>\nWhat?", "It slides.", video="long.mp4"),
    "part": row("<video>What?", "It slides.", video="long.mp4", video_start=1.1, video_end=3.45),
    "two videos": row("<video>5<video> 6", "Both.", video=["short.mp4", "long.mp4"]),
    "frames": row("<video>Who?", "Her.", video=[["tall.png"] * 3]),
    "frames with a rate": row("<video>Who?", "Her.", video=[["tall.png"] * 4], fps=0.7),
    "mixed": row("<image>3 <video><image> <video>?", "All.", image=["wide.png", "tall.png"],
                 video=["short.mp4", ["wide.png"] * 5]),
    "turns": {
        "image": "tall.png", "video": "short.mp4",
        "conversations": [
            {"from": "human", "value": "<video>1?"}, {"from": "gpt", "value": "One."},
            {"from": "human", "value": "<image>Sûr ? 写"}, {"from": "gpt", "value": "Yes."},
        ],
    },
}  # fmt: skip


def parsed(raw, folder, family):
    return parse_record(raw, file="t.json", index=0, image_folder=str(folder), family=family)


def encoder_of(folder, family, flags=None) -> Encoder:
    sizes = family.sizes(load_config(folder)[0])
    processor = load_processor(folder)
    flags = flags or RowFlags(max_length=32768)
    recipe = Recipe.of(processor, flags, family=family, tokens_per_second=sizes.vision.tokens_per_second)
    recipe.serve(processor)
    return Encoder(family=family, processor=processor, recipe=recipe)


@pytest.fixture(scope="module", params=DENSE)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def encoder(base_of, family):
    return encoder_of(base_of(family), family)


@pytest.fixture(scope="module")
def model(base_of, family):
    return load_base(base_of(family), family)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_the_stock_row(encoder, model, folder, family, name, monkeypatch):
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "decord")
    sample = parsed(ROWS[name], folder, family)
    ours, theirs = encoder.encode(sample), stock(sample, encoder)
    assert ours.input_ids_T.tolist() == theirs["input_ids"][0].tolist()
    assert ours.kinds_T.tolist() == theirs["mm_token_type_ids"][0].tolist()
    for key, is_video in (("image_grid_thw", False), ("video_grid_thw", True)):
        grids = [[m.grid.t, m.grid.h, m.grid.w] for m in ours.media if m.is_video == is_video]
        assert grids == theirs.get(key, torch.zeros(0, 3)).tolist()
    paces = [m.grid.pace for m in ours.media if m.grid.pace is not None]
    assert torch.equal(torch.tensor(paces), torch.as_tensor(theirs.get("second_per_grid_ts", [])))
    assert torch.equal(ours.positions_3T, stock_positions(theirs, model))
    side = encoder.recipe.patch_size
    for key, is_video in (("pixel_values", False), ("pixel_values_videos", True)):
        patches = [m.patches for m in ours.media if m.is_video == is_video]
        none = torch.zeros(0, 3, *(() if is_video else (2,)), side, side, dtype=torch.uint8)
        if patches:
            pair = (none, torch.cat(patches)) if is_video else (torch.cat(patches), none)
            made = PixelScale.of(encoder.processor).patches(*pair)
            torch.testing.assert_close(made, theirs[key], atol=2e-6, rtol=0)  # one step of a uint8 is above 0.007
    tokens = encoder.tokens(sample)
    assert tokens.input_ids_T.tolist() == ours.input_ids_T.tolist()
    assert tokens.grids == tuple(medium.grid for medium in ours.media)
    cost = encoder.measure(sample)
    assert (cost.tokens, cost.supervised) == (len(ours.input_ids_T), int((ours.labels_T != -100).sum()))
