"""Rows -> `Sample`: what a row must hold, whichever kit it was written for (`vlft.data.shapes` knows their forms).

Opens nothing; whether a picture exists is for `vlft.data.media` to say.

Tags become parts here, so that later stages cannot count them differently. What is refused and what is taken is written
for users in data/README.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from vlft.data.access import Access
from vlft.data.named import Places, RowName, clip, images, picture, refuse_many_files, short, videos
from vlft.data.objects import objects_of
from vlft.data.overrides import within
from vlft.data.rows import BrokenLine, home_of, kind_of
from vlft.data.sample import Image, Part, Role, Sample, Text, Turn, Video
from vlft.data.shapes import Kind, RawTurn, Said, Shape, Shown, one_form
from vlft.families import Family

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "chatgpt": "assistant",  # ShareGPT's own
    "developer": "system",  # OpenAI's newer word
}
# Characters, each counted once for every answer: an answer is rendered with all that stands before it. A context of
# 128k tokens with 100 answers makes 50 million.
RENDERED_PER_ROW = 400_000_000
TURN_CHARACTERS = 40  # what a chat template adds, about

_TAG = re.compile(r"(?:\r?\n)*<(image|video)>(?:\r?\n)*")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A turn, checked, before its media are put in. `field` names the turn, `text_field` its text."""

    role: Role
    pieces: tuple[Text | Shown, ...]
    field: str
    text_field: str

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces if isinstance(piece, Text))

    @property
    def blank(self) -> bool:
        return not self.text.strip() and not any(isinstance(piece, Shown) for piece in self.pieces)


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
        folder=home_of(file) if image_folder is None else image_folder,
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
    shape = one_form(row, raw)
    entries = [_entry(row, turn, family) for turn in shape.turns]
    _refuse_much_text(row, shape.key, entries)
    warnings = _check_order(row, shape.key, entries) + shape.warnings
    pictures, clips = _media(row, shape, entries, places)
    parts: dict[Kind, Iterator] = {"image": iter(pictures), "video": iter(clips)}
    turns = tuple(Turn(role=entry.role, parts=_parts(entry, parts), field=entry.field) for entry in entries)
    warnings += _idle(shape, [part for turn in turns for part in turn.parts if not isinstance(part, Text)])
    objects = objects_of(row, raw, [entry.text for entry in entries], len(pictures), family)
    return Sample(file=row.file, index=row.index, id=row.id, turns=turns, warnings=tuple(warnings), objects=objects)


def _media(row: RowName, shape: Shape, entries: list[_Entry], places: Places) -> tuple[list[Image], list[Video]]:
    """The row's stills and videos, each in the order in which they are shown, be it by a tag or by a part."""
    found: dict[Kind, list] = {"image": [], "video": []}
    for kind, media in found.items():
        column, overrides = shape.columns[kind], shape.overrides[kind]
        shown = [
            piece for entry in entries for piece in entry.pieces if isinstance(piece, Shown) and piece.kind == kind
        ]
        tags = [piece.field for piece in shown if piece.value is None]
        refuse_many_files(row, column.key, column.value, others=len(shown) - len(tags))
        listed: Sequence[Image | Video]
        if kind == "image":
            listed = images(row, column.value, places, key=column.key, overrides=overrides)
        else:
            listed = videos(row, column.value, places, tags=len(tags), key=column.key, overrides=overrides)
        _match(row, kind, column.key, tags, [medium.field for medium in listed])
        following: Iterator[Image | Video] = iter(listed)
        make: Callable[..., Image | Video] = picture if kind == "image" else clip
        for piece in shown:
            own = within(overrides, piece.overrides)
            if piece.value is None:
                medium = next(following)
                media.append(replace(medium, overrides=within(medium.overrides, piece.overrides)))
            else:
                media.append(make(row, piece.value, piece.field, places, own))
    return found["image"], found["video"]


def _idle(shape: Shape, media: list[Image | Video]) -> list[tuple[str, str]]:
    """Warnings on budgets of the row that act on none of its media, as fps does on a list of frames."""
    said = {f.name for one in shape.overrides.values() for f in fields(one) if getattr(one, f.name) is not None}
    return [
        (name, "acts on no picture or video of the row")
        for name in sorted(said)
        if all(getattr(medium.overrides, name) is None for medium in media)
    ]


def _entry(row: RowName, turn: RawTurn, family: Family) -> _Entry:
    if not isinstance(turn.role, str) or turn.role not in ROLES:
        known = ", ".join(ROLES)
        raise row.bad(turn.role_field, f"unknown role {short(repr(turn.role))}. Use one of {known}")
    role = ROLES[turn.role]
    pieces: list[Text | Shown] = []
    for piece in turn.pieces:
        pieces += _split(_text(row, piece, family), turn.field) if isinstance(piece, Said) else [piece]
    shown = next((piece for piece in pieces if isinstance(piece, Shown)), None)
    if shown and role != "user":
        what = f"a <{shown.kind}> tag" if shown.value is None else "a picture or video"
        where = turn.text_field if shown.field == turn.field else shown.field
        a = "an" if turn.role[0] in "aeiou" else "a"
        raise row.bad(where, f"{what} in {a} {turn.role} turn. Move it to the human turn that shows it")
    entry = _Entry(role=role, pieces=tuple(pieces), field=turn.field, text_field=turn.text_field)
    if role == "assistant" and entry.blank:
        empty = "" in (entry.text, *(piece.text for piece in turn.pieces if isinstance(piece, Said)))
        raise row.bad(turn.text_field, f"the answer is {'empty' if empty else 'blank'}. Write one, or drop the turn")
    return entry


def _text(row: RowName, said: Said, family: Family) -> str:
    text = said.text
    if text is None:
        raise row.bad(said.field, "is null. Fill it in")
    if not isinstance(text, str):
        raise row.bad(said.field, f"is {kind_of(text)}, not a string")
    forged = [token for token in family.control_tokens if token in text]
    if forged:
        raise row.bad(
            said.field,
            f"holds {', '.join(forged)}, which {family.label} reads as the end of a turn or as a picture. "
            "Take it out; pictures and videos are written <image> and <video>",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"character {error.start} is half a character ({text[error.start]!r}). Write it whole or take it out"
        raise row.bad(said.field, reason) from error
    return text


def _split(text: str, field: str) -> list[Text | Shown]:
    """Text with its tags, and the newlines next to them, made into pieces of their own."""
    pieces: list[Text | Shown] = []
    end = 0
    for tag in _TAG.finditer(text):
        if tag.start() > end:
            pieces.append(Text(text=text[end : tag.start()]))
        pieces.append(Shown(kind="image" if tag[1] == "image" else "video", field=field))
        end = tag.end()
    if text[end:]:
        pieces.append(Text(text=text[end:]))
    return pieces


def _check_order(row: RowName, key: str, entries: list[_Entry]) -> list[tuple[str, str]]:
    """Warnings on an unusual order of turns; refuses an answer to nothing and a row without answers."""
    spoken = [entry for entry in entries if entry.role != "system"]
    if spoken and spoken[0].role == "assistant":
        raise row.bad(spoken[0].field, "a gpt turn first, with nothing to answer. Put a human turn before it")
    if all(entry.role != "assistant" for entry in entries):
        raise row.bad(key, f"no gpt turn in {_count(len(entries), 'turn')}, so nothing to learn. Add the answer")
    warnings = []
    for before, entry in zip([None, *entries[:-1]], entries, strict=True):
        if entry.role == "system" and before is not None:
            warnings.append((entry.field, "a system turn that is not the first turn; it is rendered where it stands"))
        elif entry.role == "user" and before is not None and before.role == "user":
            warnings.append((entry.field, "two human turns in a row; both are rendered"))
        elif entry.role == "assistant" and before is not None and before.role == "assistant":
            warnings.append((entry.field, "two gpt turns in a row; both are trained"))
        if entry.role == "user" and entry.blank:
            warnings.append((entry.text_field, "an empty human turn"))
    if entries[-1].role == "user":
        warnings.append((entries[-1].field, "a human turn last, with no answer; it is rendered, and trains nothing"))
    return warnings


def _match(row: RowName, kind: Kind, key: str, tags: list[str], files: list[str]) -> None:
    if len(tags) == len(files):
        return
    have = f'{_count(len(tags), f"<{kind}> tag")}, {_count(len(files), "path")} in "{key}"'
    if len(tags) < len(files):
        raise row.bad(files[len(tags)], f"{have}. Add a tag to the human turn it belongs to, or drop a path")
    raise row.bad(tags[len(files)], f"{have}. Add a path or drop a tag")


def _refuse_much_text(row: RowName, key: str, entries: list[_Entry]) -> None:
    characters = sum(len(entry.text) + TURN_CHARACTERS for entry in entries)
    answers = sum(entry.role == "assistant" for entry in entries)
    if characters * answers > RENDERED_PER_ROW:
        raise row.bad(
            key,
            f"{len(entries):,} turns of {characters:,} characters: with {answers:,} answers, each rendered with all "
            f"before it, {characters * answers:,} at most, and {RENDERED_PER_ROW:,} are allowed. Split the row",
        )


def _parts(entry: _Entry, media: dict[Kind, Iterator]) -> tuple[Part, ...]:
    """The pieces of a turn, those that are shown replaced by the row's media in their order."""
    return tuple(next(media[piece.kind]) if isinstance(piece, Shown) else piece for piece in entry.pieces)


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
