"""Rows that are refused, each with its field and reason."""

from __future__ import annotations

from build import row


def turns(*values, **keys):
    """Return a row with these turns; a turn is "human: text"."""
    said = (value.split(": ", 1) for value in values)
    return {**keys, "conversations": [{"from": role, "value": text} for role, text in said]}


REFUSED = {
    "more tags than files": (
        row("<image><image>\nhm", image=["a.jpg"]),
        "conversations[0]",
        '2 <image> tags, 1 path in "image". Add a path or drop a tag',
    ),
    "more tags than files, in a later turn": (
        turns("human: <image>a", "gpt: b", "human: <image>c", "gpt: d", image="a.jpg"),
        "conversations[2]",
        '2 <image> tags, 1 path in "image"',
    ),
    "fewer tags than files": (
        row("<image> hm", image=["a.jpg", "b.jpg", "c.jpg"]),
        "image[1]",
        '1 <image> tag, 3 paths in "image". Add a tag',
    ),
    "no tag": (row("hm", image="a.jpg"), "image", 'no <image> tags, 1 path in "image"'),
    "no tag for a video": (row("hm", video="a.mp4"), "video", 'no <video> tags, 1 path in "video"'),
    "two videos, one tag": (row("<video>", video=["a.mp4", "b.mp4"]), "video[1]", "1 <video> tag, 2 paths"),
    "tag without file": (row("<image>hm"), "conversations[0]", '1 <image> tag, no paths in "image"'),
    "tag without file, empty list": (row("<video>hm", video=[]), "conversations[0]", "1 <video> tag, no paths"),
    "image and images, and they differ": (
        row("<image>hm", image="a.jpg", images=["b.jpg"]),
        "images",
        'both "image" and "images", and they differ',
    ),
    "more files than tags, in another kit's key": (
        row("<image>hm", images=["a.jpg", "b.jpg"]),
        "images[1]",
        '1 <image> tag, 2 paths in "images"',
    ),
    "tag of the wrong kind": (row("<video>hm", image="a.jpg"), "image", "no <image> tags, 1 path"),
    "tag in a gpt turn": (
        row("<image>hm", "see <image>", image=["a.jpg", "b.jpg"]),
        "conversations[1].value",
        "a <image> tag in a gpt turn",
    ),
    "tag in a system turn": (
        turns("system: <image>", "human: a", "gpt: b", image="a.jpg"),
        "conversations[0].value",
        "a <image> tag in a system turn",
    ),
    "no gpt turn": (turns("system: a", "human: b"), "conversations", "no gpt turn in 2 turns"),
    "gpt turn first": (turns("gpt: a", "human: b", "gpt: c"), "conversations[0]", "a gpt turn comes first"),
    "gpt turn first after a system turn": (turns("system: s", "gpt: a"), "conversations[1]", "a gpt turn comes first"),
    "empty answer": (row(answer=""), "conversations[1].value", "the answer is empty"),
    "blank answer": (row(answer=" \n\t"), "conversations[1].value", "the answer is blank"),
    "value that is a list": (
        {"conversations": [{"from": "human", "value": ["a"]}]},
        "conversations[0].value[0]",
        "is a string, not a part",
    ),
    "value that is a number": (row(7), "conversations[0].value", "is a number, not a string"),
    "value that is an object": (row(answer={}), "conversations[1].value", "is an object, not a string"),
    "value that is null": (row(answer=None), "conversations[1].value", "is null"),
    "no value": ({"conversations": [{"from": "human"}]}, "conversations[0]", 'no "value" (nor "content")'),
    "half a character": (row("a\ud800"), "conversations[0].value", "character 1 is half a character"),
    "unknown role": (turns("narrator: a", "gpt: b"), "conversations[0].from", "unknown role 'narrator'"),
    "role that is no string": ({"messages": [{"role": 3, "content": "a"}]}, "messages[0].role", "unknown role 3"),
    "no role": ({"conversations": [{"value": "a"}]}, "conversations[0]", 'no "from" (nor "role")'),
    "roles that differ": (
        {"conversations": [{"from": "human", "role": "assistant", "value": "a"}]},
        "conversations[0]",
        'both "from" and "role"',
    ),
    "image that is a number": (row("<image>", image=3), "image", "is a number, where a path, a list of paths or null"),
    "image that is an object": (row("<image>", image={"file": "a.jpg"}), "image", "is an object, where a path"),
    "image that is false": (row(image=False), "image", "is false"),
    "image in a list in a list": (row("<image>", image=[["a.jpg"]]), "image[0]", "is a list, where a path belongs"),
    "null among images": (row("<image><image>", image=["a.jpg", None]), "image[1]", "is null, where a path belongs"),
    "empty path": (row("<image>", image=[""]), "image[0]", "is an empty path"),
    "video that is a number": (row("<video>", video=3), "video", "is a number"),
    "a frame that is a number": (row("<video>", video=[["a.jpg", 3]]), "video[0][1]", "is a number"),
    "a video of no frames": (row("<video>", video=[[]]), "video[0]", "a video without frames"),
    "remote picture": (row("<image>", image="https://x.org/a.jpg"), "image", "https://x.org/a.jpg is not a local file"),
    "remote video": (row("<video>", video=["http://x.org/a.mp4"]), "video[0]", "--allow_remote_media"),
    "other address": (row("<image>", image="s3://x/a.jpg"), "image", "s3:// is not fetched: download it first"),
    "a file of another machine": (row("<image>", image="file://host/a.jpg"), "image", "file:// is not fetched"),
    "embedded picture": (row("<image>", image="data:image/png;base64,AAAA"), "image", "is an embedded picture"),
    "a path that climbs": (row("<image>", image="../a.jpg"), "image", "leads outside --image_folder pics"),
    "a frame whose path climbs": (row("<video>", video=["a.jpg", "b/../../c.jpg"]), "video[1]", "leads outside"),
    "a very long path": (row("<image>", image="a" * 5000), "image", "has 5,000 characters, a path has 4,096 at most"),
    "very many pictures": (
        row("<image>", image=["a.jpg"] * 10_001),
        "image",
        "10,001 files, and a row may name 10,000",
    ),
    "very many frames": (row("<video>", video=[["a.jpg"] * 9_999] * 2), "video", "19,998 files"),
    "very much text": (turns(*["human: " + 3000 * "a", "gpt: b"] * 1000), "conversations", "2,000 turns of 3,081,000"),
    "no conversations": ({"id": 3, "text": "a"}, "conversations", 'no "conversations" (nor "messages")'),
    "conversations that are null": ({"conversations": None}, "conversations", "is null"),
    "conversations that are empty": ({"conversations": []}, "conversations", "is empty"),
    "conversations that are a string": ({"conversations": "a"}, "conversations", "is a string, not a list of turns"),
    "both, and they differ": ({**row(), "messages": []}, "conversations", 'both "conversations" and "messages"'),
    "a turn that is a string": ({"conversations": ["a"]}, "conversations[0]", "is a string, not an object"),
    "a row that is a list": ([1], "row", "is a list, not an object"),
    "a row that is null": (None, "row", "is null, not an object"),
}
