"""The same rows in the forms of other kits, and how a row is parsed and compared."""

from __future__ import annotations

import base64

import torch
from build import FAMILY

from vlft.data.rows.access import Access
from vlft.data.rows.records import parse_record


def parse(raw, *, flags=None, **access):
    where = Access(**access) if access else None
    return parse_record(raw, file="data/t.json", index=3, image_folder="pics", family=FAMILY, access=where, flags=flags)


LLAVA = [
    {
        "id": "two",
        "image": ["flower.jpg", "astronaut.jpg"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nCompare the two."},
            {"from": "gpt", "value": "A flower and an astronaut."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    {
        "id": "system",
        "image": "china.jpg",
        "video": "clip.mp4",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nand <video>: which moves?"},
            {"from": "gpt", "value": "The cup."},
        ],
    },
    {
        "id": "text",
        "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
    },
]


def _shown(path):
    return {"type": "video", "video": path} if path.endswith(".mp4") else {"type": "image", "image": path}


def _openai(path, media):
    """A file in the form of OpenAI's parts; pictures are embedded."""
    if path.endswith(".mp4"):
        return {"type": "video_url", "video_url": {"url": path}}
    text = base64.b64encode((media / path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{text}", "detail": "high"}}


SHAREGPT = [
    {**LLAVA[0]},
    {**LLAVA[1], "conversations": LLAVA[1]["conversations"][1:], "system": "Be brief."},
    {"id": "text", "conversations": [{"from": "user", "value": "2+2?"}, {"from": "chatgpt", "value": "4"}]},
]


def openai(media, part=None):
    def shown(path):
        return _openai(path, media) if part is None else part(path)

    def said(role, *content):
        parts = [piece if isinstance(piece, dict) else {"type": "text", "text": piece} for piece in content]
        return {"role": role, "content": parts}

    return [
        {
            "id": "two",
            "messages": [
                said("user", shown("flower.jpg"), shown("astronaut.jpg"), "Compare the two."),
                said("assistant", "A flower and an astronaut."),
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes."},
            ],
        },
        {
            "id": "system",
            "messages": [
                said("developer", "Be brief."),
                said("user", shown("china.jpg"), "and ", shown("clip.mp4"), ": which moves?"),
                said("assistant", "The ", "cup."),
            ],
        },
        {"id": "text", "messages": [said("user", "2+2?"), said("assistant", "4")]},
    ]


LLAMA_FACTORY = [
    {
        "id": "two",
        "instruction": "Sure?",
        "input": "",
        "output": "Yes.",
        "history": [["<image>\n<image>\nCompare the two.", "A flower and an astronaut."]],
        "images": ["flower.jpg", "astronaut.jpg"],
    },
    {
        "id": "system",
        "system": "Be brief.",
        "conversations": LLAVA[1]["conversations"][1:],
        "images": ["china.jpg"],
        "videos": ["clip.mp4"],
        "audios": [],
    },
    {"id": "text", "instruction": "2+2?", "output": "4", "system": "", "images": None},
]

MS_SWIFT = [
    {
        "id": "two",
        "messages": [
            {"role": "user", "content": "<image><image>Compare the two."},
            {"role": "assistant", "content": "A flower and an astronaut."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes.", "loss": None},
        ],
        "images": [{"path": "flower.jpg", "bytes": None}, {"path": "astronaut.jpg"}],
    },
    {
        "id": "system",
        "system": "Be brief.",
        "query": "<image>and <video>: which moves?",
        "response": "The cup.",
        "history": [],
        "images": ["china.jpg"],
        "videos": ["clip.mp4"],
    },
    {"id": "text", "conversation": [{"human": "2+2?", "assistant": "4"}]},
]


def parse_row(raw, media):
    return parse_record(raw, file="rows.json", index=0, image_folder=str(media), family=FAMILY)


def same(ours, theirs) -> None:
    assert ours.input_ids_T.tolist() == theirs.input_ids_T.tolist()
    assert ours.labels_T.tolist() == theirs.labels_T.tolist()
    assert ours.positions_3T.tolist() == theirs.positions_3T.tolist()
    assert [m.grid for m in ours.media] == [m.grid for m in theirs.media]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(ours.media, theirs.media, strict=True))
