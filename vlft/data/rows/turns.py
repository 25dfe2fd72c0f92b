"""Read one turn of any supported kit: its role, its text and its media, in one form. Opens no file.

`vlft.data.rows.forms` finds the conversation, and `vlft.data.rows.records` checks what a turn may hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlft.data.rows.keys import (
    HARMLESS_TURN_KEYS,
    MEDIA_KEYS,
    OWN_MEDIA_KEYS,
    REFUSED_TURN_KEYS,
    Kind,
    is_empty,
    refuse_turn_keys,
    unknown,
)
from vlft.data.rows.masks import KEYS as MASK_KEYS
from vlft.data.rows.masks import Mask, mask_of
from vlft.data.rows.media_refs import ADDRESS_KEYS
from vlft.data.rows.overrides import of_part
from vlft.data.rows.source import kind_of
from vlft.data.sample import Overrides, Role
from vlft.errors import RowRef
from vlft.text import short

# Names of roles in lower case -> role.
ROLES: dict[str, Role] = {
    **dict.fromkeys(("human", "user", "question", "prompter", "customer"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "ai", "chatbot", "answer"), "assistant"),
    **dict.fromkeys(("gpt4", "gpt-4", "gpt-4v", "gpt4v", "gpt-4o", "gpt4o", "gpt-3.5", "gpt3.5"), "assistant"),
    **dict.fromkeys(("claude", "gemini", "bard", "bing"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),  # "developer" is OpenAI's newer word
}
TOOL_ROLES = (
    *("tool", "tools", "function", "observation", "ipython", "function_call", "function_response", "tool_call"),
    *("tool_response", "tool_result", "environment"),
)

# Type of a part -> what it is, and the keys that may hold its value: OpenAI, Qwen, chat templates of transformers.
PARTS: dict[str, tuple[Literal["text", "image", "video"], tuple[str, ...]]] = {
    "text": ("text", ("text", "value")),
    "input_text": ("text", ("text",)),
    "output_text": ("text", ("text",)),
    "image": ("image", ("image", "image_url", "url", "path", "base64", "source", "value")),
    "image_url": ("image", ("image_url", "image", "url", "path", "value")),
    "input_image": ("image", ("image_url",)),
    "video": ("video", ("video", "video_url", "url", "path", "value")),
    "video_url": ("video", ("video_url", "video", "url", "path", "value")),
}
_KNOWN_TURN_KEYS = frozenset(
    (
        *("from", "role", "value", "content"),
        *MASK_KEYS,
        *REFUSED_TURN_KEYS,
        *HARMLESS_TURN_KEYS,
        *(key for keys in MEDIA_KEYS.values() for key in keys),
    )
)
# Keys of a question and its answer in one object: ms-swift, the_cauldron, Phi-3's cookbook.
PAIRS = (("human", "assistant"), ("user", "assistant"), ("human", "gpt"), ("question", "answer"))
_KNOWN_PAIR_KEYS = _KNOWN_TURN_KEYS | {"human", "user", "assistant", "gpt", "question", "answer"}


@dataclass(frozen=True, kw_only=True)
class Said:
    """Text of a turn as the row has it, with its tags.

    Attributes:
        text: the text; not checked, may have any type.
        field: the text, for messages.
    """

    text: object
    field: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture or video at its place in a turn.

    Attributes:
        kind: picture or video.
        field: the part or the turn, for messages.
        value: the file, as the row names it. None: it is a tag, and stands for a file of the column.
        place: index of that file in the column, from 0. None: the next file.
        overrides: budgets that the part sets.
    """

    kind: Kind
    field: str
    value: object = None
    place: int | None = None
    overrides: Overrides = Overrides()


@dataclass(frozen=True, kw_only=True)
class Column:
    """The files of a kind that a row or a turn lists.

    Attributes:
        key: the key that lists them.
        value: the value of the key.
        tags: words that stand for the files in the text, if the row names them (MiniCPM: {"<image_00>": path}).
    """

    key: str
    value: object = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RawTurn:
    """A turn before it is checked.

    Attributes:
        role: its role; not checked, may have any type.
        pieces: its texts and media, in order.
        field: the turn, for messages.
        role_field: its role, for messages.
        text_field: its text, for messages.
        mask: its mask keys.
        columns: (kind, files) that the turn itself lists.
        warnings: (field, remark) for its keys.
    """

    role: object
    pieces: tuple[Said | Shown, ...]
    field: str
    role_field: str
    text_field: str
    mask: Mask = Mask()
    columns: tuple[tuple[Kind, Column], ...] = ()
    warnings: tuple[tuple[str, str], ...] = ()


def role_of(row: RowRef, turn: RawTurn) -> Role:
    """Return the role of a turn.

    Raises:
        DataError: the role is a tool or unknown.
    """
    said = turn.role.strip().lower() if isinstance(turn.role, str) else ""
    if said in TOOL_ROLES:
        raise row.bad(
            turn.role_field,
            f"{turn.role!r}: tool turns are not read, because prompts do not list tools. Write the tool's result "
            "into a human turn, or drop the row",
        )
    if said not in ROLES:
        raise row.bad(
            turn.role_field,
            f"unknown role {short(repr(turn.role))}. Use human, gpt or system; their other names: data/README.md",
        )
    return ROLES[said]


def plain(role: str, text: object, field: str) -> RawTurn:
    """Return a turn that consists of one text of the row."""
    said = Said(text=text, field=field)
    return RawTurn(role=role, pieces=(said,), field=field, role_field=field, text_field=field)


def system_turn(row: RowRef, content: object, field: str) -> RawTurn:
    """Return the turn of a row's system key: a text, or a list of parts as Anthropic writes it.

    Raises:
        DataError: a part is malformed.
    """
    pieces = _pieces(row, content, field)
    return RawTurn(role="system", pieces=pieces, field=field, role_field=field, text_field=field)


def turns_of(row: RowRef, turn: object, field: str) -> tuple[RawTurn, ...]:
    """Read an entry of a conversation: one turn, or a question and its answer.

    Raises:
        DataError: the entry is neither, or has keys that must not be ignored.
    """
    if not isinstance(turn, dict):
        raise row.bad(field, f'is {kind_of(turn)}, not an object. Write {{"from": "human", "value": "..."}}')
    if "from" not in turn and "role" not in turn:
        found = [(asked, answered) for asked, answered in PAIRS if asked in turn and answered in turn]
        if found:  # the first pair with the most values: in a table, every row has every key
            asked, answered = max(found, key=lambda pair: sum(turn[key] is not None for key in pair))
            return _pair(row, turn, field, asked, answered)
    return (_turn(row, turn, field),)


def _pair(row: RowRef, turn: dict, field: str, asked: str, answered: str) -> tuple[RawTurn, RawTurn]:
    refuse_turn_keys(row, turn, field)
    question = RawTurn(
        role="user",
        pieces=_pieces(row, turn[asked], f"{field}.{asked}"),
        field=f"{field}.{asked}",
        role_field=field,
        text_field=f"{field}.{asked}",
        columns=_columns(row, turn, field),
        warnings=tuple(unknown(turn, _KNOWN_PAIR_KEYS, f"{field}.")),
    )
    answer = RawTurn(
        role="assistant",
        pieces=_pieces(row, turn[answered], f"{field}.{answered}"),
        field=f"{field}.{answered}",
        role_field=field,
        text_field=f"{field}.{answered}",
        mask=mask_of(row, turn, field),
    )
    return question, answer


def _turn(row: RowRef, turn: dict, field: str) -> RawTurn:
    speakers = {ROLES.get(str(turn.get(key)).strip().lower()) for key in ("from", "role")}
    if len(speakers) == 1 and None not in speakers:  # {"from": "human", "role": "user"} do not differ
        role_key, role = "from", turn["from"]
    else:
        role_key, role = either(row, turn, "from", "role", at=field)
    refuse_turn_keys(row, turn, field)
    text_key, text = either(row, turn, "value", "content", at=field)
    return RawTurn(
        role=role,
        pieces=_pieces(row, text, f"{field}.{text_key}"),
        field=field,
        role_field=f"{field}.{role_key}",
        text_field=f"{field}.{text_key}",
        mask=mask_of(row, turn, field),
        columns=_columns(row, turn, field),
        warnings=tuple(unknown(turn, _KNOWN_TURN_KEYS, f"{field}.")),
    )


def _pieces(row: RowRef, text: object, field: str) -> tuple[Said | Shown, ...]:
    if not isinstance(text, list):
        return (Said(text=text, field=field),)
    pieces = tuple(_part(row, part, f"{field}[{i}]") for i, part in enumerate(text))
    return pieces or (Said(text="", field=field),)


def _part(row: RowRef, part: object, field: str) -> Said | Shown:
    """Read a part of a turn's content. An `image` or `video` without a file stands for the next file of the row."""
    if not isinstance(part, dict):
        raise row.bad(field, f'is {kind_of(part)}, not a part. Write {{"type": "text", "text": "..."}}')
    given = part.get("type")
    if given is None:  # Qwen's own tools also accept {"image": ...} and {"text": ...}
        given = next((key for key in ("text", "image", "image_url", "video", "video_url") if part.get(key)), None)
    if not isinstance(given, str) or given not in PARTS:
        shown = "without a type" if given is None else f"of type {short(repr(given))}"
        raise row.bad(field, f"a part {shown}; supported types are {', '.join(PARTS)}")
    kind, keys = PARTS[given]
    for key in MASK_KEYS:
        if part.get(key) not in (None, True, 1):
            raise row.bad(
                f"{field}.{key}", f"is {short(repr(part[key]))} on a part. Write it on the turn, or as train_detail"
            )
    values = [part[key] for key in keys if part.get(key) is not None]
    if kind == "text":
        if not values:
            raise row.bad(field, 'a part of type "text" without "text". Fill it in')
        key = next(key for key in keys if part.get(key) is not None)
        return Said(text=part[key], field=f"{field}.{key}")
    if any(value != values[0] for value in values):
        raise row.bad(
            field, f"names two files: {short(repr(values[0]))} and {short(repr(values[1]))}. Keep one of them"
        )
    value = values[0] if values else None
    if part.get("base64") is not None:
        value = {"base64": value}
    # In llava-instruct-mix-vsft and others, parts have the index of the row's picture.
    index = part.get("index")
    place = index if value is None and isinstance(index, int) and not isinstance(index, bool) else None
    return Shown(kind=kind, field=field, value=value, place=place, overrides=of_part(row, part, field, kind))


def _columns(row: RowRef, turn: dict, field: str) -> tuple[tuple[Kind, Column], ...]:
    found: list[tuple[Kind, Column]] = []
    for kind, names in MEDIA_KEYS.items():
        if turn.keys().isdisjoint(names):  # fast path, true for nearly all turns
            continue
        column, _ = column_of(row, turn, kind, at=f"{field}.")
        if column.value is not None:
            found.append((kind, column))
    return tuple(found)


def column_of(row: RowRef, raw: dict, kind: Kind, *, at: str = "") -> tuple[Column, list[tuple[str, str]]]:
    """Return the files of a kind that a row or turn lists, and warnings about other keys that also list some.

    Args:
        row: the row, for messages.
        raw: the row or turn as an object.
        kind: kind of media.
        at: prefix of the key's name in messages.

    Raises:
        DataError: both keys of our own format are present and differ.
    """
    own = MEDIA_KEYS[kind][:OWN_MEDIA_KEYS]
    given = [key for key in MEDIA_KEYS[kind] if not is_empty(raw.get(key)) or raw.get(key) is False]
    if given[:OWN_MEDIA_KEYS] == list(own) and _listed(raw[own[0]]) != _listed(raw[own[1]]):
        raise row.bad(f"{at}{own[1]}", f'both "{own[0]}" and "{own[1]}", and they differ. Keep one of them')
    if not given:
        return Column(key=f"{at}{own[0]}"), []
    key, value = given[0], raw[given[0]]
    unread = [other for other in given[1:] if other not in own and key not in own]
    warnings = [(f"{at}{other}", f'is not read: the row has "{key}"') for other in unread if raw[other] != value]
    tags: tuple[str, ...] = ()
    if isinstance(value, dict) and not value.keys() & set(ADDRESS_KEYS) and all(_is_tag(name) for name in value):
        tags, value = tuple(value), list(value.values())
    return Column(key=f"{at}{key}", value=value, tags=tags), warnings


def _is_tag(name: object) -> bool:
    return isinstance(name, str) and len(name) > 2 and name[0] in "<[" and name[-1] in ">]"


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


def either(row: RowRef, values: dict, one: str, other: str, *, at: str) -> tuple[str, object]:
    """Return the key, of two, that is present, and its value.

    Raises:
        DataError: both are present and differ, or neither is present.
    """
    present = [key for key in (one, other) if values.get(key) is not None]
    if len(present) == 2 and values[one] != values[other]:
        raise row.bad(at or one, f'both "{one}" and "{other}", and they differ. Keep one of them')
    if present:
        return present[0], values[present[0]]
    null = [key for key in (one, other) if key in values]
    if null:
        raise row.bad(f"{at}.{null[0]}".lstrip("."), "is null. Fill it in")
    keys = short(", ".join(map(str, values))) or "none"
    raise row.bad(at or one, f'no "{one}" (nor "{other}"). Add it; the keys present are: {keys}')
