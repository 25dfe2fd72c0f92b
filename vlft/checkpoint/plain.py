"""Open a base's config and processor from their files, without transformers, whose import takes seconds.

`vlft preview`, `vlft check-data --headers_only` and `vlft plan` use it: they need tokens and sizes, no pixels and no
weights. Only files of the published forms are read. For all others `open_plain` returns None, and the caller asks
transformers. Tests compare the results with the stock processor of the installed version.

Neighbours: `vlft.checkpoint.plain_tokens` has the tokenizer and the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlft.checkpoint.plain_tokens import PlainTokenizer, read_template, read_tokenizer
from vlft.families import Family
from vlft.model_files import read_json

#: Class of a processor in transformers -> the values of what its file leaves out, in all supported versions.
_MEDIA: Mapping[str, Mapping[str, Any]] = {
    "Qwen2VLImageProcessor": {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}},
    "Qwen2VLVideoProcessor": {
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
        "fps": None,
        "num_frames": None,
        "max_frames": 768,
    },
    "Qwen3VLVideoProcessor": {
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
        "patch_size": 16,
        "fps": 2,
        "num_frames": None,
        "min_frames": 4,
        "max_frames": 768,
        "cap_pixels_per_frame": None,
        "max_video_tokens": 768,
    },
}
_EVERY_MEDIUM: Mapping[str, Any] = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}


@dataclass(frozen=True, kw_only=True)
class PlainProcessor:
    """The parts of a stock processor that decide the tokens of a row. It has no pixels.

    Attributes:
        tokenizer: with the methods of a stock tokenizer that vlft uses.
        chat_template: as text; None if the tokenizer has it.
        image_processor: the settings for stills.
        video_processor: the settings for videos.
    """

    tokenizer: PlainTokenizer
    chat_template: str | None
    image_processor: SimpleNamespace
    video_processor: SimpleNamespace


def open_plain(folder: Path, family: Family) -> tuple[SimpleNamespace, PlainProcessor] | None:
    """Open the config and the processor of a model folder.

    Args:
        folder: with config.json, which `check_base` has checked.
        family: of its config.

    Returns:
        the config, with the attributes that `Family.sizes` reads, and the processor. None if a file has a form that
        only transformers can read.

    Raises:
        CheckpointError: a file cannot be read.
    """
    config = family.plain_config(read_json(folder / "config.json"), where=str(folder)) if _sound(folder) else None
    image, video = _media(folder, family)
    if config is None or image is None or video is None:
        return None
    tokenizer = read_tokenizer(folder, family.tokenizer_class)
    if tokenizer is None:
        return None
    template, ours = read_template(folder, tokenizer.chat_template)
    if not ours:
        return None
    return config, PlainProcessor(
        tokenizer=tokenizer, chat_template=template, image_processor=image, video_processor=video
    )


def _json(folder: Path, name: str) -> dict[str, Any] | None:
    return read_json(folder / name) if (folder / name).is_file() else None


#: Keys of generation_config.json -> the types of their values.
_GENERATION: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("bos_token_id", "pad_token_id"), (int, type(None))),
    "eos_token_id": (int, list, type(None)),
    **dict.fromkeys(("do_sample", "use_cache", "output_attentions", "output_hidden_states"), (bool,)),
    "_from_model_config": (bool,),
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), (int, float)),
    "top_k": (int,),
    "transformers_version": (str,),
}


def _sound(folder: Path) -> bool:
    """Whether generation_config.json has only values that transformers certainly accepts."""
    found = _json(folder, "generation_config.json") or {}
    return all(isinstance(value, _GENERATION.get(name, ())) for name, value in found.items())


def _media(folder: Path, family: Family) -> tuple[SimpleNamespace | None, SimpleNamespace | None]:
    """Return the settings for stills and for videos; None for each that only transformers can read."""
    whole = _json(folder, "processor_config.json") or {}
    stills = _json(folder, "preprocessor_config.json")
    videos = _json(folder, "video_preprocessor_config.json")
    image = whole.get("image_processor", stills)
    video = whole.get("video_processor", videos if videos is not None else stills)
    named = video is not stills  # a file for stills does not name the class for videos
    return (
        _settings(image, family.image_processor_class, "image_processor_type"),
        _settings(video, family.video_processor_class, "video_processor_type" if named else None),
    )


def _settings(found: Any, wanted: str, key: str | None) -> SimpleNamespace | None:
    """Return the settings of one processor; None if it is of another class or of an unknown form."""
    defaults = _MEDIA.get(wanted)
    if defaults is None or not isinstance(found, dict) or "auto_map" in found:
        return None
    if key is not None and str(found.get(key, wanted)).removesuffix("Fast") != wanted:
        return None
    if not {"image_mean", "image_std"} <= set(found):
        return None
    size = found.get("size", defaults["size"])
    if not isinstance(size, dict):
        return None
    size = dict(size)
    for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if found.get(old) is not None:  # of files before transformers 4.57
            size[new] = found[old]
            size.pop(old, None)
    if set(size) != {"shortest_edge", "longest_edge"} or not all(isinstance(value, int) for value in size.values()):
        return None
    every = {**_EVERY_MEDIUM, **defaults}
    values = {name: found.get(name, default) for name, default in every.items()}
    return SimpleNamespace(
        **values | {"size": size, "image_mean": list(found["image_mean"]), "image_std": list(found["image_std"])}
    )
