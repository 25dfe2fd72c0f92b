"""Rows of every family: ids, grids, positions and pixels equal those of its stock processor and model."""

from __future__ import annotations

import json
import re
import shutil
from fractions import Fraction
from importlib.metadata import version

import numpy as np
import pytest
import torch
from build import picture, row, write_image
from packaging.version import Version
from patches import patches_of
from stock import stock, stock_positions

from vlft.answering import as_tensors, question_of, seconds_remark
from vlft.chat import open_model
from vlft.cli.main import main
from vlft.config.recipe import Recipe
from vlft.config.row_flags import RowFlags
from vlft.data.boxes import boxes_in_answer
from vlft.data.encode import Encoder
from vlft.data.media.sizes import clip_count, clip_size
from vlft.data.positions import mrope_positions
from vlft.data.rows.records import parse_record
from vlft.data.sample import Grid
from vlft.errors import CheckpointError, ConfigError, DataError
from vlft.families import FAMILIES
from vlft.model.generate import Sampling
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


def assert_pixels(ours, theirs, encoder) -> None:
    """The pixels of an encoded row are those of the stock processor."""
    side = encoder.recipe.patch_size
    stills, videos = patches_of(ours.media, patch=side)
    made = PixelScale.of(encoder.processor).patches(stills, videos).split([len(stills), len(videos)])
    for found, key in zip(made, ("pixel_values", "pixel_values_videos"), strict=True):
        if len(found):
            torch.testing.assert_close(found, theirs[key], atol=2e-6, rtol=0)  # one step of a uint8 is above 0.007


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_the_stock_row(encoder, model, folder, family, name, monkeypatch):
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "decord")
    for sample in encoder.samples(parsed(ROWS[name], folder, family)):
        assert_stock_row(sample, encoder, model)


def assert_stock_row(sample, encoder, model) -> None:
    ours, theirs = encoder.encode(sample), stock(sample, encoder)
    if sample.answer is not None:  # a sample of a split row ends with its answer, without the line break after it
        for key in ("input_ids", "mm_token_type_ids"):
            theirs[key] = theirs[key][:, : len(ours.input_ids_T)]
    assert ours.input_ids_T.tolist() == theirs["input_ids"][0].tolist()
    assert ours.kinds_T.tolist() == theirs["mm_token_type_ids"][0].tolist()
    for key, is_video in (("image_grid_thw", False), ("video_grid_thw", True)):
        grids = [[m.grid.t, m.grid.h, m.grid.w] for m in ours.media if m.is_video == is_video]
        assert grids == theirs.get(key, torch.zeros(0, 3)).tolist()
    paces = [m.grid.pace for m in ours.media if m.grid.pace is not None]
    assert torch.equal(torch.tensor(paces), torch.as_tensor(theirs.get("second_per_grid_ts", [])))
    if not paces or not seconds_remark(model, encoder.recipe):  # transformers 5.17 truncates seconds
        assert torch.equal(ours.positions_3T, stock_positions(theirs, model))
    assert_pixels(ours, theirs, encoder)
    tokens = encoder.tokens(sample)
    assert tokens.input_ids_T.tolist() == ours.input_ids_T.tolist()
    assert tokens.grids == tuple(medium.grid for medium in ours.media)
    cost = encoder.measure(sample)
    assert (cost.tokens, cost.supervised) == (len(ours.input_ids_T), int((ours.labels_T != -100).sum()))


# ---- positions


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_of_random_rows_are_those_of_the_model(base_of, model_type):
    family = FAMILIES[model_type]
    model, draw = load_base(base_of(family), family), np.random.default_rng(0)
    if seconds_remark(model, encoder_of(base_of(family), family).recipe):
        assert Version(version("transformers")) < Version("5.23")
        pytest.skip("transformers 5.17 truncates the seconds between time steps; vlft does as 5.23")
    rate = family.sizes(model.config).vision.tokens_per_second
    for _ in range(200):
        segments, kinds, grids, paces = [], [], {1: [], 2: []}, []
        for _ in range(draw.integers(1, 6)):
            text, kind = int(draw.integers(1, 9)), int(draw.integers(1, 3))
            t, h, w = (int(draw.integers(1, 7)) if kind == 2 else 1, *(2 * int(n) for n in draw.integers(1, 6, 2)))
            pace = float(draw.choice([0.5, 1.0, 2 / 3, 2 / (29.97 / 15), draw.uniform(0.05, 9)]))
            timed = kind == 2 and family.video_time == "seconds"
            grid = Grid(t=t, h=h, w=w, pace=pace if timed else None)
            if kind == 2 and family.video_time == "text":
                grid = Grid(t=t, h=h, w=w, times=tuple(range(t)))
            grids[kind].append([t, h, w])
            paces += [pace] if timed else []
            for run in grid.runs:
                segments += [text, run]
                kinds += [0] * text + [kind] * run.tokens(2)
        answer = {"input_ids": torch.ones(1, len(kinds), dtype=torch.int64), "mm_token_type_ids": torch.tensor([kinds])}
        names = {1: "image_grid_thw", 2: "video_grid_thw"}
        answer |= {names[kind]: torch.tensor(some) for kind, some in grids.items() if some}
        answer |= {"second_per_grid_ts": torch.tensor(paces)} if paces else {}
        ours = mrope_positions(segments, merge=2, tokens_per_second=rate)
        assert np.array_equal(ours, stock_positions(answer, model).numpy())


# ---- the rule of the processor


def test_clips_are_sampled_and_resized_as_by_the_processor():
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize
    from transformers.video_utils import VideoMetadata

    draw = np.random.default_rng(1)
    for _ in range(3000):
        frames, height, width = (int(2 ** draw.uniform(low, high)) for low, high in ((1, 10), (0, 12), (0, 12)))
        if max(height, width) / min(height, width) > 190:
            continue
        low = int(2 ** draw.uniform(8, 20))
        high = low + int(2 ** draw.uniform(8, 25))
        limits = {"min_pixels": low, "max_pixels": high}
        theirs = smart_resize(frames, height, width, temporal_factor=2, factor=32, **limits)
        assert clip_size(frames, height, width, factor=32, low=low, high=high, frame_tokens=None) == theirs
        rate, fps = float(draw.choice([8, 23.976, 29.97, draw.uniform(0.5, 120)])), float(draw.choice([0.5, 1, 2, 7]))
        sampler = Qwen3VLVideoProcessor(min_frames=int(draw.integers(1, 8)), max_frames=int(draw.integers(8, 800)))
        indices = sampler.sample_frames(VideoMetadata(total_num_frames=frames, fps=rate), fps=fps)
        least, most = sampler.min_frames, sampler.max_frames
        assert clip_count(frames, rate, fps=fps, least=least, most=most) == len(indices)


def test_a_cap_of_the_base_is_applied_and_served(base_of, folder):
    """transformers 5.23 has `cap_pixels_per_frame`, which limits each frame as qwen-vl-utils does."""
    from transformers import AutoProcessor

    family = FAMILIES["qwen3_vl"]
    processor = load_processor(base_of(family))
    processor.video_processor.cap_pixels_per_frame = True
    processor.video_processor.max_video_tokens = 3
    recipe = Recipe.of(processor, RowFlags(max_length=32768), family=family)
    assert recipe.frame_tokens == 3
    encoder = Encoder(family=family, processor=processor, recipe=recipe)
    sample = parsed(ROWS["video, odd"], folder, family)
    (grid,) = encoder.tokens(sample).grids
    assert (grid.h, grid.w) != (8, 12)
    if hasattr(type(processor.video_processor), "cap_pixels_per_frame"):
        assert [[grid.t, grid.h, grid.w]] == stock(sample, encoder)["video_grid_thw"].tolist()
    assert AutoProcessor.from_pretrained(base_of(family)).video_processor.to_dict().get("cap_pixels_per_frame") is None


@pytest.mark.parametrize("flags", [
    {"fps": 7.0}, {"nframes": 6}, {"video_max_frames": 4}, {"video_max_pixels": 40_000}, {"video_min_pixels": 450_000},
    {"image_max_pixels": 9000}, {},
], ids=str)  # fmt: skip
def test_what_is_saved_serves_what_was_trained(base_of, folder, tmp_path, flags):
    """Flags act as the processor's settings do, and the saved processor has them, for plain serving."""
    from transformers import AutoProcessor

    family = FAMILIES["qwen3_vl"]
    trained = encoder_of(base_of(family), family, RowFlags(max_length=32768, **flags))
    trained.processor.save_pretrained(tmp_path)
    trained.processor.video_processor.save_pretrained(tmp_path)
    served = AutoProcessor.from_pretrained(tmp_path)
    assert served.video_processor.cap_pixels_per_frame is False  # said, so that a later default does not change it
    plain = Encoder(family=family, processor=served, recipe=trained.recipe)
    for name in ("video, odd", "picture", "two videos"):
        sample = parsed(ROWS[name], folder, family)
        ours, theirs = trained.encode(sample), stock(sample, plain)
        assert ours.input_ids_T.tolist() == theirs["input_ids"][0].tolist(), name
        assert_pixels(ours, theirs, trained)
    if flags:
        usual = encoder_of(base_of(family), family)
        rows = [parsed(ROWS[name], folder, family) for name in ("video, even", "picture")]
        assert any(trained.measure(sample) != usual.measure(sample) for sample in rows)
    assert Recipe.of(served, family=family) == Recipe.of(trained.processor, family=family)


def test_a_video_processor_of_another_family_is_refused(base_of, tmp_path):
    made = shutil.copytree(base_of(FAMILIES["qwen3_vl"]), tmp_path / "mixed")
    found = json.loads((made / "processor_config.json").read_text())
    found["video_processor"]["video_processor_type"] = "Qwen2VLVideoProcessor"
    (made / "processor_config.json").write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=r"is a Qwen2VLVideoProcessor, Qwen3-VL has a Qwen3VLVideoProcessor"):
        load_processor(made)


def test_budgets_of_a_row_are_those_of_a_clip(base_of, folder):
    family = FAMILIES["qwen3_vl"]
    encoder = encoder_of(base_of(family), family)
    raw = ROWS["video, even"] | {"max_pixels": 60_000}
    (grid,) = encoder.tokens(parsed(raw, folder, family)).grids
    assert (grid.t, grid.h, grid.w) == (4, 4, 6)
    assert grid.patches * 16 * 16 * 2 <= 60_000
    fit = RowFlags(max_length=150, over_length="shrink")
    (cost,) = [encoder_of(base_of(family), family, fit).measure(parsed(ROWS["video, even"], folder, family))]
    assert cost.tokens <= 150
    assert cost.changed.startswith("shrunk videos to at most ")


def test_a_limit_of_frames_that_is_taken_for_one_of_clips_is_reported(base_of, folder, tmp_path, capsys):
    clip, small = ROWS["video, even"], ROWS["video, even"] | {"video_max_pixels": 16_384}
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([clip, small, row("2+2?", "4")]))
    flags = [str(data), "--image_folder", str(folder), "--json"]
    run = "--video_max_pixels 25088: Qwen3-VL divides it among all frames of a video, so of 10 seconds of 1280x720 it "
    run += "sees 20 frames of 32x32 pixels (1 token for two frames). If 25088 is meant for one frame, as for "
    run += "Qwen2-VL, use 501760 (25088 x 20 frames), or drop the flag."
    row_limit = "180x120 pixels: each frame is reduced to 32x32 (1 token for two frames), because max_pixels 16384 is "
    frames = "180x120 pixels: each frame is reduced to 64x32 (2 tokens for two frames), because --video_max_pixels "
    for model_type, limit, notes, reasons in (
        ("qwen3_vl", ["--video_max_pixels", "25088"], [run], [frames, row_limit]),
        ("qwen3_vl", ["--video_max_pixels", "501760"], [], [row_limit]),
        ("qwen3_vl", [], [], [row_limit]),
        ("qwen2_vl", ["--video_max_pixels", "25088"], [], []),
    ):
        base = ["--model_id", str(base_of(FAMILIES[model_type]))]
        assert main(["check-data", *flags, "--headers_only", *base, *limit]) == 0
        found = json.loads(capsys.readouterr().out)
        for warning, reason in zip(found["warnings"], reasons, strict=True):
            assert warning["field"] == "video"
            assert warning["reason"].startswith(reason)
        assert main(["plan", "--data_path", *flags, *base, *limit, "--output_dir", str(tmp_path / "run")]) == 0
        assert [one for one in json.loads(capsys.readouterr().out)["notes"] if "max_pixels" in one] == notes


def test_frames_of_one_size_and_two_of_them(base_of, folder):
    family = FAMILIES["qwen3_vl"]
    encoder = encoder_of(base_of(family), family)
    for frames, reason in ((["tall.png", "wide.png"], r"video\[0\]\[1\].*400x90, the first frame 101x307"),
                           (["tall.png"], "a video of 1 frame, 2 are needed")):  # fmt: skip
        with pytest.raises(DataError, match=reason):
            encoder.measure(parsed(row("<video>", "x", video=[frames]), folder, family))


# ---- the rate of lists of frames


def test_the_rate_of_lists_of_frames(base_of, folder, tmp_path, capsys):
    listed = row("<video>Who?", "Her.", video=[["tall.png"] * 4])
    texts = {}
    for name, flags, keys in (
        ("default", {}, {}), ("flag", {"frames_fps": 4.0}, {}), ("row", {"frames_fps": 4.0}, {"fps": 0.5}),
        ("utils", {}, {"sample_fps": 0.5, "raw_fps": 24}),
    ):  # fmt: skip
        family = FAMILIES["qwen3_vl"]
        encoder = encoder_of(base_of(family), family, RowFlags(max_length=32768, **flags))
        texts[name] = encoder.tokens(parsed(listed | keys, folder, family)).grids[0].times
    assert texts == {"default": (0.25, 1.25), "flag": (0.125, 0.625), "row": (1.0, 5.0), "utils": (1.0, 5.0)}
    with pytest.raises(DataError, match=r"raw_fps.*Use sample_fps"):
        parsed(listed | {"raw_fps": 24}, folder, family)
    with pytest.raises(ConfigError, match=r"--frames_fps 3 has no effect: Qwen2-VL does not use the time of frames"):
        encoder_of(base_of(FAMILIES["qwen2_vl"]), FAMILIES["qwen2_vl"], RowFlags(frames_fps=3.0))
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([listed, listed, listed | {"fps": 1}]))
    argv = ["check-data", str(data), "--image_folder", str(folder), "--headers_only", "--json"]
    for model_type, more, expected in (
        ("qwen3_vl", [], 1), ("qwen2_5_vl", [], 1), ("qwen3_vl", ["--frames_fps", "2"], 0), ("qwen2_vl", [], 0),
    ):  # fmt: skip
        assert main([*argv, "--model_id", str(base_of(FAMILIES[model_type])), *more]) == 0
        reasons = [one["reason"] for one in json.loads(capsys.readouterr().out)["warnings"]]
        rates = [reason for reason in reasons if "how many frames per second" in reason]
        assert len(rates) == expected
        assert all("2 are assumed" in one and one.endswith("2 rows of the file have such a list") for one in rates)


# ---- boxes


def test_boxes_of_qwen2_5_are_pixels_of_the_resized_picture(base_of, folder):
    """JSON, also from `objects`, and after `--over_length shrink`; an answer is converted back to the original."""
    family = FAMILIES["qwen2_5_vl"]
    answer = '{"bbox_2d": [40, 9, 400, 90], "label": "roof"}, {"point_2d": [200, 45]}'
    objects = {"bbox": [[40, 9, 400, 90], [200, 45]], "ref": ["roof"]}
    text = row("<image>Where?", answer, image="wide.png")
    placed = row("<image><ref-object>?", '{"bbox_2d": <bbox>}, {"point_2d": <bbox>}', image="wide.png", objects=objects)
    usual = encoder_of(base_of(family), family, RowFlags(max_length=999, box_format="pixels"))
    for raw, shrunk in ((text, False), (placed, False), (text, True), (placed, True)):
        sample, encoder = parsed(raw, folder, family), usual
        if shrunk:
            flags = {"max_length": usual.measure(sample).tokens - 20, "over_length": "shrink"}
            encoder = encoder_of(base_of(family), family, RowFlags(box_format="pixels", **flags))
        encoded = encoder.encode(sample)
        grid = encoded.media[0].grid
        assert encoder.measure(sample).tokens == len(encoded.input_ids_T)
        assert bool(encoded.changed) == shrunk
        wide, high = grid.w * 14, grid.h * 14
        box, point = re.findall(r"\[[\d, ]+\]", encoded.text)
        assert json.loads(box) == [round(wide / 10), round(high / 10), wide, high]
        assert json.loads(point) == [round(wide / 2), round(high / 2)]
        asked = question_of(parsed(text, folder, family))
        [back, _] = boxes_in_answer(encoded.text, asked, lambda _, grid=grid: grid, family=family, patch_size=14)
        assert back.pixels == pytest.approx((40, 9, 400, 90), abs=400 / wide)


# ---- answers


def test_answers_are_those_of_stock_serving(base_of, folder, family, monkeypatch):
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "decord")
    chat = open_model(base_of(family), device="cpu")
    model = load_base(base_of(family), family).eval()
    for name in ("text", "picture", "video, odd", "frames with a rate", "mixed"):
        asked = question_of(parsed(ROWS[name], folder, family))
        prompt = as_tensors(chat.encoder.prompt(asked), chat.encoder.recipe)
        (ours,) = chat.speaker.generate([prompt], Sampling(max_new_tokens=5))
        theirs = stock(asked, chat.encoder, unanswered=True)
        with torch.inference_mode():
            out = model.generate(**theirs, max_new_tokens=5, do_sample=False)
        assert ours == out[0, theirs["input_ids"].shape[1] :].tolist(), name


def test_a_preview_shows_the_times(base_of, folder, tmp_path, capsys):
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([ROWS["video, odd"]]))
    argv = ["preview", str(data), "--image_folder", str(folder), "--model_id", str(base_of(FAMILIES["qwen3_vl"]))]
    assert main([*argv, "--html", str(tmp_path / "row.html")]) == 0
    shown = capsys.readouterr().out
    assert "<|vision_start|><0.3 seconds><|vision_start|><|video_pad|> x" in shown
    page = (tmp_path / "row.html").read_text()
    assert page.count("data:image/png") == 6  # five frames, the last one twice
