"""Rows as other kits write them -> one form: turns of pieces, and the files their tags stand for.

Read are the forms of LLaVA, ShareGPT, OpenAI, LLaMA-Factory (sharegpt and alpaca) and ms-swift; data/README.md shows
each. What a turn may hold is for `vlft.data.records` to say, which gets this form only; files are
`vlft.data.named`'s. A new key that other kits have belongs into this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vlft.data.named import RowName, short
from vlft.data.overrides import of_part, of_row
from vlft.data.rows import kind_of
from vlft.data.sample import Overrides

Kind = Literal["image", "video"]

# Keys of other kits that hold training material; trained without it, a row would teach something else than it says.
REFUSED_KEYS = {
    "audio": "holds sound, which is not read: the answer would be learned without what it is about",
    "audios": "holds sound, which is not read: the answer would be learned without what it is about",
    "tools": "is not read: the model would learn to call tools that its prompt does not name. Write them into the "
    "system turn, as they will stand when served",
    "chosen": "is not read: the answer to learn stands outside the conversation. Write it as the last gpt turn",
}
# Trained without these, a row teaches what its conversation says.
IDLE_KEYS = ("rejected", "rejected_response", "rejected_messages", "rejected_images", "rejected_videos")
VERDICTS = ("label", "kto_tag")  # of preference data: false says that the answer is a bad one

# type of a part -> what it is, and the keys its value may have. OpenAI, Qwen's own, transformers' chat templates.
PARTS: dict[str, tuple[Literal["text", "image", "video"], tuple[str, ...]]] = {
    "text": ("text", ("text",)),
    "input_text": ("text", ("text",)),
    "output_text": ("text", ("text",)),
    "image": ("image", ("image", "image_url", "url", "path")),
    "image_url": ("image", ("image_url", "image", "url", "path")),
    "input_image": ("image", ("image_url",)),
    "video": ("video", ("video", "video_url", "url", "path")),
    "video_url": ("video", ("video_url", "video", "url", "path")),
}


@dataclass(frozen=True, kw_only=True)
class Said:
    """Text of a turn as the row has it, tags and all; `text` may still be anything."""

    text: object
    field: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture or video of a turn, at its place. With `value` None it is a tag: the next file of the row's column."""

    kind: Kind
    field: str
    value: object = None
    overrides: Overrides = Overrides()


@dataclass(frozen=True, kw_only=True)
class RawTurn:
    """A turn before it is checked; `role` may still be anything. `role_field`, `text_field` and `field` name it."""

    role: object
    pieces: tuple[Said | Shown, ...]
    field: str
    role_field: str
    text_field: str


@dataclass(frozen=True, kw_only=True)
class Column:
    """The files of a kind that a row lists, under the key it lists them by."""

    key: str
    value: object = None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A row in the one form.

    Attributes:
        key: where its conversation stands: `conversations`, `messages`, `output`, ...
        turns: in order. columns: kind -> files for its tags.
        overrides: kind -> budgets that the row sets for all its media of that kind.
        warnings: (field, remark) on keys that are not read.
    """

    key: str
    turns: list[RawTurn]
    columns: dict[Kind, Column]
    overrides: dict[Kind, Overrides]
    warnings: list[tuple[str, str]]


def one_form(row: RowName, raw: dict) -> Shape:
    """The row, whatever kit it was written for.

    Raises:
        DataError: it holds what is not read and must not be left out, says one thing twice and differently, or has
            another kind of value than belongs there.
    """
    warnings = _keys(row, raw)
    key, turns, unread = _conversation(row, raw)
    for other in unread:
        if raw.get(other):
            warnings.append((other, f'is not read: the row has "{key}"'))
            break  # one remark on another conversation is enough
    system = raw.get("system")
    if system is not None and system != "":
        turns = _with_system(row, system, turns)
    return Shape(
        key=key,
        turns=turns,
        columns={"image": _column(row, raw, "image"), "video": _column(row, raw, "video")},
        overrides=of_row(row, raw),
        warnings=warnings,
    )


def _keys(row: RowName, raw: dict) -> list[tuple[str, str]]:
    for key, why in REFUSED_KEYS.items():
        if raw.get(key) not in (None, "", [], {}, "[]", False):
            raise row.bad(key, f"{why}. Or empty it")
    for key in VERDICTS:
        if raw.get(key) is False:
            raise row.bad(key, "is false: by it the answer is a bad one, and every answer is trained as a good one")
    return [(key, "is not read: the answers of the conversation are trained") for key in IDLE_KEYS if raw.get(key)]


def _conversation(row: RowName, raw: dict) -> tuple[str, list[RawTurn], tuple[str, ...]]:
    """Where the conversation stands, its turns, and the keys of other conversations that are not read then."""
    alpaca, queries = ("instruction", "input", "output"), ("query", "response")
    pairs, turns = raw.get("conversation"), any(raw.get(key) is not None for key in ("conversations", "messages"))
    if not turns and isinstance(pairs, list):
        return "conversation", list(_pairs(row, pairs)), (*alpaca, *queries, "history")
    if not turns and raw.get("output") is not None and any(raw.get(key) for key in ("instruction", "input")):
        asked = [raw[key] for key in ("instruction", "input") if raw.get(key)]
        for key in ("instruction", "input"):
            if raw.get(key) and not isinstance(raw[key], str):
                raise row.bad(key, f"is {kind_of(raw[key])}, not a string")
        name = "instruction" if raw.get("instruction") else "input"
        said = [_plain("user", "\n".join(asked), name), _plain("assistant", raw["output"], "output")]
        return "output", [*_history(row, raw.get("history")), *said], queries
    if not turns and raw.get("response") is not None and raw.get("query") is not None:
        said = [_plain("user", raw["query"], "query"), _plain("assistant", raw["response"], "response")]
        return "response", [*_history(row, raw.get("history")), *said], alpaca
    key, found = _either(row, raw, "conversations", "messages", at="")
    if not isinstance(found, list):
        raise row.bad(key, f"is {kind_of(found)}, not a list of turns")
    if not found:
        raise row.bad(key, "is empty. A row needs a human turn and a gpt turn")
    return key, [_turn(row, turn, f"{key}[{i}]") for i, turn in enumerate(found)], (*alpaca, *queries, "history")


def _plain(role: str, text: object, field: str) -> RawTurn:
    said = Said(text=text, field=field)
    return RawTurn(role=role, pieces=(said,), field=field, role_field=field, text_field=field)


def _history(row: RowName, history: object) -> Iterator[RawTurn]:
    """`[[question, answer], ...]` of LLaMA-Factory and of ms-swift's old form."""
    if history is None or history == "":
        return
    if not isinstance(history, list):
        raise row.bad("history", f"is {kind_of(history)}, not a list of [question, answer] pairs")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.bad(f"history[{i}]", "is no [question, answer] pair")
        yield _plain("user", pair[0], f"history[{i}][0]")
        yield _plain("assistant", pair[1], f"history[{i}][1]")


def _pairs(row: RowName, pairs: list) -> Iterator[RawTurn]:
    """`[{"human": ..., "assistant": ...}, ...]`, a form of ms-swift."""
    for i, pair in enumerate(pairs):
        field = f"conversation[{i}]"
        if not isinstance(pair, dict) or pair.get("human") is None or pair.get("assistant") is None:
            raise row.bad(field, 'is no {"human": ..., "assistant": ...} pair')
        yield _plain("user", pair["human"], f"{field}.human")
        yield _plain("assistant", pair["assistant"], f"{field}.assistant")


def _with_system(row: RowName, system: object, turns: list[RawTurn]) -> list[RawTurn]:
    """The turns after the one that the key `system` holds; the same text in both places counts once."""
    first = turns[0] if turns else None
    if first is None or first.role != "system":
        return [_plain("system", system, "system"), *turns]
    said = first.pieces[0] if len(first.pieces) == 1 else None
    if isinstance(said, Said) and said.text == system:
        return turns
    raise row.bad("system", f"differs from the system turn {first.field}. Keep one of them")


def _column(row: RowName, raw: dict, kind: Kind) -> Column:
    """Files under `image` or `images` (`video` or `videos`), whichever is there."""
    given = [key for key in (kind, f"{kind}s") if raw.get(key) not in (None, "", [])]
    if len(given) == 2 and _listed(raw[given[0]]) != _listed(raw[given[1]]):
        raise row.bad(given[1], f'both "{given[0]}" and "{given[1]}", and they differ. Keep one of them')
    return Column(key=given[0], value=raw[given[0]]) if given else Column(key=kind)


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _turn(row: RowName, turn: object, field: str) -> RawTurn:
    if not isinstance(turn, dict):
        raise row.bad(field, f'is {kind_of(turn)}, not an object. Write {{"from": "human", "value": "..."}}')
    role_key, role = _either(row, turn, "from", "role", at=field)
    if turn.get("tool_calls"):
        raise row.bad(f"{field}.tool_calls", "is not read, and the answer is not whole without it. Write it as text")
    if turn.get("loss") not in (None, True, 1) or turn.get("weight") not in (None, True, 1):
        key = "loss" if turn.get("loss") not in (None, True, 1) else "weight"
        raise row.bad(
            f"{field}.{key}", f"is {turn[key]!r}: every gpt turn is trained, all with one weight. Cut the row before it"
        )
    text_key, text = _either(row, turn, "value", "content", at=field)
    text_field = f"{field}.{text_key}"
    if isinstance(text, list):
        pieces = tuple(_part(row, part, f"{text_field}[{i}]") for i, part in enumerate(text))
        pieces = pieces or (Said(text="", field=text_field),)
    else:
        pieces = (Said(text=text, field=text_field),)
    return RawTurn(role=role, pieces=pieces, field=field, role_field=f"{field}.{role_key}", text_field=text_field)


def _part(row: RowName, part: object, field: str) -> Said | Shown:
    """A part of a turn's content; an `image` or `video` that names no file stands for the next one of the row's."""
    if not isinstance(part, dict):
        raise row.bad(field, f'is {kind_of(part)}, not a part. Write {{"type": "text", "text": "..."}}')
    given = part.get("type")
    if given is None:  # Qwen's own tools take {"image": ...} and {"text": ...} too
        given = next((key for key in ("text", "image", "image_url", "video", "video_url") if part.get(key)), None)
    if not isinstance(given, str) or given not in PARTS:
        shown = "without a type" if given is None else f"of type {short(repr(given))}"
        raise row.bad(field, f"a part {shown}; read are parts of type {', '.join(PARTS)}")
    kind, keys = PARTS[given]
    if kind == "text":
        if part.get("text") is None:
            raise row.bad(field, 'a part of type "text" without "text". Fill it in')
        return Said(text=part["text"], field=f"{field}.text")
    values = [part[key] for key in keys if part.get(key) is not None]
    if any(value != values[0] for value in values):
        raise row.bad(
            field, f"names two files: {short(repr(values[0]))} and {short(repr(values[1]))}. Keep one of them"
        )
    value = _address(values[0]) if values else None
    return Shown(kind=kind, field=field, value=value, overrides=of_part(row, part, field, kind))


def _address(value: object) -> object:
    """`{"url": ...}` of OpenAI as the address; `file:` addresses, which Qwen's own examples have, as paths."""
    if isinstance(value, dict) and value.get("url") is not None:
        value = value["url"]
    if isinstance(value, list):
        return [_address(item) for item in value]
    return value[7:] if isinstance(value, str) and value.startswith("file:///") else value


def _either(row: RowName, values: dict, one: str, other: str, *, at: str) -> tuple[str, object]:
    """The value under whichever of the two keys is there, with that key."""
    present = [key for key in (one, other) if values.get(key) is not None]
    if len(present) == 2 and values[one] != values[other]:
        raise row.bad(at or one, f'both "{one}" and "{other}", and they differ. Keep one of them')
    if present:
        return present[0], values[present[0]]
    null = [key for key in (one, other) if key in values]
    if null:
        raise row.bad(f"{at}.{null[0]}".lstrip("."), "is null. Fill it in")
    keys = short(", ".join(map(str, values))) or "none"
    raise row.bad(at or one, f'no "{one}" (nor "{other}"). Add it; the keys it has: {keys}')
