"""Rows as transformers' own processor and qwen-vl-utils take them: what our tokens and pixels must equal."""

from __future__ import annotations

import functools

import av
import numpy as np
import torch
from PIL import Image as PILImage
from qwen_vl_utils import process_vision_info
from qwen_vl_utils.vision_process import calculate_video_frame_range
from transformers.video_utils import VideoMetadata

from vlft.data.sample import Text, Video


def messages_of(sample, settings) -> list[dict]:
    """A sample as the messages that transformers' processors and qwen-vl-utils take."""

    def part(piece):
        if isinstance(piece, Text):
            return {"type": "text", "text": piece.text}
        if isinstance(piece, Video):
            own = piece.overrides
            video = piece.path or [PILImage.open(frame).convert("RGB") for frame in piece.frames]
            budget = {
                "min_pixels": own.min_pixels or settings.video_min_pixels,
                "max_pixels": own.max_pixels or settings.video_max_pixels,
            }
            span = {"video_start": own.video_start, "video_end": own.video_end} if own.video_start is not None else {}
            rate = {"fps": own.fps or settings.fps, "max_frames": settings.video_max_frames}
            if piece.frames:
                rate = {"sample_fps": own.fps or settings.frames_fps} if settings.frames_fps else {}
            return {"type": "video", "video": video, **budget, **rate, **span}
        return {"type": "image", "image": PILImage.open(piece.path)}

    return [{"role": turn.role, "content": [part(p) for p in turn.parts]} for turn in sample.turns]


def stock(sample, encoder, *, unanswered=False):
    """The stock processor's whole answer for a row, with videos as plain serving hands them over."""
    processor, recipe = encoder.processor, encoder.recipe
    messages = messages_of(sample, recipe)
    thinking = {} if sample.thinking is None else {"enable_thinking": sample.thinking}
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=unanswered, **thinking)
    videos = [m for message in messages for m in message["content"] if m["type"] == "video"]
    pictures = [m["image"] for message in messages for m in message["content"] if m["type"] == "image"]
    asked = {"text": [text], "return_tensors": "pt"}
    if videos:
        prepare = _of_utils if recipe.video_rule == "qwen-vl-utils" else _of_processor
        clips, metadata, kwargs = prepare(videos, processor, recipe)
        asked |= {"videos": list(clips), "videos_kwargs": {"video_metadata": list(metadata), **kwargs}}
    if pictures:
        asked["images"] = pictures
    return dict(processor(**asked))


def _of_utils(videos, processor, recipe):
    """Videos through qwen-vl-utils, as in the model card of Qwen2-VL and Qwen2.5-VL."""
    _, clips, kwargs = process_vision_info(
        [{"role": "user", "content": videos}],
        return_video_kwargs=True,
        return_video_metadata=True,
        image_patch_size=recipe.patch_size,
    )
    clips, metadata = zip(*clips, strict=True)
    metadata = [one if isinstance(one, VideoMetadata) else VideoMetadata(**one) for one in metadata]
    return clips, metadata, {"do_resize": False, **kwargs}


def _of_processor(videos, processor, recipe):
    """Videos through the model's own video processor, which samples and resizes; a part of a file is cut out first."""
    made = [_whole(one["video"]) if isinstance(one["video"], str) else None for one in videos]
    if all(made) and not any("video_start" in one for one in videos):
        return [frames for frames, _ in made], [metadata for _, metadata in made], {}  # samples by its own settings
    clips, metadata = [], []
    for one, whole in zip(videos, made, strict=True):
        if whole is None:
            frames = len(one["video"])
            # one call takes lists of pictures or arrays, and not both
            clips.append(np.stack([np.asarray(frame) for frame in one["video"]]) if any(made) else one["video"])
            known = VideoMetadata(total_num_frames=frames, fps=one["sample_fps"], frames_indices=list(range(frames)))
        else:
            frames, known = whole
            first, last, there = 0, len(frames) - 1, len(frames)
            if "video_start" in one:
                first, last, there = calculate_video_frame_range(one, len(frames), known.fps)
            part = VideoMetadata(total_num_frames=there, fps=known.fps)
            count = len(processor.video_processor.sample_frames(part, fps=processor.video_processor.fps))
            indices = np.linspace(first, last, count).round().astype(int)
            clips.append(frames[indices])
            known = VideoMetadata(total_num_frames=len(frames), fps=known.fps, frames_indices=indices.tolist())
        metadata.append(known)
    return clips, metadata, {"do_sample_frames": False}


@functools.lru_cache(maxsize=8)
def _whole(path):
    """Every frame of a file, uint8 [F, H, W, 3], and its metadata."""
    with av.open(path) as container:
        rate = float(container.streams.video[0].average_rate)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return frames, VideoMetadata(total_num_frames=len(frames), fps=rate)


def stock_positions(answer, model) -> torch.Tensor:
    """int64 [3, T], as the stock model computes them from the processor's answer."""
    keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    positions, _ = model.model.get_rope_index(**{key: answer[key] for key in keys if key in answer})
    return positions[:, 0]


NAMES = ["still", "two-turns", "clip", "text", "both", "frames"]
