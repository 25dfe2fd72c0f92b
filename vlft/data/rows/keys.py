"""The keys of rows and turns that other kits write: which are refused, which are ignored, and which are unknown.

The keys are tables. A key that is not read, not refused and not harmless gives a warning: it may change what its
author wants the row to teach. `vlft.data.rows.forms`, `turns` and `overrides` read the values of the known keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from vlft.errors import RowRef
from vlft.text import short

Kind = Literal["image", "video"]

# Every warning about an unknown key starts with this, so that check-data can count rows by key instead of listing them.
UNREAD = "is not read:"

SOUND = "holds sound, which is not read: the model would learn the answer without hearing it"
TOOLS = (
    "is not read: the model would learn to call tools that its prompt does not name. Write them into the system turn, "
    "exactly as the served prompt will have them"
)
CALLS = "is not read, and the answer is incomplete without it. Write it as text"
THOUGHT = (
    "is not read, and the answer would be learned without its reasoning. Write it into the text of the turn: "
    "<think>...</think> before the answer"
)
TOKENS = "is a mask over the tokens of another tokenizer. Mask whole turns (loss) or characters (train_detail) instead"
PREFIX = (
    "is not read: every answer must be complete, and the token that ends it is trained. Finish the answer, or mask it"
)

# Keys of a row that must not be ignored: without them the row would teach something else.
REFUSED_KEYS = {
    **dict.fromkeys(("audio", "audios", "audio_path"), SOUND),
    **dict.fromkeys(("tools", "functions"), TOOLS),
    **dict.fromkeys(("tool_calls", "function_call"), CALLS),
    "documents": "is not read: the model would learn the answer without them. Write them into the human turn",
    "chosen": "is not read: the answer to learn is outside the conversation. For a preference row set --method dpo, "
    "orpo or simpo. Otherwise write the answer as the last gpt turn",
    "chat_template_kwargs": "is not read: each row is rendered by the base's own chat template and its defaults",
    "chat_template": "is not read: each row is rendered by the base's own chat template",
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), THOUGHT),
    **dict.fromkeys(("assistant_masks", "completion_mask", "loss_mask"), TOKENS),
    **dict.fromkeys(("add_generation_prompt", "continue_final_message"), PREFIX),
    **dict.fromkeys(
        ("train_on_prompt", "train_on_inputs"),
        "asks to train the human turns, but only answers are trained. Drop it, or drop the row",
    ),
}
# Keys of a turn that must not be ignored: without them the turn would teach something else.
REFUSED_TURN_KEYS = {
    **dict.fromkeys(("tool_calls", "function_call"), CALLS),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), THOUGHT),
    **dict.fromkeys(("audio", "audios"), SOUND),
    **dict.fromkeys(("prefix", "prefill"), PREFIX),
    "refusal": "is not read, but it is the model's answer. Write it as the text of the turn",
}
# Keys that may be ignored with a warning: the conversation is complete without them.
IDLE_KEYS = ("rejected", "rejected_response", "rejected_messages", "rejected_images", "rejected_videos")
PAIR_KEYS = ("chosen",)  # keys of preference rows that are refused in other rows
VERDICTS = ("label", "kto_tag")  # keys of preference data: false marks a bad answer
# Weights of a whole row; `vlft.data.rows.masks` reads those of a turn.
WEIGHTS = ("loss_weight", "loss_scale", "loss", "train", "training")

# Kind of media -> its keys. The first key that a row has wins. The first two of each kind are our own format's.
MEDIA_KEYS: dict[Kind, tuple[str, ...]] = {
    "image": (
        *("image", "images", "image_path", "image_paths", "image_file", "image_files", "img_path", "img", "imgs"),
        *("file_name", "image_url", "image_urls"),
    ),
    "video": ("video", "videos", "video_path", "video_paths", "video_file", "video_files", "video_url", "video_urls"),
}
OWN_MEDIA_KEYS = 2
SYSTEM_KEYS = ("system", "system_prompt", "system_message")

_ANYWHERE = (
    *("id", "ids", "idx", "index", "uid", "uuid", "name", "source", "sources", "model", "generator", "author"),
    *("lang", "language", "timestamp", "time", "date", "created", "created_at", "updated_at", "score", "scores"),
    *(
        "rating",
        "ratings",
        "tokens",
        "token_count",
        "num_tokens",
        "length",
        "hash",
        "md5",
        "sha256",
        "sha1",
        "metadata",
    ),
    *("meta", "info", "extra", "extra_info", "comment", "comments", "note", "notes", "url", "urls", "tags", "type"),
)
HARMLESS_KEYS = frozenset(
    (
        *_ANYWHERE,
        *("question_id", "image_id", "video_id", "sample_id", "item_id", "conversation_id", "conv_id", "dialog_id"),
        *("qid", "row_id", "story_id", "question_type", "answer_type", "data_source", "dataset", "dataset_name"),
        *("data_type", "datatype", "task", "task_type", "task_name", "category", "categories", "subset", "split"),
        *("domain", "topic", "topics", "subject", "license", "licence", "title", "width", "height", "image_width"),
        *("image_height", "image_size", "image_sizes", "widths", "heights", "width_list", "height_list", "size"),
        *("duration", "quality", "difficulty", "level", "version", "num_turns", "turn_count", "num_images"),
        *("image_count", "image_num", "num_videos", "channel", "annotator", "original_id", "orig_id", "file", "path"),
        *("ds_name", "origin_dataset", "origin_split"),
        *("filename", "image_name", "video_name", "page", "pages", "cluster", "embedding", "similarity", "clip_score"),
        *("relevance_ratings", "relevance_min", "visual_dependency_ratings", "visual_dependency_min"),
        *("image_correspondence_ratings", "image_correspondence_min", "formatting_ratings", "formatting_min"),
        *("__index_level_0__", "_id", "__key__", "__url__"),
    )
)
HARMLESS_TURN_KEYS = frozenset((*_ANYWHERE, "tool_call_id", "turn", "turn_id", "message_id", "parent_id", "end_turn"))


def is_empty(value: object) -> bool:
    """Return whether a value counts as absent: in a table, every row has every column."""
    return value is None or value is False or value in ("", [], {}, "[]", "{}")


def refuse_row_keys(row: RowRef, raw: dict, *, pairs: bool = False) -> None:
    """Refuse a row with keys that must not be ignored.

    Args:
        row: the row, for messages.
        raw: the row as an object.
        pairs: whether it is read as a preference row.

    Raises:
        DataError: the row has such a key; the message says what to do.
    """
    for key, why in REFUSED_KEYS.items():
        if key in raw and not is_empty(raw[key]) and not (pairs and key in PAIR_KEYS):
            raise row.bad(key, f"{why}. Or empty it")
    for key in VERDICTS:
        if raw.get(key) is False:
            raise row.bad(key, "is false: it marks a bad answer, and every answer is trained as a good one")
    for key in (*WEIGHTS, "weight"):
        # "weight": 0 is a mask. Any other "weight" may be a column of a table with any meaning: an unknown key.
        if raw.get(key) not in (None, True, 1) and (key in WEIGHTS or raw[key] == 0):
            raise row.bad(
                key,
                f"is {short(repr(raw[key]))} on the whole row, but all rows count equally. Remove the row, or weight "
                "data sets with --data_mix",
            )


def refuse_turn_keys(row: RowRef, turn: dict, field: str) -> None:
    """Refuse a turn with keys that must not be ignored.

    Raises:
        DataError: the turn has such a key; the message says what to do.
    """
    for key, why in REFUSED_TURN_KEYS.items():
        if key in turn and not is_empty(turn[key]):
            raise row.bad(f"{field}.{key}", why)


def unknown(given: dict, known: Iterable[str], at: str = "") -> Iterator[tuple[str, str]]:
    """Yield (field, warning) for each unknown key that has a value.

    Args:
        given: a row or a turn.
        known: keys that are read, refused or harmless.
        at: prefix of the key's name in messages.
    """
    for key in given.keys() - known:
        if given[key] is False or not is_empty(given[key]):  # false may be a mask
            yield f"{at}{short(str(key))}", f"{UNREAD} the key is unknown. Drop it, or check whether it matters"
