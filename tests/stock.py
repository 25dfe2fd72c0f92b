"""Rows as transformers' own processor and qwen-vl-utils take them: what our tokens and pixels must equal."""

from __future__ import annotations

from PIL import Image as PILImage
from qwen_vl_utils import process_vision_info

from vlft.data.sample import Text, Video


def messages_of(sample, settings) -> list[dict]:
    """A sample as the messages that transformers' processors and qwen-vl-utils take."""

    def part(piece):
        if isinstance(piece, Text):
            return {"type": "text", "text": piece.text}
        if isinstance(piece, Video):
            video = piece.path or [PILImage.open(frame).convert("RGB") for frame in piece.frames]
            budget = {"min_pixels": settings.video_min_pixels, "max_pixels": settings.video_max_pixels}
            rate = {} if piece.frames else {"fps": settings.fps, "max_frames": settings.video_max_frames}
            return {"type": "video", "video": video, **budget, **rate}
        return {"type": "image", "image": PILImage.open(piece.path)}

    return [{"role": turn.role, "content": [part(p) for p in turn.parts]} for turn in sample.turns]


def stock(sample, encoder):
    """The stock processor's whole answer for a row: pictures by itself, videos as qwen-vl-utils hands them over."""
    processor = encoder.processor
    messages = messages_of(sample, encoder.recipe)
    text = processor.apply_chat_template(messages, tokenize=False)
    videos = [m for message in messages for m in message["content"] if m["type"] == "video"]
    pictures = [m["image"] for message in messages for m in message["content"] if m["type"] == "image"]
    answer = {}
    if videos:
        _, clips, kwargs = process_vision_info(
            [{"role": "user", "content": videos}], return_video_kwargs=True, return_video_metadata=True
        )
        clips, metadata = zip(*clips, strict=True)
        made = processor.video_processor(
            videos=list(clips), video_metadata=list(metadata), do_resize=False, return_tensors="pt", **kwargs
        )
        answer |= {"pixel_values_videos": made["pixel_values_videos"], "video_grid_thw": made["video_grid_thw"]}
    if pictures:
        made = processor.image_processor(images=pictures, return_tensors="pt")
        answer |= {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}
    for token, grids in (("<|image_pad|>", "image_grid_thw"), ("<|video_pad|>", "video_grid_thw")):
        for grid in answer.get(grids, []):
            text = text.replace(token, "<|placeholder|>" * int(grid.prod() // 4), 1)
        text = text.replace("<|placeholder|>", token)
    answer["input_ids"] = processor.tokenizer(text, return_tensors="pt").input_ids
    return answer


NAMES = ["still", "two-turns", "clip", "text", "both", "frames"]
