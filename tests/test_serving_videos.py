"""Videos of a merged folder: each client computes the grids that were trained, and which frames it takes.

Clients that are not installed are skipped. `examples/guides/serving.md` has the results for more clips.
"""

from __future__ import annotations

import random
import re
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HAS_VIDEOS
from packaging.requirements import Requirement
from served import CLIPS, PUBLISHED, Seen, Served, asked, merged_with_videos

from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.recipe import Recipe
from vlft.config.row_flags import RowFlags
from vlft.data.media.read import video_size_of
from vlft.demo.tiny import tiny_processor
from vlft.families import FAMILIES

PAGE = (Path(__file__).parent.parent / "examples" / "guides" / "serving.md").read_text(encoding="utf-8")
FAMILY_NAMES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_the_saved_processor_resizes_videos_as_they_were_trained(model_type):
    """The stock `resize` on random sizes and limits, also those of the hub's files. Tensors have no contents."""
    from transformers.image_utils import SizeDict

    family, draw = FAMILIES[model_type], random.Random(7)
    low, high = PUBLISHED[family.video_rule]
    processor = tiny_processor(family)
    for turn in range(200):
        processor.video_processor.cap_pixels_per_frame = None
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


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A function: model type and flags -> a merged folder. Each is made once."""
    if not HAS_VIDEOS:
        pytest.skip("videos need av and qwen-vl-utils")
    made: dict[tuple[str, tuple[str, ...]], Served] = {}

    def serve(model_type: str, *flags: str) -> Served:
        key = model_type, flags
        if key not in made:
            made[key] = merged_with_videos(tmp_path_factory.mktemp(model_type), model_type, flags)
        return made[key]

    return serve


def shared(theirs: Seen, ours: Seen) -> int:
    return len(set(theirs.frames) & set(ours.frames))


# --- vlft ---


@pytest.mark.parametrize(
    ("trained", "more"),
    [
        ((), {}),
        ((), {"video_min_pixels": 700_000}),  # above the limit of a frame without it
        ((), {"video_max_pixels": PUBLISHED["qwen-vl-utils"][1]}),  # as the first run's config.yaml may say
        (("--nframes", "8"), {}),
        (("--nframes", "8"), {"fps": 1.0}),
    ],
)
def test_a_merged_folder_is_trained_again_as_its_base_with_the_settings_of_its_run(served, trained, more):
    from vlft.setup import open_base

    merged = served("qwen2_vl", *trained)
    kept = {"image_max_pixels": 40000} | ({"nframes": 8} if trained and not more else {})
    recipes = []
    for folder, given in ((merged.folder, more), (merged.folder.parent / "base", kept | more)):
        model = ModelFlags(model_id=str(folder))
        recipes.append(open_base(DataFlags(**given), model, given=frozenset({"model_id", *given}), plain=True))
    again, base = [one.recipe for one in recipes]
    assert again.as_json() == base.as_json()


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
    needs = next(one for one in map(Requirement, requires("vllm") or ()) if one.name == "transformers")
    if not needs.specifier.contains(version("transformers")):
        pytest.skip(f"vllm needs {needs}")
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


# --- lmms-eval ---


def message(row: dict[str, str]) -> list[dict[str, Any]]:
    parts = [{"type": "video", "url": row["path"]}, {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("name", ["simple.qwen2_vl.Qwen2_VL", "chat.qwen2_5_vl.Qwen2_5_VL"])
def test_lmms_eval_takes_the_trained_frames(name, served, monkeypatch):
    """lmms-eval 0.7.3, with the settings of the page. Its inputs are read where the model would answer."""
    kind, module, maker = name.split(".")
    reason = "pip install lmms-eval==0.7.3 evaluate pytz"
    models = pytest.importorskip(f"lmms_eval.models.{kind}.{module}", reason=reason)
    from lmms_eval.api.instance import Instance

    run = served(module)
    limits = {"min_pixels": 3136, "max_pixels": 602112, "max_num_frames": 768} | ({"fps": 2} if kind == "chat" else {})
    model = getattr(models, maker)(pretrained=str(run.folder), device="cpu", device_map="cpu", **limits)
    found: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(model.model, "generate", lambda **inputs: found.update(inputs) or inputs["input_ids"])
    options = {"max_new_tokens": 4}
    asked_by = (message, options) if kind == "chat" else (options, lambda row: [row["path"]])
    for clip in CLIPS:
        model.task_dict = {"task": {"test": [{"path": str(run.media / f"{clip}.mp4")}]}}
        given = ("What?", *asked_by, 0, "task", "test")
        model.generate_until([Instance("generate_until", given, 0, {"task": "task", "doc_id": 0, "repeats": 1})])
        assert found["video_grid_thw"].tolist() == [run.trained[clip].grid]
        assert found["input_ids"][0].tolist() == run.trained[clip].prompt
