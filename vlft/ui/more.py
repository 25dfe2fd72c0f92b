"""The field for further flags of `vlft train`: its words, what is wrong with them, and what they change elsewhere."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

from vlft.config import door, grpo, preference, table
from vlft.config.kinds import Place
from vlft.config.kits.outcome import Becomes
from vlft.config.names import help_asked, unknown
from vlft.config.said import read_line
from vlft.config.translate import shown, translate
from vlft.errors import ConfigError, VlftError
from vlft.ui.words import FIELDS, OWN, place


def words_of(text: str, folder: str) -> list[str]:
    """Return the words of the field. Relative paths are in the open folder, as in the other fields.

    Raises:
        ConfigError: a quote is not closed, or `vlft train` would refuse a word, or a flag has a field of its own.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"More flags: {text!r} cannot be read ({error}). Close the quotes.") from error
    words = _located(words, folder)
    if words and (fault := _wrong(words)):
        raise ConfigError(f"More flags: {fault}")
    return words


def _located(words: list[str], folder: str) -> list[str]:
    """Return the words with the paths that exist in a folder as absolute ones."""
    kinds, found, name = table.kinds("train"), [], ""
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        name = flag[2:].replace("-", "_") or name
        if (equals or not flag) and (name == "config" or isinstance(kinds.get(name), Place)):
            there = os.path.normpath(os.path.join(folder, os.path.expanduser(value)))
            value = there if name == "config" or os.path.exists(there) else value
        found.append(f"{flag}{equals}{value}" if flag else value)
    return found


def _wrong(words: list[str]) -> str:
    """Return the first fault of the words, "" if there is none."""
    kinds = table.kinds("train")
    try:
        line = read_line(words, kinds, others=False)
    except VlftError as error:
        return str(error)
    if help_asked(words):
        return "help is asked for in a terminal: vlft train --help. Drop it."
    for one in line.flags:
        name = one.name.removeprefix("no_")
        if one.file is None and name in FIELDS:
            return f"--{one.name} has a field of its own: {place(name)}. Set it there."
        if one.name in OWN:
            return f"--{one.name} is set by the page. Drop it."
    told = translate(line.values(), kinds, os.environ)
    for change in (*told.changes, *told.refusals):
        flags = change.outcome.flags if isinstance(change.outcome, Becomes) else {}
        if field := next((name for name in flags if name in FIELDS), ""):
            return f"{change.before} has a field of its own: {place(field)}. Set it there."
        written = " is written differently here" if flags else ""
        return f"{change.before}{written}: {shown(change)}"
    if told.unknown:
        return unknown(told.unknown[0].name, kinds, file=told.unknown[0].file)
    return next(iter(door.misused("train", line, told, kinds)), "")


def notes(words: list[str], towers: Mapping[str, str], fields: Mapping[str, str]) -> list[str]:
    """Return a note for each field whose value replaces a default of the training method.

    Args:
        words: of `words_of`.
        towers: tower -> mode.
        fields: flag -> text of its field.
    """
    said = read_line(words, table.kinds("train"), others=False).values().get("method")
    if said is None:
        return []
    values = {**towers, "method": said.word}
    found = []
    for name, default in (preference.defaults(values) | grpo.defaults(values)).items():
        text = fields.get(name, "")
        if text and not _same(text, default):
            found.append(
                f"{place(name)} is {text}; the default of --method {said.word} is {default:g}. To use it, set it in "
                "the field, or empty the field."
            )
    return found


def _same(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False
