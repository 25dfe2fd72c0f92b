"""Split the text of a shell script into tokens: words with their quotes and expansions, and operators.

Follows the quoting rules of bash (GNU Bash manual, section 3.1.2). Neighbour: `vlft.config.shell.syntax`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from vlft.errors import ConfigError

_OPERATOR = re.compile(r"&&|\|\||;;&|;;|;&|\|&|[;|()\n&]")
_REDIRECT = re.compile(r"\d*(?:<<<|<<-?|>>|>\||<>|>&|<&|[<>])|&>>?")
_NAME = re.compile(r"[A-Za-z_]\w*")
_ARRAY = re.compile(r"[A-Za-z_]\w*\+?=\(")
_SPECIAL = "@*#?$!-0123456789"
#: Words after which a command starts.
_BEFORE_COMMAND = frozenset(("if", "then", "elif", "else", "while", "until", "do", "!", "{", "time"))
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a word.

    Attributes:
        kind: `text`, `variable` (a name, or what `${...}` contains), `arithmetic` or `command` (a substitution).
        text: the text, the name, the expression or the source of the command.
        quoted: it is inside of quotes, so that its value is not split into words.
    """

    kind: Literal["text", "variable", "arithmetic", "command"]
    text: str
    quoted: bool


@dataclass(frozen=True, kw_only=True)
class Token:
    """A word or an operator.

    Attributes:
        line: its line in the script, from 1.
        operator: the operator, e.g. `&&`; `((` for an arithmetic command; "" for a word.
        parts: the pieces of a word.
        array: the words of an array, for an assignment `name=(...)`; the name and `=` or `+=` are in `parts`.
        document: the text of a here-document, for the operators `<<` and `<<-`.
    """

    line: int
    operator: str = ""
    parts: tuple[Part, ...] = ()
    array: tuple[Token, ...] | None = None
    document: tuple[Part, ...] = ()

    @property
    def plain(self) -> str:
        """The text of a word without quotes and expansions, such as a keyword; else ""."""
        return "".join(part.text for part in self.parts) if all(_bare(part) for part in self.parts) else ""


def _bare(part: Part) -> bool:
    return part.kind == "text" and not part.quoted


def tokens_of(text: str) -> list[Token]:
    """Split a script into tokens.

    Raises:
        ConfigError: quotes, brackets or a here-document are never closed.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # In a notebook a cell starts with %%bash, or a line with !
    text = re.sub(r"^%%.*$|^!(?=\w)", "", text, flags=re.M)
    # bash does not continue a line if spaces follow the backslash, but that is what was meant.
    return _Lexer(re.sub(r"\\[ \t]+\n", "\\\n", text)).run()


def parts_of(text: str, line: int) -> tuple[Part, ...]:
    """Return the pieces of a text that is expanded as if in double quotes: a here-document, or a default value."""
    return _Lexer(text, line).quoted_until("")


def word_parts(text: str, line: int) -> tuple[Part, ...]:
    """Return the pieces of a single word, whose quotes are removed: the default value in `${name:-word}`."""
    lexer = _Lexer(text, line)
    parts: list[Part] = []
    while lexer.at < len(lexer.text):
        lexer.piece(parts)
    return tuple(parts)


class _Lexer:
    def __init__(self, text: str, line: int = 1) -> None:
        self.text, self.at, self._line = text, 0, line
        self._from = 0
        self._documents: list[tuple[int, str, bool, bool]] = []

    def run(self, until: str = "") -> list[Token]:
        """Return the tokens up to an operator, which is consumed; or all tokens."""
        found: list[Token] = []
        testing = False
        while self._skip_space(comments=True):
            line = self.line
            if self.text.startswith("((", self.at) and self._command_starts(found):
                found.append(Token(line=line, operator="((", parts=parts_of(self._inside("((", "))"), line)))
                continue
            if not testing and (match := _REDIRECT.match(self.text, self.at)):
                self.at = match.end()
                found.append(self._redirect(match[0], line, len(found)))
                continue
            if (match := _OPERATOR.match(self.text, self.at)) and not (testing and match[0] in "()\n"):
                self.at = match.end()
                if match[0] == until:
                    return found
                found.append(Token(line=line, operator=match[0]))
                if match[0] == "\n":
                    self._read_documents(found)
                continue
            if testing and self.text[self.at] in "()<>\n":
                self.at += 1
                continue
            found.append(self._word(line))
            testing = (testing or found[-1].plain == "[[") and found[-1].plain != "]]"
        if until:
            raise self._never_closed(until, self.line)
        if self._documents:
            raise self._never_closed(self._documents[0][1], self.line)
        return found

    @property
    def line(self) -> int:
        self._line += self.text.count("\n", self._from, self.at)
        self._from = max(self._from, self.at)
        return self._line

    def _never_closed(self, what: str, line: int) -> ConfigError:
        return ConfigError(f"line {line}: a {what} is missing, so the script cannot be read")

    def _skip_space(self, *, comments: bool) -> bool:
        while self.at < len(self.text):
            if self.text[self.at] in " \t":
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            elif comments and self.text[self.at] == "#":
                end = self.text.find("\n", self.at)
                self.at = end if end >= 0 else len(self.text)
            else:
                return True
        return False

    @staticmethod
    def _command_starts(found: list[Token]) -> bool:
        if not found:
            return True
        last = found[-1]
        if last.operator:
            return last.operator in ("\n", ";", "&&", "||", "|", "&", "(", ";;", "((")
        return last.plain in _BEFORE_COMMAND or last.plain == "for"

    def _redirect(self, operator: str, line: int, place: int) -> Token:
        kind = operator.lstrip("0123456789")
        if kind in ("<<", "<<-"):
            self._skip_space(comments=False)
            start = self.at
            end = self._word(line)
            name = "".join(part.text for part in end.parts)
            literal = any(part.quoted for part in end.parts) or "\\" in self.text[start : self.at]
            self._documents.append((place, name, kind == "<<-", literal))
        return Token(line=line, operator=kind)

    def _read_documents(self, found: list[Token]) -> None:
        for place, name, tabs, literal in self._documents:
            lines = []
            while True:
                if self.at >= len(self.text):
                    raise self._never_closed(name, found[place].line)
                end = self.text.find("\n", self.at)
                end = end if end >= 0 else len(self.text)
                line = self.text[self.at : end]
                self.at = end + 1
                line = line.lstrip("\t") if tabs else line
                if line == name:
                    break
                lines.append(line)
            text = "".join(f"{line}\n" for line in lines)
            one = found[place]
            parts = (Part(kind="text", text=text, quoted=True),) if literal else parts_of(text, one.line)
            found[place] = Token(line=one.line, operator=one.operator, document=parts)
        self._documents = []

    def _word(self, line: int) -> Token:
        if match := _ARRAY.match(self.text, self.at):
            self.at = match.end()
            words = tuple(one for one in self.run(until=")") if not one.operator)
            name = Part(kind="text", text=match[0][:-1], quoted=False)
            return Token(line=line, parts=(name,), array=words)
        parts: list[Part] = []
        while self.at < len(self.text) and self.text[self.at] not in " \t\n;&|()<>":
            self.piece(parts)
        return Token(line=line, parts=tuple(parts))

    def piece(self, parts: list[Part]) -> None:
        """Read the next piece of a word."""
        char = self.text[self.at]
        if char == "\\":
            after = self.text[self.at + 1 : self.at + 2]
            self.at += 2
            if after != "\n":
                parts.append(Part(kind="text", text=after, quoted=True))
        elif char == "'":
            parts.append(Part(kind="text", text=self._until("'", self.at + 1), quoted=True))
        elif char == '"':
            self.at += 1
            parts += self.quoted_until('"') or (Part(kind="text", text="", quoted=True),)
        elif self.text.startswith("$'", self.at):
            plain = re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), self._until("'", self.at + 2))
            parts.append(Part(kind="text", text=plain, quoted=True))
        elif char in "$`":
            parts.append(self._expansion(quoted=False))
        else:
            end = re.compile(r"""[^\s;&|()<>\\'"$`]+|.""", re.S).match(self.text, self.at)
            assert end is not None
            self.at = end.end()
            parts.append(Part(kind="text", text=end[0], quoted=False))

    def quoted_until(self, end: str) -> tuple[Part, ...]:
        """Read a text in double quotes. `end` is consumed; "" reads to the end of the text."""
        parts: list[Part] = []
        plain = ""
        line = self.line
        while self.at < len(self.text):
            char = self.text[self.at]
            if end and char == end:
                self.at += 1
                return (*parts, *((Part(kind="text", text=plain, quoted=True),) if plain else ()))
            if char == "\\" and self.text[self.at + 1 : self.at + 2] in ("$", "`", '"', "\\", "\n"):
                plain += self.text[self.at + 1].replace("\n", "")
                self.at += 2
            elif char in "$`":
                parts += [Part(kind="text", text=plain, quoted=True)] if plain else []
                plain = ""
                parts.append(self._expansion(quoted=True))
            else:
                plain += char
                self.at += 1
        if end:
            raise self._never_closed(end, line)
        return (*parts, *((Part(kind="text", text=plain, quoted=True),) if plain else ()))

    def _expansion(self, *, quoted: bool) -> Part:
        if self.text[self.at] == "`":
            return Part(kind="command", text=self._until("`", self.at + 1), quoted=quoted)
        if self.text.startswith("$((", self.at):
            self.at += 1
            return Part(kind="arithmetic", text=self._inside("((", "))"), quoted=quoted)
        if self.text.startswith("$(", self.at):
            self.at += 1
            return Part(kind="command", text=self._inside("(", ")"), quoted=quoted)
        if self.text.startswith("${", self.at):
            self.at += 1
            return Part(kind="variable", text=self._inside("{", "}"), quoted=quoted)
        name = _NAME.match(self.text, self.at + 1)
        after = self.text[self.at + 1 : self.at + 2]
        if name is None and (not after or after not in _SPECIAL):
            self.at += 1
            return Part(kind="text", text="$", quoted=quoted)
        text = name[0] if name else after
        self.at += 1 + len(text)
        return Part(kind="variable", text=text, quoted=quoted)

    def _until(self, end: str, start: int) -> str:
        place = self.text.find(end, start)
        if place < 0:
            raise self._never_closed(end, self.line)
        self.at = place + 1
        return self.text[start:place]

    def _inside(self, opening: str, closing: str) -> str:
        """Return the text between brackets. Nested brackets and quotes are skipped."""
        line = self.line
        start = self.at + len(opening)
        place, depth = start, 0
        left, right = opening[0], closing[0]
        while place < len(self.text):
            char = self.text[place]
            if char == "\\":
                place += 1
            elif char in "'\"" and opening != "((":
                end = self.text.find(char, place + 1)
                place = end if end >= 0 else len(self.text)
            elif char == left:
                depth += 1
            elif depth == 0 and self.text.startswith(closing, place):
                self.at = place + len(closing)
                return self.text[start:place]
            elif char == right:
                depth -= 1
            place += 1
        raise self._never_closed(closing, line)
