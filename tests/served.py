"""Merged folders with the limits of the hub's files, what was trained of their media, and the flags that serve them."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build import row, write_image, write_json, write_video
from runs import arguments

from vlft.checkpoint import read_record
from vlft.checkpoint.serving import serving_of_model
from vlft.cli.main import main
from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.recipe import Recipe
from vlft.data.media.clips import open_clip
from vlft.data.media.read import frames_taken
from vlft.data.sample import Video
from vlft.demo.tiny import build_tiny
from vlft.families import FAMILIES, Family
from vlft.model_files import read_json
from vlft.preview import preview_rows

#: Fewest and most pixels of videos in the hub's files: of a frame of Qwen2-VL, of a clip of Qwen3-VL.
PUBLISHED = {"qwen-vl-utils": (3136, 12845056), "processor": (4096, 25165824)}
#: Name -> frames, width, height and frames per second. The first is larger than a frame of Qwen2-VL may be.
CLIPS = {"large": (12, 1280, 960, 6), "odd": (23, 200, 120, 6)}


def flags_of(command: str) -> dict[str, object]:
    """Flag -> its value, JSON parsed, of the last program of a command line."""
    words = shlex.split(command.split(" && ")[-1])
    found = {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            value = words[place + 1] if place + 1 < len(words) else ""
            found[word] = json.loads(value) if value[:1] in "{[" and value else value
    return found


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


def merged_with_videos(folder: Path, model_type: str, flags: tuple[str, ...]) -> Served:
    """A tiny base with the hub's limits, trained on a picture and a clip, and merged."""
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
