"""Parse rows into `Sample`, and check what a row must hold.

`vlft.data.rows.normalise` converts the rows of all kits to one form first. Opens no file; `vlft.data.media.read`
checks that the pictures exist.

Tags become parts here, so that later stages cannot count them differently. data/README.md lists for users what is
accepted and what is refused.
"""

from __future__ import annotations

from dataclasses import fields, replace

from vlft.config.row_flags import RowFlags
from vlft.data.rows.access import Access
from vlft.data.rows.keys import is_empty
from vlft.data.rows.masks import masked
from vlft.data.rows.matching import Entry, as_videos, media_of, parts_of, tags_in, with_tags
from vlft.data.rows.media_refs import MEDIA_ENDINGS, Places
from vlft.data.rows.normalise import PlainRow, one_form
from vlft.data.rows.objects import PLACEHOLDER, objects_of
from vlft.data.rows.placeholders import Tags
from vlft.data.rows.references import references_of
from vlft.data.rows.source import BrokenLine, home_of, kind_of
from vlft.data.rows.turns import RawTurn, Said, Shown, role_of
from vlft.data.sample import Image, Role, Sample, Text, Turn, Video
from vlft.errors import RowRef
from vlft.families import Family
from vlft.text import counted, short

# Characters, each counted once per answer, because an answer is rendered with all text before it. A context of 128k
# tokens with 100 answers makes 50 million.
RENDERED_PER_ROW = 400_000_000
TURN_CHARACTERS = 40  # about what a chat template adds


def parse_record(
    raw: object,
    *,
    file: str,
    index: int,
    image_folder: str | None,
    family: Family,
    access: Access | None = None,
    flags: RowFlags | None = None,
) -> Sample:
    """Parse and check one row. Its media are not opened.

    `video` may be a path, a list of videos (an item that is itself a list holds the frames of one video), or, with
    exactly one `<video>` tag in the row, a list of frames. A list is a list of frames if every path has the ending of a
    picture (`FRAME_ENDINGS`).

    Args:
        raw: the row as returned by `vlft.data.files.read.row_of`.
        file: the data file, for messages and for relative paths.
        index: index of the row in the file, from 0.
        image_folder: where relative media paths start. None: the folder of `file`. Never the working directory.
        family: its control tokens are refused.
        access: which files the row may name. None: files in the folder, and absolute paths.
        flags: how the row is read. None: the defaults.

    Raises:
        DataError: the row cannot be trained. `.row.field` names the part that is wrong.
    """
    row = RowRef(file=file, index=index, id=_id(raw))
    places = Places(
        access=access or Access(),
        folder=home_of(file) if image_folder is None else image_folder,
        named="the folder of the data file" if image_folder is None else f"--image_folder {image_folder}",
    )
    try:
        return _parsed(row, raw, family, places, flags or RowFlags())
    except RecursionError as error:
        raise row.bad("row", "is nested too deeply to be read. Flatten its lists") from error


def _id(raw: object) -> str | None:
    name = raw.get("id") if isinstance(raw, dict) else None
    if name is None:
        return None
    try:
        return short(str(name))
    except (RecursionError, ValueError):  # nested too deeply; an integer with more digits than Python prints
        return kind_of(name)


def _parsed(row: RowRef, raw: object, family: Family, places: Places, flags: RowFlags) -> Sample:
    if isinstance(raw, BrokenLine):
        raise row.bad("row", raw.reason)
    if not isinstance(raw, dict):
        raise row.bad("row", f'is {kind_of(raw)}, not an object. Write {{"conversations": [...]}}')
    shape = one_form(row, raw, pairs=flags.pairs)
    said = [*shape.turns, *shape.rejected]
    roles = [role_of(row, turn) for turn in said]
    tags = tags_in(row, shape, roles)
    entries = [_entry(row, turn, role, tags, family) for turn, role in zip(said, roles, strict=True)]
    entries, rejected = entries[: len(shape.turns)], entries[len(shape.turns) :]
    if shape.last_only:
        entries = _last_answer_only(entries)
    _refuse_much_text(row, shape.form.name, [*entries, *rejected])
    if rejected:
        _check_answers(row, [entries[-1], *rejected], objects=not is_empty(raw.get("objects")))
    warnings = _check_order(row, shape.form.name, entries) + shape.warnings + list(tags.warnings)
    entries = as_videos(shape, entries)
    entries, added = with_tags(shape, entries, first=flags.missing_tags == "first")
    media = media_of(row, shape, entries, places)
    parts = {kind: iter(some) for kind, some in media.items()}
    turns = tuple(Turn(role=entry.role, parts=parts_of(entry, parts), field=entry.field) for entry in entries)
    others = tuple(Turn(role=entry.role, parts=parts_of(entry, parts), field=entry.field) for entry in rejected)
    shown = [part for turn in turns for part in turn.parts if not isinstance(part, Text)]
    warnings += _budgets_without_effect(shape, shown, family)
    if not shown:
        warnings += _unread_media(raw)
    references, unread = references_of(raw)
    objects = objects_of(row, raw, [entry.text for entry in entries], len(media["image"]), family)
    return Sample(
        file=row.file,
        index=row.index,
        id=row.id,
        turns=turns,
        rejected=others,
        warnings=(*warnings, *unread),
        objects=objects,
        added=added,
        references=references,
    )


def _check_answers(row: RowRef, answers: list[Entry], *, objects: bool) -> None:
    """Refuse answers of a preference row that cannot be compared; the first one is the chosen answer."""
    seen: dict[str, Entry] = {}
    for entry in answers:
        if (twin := seen.setdefault(entry.text, entry)) is not entry:
            raise row.bad(
                entry.text_field,
                f"is the same answer as {twin.text_field}: {short(repr(twin.text))} and {short(repr(entry.text))}. "
                "Change one of them, or drop the row",
            )
        if not entry.trained:
            raise row.bad(entry.field, "is masked, but the answers of a preference row are compared. Unmask it")
        if objects and (mark := PLACEHOLDER.search(entry.text)):
            raise row.bad(
                entry.text_field,
                f"holds {mark[0]}, which stands for an object in the prompt of a preference row only. Write the name "
                "or the box as text",
            )


def _last_answer_only(entries: list[Entry]) -> list[Entry]:
    """Mask all answers except the last one, as `mask_history` of LLaMA-Factory does."""
    last = max((i for i, entry in enumerate(entries) if entry.role == "assistant"), default=-1)

    def untrained(entry: Entry) -> Entry:
        pieces = (replace(piece, trained=False) if isinstance(piece, Text) else piece for piece in entry.pieces)
        return replace(entry, pieces=tuple(pieces))

    return [untrained(entry) if i != last and entry.role == "assistant" else entry for i, entry in enumerate(entries)]


def _unread_media(raw: dict) -> list[tuple[str, str]]:
    """Warn about a key that names a picture or video in a row that shows none."""
    for key, value in raw.items():
        if isinstance(value, str) and len(value) < 500 and value.lower().endswith(MEDIA_ENDINGS) and " " not in value:
            return [(short(str(key)), f"names a file, {short(value)}, but the row shows no picture or video")]
    return []


def _budgets_without_effect(shape: PlainRow, media: list[Image | Video], family: Family) -> list[tuple[str, str]]:
    """Warn about budgets of the row that have no effect on its media, such as nframes on a list of frames."""

    def acts(name: str, medium: Image | Video) -> bool:
        rate_of_list = name == "fps" and isinstance(medium, Video) and medium.frames
        used = not rate_of_list or family.video_time != "index"
        return used and getattr(medium.overrides, name) is not None

    said = {f.name for one in shape.overrides.values() for f in fields(one) if getattr(one, f.name) is not None}
    return [
        (name, "has no effect on any picture or video of the row")
        for name in sorted(said)
        if not any(acts(name, medium) for medium in media)
    ]


def _entry(row: RowRef, turn: RawTurn, role: Role, tags: Tags, family: Family) -> Entry:
    pieces: list[Text | Shown] = []
    for piece in turn.pieces:
        if isinstance(piece, Shown):
            pieces.append(piece)
            continue
        for part in tags.split(_text(row, piece, family), role, turn.field):
            pieces.append(Text(text=part) if isinstance(part, str) else part)
    shown = next((piece for piece in pieces if isinstance(piece, Shown)), None)
    if shown and role != "user":
        what = f"a <{shown.kind}> tag" if shown.value is None else "a picture or video"
        where = turn.text_field if shown.field == turn.field else shown.field
        a = "an" if str(turn.role)[0].lower() in "aeiou" else "a"
        raise row.bad(where, f"{what} in {a} {turn.role} turn. Move it to the human turn that shows it")
    if role != "user" and turn.columns:
        raise row.bad(
            turn.columns[0][1].key, "a picture or video in a turn that is not a human turn. Move it to a human turn"
        )
    texts = tuple(piece for piece in pieces if isinstance(piece, Text))
    whole = [piece.field for piece in turn.pieces] == [turn.text_field]
    cut = masked(row, turn.mask, role, texts, turn.field, whole=whole)
    if role == "assistant":
        pieces = list(cut)
    entry = Entry(
        role=role,
        pieces=tuple(pieces),
        field=turn.field,
        text_field=turn.text_field,
        whole=whole,
        columns=turn.columns,
    )
    if role == "assistant" and entry.blank:
        empty = "" in (entry.text, *(piece.text for piece in turn.pieces if isinstance(piece, Said)))
        raise row.bad(turn.text_field, f"the answer is {'empty' if empty else 'blank'}. Write one, or drop the turn")
    return entry


def _text(row: RowRef, said: Said, family: Family) -> str:
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
            "Remove it; write <image> and <video> for pictures and videos",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"character {error.start} is half a character ({text[error.start]!r})"
        raise row.bad(said.field, f"{half}. Write the whole character or remove it") from error
    return text


def _check_order(row: RowRef, key: str, entries: list[Entry]) -> list[tuple[str, str]]:
    """Warn about an unusual order of turns. Refuse an answer without a question, and a row without answers."""
    spoken = [entry for entry in entries if entry.role != "system"]
    if spoken and spoken[0].role == "assistant":
        raise row.bad(spoken[0].field, "a gpt turn comes first, with nothing to answer. Put a human turn before it")
    if all(entry.role != "assistant" for entry in entries):
        raise row.bad(
            key, f"no gpt turn in {counted(len(entries), 'turn', zero='no')}, so nothing to learn. Add the answer"
        )
    if not any(entry.trained for entry in entries):
        raise row.bad(key, "every gpt turn is masked, so nothing to learn. Unmask one, or take the row out")
    warnings = []
    for before, entry in zip([None, *entries[:-1]], entries, strict=True):
        if entry.role == "system" and before is not None:
            warnings.append((entry.field, "a system turn that is not the first turn; it is rendered at its place"))
        elif entry.role == "user" and before is not None and before.role == "user":
            warnings.append((entry.field, "two human turns in a row; both are rendered"))
        elif entry.role == "assistant" and before is not None and before.role == "assistant":
            warnings.append(
                (
                    entry.field,
                    "two gpt turns in a row; both are "
                    + ("trained" if before.trained and entry.trained else "rendered"),
                )
            )
        if entry.role == "user" and entry.blank:
            warnings.append((entry.text_field, "an empty human turn"))
    if entries[-1].role == "user":
        warnings.append((entries[-1].field, "a human turn comes last, with no answer; it is rendered, but not trained"))
    return warnings


def _refuse_much_text(row: RowRef, key: str, entries: list[Entry]) -> None:
    characters = sum(len(entry.text) + TURN_CHARACTERS for entry in entries)
    answers = sum(entry.role == "assistant" for entry in entries)
    if characters * answers > RENDERED_PER_ROW:
        raise row.bad(
            key,
            f"{len(entries):,} turns of {characters:,} characters: {answers:,} answers, each rendered with all text "
            f"before it, make up to {characters * answers:,}, and {RENDERED_PER_ROW:,} are allowed. Split the row",
        )
