"""Group the tokens of a shell script into statements.

Neighbours: `words` has the tokens, `walk` follows the statements.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from vlft.config.shell.words import Part, Token, tokens_of
from vlft.errors import ConfigError

_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*(\[[^\]]*\])?\+?=")
_REDIRECTS = frozenset(("<", ">", ">>", ">|", "<<", "<<-", "<<<", "<>", ">&", "<&", "&>", "&>>"))
_MISPLACED = frozenset(("then", "elif", "else", "fi", "do", "done", "esac", "}", ")", ";;"))
_DEEPEST = 60


@dataclass(frozen=True, kw_only=True)
class Simple:
    """A simple command.

    Attributes:
        assignments: the assignments before its words.
        words: its words. None at all if it only assigns.
        documents: its here-documents.
        outputs: the files that its output is redirected to.
        arithmetic: the expression of `((...))`; None for other commands.
    """

    line: int
    assignments: tuple[Token, ...] = ()
    words: tuple[Token, ...] = ()
    documents: tuple[Token, ...] = ()
    outputs: tuple[Token, ...] = ()
    arithmetic: Token | None = None


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A loop. `name` and `items` belong to `for`: items is None for `for name` and for `for ((...))`."""

    line: int
    name: str
    items: tuple[Token, ...] | None
    test: Body
    body: Body


@dataclass(frozen=True, kw_only=True)
class Choice:
    """`if` or `case`: (test, body) for each branch. A `case` has no tests, and `word` and `patterns` instead."""

    line: int
    branches: tuple[tuple[Body, Body], ...]
    word: Token | None = None
    patterns: tuple[tuple[Token, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Function:
    line: int
    name: str
    body: Body


@dataclass(frozen=True, kw_only=True)
class Group:
    """Commands in braces, or in parentheses (a subshell, whose variables are lost at its end)."""

    line: int
    body: Body
    subshell: bool


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A pipeline, or commands joined by `&&` and `||`: operators[i] stands between parts[i] and parts[i + 1]."""

    line: int
    parts: tuple[Statement, ...]
    operators: tuple[str, ...]
    negated: bool = False


Statement = Simple | Loop | Choice | Function | Group | Chain
Body = tuple[Statement, ...]


def parse(text: str) -> Body:
    """Parse a script.

    Raises:
        ConfigError: it is no valid script: something is never closed, or a keyword is out of place.
    """
    parser = _Parser(tokens_of(text))
    body = parser.body(())
    if (left := parser.peek()) is not None:
        raise ConfigError(
            f"line {left.line}: {left.operator or left.plain} is out of place, so this is no shell script"
        )
    return body


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self._tokens, self._at, self._depth = tokens, 0, 0

    def peek(self, ahead: int = 0) -> Token | None:
        return self._tokens[self._at + ahead] if self._at + ahead < len(self._tokens) else None

    def _next(self, wanted: str) -> Token:
        token = self.peek()
        if token is None:
            last = self._tokens[-1].line if self._tokens else 1
            raise ConfigError(f"line {last}: the script ends, but {wanted} is missing")
        self._at += 1
        return token

    def _is(self, *words: str) -> bool:
        token = self.peek()
        return token is not None and (token.operator or token.plain) in words

    def _expect(self, word: str) -> Token:
        token = self._next(word)
        if (token.operator or token.plain) != word:
            raise ConfigError(f"line {token.line}: {word} is missing before {token.operator or token.plain}")
        return token

    def _skip(self, *operators: str) -> None:
        while (token := self.peek()) is not None and token.operator in operators:
            self._at += 1

    def body(self, ends: Collection[str]) -> Body:
        """Read statements up to one of the words, which is not consumed."""
        found: list[Statement] = []
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ConfigError(f"more than {_DEEPEST} levels of nesting: this is no script to train with")
        while True:
            self._skip("\n", ";", "&")
            token = self.peek()
            if token is None or (token.operator or token.plain) in ends:
                break
            before = self._at
            found.append(self._and_or())
            if self._at == before:
                break
        self._depth -= 1
        return tuple(found)

    def _and_or(self) -> Statement:
        parts, operators = [self._pipeline()], []
        while self._is("&&", "||"):
            operators.append(self._next("").operator)
            self._skip("\n")
            parts.append(self._pipeline())
        return (
            parts[0] if len(parts) == 1 else Chain(line=parts[0].line, parts=tuple(parts), operators=tuple(operators))
        )

    def _pipeline(self) -> Statement:
        line = self._tokens[self._at].line if self.peek() else 0
        negated = False
        while self._is("!"):
            self._at += 1
            negated = not negated
        parts = [self._command()]
        while self._is("|", "|&"):
            self._at += 1
            self._skip("\n")
            parts.append(self._command())
        if len(parts) == 1 and not negated:
            return parts[0]
        return Chain(line=line, parts=tuple(parts), operators=("|",) * (len(parts) - 1), negated=negated)

    def _command(self) -> Statement:
        token = self._next("a command")
        self._at -= 1
        word = token.operator or token.plain
        if word in ("for", "select"):
            return self._for()
        if word in ("while", "until"):
            self._at += 1
            test = self.body(("do",))
            return self._redirected(Loop(line=token.line, name="", items=None, test=test, body=self._do()))
        if word == "if":
            return self._redirected(self._if())
        if word == "case":
            return self._redirected(self._case())
        if word in ("{", "("):
            self._at += 1
            end = {"{": "}", "(": ")"}[word]
            body = self.body((end,))
            self._expect(end)
            return self._redirected(Group(line=token.line, body=body, subshell=word == "("))
        if word in _MISPLACED:
            raise ConfigError(f"line {token.line}: {word} is out of place, so this is no shell script")
        after = self.peek(1)
        if word == "function" or (after is not None and after.operator == "(" and self._closes(2)):
            return self._function(keyword=word == "function")
        return self._simple()

    def _closes(self, ahead: int) -> bool:
        token = self.peek(ahead)
        return token is not None and token.operator == ")"

    def _redirected(self, statement: Statement) -> Statement:
        while self._is(*_REDIRECTS):
            document = bool(self._next("").document)
            if not document and self.peek() is not None:
                self._at += 1
        return statement

    def _function(self, *, keyword: bool) -> Statement:
        self._at += keyword
        name = self._next("the name of a function")
        if self._is("("):
            self._at += 2
        self._skip("\n")
        return Function(line=name.line, name=name.plain, body=(self._command(),))

    def _for(self) -> Statement:
        line = self._next("for").line
        items: tuple[Token, ...] | None = None
        name = ""
        if self._is("(("):
            self._at += 1
        else:
            name = self._next("a name").plain
            self._skip("\n")
            if self._is("in"):
                self._at += 1
                words = []
                while (token := self.peek()) is not None and not token.operator:
                    words.append(token)
                    self._at += 1
                items = tuple(words)
        self._skip(";", "\n")
        return self._redirected(Loop(line=line, name=name, items=items, test=(), body=self._do()))

    def _do(self) -> Body:
        self._skip(";", "\n")
        self._expect("do")
        body = self.body(("done",))
        self._expect("done")
        return body

    def _if(self) -> Choice:
        line = self._expect("if").line
        branches = []
        while True:
            test = self.body(("then",))
            self._expect("then")
            branches.append((test, self.body(("elif", "else", "fi"))))
            if not self._is("elif"):
                break
            self._at += 1
        if self._is("else"):
            self._at += 1
            branches.append(((), self.body(("fi",))))
        self._expect("fi")
        return Choice(line=line, branches=tuple(branches))

    def _case(self) -> Choice:
        line = self._expect("case").line
        word = self._next("a word")
        self._skip("\n")
        self._expect("in")
        branches, patterns = [], []
        while True:
            self._skip("\n")
            if self._is("esac"):
                break
            self._skip("(")
            choices = []
            while not self._is(")"):
                token = self._next(")")
                choices += [token] if not token.operator else []
            self._at += 1
            patterns.append(tuple(choices))
            branches.append(((), self.body((";;", ";&", ";;&", "esac"))))
            self._skip(";;", ";&", ";;&")
        self._expect("esac")
        return Choice(line=line, branches=tuple(branches), word=word, patterns=tuple(patterns))

    def _simple(self) -> Statement:
        first = self._next("a command")
        if first.operator == "((":
            return Simple(line=first.line, arithmetic=first)
        self._at -= 1
        assignments: list[Token] = []
        words: list[Token] = []
        documents: list[Token] = []
        outputs: list[Token] = []
        testing = False
        while (token := self.peek()) is not None:
            if token.operator in _REDIRECTS:
                self._at += 1
                documents += [token] if token.document else []
                if token.operator not in ("<<", "<<-") and (target := self.peek()) is not None and not target.operator:
                    self._at += 1
                    outputs += [target] if token.operator in (">", ">>", ">|") else []
                continue
            if token.operator and not testing:
                break
            self._at += 1
            if not words and _is_assignment(token):
                assignments.append(token)
            elif token.operator:  # inside of [[ ]], where && and || are words
                words.append(Token(line=token.line, parts=(Part(kind="text", text=token.operator, quoted=True),)))
            else:
                words.append(token)
            testing = (testing or token.plain == "[[") and token.plain != "]]"
        return Simple(
            line=first.line,
            assignments=tuple(assignments),
            words=tuple(words),
            documents=tuple(documents),
            outputs=tuple(outputs),
        )


def _is_assignment(token: Token) -> bool:
    text = token.parts[0].text if token.parts else ""
    return bool(token.parts) and not token.parts[0].quoted and _ASSIGNMENT.match(text) is not None
