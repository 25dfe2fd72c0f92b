"""Replace the variables, expressions and substitutions in words. What cannot be resolved becomes a placeholder.

Neighbours: `words` has the pieces of words, `walk` the variables. The rules are those of bash (GNU Bash manual, section
3.5). No command is run; `computed` has the few whose output follows from their words.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vlft.config.shell.computed import COMPUTED, LONGEST, compute
from vlft.config.shell.words import Part, Token, word_parts

_PARAMETER = re.compile(r"([!#]?)(\w+|[@*#?$!-])(\[[^\]]*\])?(.*)", re.S)
_HARMLESS = re.compile(r"[^\w.:/@%+=-]+")


@dataclass(frozen=True, kw_only=True)
class Text:
    """A value.

    Attributes:
        text: the value. Parts that are not known are placeholders such as `<MODEL>`.
        missing: (placeholder, why) of these parts.
    """

    text: str
    missing: tuple[tuple[str, str], ...] = ()

    def __add__(self, other: Text) -> Text:
        return Text(text=self.text + other.text, missing=self.missing + other.missing)


EMPTY = Text(text="")
Values = tuple[Text, ...]


def unknown(name: str, why: str) -> Text:
    """Return a placeholder. `name` may contain any characters; blanks become `_`."""
    placeholder = f"<{_HARMLESS.sub('_', name).strip('_')[:60] or 'value'}>"
    return Text(text=placeholder, missing=((placeholder, why),))


class Expander:
    """Expands words with the variables of a script.

    Args:
        variables: name -> its value, or values for an array. `${x:=word}` adds to it.
        arguments: the values of `$1`, `$2` and so on; None if they are not known.
        script: the value of `$0`; "" if the script has no file.
    """

    def __init__(self, variables: dict[str, Values], arguments: Values | None, script: str) -> None:
        self.variables, self.arguments, self.script = variables, arguments, script
        self.passes_arguments = False

    def word(self, token: Token) -> list[Text]:
        """Expand a word into none, one or several words."""
        found: list[Text] = []
        for parts in _braces(token.parts):
            found += self._fields(parts, token.line)
        return found

    def one(self, parts: Sequence[Part], line: int) -> Text:
        """Expand pieces into a single text, which is not split."""
        total = EMPTY
        for part in parts:
            values = self._values(part, line)
            joined = EMPTY
            for place, value in enumerate(values):
                joined = joined + (Text(text=" ") if place else EMPTY) + value
            total += joined
        return total

    def _fields(self, parts: Sequence[Part], line: int) -> list[Text]:
        fields: list[Text] = []
        current: Text | None = None
        for place, part in enumerate(parts):
            values = self._values(part, line)
            if part.kind == "text":
                text = values[0]
                if place == 0 and not part.quoted and text.text.startswith("~/"):
                    text = Text(text=os.path.expanduser(text.text))
                current = text if current is None else current + text
                continue
            if not part.quoted:
                values = tuple(piece for value in values for piece in _split(value))
            for number, value in enumerate(values):
                if number:
                    fields += [current] if current is not None else []
                    current = None
                current = value if current is None else current + value
        return [*fields, *([current] if current is not None else [])]

    def _values(self, part: Part, line: int) -> Values:
        if part.kind == "text":
            return (Text(text=part.text),)
        if part.kind == "arithmetic":
            return (self.arithmetic(part.text, line),)
        if part.kind == "command":
            return (self._substitution(part.text, line),)
        return self._variable(part.text, line)

    def arithmetic(self, expression: str, line: int) -> Text:
        """Compute an expression with whole numbers, as in `$((...))`."""
        plain = self.one(word_parts(expression.replace("'", "").replace('"', ""), line), line)
        if plain.missing:
            return unknown(expression, plain.missing[0][1])
        missing: list[tuple[str, str]] = []

        def number(match: re.Match[str]) -> str:
            value = self._variable(match[0], line)
            missing.extend(value[0].missing if value else ())
            return f"({value[0].text})" if value and value[0].text.strip() else "0"

        text = re.sub(r"\b[A-Za-z_]\w*\b", number, plain.text)
        if missing:
            return unknown(expression, missing[0][1])
        result = compute(text)
        if result is None:
            return unknown(expression, f"line {line}: $(({expression})) cannot be computed")
        return Text(text=result)

    def _substitution(self, source: str, line: int) -> Text:
        from vlft.config.shell.syntax import Simple, parse
        from vlft.errors import ConfigError

        why = f"line {line}: the output of `{' '.join(source.split())}`"
        try:
            body = parse(source)
        except ConfigError:
            return unknown(source, why)
        if len(body) != 1 or not isinstance(body[0], Simple):
            return unknown(source, why)
        words = [text for word in body[0].words for text in self.word(word)]
        if not words or words[0].text not in COMPUTED or any(word.missing for word in words):
            return unknown(source, next((word.missing[0][1] for word in words if word.missing), why))
        result = COMPUTED[words[0].text]([word.text for word in words[1:]])
        return unknown(source, why) if result is None else Text(text=result)

    def _variable(self, inside: str, line: int) -> Values:
        match = _PARAMETER.fullmatch(inside)
        if match is None:
            return (unknown(inside, f"line {line}: ${{{inside}}} cannot be resolved"),)
        sign, name, index, rest = match[1], match[2], match[3] or "", match[4]
        values = self._look_up(name, index)
        why = f"line {line}: ${name} is not set in the script"
        if name.isdigit() and name != "0":
            why = f"line {line}: ${name} is an argument of the script"
        if sign == "!":
            return (unknown(name, f"line {line}: ${{{inside}}} is the value of a variable that has another name"),)
        if sign == "#":
            if values is None:
                return (unknown(name, why),)
            whole = index in ("[@]", "[*]") or name in "@*"
            return (Text(text=str(len(values) if whole else len(values[0].text) if values else 0)),)
        operator = re.match(r":?[-=+?]", rest)
        if operator and not (rest[0] == ":" and rest[1:2].isdigit()):
            return self._with_default(name, values, operator[0], rest[operator.end() :], line, why)
        if values is None:
            if name in "@*":
                self.passes_arguments = True
                return ()
            return (unknown(f"argument_{name}" if name.isdigit() else name, why),)
        return tuple(_changed(value, rest, line) for value in values) if rest else values

    def _with_default(
        self, name: str, values: Values | None, operator: str, default: str, line: int, why: str
    ) -> Values:
        empty = not values or (operator[0] == ":" and not any(value.text for value in values))
        if operator[-1] == "+":
            return () if empty else (self.one(word_parts(default, line), line),)
        if not empty:
            return values or ()
        if operator[-1] == "?":
            return (unknown(f"argument_{name}" if name.isdigit() else name, why),)
        found = self.one(word_parts(default, line), line)
        if operator[-1] == "=":
            self.variables[name] = (found,)
        return (found,)

    def _look_up(self, name: str, index: str) -> Values | None:
        """Return the values of a variable; None if it is not known."""
        if name == "0" or (name == "BASH_SOURCE" and index in ("", "[0]")):
            return (Text(text=self.script),) if self.script else None
        if name in "@*" or name.isdigit():
            if self.arguments is None:
                return None
            if name in "@*":
                return self.arguments
            return self.arguments[int(name) - 1 : int(name)] or (EMPTY,)
        if name == "#":
            return None if self.arguments is None else (Text(text=str(len(self.arguments))),)
        values = self.variables.get(name)
        if values is None or index in ("[@]", "[*]"):
            return values
        place = index.strip("[]")
        if not place or place.lstrip("-").isdigit():
            number = int(place or 0)
            return (values[number],) if -len(values) <= number < len(values) else (EMPTY,)
        return None


def _split(value: Text) -> list[Text]:
    """Split a value at blanks. Placeholders contain no blanks."""
    return [
        Text(text=word, missing=tuple(one for one in value.missing if one[0] in word)) for word in value.text.split()
    ]


def _changed(value: Text, rest: str, line: int) -> Text:
    """Apply `${name%pattern}` and similar operations to a value."""
    if value.missing:
        return unknown(value.text.strip("<>") + rest, value.missing[0][1])
    text = value.text
    for sign, cut in _CUTS.items():
        if rest.startswith(sign):
            return Text(text=cut(text, rest[len(sign) :]))
    if rest.startswith("/"):
        every = rest.startswith("//")
        old, _, new = rest.lstrip("/").partition("/")
        return Text(text=re.sub(_pattern(old), lambda _: new, text, count=0 if every else 1))
    return unknown(text + rest, f"line {line}: the operation {rest} cannot be resolved")


def _pattern(glob: str) -> str:
    return fnmatch.translate(glob).removesuffix(r"\Z").removesuffix(r"\z")


def _cut_end(text: str, glob: str, *, longest: bool) -> str:
    places = range(len(text) + 1) if longest else range(len(text), -1, -1)
    return next((text[:at] for at in places if fnmatch.fnmatchcase(text[at:], glob)), text)


def _cut_start(text: str, glob: str, *, longest: bool) -> str:
    places = range(len(text), -1, -1) if longest else range(len(text) + 1)
    return next((text[at:] for at in places if fnmatch.fnmatchcase(text[:at], glob)), text)


_CUTS: Mapping[str, Callable[[str, str], str]] = {
    "%%": lambda text, glob: _cut_end(text, glob, longest=True),
    "%": lambda text, glob: _cut_end(text, glob, longest=False),
    "##": lambda text, glob: _cut_start(text, glob, longest=True),
    "#": lambda text, glob: _cut_start(text, glob, longest=False),
}


def _braces(parts: Sequence[Part]) -> list[tuple[Part, ...]]:
    """Expand `{1..3}` and `{a,b}` in the parts of a word that are not quoted, to at most `LONGEST` words."""
    found = [tuple(parts)]
    while len(found) <= LONGEST:
        expanded = [word for one in found for word in _first_brace(one)]
        if len(expanded) == len(found):
            return found
        found = expanded
    return [tuple(parts)]


def _first_brace(parts: tuple[Part, ...]) -> list[tuple[Part, ...]]:
    for place, part in enumerate(parts):
        if part.kind != "text" or part.quoted:
            continue
        match = re.search(r"\{(?:(-?\d{1,9})\.\.(-?\d{1,9})|([^{}\s]*,[^{}\s]*))\}", part.text)
        if match is None:
            continue
        if match[3] is not None:
            items = match[3].split(",")
        else:
            first, last = int(match[1]), int(match[2])
            step = 1 if first <= last else -1
            items = [str(number) for number in range(first, last + step, step)[: LONGEST + 1]]
        texts = (part.text[: match.start()] + item + part.text[match.end() :] for item in items)
        return [(*parts[:place], Part(kind="text", text=text, quoted=False), *parts[place + 1 :]) for text in texts]
    return [parts]
