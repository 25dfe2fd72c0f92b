"""Budgets that rows and parts set for their own media, against qwen-vl-utils 0.0.14 and the stock image processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from build import FAMILY, row, write_image, write_video
from patches import patches
from PIL import Image as PILImage
from qwen_vl_utils import fetch_image, fetch_video

from vlft.config.recipe import Recipe
from vlft.data.costs.cache import key_of
from vlft.data.media.decode import decode
from vlft.data.media.read import MediaError, measure
from vlft.data.rows.records import parse_record
from vlft.demo.tiny import tiny_processor
from vlft.errors import DataError

PROCESSOR = tiny_processor()
SETTINGS = Recipe.of(PROCESSOR)
TOKEN = 28 * 28


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_image(folder / "a.png", 400, 300)
    write_image(folder / "b.png", 300, 400, name="flower")
    write_video(folder / "v.mp4", 60, 160, 112, fps=10)
    return folder


def parse(raw, folder="pics"):
    return parse_record(raw, file="t.json", index=0, image_folder=str(folder), family=FAMILY)


def part_row(*parts, **keys):
    turns = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "b"}]
    return {"messages": turns, **keys}


STILLS = [
    {"max_pixels": 20 * TOKEN},
    {"min_pixels": 180 * TOKEN, "max_pixels": 300 * TOKEN},
    {"min_pixels": 50 * TOKEN, "max_pixels": 60 * TOKEN},
    {"min_pixels": 1, "max_pixels": 3 * TOKEN},
]


@pytest.mark.parametrize("own", STILLS, ids=str)
@pytest.mark.parametrize("where", ["part", "row"])
def test_a_picture_gets_its_own_size(folder, own, where):
    path = str(folder / "a.png")
    if where == "part":
        raw = part_row({"type": "image", "image": path, **own}, {"type": "image", "image": str(folder / "b.png")})
    else:
        raw = row("<image>", image="a.png", **own)
    still, *others = parse(raw, folder).media
    theirs = fetch_image({"image": path, **own})
    grid = measure(still, SETTINGS)
    assert (grid.w * 14, grid.h * 14) == theirs.size
    low, high = own.get("min_pixels", SETTINGS.image_min_pixels), own.get("max_pixels", SETTINGS.image_max_pixels)
    stock = PROCESSOR.image_processor(
        images=[PILImage.open(path)], size={"shortest_edge": low, "longest_edge": high}, do_rescale=False,
        do_normalize=False, return_tensors="pt",
    )  # fmt: skip
    ours = decode(still, SETTINGS)
    assert ours.grid == grid
    assert [[grid.t, grid.h, grid.w]] == stock["image_grid_thw"].tolist()
    assert torch.equal(stock["pixel_values"].reshape(-1, 3, 2, 14, 14)[:, :, 0].to(torch.uint8), patches(ours))
    for other in others:  # a part's budgets are its own
        assert measure(other, SETTINGS) == measure(type(other)(path=other.path, field=""), SETTINGS)


CLIPS = [
    {"fps": 1.0},
    {"fps": 5},
    {"nframes": 6},
    {"fps": 8, "max_frames": 10},
    {"max_pixels": 10 * TOKEN},
    {"min_pixels": 60 * TOKEN, "max_pixels": 80 * TOKEN, "nframes": 2},
    {"video_start": 2.0},
    {"video_end": 1.5, "fps": 4},
    {"video_start": 1.05, "video_end": 4.0, "nframes": 8, "max_pixels": 12 * TOKEN},
]


@pytest.mark.parametrize("own", CLIPS, ids=str)
@pytest.mark.parametrize("where", ["part", "row"])
def test_a_video_gets_its_own_frames_and_size(folder, monkeypatch, own, where):
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "decord")
    path = str(folder / "v.mp4")
    raw = part_row({"type": "video", "video": path, **own}) if where == "part" else row("<video>", video=path, **own)
    (video,) = parse(raw).media
    rate = {} if "nframes" in own else {"fps": SETTINGS.fps, "max_frames": SETTINGS.video_max_frames}
    budget = {"min_pixels": SETTINGS.video_min_pixels, "max_pixels": SETTINGS.video_max_pixels}
    theirs = fetch_video({"video": path, **budget, **rate, **own, "total_pixels": 128000 * TOKEN * 0.9})
    ours = decode(video, SETTINGS)
    assert ours.grid == measure(video, SETTINGS)
    frames = ours.pixels
    assert frames.shape == theirs.permute(0, 2, 3, 1).shape
    assert np.array_equal(frames.numpy(), theirs.permute(0, 2, 3, 1).to(torch.uint8).numpy())


def test_frames_get_their_own_size(folder):
    paths = [str(folder / "a.png")] * 4
    own = {"min_pixels": 16 * TOKEN, "max_pixels": 40 * TOKEN}
    (video,) = parse(part_row({"type": "video", "video": paths, **own})).media
    theirs = fetch_video({"video": paths, **own, "total_pixels": 128000 * TOKEN * 0.9})
    assert np.array_equal(decode(video, SETTINGS).pixels.numpy(), theirs.permute(0, 2, 3, 1).to(torch.uint8).numpy())


def test_a_part_wins_over_its_row_and_a_kind_over_both(folder):
    raw = part_row(
        {"type": "image", "image": "a.png", "max_pixels": 30 * TOKEN},
        {"type": "image", "image": "b.png"},
        {"type": "video", "video": "v.mp4", "fps": 1},
        max_pixels=50 * TOKEN, video_max_pixels=9 * TOKEN, nframes=4,
    )  # fmt: skip
    one, two, video = (part.overrides for part in parse(raw, folder).media)
    assert (one.max_pixels, two.max_pixels, video.max_pixels) == (30 * TOKEN, 50 * TOKEN, 9 * TOKEN)
    assert (one.nframes, two.nframes) == (None, None)
    assert (video.fps, video.nframes) == (1.0, None)


REFUSED = {
    "a word": (row("<image>", image="a.png", max_pixels="50k"), "max_pixels", "is a string, where a number belongs"),
    "none": (row("<image>", image="a.png", min_pixels=0), "min_pixels", "is 0. Use a whole number above 0"),
    "infinite": (row("<video>", video="v.mp4", fps=float("inf")), "fps", "is inf"),
    "true": (row("<video>", video="v.mp4", fps=True), "fps", "is true, where a number belongs"),
    "odd": (row("<video>", video="v.mp4", nframes=5), "nframes", "is 5: frames go in pairs"),
    "both": (row("<video>", video="v.mp4", fps=1, nframes=6), "nframes", "fps and nframes both set how many"),
    "upside down": (row("<image>", image="a.png", min_pixels=9, max_pixels=8), "min_pixels", "9 is above max_pixels 8"),
    "backwards": (row("<video>", video="v.mp4", video_start=3, video_end=1), "video_start", "3.0 is above video_end 1"),
    "fps of a picture": (
        part_row({"type": "image", "image": "a.png", "fps": 2}),
        "messages[0].content[0].fps",
        "is for videos, but this is a picture",
    ),
    "total_pixels": (
        part_row({"type": "video", "video": "v.mp4", "total_pixels": 2e6}),
        "messages[0].content[0].total_pixels",
        "is not supported. Use max_pixels",
    ),
}


@pytest.mark.parametrize(("raw", "field", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(raw, field, reason):
    with pytest.raises(DataError) as caught:
        parse(raw)
    assert caught.value.row.field == field
    assert reason in caught.value.row.reason


BESIDE_FLAGS = {
    "below the run's least": ({"max_pixels": 3 * TOKEN}, "--image_min_pixels 3136 is above max_pixels 2352"),
    "less than a token": ({"max_pixels": 700, "min_pixels": 1}, "max_pixels 700 is less than one token"),
    "above the run's most": ({"min_pixels": 10**9}, "min_pixels 1000000000 is above --image_max_pixels"),
}


@pytest.mark.parametrize(("own", "reason"), BESIDE_FLAGS.values(), ids=BESIDE_FLAGS)
def test_refused_beside_the_flags(folder, own, reason):
    (still,) = parse(row("<image>", image="a.png", **own), folder).media
    for look in (measure, decode):
        with pytest.raises(MediaError) as caught:
            look(still, SETTINGS)
        assert reason in caught.value.reason


CLIP_ERRORS = {
    "more frames than there are": ({"nframes": 20, "video_end": 1.0}, "nframes 20, and it has 11 frames there"),
    "a moment": ({"video_start": 5.95}, "video_start 5.95 to video_end its end leaves less than 2 frames"),
    "more pixels than any frame gets": ({"max_pixels": 10**7}, "max_pixels 10000000: no frame gets more than 602112"),
}


@pytest.mark.parametrize(("own", "reason"), CLIP_ERRORS.values(), ids=CLIP_ERRORS)
def test_a_video_that_cannot_be_cut_so(folder, own, reason):
    (video,) = parse(row("<video>", video="v.mp4", **own), folder).media
    for look in (measure, decode):
        with pytest.raises(MediaError) as caught:
            look(video, SETTINGS)
        assert reason in caught.value.reason


def test_another_budget_is_another_row_to_the_cache_of_costs():
    samples = [parse(row("<image>", image="a.png", **own)) for own in ({}, {"max_pixels": 9 * TOKEN}, {"fps": None})]
    first, second, third = (key_of(sample, lambda path: (0, 0)) for sample in samples)
    assert first == third != second
