"""Read preference rows: a prompt, the chosen answer, and one or more rejected answers (`--method dpo`, orpo, simpo).

`PAIR_FORMS` in `vlft.data.rows.forms` lists which keys hold them. `vlft.data.rows.records` checks what was read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlft.data.rows.conversation import entries_of, question
from vlft.data.rows.keys import MEDIA_KEYS, is_empty
from vlft.data.rows.masks import Mask
from vlft.data.rows.placeholders import TAG
from vlft.data.rows.source import kind_of
from vlft.data.rows.turns import ROLES, RawTurn, Said, plain, role_of, turns_of
from vlft.errors import RowRef
from vlft.text import counted, short

CHOSEN, REJECTED = "chosen", "rejected"
BESIDE_ANSWER = ("rejected_response", "rejected_messages")  # ms-swift: the last turn is the chosen answer
METHODS = "--method dpo, orpo and simpo"
Turns = list[RawTurn]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The turns of a preference row.

    Attributes:
        turns: the prompt and the chosen answer. Answers in the prompt are not trained.
        rejected: other answers to the same prompt.
    """

    turns: Turns
    rejected: Turns


Reader = Callable[[RowRef, dict], Pair]


def after(prompt: Callable[[RowRef, dict], Turns]) -> Reader:
    """Return the reader of rows with a prompt, `chosen` and `rejected`.

    Args:
        prompt: reads the turns of the prompt.
    """

    def read(row: RowRef, raw: dict) -> Pair:
        return _paired(row, prompt(row, raw), _chosen(row, raw), _answers(row, raw[REJECTED], REJECTED))

    return read


def whole(row: RowRef, raw: dict) -> Pair:
    """Read TRL's implicit prompts: `chosen` and `rejected` are whole conversations, equal up to the last answer."""
    return _paired(row, [], _chosen(row, raw), _answers(row, raw[REJECTED], REJECTED))


def before(read_row: Callable[[RowRef, dict], Turns], key: str) -> Reader:
    """Return the reader of ms-swift's rows, whose last turn is the chosen answer.

    Args:
        read_row: reads the turns of the row without its rejected answers.
        key: holds the rejected answers.
    """

    def read(row: RowRef, raw: dict) -> Pair:
        turns = read_row(row, raw)
        if not turns or role_of(row, turns[-1]) != "assistant":
            where = turns[-1].field if turns else key
            raise row.bad(
                where,
                f'the last turn is not an answer, so "{key}" has no chosen answer beside it. Add the chosen answer as '
                "the last turn",
            )
        return _paired(row, [], turns, _answers(row, raw[key], key))

    return read


def in_json(row: RowRef, raw: dict) -> Pair:
    """Read RLHF-V: `text` is a JSON string of an object with `question`, `chosen` and `rejected`."""
    found = raw["text"]
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            raise row.bad("text", f"is a string that is not JSON: {error}. Write an object with {_NAMES}") from error
    if not isinstance(found, dict):
        raise row.bad("text", f"is {kind_of(found)}, not an object with {_NAMES}")
    for key in ("question", CHOSEN, REJECTED):
        if found.get(key) is None:
            raise row.bad(f"text.{key}", f"is missing. Write an object with {_NAMES}")
    pair = after(question("question"))(row, found)
    return Pair(turns=[_inside(turn) for turn in pair.turns], rejected=[_inside(turn) for turn in pair.rejected])


_NAMES = "question, chosen and rejected"


def _inside(turn: RawTurn) -> RawTurn:
    """Return a turn whose fields are those of the object in `text`."""
    pieces = tuple(replace(piece, field=f"text.{piece.field}") for piece in turn.pieces)
    field, role_field, text_field = (f"text.{name}" for name in (turn.field, turn.role_field, turn.text_field))
    return replace(turn, pieces=pieces, field=field, role_field=role_field, text_field=text_field)


def missing_answer(row: RowRef, raw: dict) -> Exception:
    """Return the error for a row that is not a preference row."""
    have = [key for key in (CHOSEN, REJECTED, *BESIDE_ANSWER) if key in raw]
    keys = short(", ".join(map(str, raw))) or "none"
    for key, other in ((REJECTED, CHOSEN), (CHOSEN, REJECTED)):
        if raw.get(other) is not None and raw.get(key) is None:
            way = "is null. Fill it in" if key in raw else f"is missing. Add it; the keys present are: {keys}"
            also = ""
            if key == CHOSEN:
                also = '. If the chosen answer is the last turn of the row, rename "rejected" to "rejected_response"'
            return row.bad(key, f'{way}. The row has "{other}", and {METHODS} need both{also}')
    if all(raw.get(key) is not None for key in (CHOSEN, REJECTED)) or any(raw.get(key) for key in BESIDE_ANSWER):
        return row.bad("row", f'has {" and ".join(have)}, but no prompt. Add "prompt"; the keys present are: {keys}')
    return row.bad(
        have[0] if have else "row",
        f'has no rejected answer, and {METHODS} compare two answers. Add "chosen" and "rejected", or train the row '
        f"with --method sft; the keys present are: {keys}",
    )


def _chosen(row: RowRef, raw: dict) -> Turns:
    found = _answers(row, raw[CHOSEN], CHOSEN)
    if len(found) != 1:
        raise row.bad(CHOSEN, f'holds {len(found)} answers. Keep one; several answers belong under "rejected"')
    return found[0]


def _answers(row: RowRef, value: object, key: str) -> list[Turns]:
    """Return each answer under a key: a string, a turn, or turns of which the last one is the answer."""
    value = _decoded(row, value, key)
    if isinstance(value, str):
        return [[plain("assistant", value, key)]]
    if isinstance(value, dict):
        return [list(turns_of(row, value, key))]
    if not isinstance(value, list):
        raise row.bad(key, f"is {kind_of(value)}, not an answer. Write a string, a turn, or a list of turns")
    if not value:
        raise row.bad(key, "is empty. Write the answer, or drop the row")
    if all(isinstance(one, dict) for one in value):
        turns = [turn for i, one in enumerate(value) for turn in turns_of(row, one, f"{key}[{i}]")]
        several = len(turns) > 1 and all(_is_answer(turn) for turn in turns)
        return [[turn] for turn in turns] if several else [turns]
    return [answer for i, one in enumerate(value) for answer in _answers(row, one, f"{key}[{i}]")]


def _decoded(row: RowRef, value: object, key: str) -> Any:
    """Return turns that a table holds as a JSON string or as an object of lists. An answer may also look like JSON."""
    if isinstance(value, str):
        try:
            found = json.loads(value) if value.lstrip()[:1] in ("[", "{") else None
        except ValueError:
            return value
        turns = found if isinstance(found, list) else [found]
        named = all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)
        return found if turns and named else value
    try:
        return entries_of(value)
    except ValueError as error:
        raise row.bad(key, str(error)) from error


def _is_answer(turn: RawTurn) -> bool:
    return isinstance(turn.role, str) and ROLES.get(turn.role.strip().lower()) == "assistant"


def _paired(row: RowRef, prompt: Turns, chosen: Turns, rejected: Sequence[Turns]) -> Pair:
    """Return the row of these answers.

    Args:
        row: the row, for messages.
        prompt: its turns; empty if the answers are whole conversations.
        chosen: the chosen answer, or a conversation that ends with it.
        rejected: each rejected answer, likewise.

    Raises:
        DataError: an answer has another role, or the prompts differ.
    """
    for turns in (chosen, *rejected):
        if role_of(row, turns[-1]) != "assistant":
            said = short(repr(turns[-1].role))
            raise row.bad(turns[-1].role_field, f"is {said}, but an answer is a gpt turn. Change the role, or drop it")
    if prompt and role_of(row, prompt[-1]) == "assistant":  # `messages` often repeats the chosen answer
        _refuse_answered(row, prompt[-1], chosen[-1], same=True)
        prompt = prompt[:-1]
    heads = [turns[:-1] for turns in (chosen, *rejected) if len(turns) > 1]
    for head in heads[1:]:
        _refuse_other_prompt(row, heads[0], head)
    if heads and prompt:
        _refuse_other_start(row, prompt, heads[0])
    shown = heads[0] if heads else prompt
    if not shown:
        raise row.bad(chosen[-1].field, 'is an answer without a prompt. Add "prompt", or write whole conversations')
    if role_of(row, shown[-1]) == "assistant":
        _refuse_answered(row, shown[-1], chosen[-1], same=False)
    untrained = [replace(turn, mask=Mask(switch=("train", False))) if _is_answer(turn) else turn for turn in shown]
    return Pair(turns=[*untrained, chosen[-1]], rejected=[turns[-1] for turns in rejected])


def _refuse_answered(row: RowRef, last: RawTurn, chosen: RawTurn, *, same: bool) -> None:
    """Refuse a prompt that ends with an answer, unless it is the chosen one and `same` allows that."""
    if not same or _said(last) != _said(chosen):
        raise row.bad(
            last.field,
            f"{_quoted(last)} is an answer, and {chosen.field} is another one, {_quoted(chosen)}. Remove the turn: a "
            "prompt ends with a human turn",
        )


def _refuse_other_prompt(row: RowRef, one: Turns, other: Turns) -> None:
    """Refuse conversations that differ before their last answer."""
    for mine, yours in zip(one, other, strict=False):  # lengths that differ are refused below
        if role_of(row, mine) != role_of(row, yours) or not _alike(mine, yours):
            raise row.bad(
                yours.field,
                f"{yours.role} {_quoted(yours)} differs from {mine.field}, {mine.role} {_quoted(mine)}: all answers of "
                "a row answer the same prompt. Make the turns equal, or drop the row",
            )
    if len(one) != len(other):
        longer = one if len(one) > len(other) else other
        raise row.bad(
            longer[min(len(one), len(other))].field,
            f"has no counterpart: one conversation has {counted(len(one), 'turn')} before its answer, the other "
            f"{counted(len(other), 'turn')}, and all answers of a row answer the same prompt. Make them equal, or drop "
            "the row",
        )


def _refuse_other_start(row: RowRef, prompt: Turns, shown: Turns) -> None:
    """Refuse a prompt that the whole conversations next to it do not have. Some sets repeat it, or its question."""
    mine, yours = [_said(turn) for turn in prompt], [_said(turn) for turn in shown]
    if mine != yours[-len(mine) :] and not (len(mine) == 1 and mine[0] in yours):
        raise row.bad(
            prompt[-1].field,
            f"{_quoted(prompt[-1])} is not in the conversations of the answers, which ask {_quoted(shown[-1])}. Keep "
            "one of the two prompts",
        )


def _alike(one: RawTurn, other: RawTurn) -> bool:
    """Whether two turns say the same. One of them may lack the tags: the pictures are those of the row anyway."""
    if _said(one) == _said(other):
        return True
    said = [[piece for piece in turn.pieces if isinstance(piece, Said)] for turn in (one, other)]
    shown = [len(turn.pieces) > len(texts) for turn, texts in zip((one, other), said, strict=True)]
    texts = ["".join(str(piece.text) for piece in some) for some in said]
    bare = [TAG.sub("", text) for text in texts]
    untagged = [text == other and not parts for text, other, parts in zip(texts, bare, shown, strict=True)]
    return bare[0] == bare[1] and any(untagged)


def _said(turn: RawTurn) -> list[object]:
    """Return the texts and media of a turn, without where they are in the row."""
    return [piece.text if isinstance(piece, Said) else replace(piece, field="") for piece in turn.pieces]


def _quoted(turn: RawTurn) -> str:
    text = "".join(str(piece.text) if isinstance(piece, Said) else f"<{piece.kind}>" for piece in turn.pieces)
    return short(repr(text))


def refuse_other_media(row: RowRef, raw: dict) -> None:
    """Refuse pictures or videos of a rejected answer: all answers of a row see the same ones.

    Raises:
        DataError: `rejected_images` or `rejected_videos` differ from those of the row.
    """
    for kind, names in MEDIA_KEYS.items():
        key = f"rejected_{kind}s"
        if is_empty(raw.get(key)):
            continue
        shown = next((raw[name] for name in names if not is_empty(raw.get(name))), None)
        one, other = (value if isinstance(value, list) else [value] for value in (raw[key], shown))
        if one != other:
            raise row.bad(
                key,
                f"is {short(json.dumps(one, default=str))}, and the row shows {short(json.dumps(other, default=str))}: "
                "all answers of a row must see the same. Drop the key, or the row",
            )
