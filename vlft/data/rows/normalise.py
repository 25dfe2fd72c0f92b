"""Convert rows of all supported kits to one form: turns of pieces, and the files that their tags stand for.

Combines `vlft.data.rows.forms` (where the conversation is), `turns` (one turn), `keys` (the other keys of a row) and
`overrides` (its budgets). `vlft.data.rows.records` then checks the result, and `vlft.data.rows.media_refs` reads the
files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vlft.data.rows import keys
from vlft.data.rows.forms import FORMS, PAIR_KEYS, AnyForm, Form, PairForm, form_of, pair_form_of
from vlft.data.rows.forms import KEYS as FORM_KEYS
from vlft.data.rows.keys import IDLE_KEYS, MEDIA_KEYS, SYSTEM_KEYS, Kind
from vlft.data.rows.overrides import ROW_KEYS, nframes_of, of_row
from vlft.data.rows.pairs import METHODS, missing_answer, refuse_other_media
from vlft.data.rows.references import KEYS as REFERENCE_KEYS
from vlft.data.rows.registries import registry_row
from vlft.data.rows.source import kind_of
from vlft.data.rows.turns import ROLES, Column, RawTurn, Said, column_of, either, system_turn
from vlft.data.sample import Overrides
from vlft.errors import RowRef

_KNOWN_KEYS = frozenset(
    (
        *FORM_KEYS,
        *PAIR_KEYS,
        *SYSTEM_KEYS,
        *ROW_KEYS,
        *keys.REFUSED_KEYS,
        *IDLE_KEYS,
        *REFERENCE_KEYS,
        *keys.VERDICTS,
        *keys.WEIGHTS,
        *keys.HARMLESS_KEYS,
        *(key for names in MEDIA_KEYS.values() for key in names),
        *("objects", "mask_history"),
    )
)


@dataclass(frozen=True, kw_only=True)
class PlainRow:
    """A row in the one form.

    Attributes:
        form: form of its conversation.
        turns: its turns, in order.
        rejected: other answers to the last question; empty unless it is a preference row.
        columns: kind -> files for its tags.
        overrides: kind -> budgets that the row sets for all its media of that kind.
        nframes: frames of each of its videos, if the row lists them one by one; else empty.
        last_only: whether only its last answer is trained (`mask_history`).
        warnings: (field, remark) for keys that are not read.
    """

    form: Form | PairForm
    turns: list[RawTurn]
    rejected: list[RawTurn]
    columns: dict[Kind, Column]
    overrides: dict[Kind, Overrides]
    nframes: tuple[int, ...]
    last_only: bool
    warnings: list[tuple[str, str]]


def one_form(row: RowRef, raw: dict, *, pairs: bool = False) -> PlainRow:
    """Convert a row of any supported kit.

    Args:
        row: the row, for messages.
        raw: the row as an object.
        pairs: whether it is read as a preference row.

    Raises:
        DataError: the row has a key that must not be ignored, two keys for one thing with different values, or a
            value of the wrong type; or it is not a preference row, and `pairs` asks for one.
    """
    keys.refuse_row_keys(row, raw, pairs=pairs)
    form: Form | PairForm
    if pairs:
        form = _pair_form(row, raw)
        refuse_other_media(row, raw)
        pair = form.read(row, raw)
        turns, rejected = pair.turns, pair.rejected
        idle, read = f'is not read: the row has "{form.keys[-1]}"', {*form.keys, "rejected_images", "rejected_videos"}
    else:
        form = _form(row, raw)
        turns, rejected = form.read(row, raw), []
        idle, read = f"is not read: the answers of the conversation are trained. {METHODS} train on both", set()
    warnings = [(key, idle) for key in IDLE_KEYS if raw.get(key) and key not in read]
    warnings += _other_conversation(raw, form)
    columns: dict[Kind, Column] = {}
    for kind in MEDIA_KEYS:
        columns[kind], unread = column_of(row, raw, kind)
        warnings += unread
    warnings += sorted(keys.unknown(raw, _KNOWN_KEYS))
    warnings += [warning for turn in (*turns, *rejected) for warning in turn.warnings]
    return PlainRow(
        form=form,
        turns=_with_system(row, raw, turns),
        rejected=rejected,
        columns=columns,
        overrides=of_row(row, raw),
        nframes=nframes_of(row, raw),
        last_only=_switch(row, raw, "mask_history") or pairs,
        warnings=warnings,
    )


def _form(row: RowRef, raw: dict) -> Form:
    form = form_of(raw)
    if form is None or form.name in ("conversations", "messages"):
        if form is None and (pointer := registry_row(raw)):
            raise row.bad("row", pointer)
        if form is None and (pair := pair_form_of(raw)):
            raise row.bad(pair.keys[-1], f"belongs to a preference row, which {METHODS} train on. Set --method")
        either(row, raw, "conversations", "messages", at="")  # refuses both with different values, and neither
    assert form is not None
    return form


def _pair_form(row: RowRef, raw: dict) -> PairForm:
    form = pair_form_of(raw)
    if form is None:
        if form_of(raw) is None and (pointer := registry_row(raw)):
            raise row.bad("row", pointer)
        raise missing_answer(row, raw)
    if {"conversations", "messages"} & set(form.keys):
        either(row, raw, "conversations", "messages", at="")  # refuses both with different values
    return form


def _other_conversation(raw: dict, form: AnyForm) -> Iterator[tuple[str, str]]:
    """Yield a warning for the first key of another conversation."""
    same = {*form.keys, *form.beside}
    same |= {"conversations", "messages"} if same & {"conversations", "messages"} else set()
    others = (key for other in FORMS for key in (*other.keys, *other.beside))
    key = next((key for key in others if key not in same and not keys.is_empty(raw.get(key))), None)
    if key is not None and raw[key] != raw.get("chosen"):  # some sets repeat the chosen conversation as `messages`
        yield key, f'is not read: the row has "{form.keys[-1]}"'


def _switch(row: RowRef, raw: dict, key: str) -> bool:
    value = raw.get(key)
    if value not in (None, 0, 1):
        raise row.bad(key, f"is {kind_of(value)}. Write true or false")
    return bool(value)


def _with_system(row: RowRef, raw: dict, turns: list[RawTurn]) -> list[RawTurn]:
    """Put the system turn of a row's key before the turns. The same text in both places counts once."""
    given = [key for key in SYSTEM_KEYS if raw.get(key) not in (None, "")]
    if not given:
        return turns
    key = given[0]
    for other in given[1:]:
        if raw[other] != raw[key]:
            raise row.bad(other, f'both "{key}" and "{other}", and they differ. Keep one of them')
    first = turns[0] if turns else None
    if first is None or ROLES.get(str(first.role).strip().lower()) != "system":
        return [system_turn(row, raw[key], key), *turns]
    said = first.pieces[0] if len(first.pieces) == 1 else None
    if isinstance(said, Said) and said.text == raw[key]:
        return turns
    raise row.bad(key, f"differs from the system turn {first.field}. Keep one of them")
