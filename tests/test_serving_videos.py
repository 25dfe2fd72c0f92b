"""Videos of a merged folder: each client computes the grids that were trained, and which frames it takes.

Clients that are not installed are skipped. `examples/guides/serving.md` has the results for more clips.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from build import row, write_image, write_json, write_video
from conftest import HAS_VIDEOS
from runs import arguments
from test_serving_lines import flags_of

from vlft.checkpoint import read_record
from vlft.checkpoint.serving import serving_of_model
from vlft.cli.main import main
from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.recipe import Recipe
from vlft.config.row_flags import RowFlags
from vlft.data.media.clips import open_clip
from vlft.data.media.read import frames_taken, video_size_of
from vlft.data.sample import Video
from vlft.demo.tiny import build_tiny, tiny_processor
from vlft.families import FAMILIES, Family
from vlft.model_files import read_json
from vlft.preview import preview_rows

PAGE = (Path(__file__).parent.parent / "examples" / "guides" / "serving.md").read_text(encoding="utf-8")
#: Fewest and most pixels of videos in the hub's files: of a frame of Qwen2-VL, of a clip of Qwen3-VL.
PUBLISHED = {"qwen-vl-utils": (3136, 12845056), "processor": (4096, 25165824)}
FAMILY_NAMES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
#: Name -> frames, width, height and frames per second. The first is larger than a frame of Qwen2-VL may be.
CLIPS = {"large": (12, 1280, 960, 6), "odd": (23, 200, 120, 6)}


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_the_saved_processor_resizes_videos_as_they_were_trained(model_type):
    """The stock `resize` on random sizes and limits, also those of the hub's files. Tensors have no contents."""
    from transformers.image_utils import SizeDict

    family, draw = FAMILIES[model_type], random.Random(7)
    low, high = PUBLISHED[family.video_rule]
    for turn in range(200):
        processor = tiny_processor(family)
        processor.video_processor.size = {"shortest_edge": low, "longest_edge": high}
        least = None if turn % 2 else draw.choice([low, 40_000, 590_000])
        most = None if turn % 4 else draw.randint(590_000, 600_000)
        recipe = Recipe.of(
            processor, RowFlags(video_min_pixels=least, video_max_pixels=most), family=family, tokens_per_second=2
        )
        recipe.serve(processor)
        video = processor.video_processor
        frames, height, width = draw.randint(2, 900), draw.randint(60, 2200), draw.randint(60, 2200)
        theirs = video.resize(
            torch.empty((1, frames, 3, height, width), dtype=torch.uint8, device="meta"),
            size=SizeDict(**video.size),
            resample=video.resample,
            factor=recipe.factor,
            temporal_factor=2,
            cap_pixels_per_frame=video.cap_pixels_per_frame,
        )
        assert tuple(theirs.shape[-2:]) == video_size_of(frames, height, width, recipe), (frames, height, width, recipe)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The prompt of a row as tokens, the grid of its picture or video, and the frames that are taken of a video."""

    prompt: list[int]
    grid: list[int]
    frames: list[int]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A merged folder, the flags of its command for vLLM, and what was trained of each picture or clip."""

    folder: Path
    vllm: dict[str, Any]
    media: Path
    trained: dict[str, Seen]
    thinking: dict[str, bool]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A function: model type -> its tiny base with the hub's limits, trained on a picture and a clip, and merged."""
    if not HAS_VIDEOS:
        pytest.skip("videos need av and qwen-vl-utils")
    made: dict[tuple[str, tuple[str, ...]], Served] = {}

    def serve(model_type: str, *flags: str) -> Served:
        key = model_type, flags
        if key not in made:
            made[key] = _served(tmp_path_factory.mktemp(model_type), model_type, flags)
        return made[key]

    return serve


def _served(folder: Path, model_type: str, flags: tuple[str, ...]) -> Served:
    from transformers import AutoProcessor

    family, media = FAMILIES[model_type], folder / "media"
    base = build_tiny(folder / "base", family)
    for name, change in (("processor_config.json", _published), ("config.json", _long)):
        settings = read_json(base / name)
        change(settings, family)
        (base / name).write_text(json.dumps(settings), encoding="utf-8")
    write_image(media / "picture.png", 300, 200)
    for name, (frames, width, height, fps) in CLIPS.items():
        write_video(media / f"{name}.mp4", frames, width, height, fps=fps)
    rows = [row("<image>What?", "This.", image="picture.png", id="picture")]
    rows += [row("<video>What?", "That.", video=f"{name}.mp4", id=name) for name in CLIPS]
    data = write_json(folder / "rows.json", rows)
    small = write_json(folder / "small.json", [rows[0], rows[2]])
    more = ("--image_max_pixels", "40000", "--max_steps", "1", *flags)
    assert main(arguments(base, small, media, folder / "run", *more)) == 0
    assert main(["merge", str(folder / "run"), str(folder / "merged")]) == 0
    record = read_record(folder / "merged")
    recipe = Recipe.of_run(
        AutoProcessor.from_pretrained(folder / "merged"),
        record.settings,
        family=family,
        tokens_per_second=record.settings["tokens_per_second"],
    )
    limits = {name: getattr(recipe, name) for name in ("image_max_pixels", "fps", "nframes", "video_max_frames")}
    given = frozenset({"model_id", "image_max_pixels"})
    if recipe.nframes is not None:
        limits |= {"fps": None, "video_max_frames": None}
    trained = {}
    data_flags, model_flags = DataFlags(image_folder=str(media), **limits), ModelFlags(model_id=str(base))
    for one in preview_rows(str(data), range(3), data_flags, model_flags, given=given):
        found = one.as_json()
        answer = next(place for place, label in enumerate(found["labels"]) if label != -100)
        (grid,) = found["image_grid_thw"] + found["video_grid_thw"]
        path = str(media / f"{found['id']}.mp4")
        video = found["id"] != "picture"
        frames = frames_taken(open_clip(path), Video(path=path, field="video"), recipe) if video else []
        trained[found["id"]] = Seen(prompt=found["input_ids"][:answer], grid=grid, frames=frames)
    serving = serving_of_model(folder / "merged", family, record, path="merged")
    return Served(
        folder=folder / "merged",
        vllm=flags_of(serving.commands["vllm"]),
        media=media,
        trained=trained,
        thinking=recipe.template_arguments(False),
    )


def _published(settings: dict[str, Any], family: Family) -> None:
    low, high = PUBLISHED[family.video_rule]
    settings["video_processor"]["size"] = {"shortest_edge": low, "longest_edge": high}


def _long(settings: dict[str, Any], family: Family) -> None:
    settings["text_config"]["max_position_embeddings"] = 262_144


def asked(served: Served, clip: str, **more: Any) -> list[dict[str, Any]]:
    """The question of a row, as clients take it."""
    kind, end = ("image", "png") if clip == "picture" else ("video", "mp4")
    part = {"type": kind, kind: str(served.media / f"{clip}.{end}"), **more}
    return [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]


def shared(theirs: Seen, ours: Seen) -> int:
    return len(set(theirs.frames) & set(ours.frames))


# --- transformers ---


def by_transformers(served: Served, clip: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Seen:
    """`apply_chat_template` on the path of a clip. PyAV reads it; the choice of frames is stock."""
    from transformers import AutoProcessor
    from transformers.video_processing_utils import BaseVideoProcessor
    from transformers.video_utils import load_video

    known = []

    def fetch(self: Any, paths: Any, sample_indices_fn: Any = None) -> Any:
        if isinstance(paths, list):
            return tuple(zip(*(fetch(self, path, sample_indices_fn) for path in paths), strict=True))
        frames, metadata = load_video(paths, backend="pyav", sample_indices_fn=sample_indices_fn)
        known.append(metadata)
        return frames, metadata

    monkeypatch.setattr(BaseVideoProcessor, "fetch_videos", fetch)
    made = AutoProcessor.from_pretrained(served.folder).apply_chat_template(
        asked(served, clip),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **({"processor_kwargs": settings} if settings else {}),
        **served.thinking,
    )
    (grid,) = made["image_grid_thw" if clip == "picture" else "video_grid_thw"].tolist()
    frames = [int(place) for place in known[0].frames_indices] if known else []
    return Seen(prompt=made["input_ids"][0].tolist(), grid=grid, frames=frames)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize("flags", [(), ("--nframes", "6")], ids=["fps", "nframes"])
def test_the_default_call_of_transformers_gives_what_was_trained(model_type, flags, served, monkeypatch):
    run = served(model_type, *flags)
    for clip, ours in run.trained.items():
        assert by_transformers(run, clip, monkeypatch) == ours, clip


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_transformers_takes_other_frames_for_qwen2_vl(model_type, served, monkeypatch):
    """The default call takes all frames. `do_sample_frames` gives the trained grids and prompts, with other frames."""
    run = served(model_type)
    assert by_transformers(run, "picture", monkeypatch) == run.trained["picture"]
    for clip, (frames, *_) in CLIPS.items():
        ours = run.trained[clip]
        assert by_transformers(run, clip, monkeypatch).grid == [-(-frames // 2), *ours.grid[1:]]
        sampled = by_transformers(run, clip, monkeypatch, do_sample_frames=True)
        assert (sampled.prompt, sampled.grid) == (ours.prompt, ours.grid)
        assert shared(sampled, ours) < len(ours.frames)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("flags", [(), ("--nframes", "6")], ids=["fps", "nframes"])
def test_the_call_of_the_page_gives_the_trained_frames(model_type, flags, served, monkeypatch):
    """The block of the page for Qwen2-VL and Qwen2.5-VL, as it is printed there."""
    run = served(model_type, *flags)
    [block] = [
        text for text in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S) if "process_vision_info" in text
    ]
    monkeypatch.chdir(run.folder.parent)
    block = block.replace("output/mine-merged", str(run.folder)).replace("What happens?", "What?")
    for clip, ours in run.trained.items():
        if clip != "picture":
            names: dict[str, Any] = {}
            exec(compile(block.replace("clip.mp4", str(run.media / f"{clip}.mp4")), "serving.md", "exec"), names)
            (grid,) = names["inputs"]["video_grid_thw"].tolist()
            frames = [int(place) for place in names["known"][0]["frames_indices"]]
            assert Seen(prompt=names["inputs"]["input_ids"][0].tolist(), grid=grid, frames=frames) == ours


# --- vLLM ---


def by_vllm(served: Served, clip: str) -> Seen:
    """The loader and the processor of `vllm serve` with the printed flags, without an engine. vLLM 0.33.0."""
    import base64

    from transformers import AutoProcessor
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.media.connector import MediaConnector
    from vllm.multimodal.processing import TimingContext
    from vllm.multimodal.processing.inputs import ProcessorInputs

    folder, flags = str(served.folder), served.vllm
    config = ModelConfig(
        model=folder,
        tokenizer=folder,
        dtype="float32",
        mm_processor_kwargs=flags["--mm-processor-kwargs"],
        media_io_kwargs=flags["--media-io-kwargs"],
        limit_mm_per_prompt=flags["--limit-mm-per-prompt"],
        enforce_eager=True,
    )
    maker = MULTIMODAL_REGISTRY.create_processor(config)
    stock = AutoProcessor.from_pretrained(folder)
    loader = MediaConnector(media_io_kwargs=flags["--media-io-kwargs"])
    kind, end = ("image", "png") if clip == "picture" else ("video", "mp4")
    data = base64.b64encode((served.media / f"{clip}.{end}").read_bytes()).decode()
    frames: list[int] = []
    if kind == "image":
        item: Any = loader.fetch_image(f"data:image/png;base64,{data}")
    else:
        item = loader.fetch_video(
            f"data:video/mp4;base64,{data}", video_processor=type(stock.video_processor).__name__
        ).media
        frames = list(item[1]["frames_indices"])
    text = stock.apply_chat_template(asked(served, clip), add_generation_prompt=True, tokenize=False, **served.thinking)
    prompt = stock.tokenizer(text, add_special_tokens=False).input_ids
    items = maker.info.parse_mm_data({kind: [item]})
    made = maker.apply(ProcessorInputs(prompt=prompt, mm_data_items=items, hf_processor_mm_kwargs={}), TimingContext())
    (grid,) = made["mm_kwargs"].get_data()[f"{kind}_grid_thw"].view(-1, 3).tolist()
    return Seen(prompt=list(made["prompt_token_ids"]), grid=grid, frames=frames)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
@pytest.mark.parametrize("flags", [(), ("--nframes", "6")], ids=["fps", "nframes"])
def test_vllm_computes_the_trained_grids_with_the_printed_flags(model_type, flags, served):
    """And the trained prompts; by frame rate it takes the trained frames of Qwen3-VL and Qwen3.5."""
    pytest.importorskip("vllm", reason="needs vllm and what it imports; no GPU")
    run = served(model_type, *flags)
    for clip, ours in run.trained.items():
        theirs = by_vllm(run, clip)
        assert theirs.grid == ours.grid, clip
        if flags:  # their places are rounded down, and Qwen3-VL and Qwen3.5 say the times of frames in the prompt
            near = zip(theirs.frames, ours.frames, strict=True)
            assert all(ours_at - theirs_at in (0, 1) for theirs_at, ours_at in near)
            continue
        assert theirs.prompt == ours.prompt
        if model_type.startswith("qwen3"):
            assert theirs.frames == ours.frames
