"""Raw rows -> `Sample`. Opens nothing; whether a picture exists is for `vlft.data.media` to say.

Tags become parts here, so that later stages cannot count them differently. What is refused and what is taken is written
for users in data/README.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vlft.data.access import Access
from vlft.data.named import Places, RowName, images, refuse_many_files, short, videos
from vlft.data.objects import objects_of
from vlft.data.rows import BrokenLine, kind_of
from vlft.data.sample import Part, Role, Sample, Text, Turn
from vlft.families import Family

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# Keys of other kits that hold training material; overlooked, a row would train on less than its author thinks.
OTHER_KITS = {"images": "image", "videos": "video", "audios": None, "audio": None, "system": None, "tools": None}

# Characters, each counted once for every answer: an answer is rendered with all that stands before it. A context of
# 128k tokens with 100 answers makes 50 million.
RENDERED_PER_ROW = 400_000_000
TURN_CHARACTERS = 40  # what a chat template adds, about

_TAG = re.compile(r"(?:\r?\n)*<(image|video)>(?:\r?\n)*")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A turn before its tags are replaced. `field` names the turn, `text_field` its text."""

    role: Role
    text: str
    field: str
    text_field: str


def parse_record(
    raw: object, *, file: str, index: int, image_folder: str | None, family: Family, access: Access | None = None
) -> Sample:
    """One row, checked; media are not opened.

    `video` may be a path, a list of videos (an item that is itself a list holds the frames of one video), or, with
    exactly one `<video>` tag in the row, a list of frames. The last two are told apart by file ending: every path ends
    as pictures do (`FRAME_ENDINGS`).

    Args:
        raw: the row as `rows.row_of` gives it.
        file, index: where it stands.
        image_folder: where relative media paths start; None: the folder of `file`. Never the working directory.
        family: whose control tokens are refused.
        access: what the row may name; None: files in the folder, and absolute paths.

    Raises:
        DataError: the row cannot be trained; `.row.field` says which part of it.
    """
    row = RowName(file=file, index=index, id=_id(raw))
    places = Places(
        access=access or Access(),
        folder=os.path.dirname(file) if image_folder is None else image_folder,
        named="the folder of the data file" if image_folder is None else f"--image_folder {image_folder}",
    )
    try:
        return _parsed(row, raw, family, places)
    except RecursionError as error:
        raise row.bad("row", "lists in lists, deeper than can be read. Write it flat") from error


def _id(raw: object) -> str | None:
    name = raw.get("id") if isinstance(raw, dict) else None
    if name is None:
        return None
    try:
        return short(str(name))
    except (RecursionError, ValueError):  # nested too deep; more digits than Python writes
        return kind_of(name)


def _parsed(row: RowName, raw: object, family: Family, places: Places) -> Sample:
    if isinstance(raw, BrokenLine):
        raise row.bad("row", raw.reason)
    if not isinstance(raw, dict):
        raise row.bad("row", f'is {kind_of(raw)}, not an object. Write {{"conversations": [...]}}')
    entries = _entries(row, raw, family)
    _refuse_much_text(row, entries)
    warnings = _check_order(row, entries)
    tags = {kind: _tags(entries, kind) for kind in ("image", "video")}
    refuse_many_files(row, raw)
    pictures = images(row, raw.get("image"), places)
    clips = videos(row, raw.get("video"), places, tags=len(tags["video"]))
    _match(row, raw, "image", tags["image"], [picture.field for picture in pictures])
    _match(row, raw, "video", tags["video"], [clip.field for clip in clips])
    objects = objects_of(row, raw, [entry.text for entry in entries], len(pictures), family)
    media = {"image": iter(pictures), "video": iter(clips)}
    turns = tuple(Turn(role=entry.role, parts=_parts(entry, media), field=entry.field) for entry in entries)
    for key, ours in OTHER_KITS.items():
        if raw.get(key):
            warnings.append((key, "is not read" + (f'; vlft reads "{ours}"' if ours else "")))
    return Sample(file=row.file, index=row.index, id=row.id, turns=turns, warnings=tuple(warnings), objects=objects)


def _entries(row: RowName, raw: dict, family: Family) -> list[_Entry]:
    key, turns = _either(row, raw, "conversations", "messages", at="")
    if not isinstance(turns, list):
        raise row.bad(key, f"is {kind_of(turns)}, not a list of turns")
    if not turns:
        raise row.bad(key, "is empty. A row needs a human turn and a gpt turn")
    return [_entry(row, turn, f"{key}[{i}]", family) for i, turn in enumerate(turns)]


def _entry(row: RowName, turn: object, field: str, family: Family) -> _Entry:
    if not isinstance(turn, dict):
        raise row.bad(field, f'is {kind_of(turn)}, not an object. Write {{"from": "human", "value": "..."}}')
    role_key, role = _either(row, turn, "from", "role", at=field)
    if not isinstance(role, str) or role not in ROLES:
        raise row.bad(f"{field}.{role_key}", f"unknown role {short(repr(role))}. Use one of {', '.join(ROLES)}")
    text_key, text = _either(row, turn, "value", "content", at=field)
    text_field = f"{field}.{text_key}"
    if not isinstance(text, str):
        parts = '. Lists of parts are not read: write one string with <image> tags, and the paths under "image"'
        raise row.bad(text_field, f"is {kind_of(text)}, not a string{parts if isinstance(text, list) else ''}")
    forged = [token for token in family.control_tokens if token in text]
    if forged:
        raise row.bad(
            text_field,
            f"holds {', '.join(forged)}, which {family.label} reads as the end of a turn or as a picture. "
            "Take it out; pictures and videos are written <image> and <video>",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"character {error.start} is half a character ({text[error.start]!r}). Write it whole or take it out"
        raise row.bad(text_field, reason) from error
    entry = _Entry(role=ROLES[role], text=text, field=field, text_field=text_field)
    tag = _TAG.search(text)
    if tag and entry.role != "user":
        raise row.bad(text_field, f"a <{tag[1]}> tag in a {role} turn. Move it to the human turn that shows it")
    if entry.role == "assistant" and not text.strip():
        raise row.bad(text_field, f"the answer is {'blank' if text else 'empty'}. Write one, or drop the turn")
    return entry


def _check_order(row: RowName, entries: list[_Entry]) -> list[tuple[str, str]]:
    """Warnings on an unusual order of turns; refuses an answer to nothing and a row without answers."""
    spoken = [entry for entry in entries if entry.role != "system"]
    if spoken and spoken[0].role == "assistant":
        raise row.bad(spoken[0].field, "a gpt turn first, with nothing to answer. Put a human turn before it")
    if all(entry.role != "assistant" for entry in entries):
        key = entries[0].field.split("[")[0]
        raise row.bad(key, f"no gpt turn in {_count(len(entries), 'turn')}, so nothing to learn. Add the answer")
    warnings = []
    for before, entry in zip([None, *entries[:-1]], entries, strict=True):
        if entry.role == "system" and before is not None:
            warnings.append((entry.field, "a system turn that is not the first turn; it is rendered where it stands"))
        elif entry.role == "user" and before is not None and before.role == "user":
            warnings.append((entry.field, "two human turns in a row; both are rendered"))
        elif entry.role == "assistant" and before is not None and before.role == "assistant":
            warnings.append((entry.field, "two gpt turns in a row; both are trained"))
        if entry.role == "user" and not entry.text.strip():
            warnings.append((entry.text_field, "an empty human turn"))
    if entries[-1].role == "user":
        warnings.append((entries[-1].field, "a human turn last, with no answer; it is rendered, and trains nothing"))
    return warnings


def _tags(entries: list[_Entry], kind: str) -> list[str]:
    """The field of the turn of each tag of this kind, left to right."""
    return [entry.field for entry in entries for tag in _TAG.finditer(entry.text) if tag[1] == kind]


def _match(row: RowName, raw: dict, kind: Literal["image", "video"], tags: list[str], files: list[str]) -> None:
    if len(tags) == len(files):
        return
    have = f"{_count(len(tags), f'<{kind}> tag')}, {_count(len(files), 'path')} in {kind!r}".replace("'", '"')
    if len(tags) < len(files):
        raise row.bad(files[len(tags)], f"{have}. Add a tag to the human turn it belongs to, or drop a path")
    other = f' ("{kind}s" is not read: name it "{kind}")' if raw.get(f"{kind}s") else ""
    raise row.bad(tags[len(files)], f"{have}. Add a path or drop a tag{other}")


def _refuse_much_text(row: RowName, entries: list[_Entry]) -> None:
    characters = sum(len(entry.text) + TURN_CHARACTERS for entry in entries)
    answers = sum(entry.role == "assistant" for entry in entries)
    if characters * answers > RENDERED_PER_ROW:
        raise row.bad(
            entries[0].field.split("[")[0],
            f"{len(entries):,} turns of {characters:,} characters: with {answers:,} answers, each rendered with all "
            f"before it, {characters * answers:,} at most, and {RENDERED_PER_ROW:,} are allowed. Split the row",
        )


def _parts(entry: _Entry, media: dict[str, Iterator]) -> tuple[Part, ...]:
    """The text of a turn with its tags, and the newlines next to them, replaced by media in the order of the row."""
    parts: list[Part] = []
    end = 0
    for tag in _TAG.finditer(entry.text):
        if tag.start() > end:
            parts.append(Text(text=entry.text[end : tag.start()]))
        parts.append(next(media[tag[1]]))
        end = tag.end()
    if entry.text[end:]:
        parts.append(Text(text=entry.text[end:]))
    return tuple(parts)


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
    keys = short(", ".join(values)) or "none"
    raise row.bad(at or one, f'no "{one}" (nor "{other}"). Add it; the keys it has: {keys}')


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
