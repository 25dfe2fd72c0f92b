"""Check all flags of a command line: names, types, ranges, words, packages and paths. One message lists all errors.

Reads argv and YAML as text, so it takes a tenth of a second and needs neither torch nor transformers. Every verb that
takes the flags of train calls it, so plan, check-data and train report the same errors.
Neighbours: `vlft.config.table` (what each flag takes), `translate` (other kits' flags), `checks` (flags that contradict
each other). `vlft.cli.main` and `vlft.config.parse` call it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from vlft.config import places, table
from vlft.config.checks import contradictions
from vlft.config.kinds import Kind, Place, Problem
from vlft.config.names import unknown, wrong_usage
from vlft.config.said import Line, Said, placeholders, quoted, read_line
from vlft.config.translate import Change, Translation, overridden, shown, translate
from vlft.config.values import Values
from vlft.errors import ConfigError

COLUMN = 52  # widest column of flags before the arrows
FEW = 4  # words of a value in a message


@dataclass(frozen=True, kw_only=True)
class Passed:
    """A command line without errors.

    Attributes:
        argv: flags of the YAML and of the command line, without the flags that have no effect; ready for argparse.
        given: names of the flags in `argv`.
        typed: those of them that the command line has, not only a YAML.
        remarks: the flags that were accepted but have no effect, as text.
    """

    argv: tuple[str, ...]
    given: frozenset[str]
    typed: frozenset[str]
    remarks: str


@dataclass(frozen=True, kw_only=True)
class _Wrong:
    """An error in a flag of vlft.

    Attributes:
        flag: its name; "" if the words belong to no flag.
        text: the message.
        usage: True if the words make no sense (wrong usage), False if the setting cannot be carried out.
    """

    flag: str
    text: str
    usage: bool = False


def check(verb: str, argv: Sequence[str], known: Collection[str]) -> Passed:
    """Check a command line.

    Args:
        verb: one of `table.VERBS`.
        argv: the words after the verb.
        known: names of the flags of its parser.

    Raises:
        UsageError: a flag is unknown or has another name here, or its words make no sense. The message lists every
            error.
        ConfigError: a value cannot be carried out, and there is no wrong usage. The message lists every such value.
    """
    kinds = {name: kind for name, kind in table.kinds(verb).items() if name in known}
    kinds |= {name: Kind() for name in known if name not in kinds and name.removeprefix("no_") not in kinds}
    line = read_line(argv, kinds, others=verb in table.WITH_WORDS)
    said = line.values()
    told = translate(said, kinds, os.environ)
    wrong = [_Wrong(flag=one.name, text=_unknown(one, known), usage=True) for one in told.unknown]
    wrong += [*_bad_values(said, told, kinds), *_unclaimed_words(verb, line)]
    later = [*_places(verb, line, told, kinds)]
    if not told.unknown:  # an unknown flag may be the one that is missing
        later += _conflicts(verb, told, kinds)
    if told.changes or told.refusals or any(one.usage for one in wrong):
        raise wrong_usage(verb, _message(verb, line, told, wrong, later))
    if texts := [*(one.text for one in wrong), *later]:
        raise _refusal(texts)
    dropped = {one.name for change in told.remarks for one in change.said}
    flags = [one for one in line.flags if one.name not in dropped]
    words = [*line.others, *(word for one in flags for word in (f"--{one.name}", *one.words))]
    given = frozenset(one.name for one in flags)
    typed = frozenset(one.name for one in flags if one.file is None)
    remarks = [*map(_remark, told.remarks), *_replaced(line, kinds)]
    return Passed(argv=tuple(words), given=given, typed=typed, remarks="; ".join(remarks))


def _unknown(one: Said, known: Collection[str]) -> str:
    """Return the message for an unknown flag: the YAML that sets it, and the flag that was meant."""
    text = unknown(one.name, known, file=one.file)
    inner = one.file is not None and one.word.startswith("{")
    return text + (
        f". Flags are not nested: write the lines below {one.name} without it, not indented" if inner else ""
    )


def say_remarks(passed: Passed) -> None:
    """Print on stderr which flags have no effect. Only the process of rank 0 prints."""
    if passed.remarks and os.environ.get("RANK", "0") == "0":
        print(f"note: these flags have no effect here: {passed.remarks}", file=sys.stderr)


def misused(verb: str, line: Line, told: Translation, kinds: Mapping[str, Kind]) -> list[str]:
    """Return a message for each value of the wrong kind or out of range, and for words that belong to no flag."""
    return [one.text for one in (*_bad_values(line.values(), told, kinds), *_unclaimed_words(verb, line))]


def _bad_values(said: Mapping[str, Said], told: Translation, kinds: Mapping[str, Kind]) -> Iterator[_Wrong]:
    """Yield the values that are of the wrong kind or out of range. Includes the values of translated flags."""
    for name, words in told.flags.items():
        kind = kinds.get(name)
        if kind is None:
            continue
        file = said[name].file if name in said else None
        flag = f"--{name}" + (f" (in {file})" if file else "")
        if not words and kind.many in ("one", "some"):
            yield _Wrong(flag=name, text=f"{flag}: a value is missing", usage=True)
        elif len(words) > 1 and kind.many in ("one", "maybe"):
            how = f". Write its parts as one value: {kind.example}" if kind.example else ""
            yield _Wrong(flag=name, text=f"{flag} takes one value, not {len(words)}: {_few(words)}{how}", usage=True)
        elif words and kind.many == "none":
            yield _Wrong(flag=name, text=f"{flag} takes no value, not {_few(words)}", usage=True)
        else:
            found = ((word, kind.problem(word)) for word in words if kind.angled or not placeholders(word))
            yield from (
                _Wrong(flag=name, text=problem_text(flag, word, problem), usage=problem.usage)
                for word, problem in found
                if problem is not None
            )


def problem_text(flag: str, word: str, problem: Problem) -> str:
    """Return the message for a value: its flag, the value, and what is wrong with it."""
    if not word.strip() or problem.text.startswith("must "):
        return f"{flag} is {word.strip() or 'empty'}, {problem.text}".removesuffix(", ")
    return f"{flag} {word}: {problem.text}"


def _unclaimed_words(verb: str, line: Line) -> Iterator[_Wrong]:
    """Yield words that belong to no flag, for verbs that take none; and data files named besides --data_path."""
    data = line.values().get("data_path")
    if verb in ("check-data", "preview") and line.others and data is not None and data.file is None:
        text = f"data files are named twice: {line.others[0]} and --data_path. Keep one of the two"
        yield _Wrong(flag="data_path", text=text, usage=True)
    if line.others and verb not in table.WITH_WORDS:
        yaml = next((word for word in line.others if word.endswith((".yaml", ".yml"))), "")
        script = next((word for word in line.others if word.endswith(".sh")), "")
        hint = f"; did you mean --config {yaml}?" if yaml else ". A value follows its flag: --flag value"
        if script:
            hint = f". To make a YAML of a script: vlft plan --translate {quoted(script)} --out NEW.yaml"
        yield _Wrong(flag="", text=f"{_few(line.others)} belongs to no flag{hint}", usage=True)


def _places(verb: str, line: Line, told: Translation, kinds: Mapping[str, Kind]) -> Iterator[str]:
    """Yield a message for each placeholder, and for each path that does not exist or cannot be used."""
    for name, words in told.flags.items():
        kind = kinds.get(name)
        empty = [word for word in words if not (kind and kind.angled) and placeholders(word)]
        yield from (f"--{name} {word}: replace {' and '.join(placeholders(word))} by a value" for word in empty)
        words = tuple(word for word in words if word not in empty)
        if isinstance(kind, Place) and (kind.of != "out" or verb == "train"):
            for word in filter(str.strip, words):
                file = line.values()[name].file if name in line.values() else None
                if problem := places.problem(kind, word, file=file):
                    yield f"--{name} {word}: {problem}"
    if verb in ("check-data", "preview", "export"):
        for word in line.others[1:-1] if verb == "export" else line.others:
            if not word.startswith("-") and (problem := places.problem(table.DATA_FILE, word)):
                yield f"{word}: {problem}"


def _conflicts(verb: str, told: Translation, kinds: Mapping[str, Kind]) -> Iterator[str]:
    """Yield a message for flags that contradict each other. Flags with invalid values are left out."""
    if verb == "chat":
        return
    sound = {
        name: tuple(kind.value(word) for word in words)
        for name, words in told.flags.items()
        if (kind := kinds.get(name)) is not None and not any(kind.problem(word) for word in words)
    }
    sound |= {name.removeprefix("no_"): (False,) for name in told.flags if name not in kinds}
    yield from contradictions(Values(sound, wrong=told.flags.keys() - sound.keys()), verb)


def _refusal(texts: Sequence[str]) -> ConfigError:
    if len(texts) == 1:
        return ConfigError(texts[0])
    return ConfigError("\n  ".join([f"{len(texts)} settings cannot be carried out:", *texts]))


def _message(verb: str, line: Line, told: Translation, wrong: Sequence[_Wrong], later: Sequence[str]) -> str:
    """Return the message: one line for a single error, else a list of all errors and the corrected command."""
    texts = [*(f"{change.before}: {shown(change)}." for change in told.refusals), *(one.text for one in wrong)]
    if len(texts) == 1 and not told.changes and not later:
        return texts[0]
    said = line.values()
    foreign = {one.name for change in (*told.changes, *told.refusals) for one in change.said} & set(said)
    number = len(foreign) + len(wrong)
    many = "1 flag cannot" if number == 1 else f"{number} of {len(said)} flags cannot"
    lines = [f"{many} be used as written." + (f" They are flags of {told.kit}." if told.kit else "")]
    if line.config and any(one.file for change in told.changes for one in change.said):
        own = f", with the defaults of {told.kit}" if told.kit else ""
        lines += [f"as a YAML{own}: vlft plan --translate {quoted(line.config)} --out NEW.yaml"]
    if told.changes:
        width = min(COLUMN, max(len(change.before) for change in told.changes))
        lines += ["written differently here:", *(f"  {one.before:<{width}}  ->  {shown(one)}" for one in told.changes)]
        lines += [
            f"  {one.before} is overridden: another flag sets {others}"
            for one in told.changes
            if (others := overridden(told, one))
        ]
    if told.refusals:
        lines += ["not supported here:", *(f"  {text}" for text in texts[: len(told.refusals)])]
    if wrong:
        lines += ["wrong:", *(f"  {one.text}" for one in wrong)]
    if later and told.changes:
        lines += ["also wrong, in the command below:", *(f"  {text}" for text in later)]
    elif later:
        lines += ["also wrong:", *(f"  {text}" for text in later)]
    if told.remarks:
        lines += ["no effect here:", *(f"  {_remark(one)}" for one in told.remarks)]
    if told.changes:
        bad = {one.flag for one in wrong}
        right = replace(told, flags={name: words for name, words in told.flags.items() if name not in bad})
        left_out = ", without the flags that are not supported or wrong" if texts else ""
        lines += [f"the command for vlft{left_out}:", f"  {right.command(verb, line.others)}"]
    return "\n  ".join(lines)


def _replaced(line: Line, kinds: Mapping[str, Kind]) -> Iterator[str]:
    """Yield flags of several values that the command line gives again: the last one counts, as in argparse."""
    last = line.values()
    for one in line.flags:
        kind = kinds.get(one.name)
        if one.file is None and kind is not None and kind.many == "some" and one.words != last[one.name].words:
            yield f"{one} (a later {last[one.name]} replaces it. Several values: --{one.name} A B)"


def _remark(change: Change) -> str:
    why = shown(change)
    return f"{change.before} ({why})" if why else change.before


def _few(words: Sequence[str]) -> str:
    return " ".join(words[:FEW]) + (" ..." if len(words) > FEW else "")
