"""The simple commands of a script: assignments, functions, other scripts that it calls, and the commands to report.

Neighbours: `walk` follows loops and conditions around them, `expand` replaces variables.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlft.config.shell import conditions
from vlft.config.shell.expand import EMPTY, Expander, Text, Values, unknown
from vlft.config.shell.syntax import Body, Simple, parse
from vlft.config.shell.words import Part, Token
from vlft.errors import ConfigError

DEEPEST = 8  # functions and scripts that call each other
LARGEST = 200_000  # characters of a variable
KNOWN_ANYWHERE = ("HOME", "USER", "PWD")
_DECLARE = frozenset(("export", "declare", "typeset", "local", "readonly"))
_SHELLS = frozenset(("bash", "sh", "zsh", "dash"))
#: Commands that start another command.
WRAPPERS = frozenset(
    (
        *("srun", "mpirun", "mpiexec", "nohup", "env", "sudo", "timeout", "numactl", "nice", "stdbuf", "setsid"),
        *("singularity", "apptainer", "docker", "conda", "uv", "poetry", "ssh"),
    )
)
#: The variables that `((...))` sets.
_SET = re.compile(r"([A-Za-z_]\w*)\s*(?:[-+*/%]?=(?!=)|\+\+|--)|(?:\+\+|--)([A-Za-z_]\w*)")
_BRACKETS = {"[": "]", "[[": "]]"}


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that the script would run.

    Attributes:
        line: its line in the script.
        words: its words.
        environment: variable -> value, for the variables that the command sees.
        variables: every variable of the script at this place.
        loops: variable of a loop around it -> its value.
        wrappers: commands around it that start it in another way, such as `srun`.
        maybe: the line of a condition around it that is not known; None without one.
    """

    line: int
    words: Values
    environment: Mapping[str, Text]
    variables: Mapping[str, Values]
    loops: Mapping[str, str]
    maybe: int | None
    wrappers: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Script:
    """What a script would do.

    Attributes:
        commands: its commands, in order.
        files: path -> text of the files that it writes with `cat` and a here-document.
        remarks: what was not followed, and why.
        passes_arguments: it passes its own arguments on (`"$@"`), and they are not known.
    """

    commands: list[Command] = field(default_factory=list)
    files: dict[str, Text] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    passes_arguments: bool = False


def _shell_at(words: list[Text]) -> int | None:
    """Return the place of a shell with a script among the words of another command; None without one."""
    names = [os.path.basename(word.text) for word in words]
    return next((at for at, name in enumerate(names[:-1]) if at and name in _SHELLS), None)


class _Ended:
    pass


#: The script, or the function, ends here. Not a bool, so that it differs from every result of a command.
ENDED: bool = _Ended()  # type: ignore[assignment]


class Commands(ABC):
    """The state of a script while it is followed, and its simple commands. `walk` adds the others."""

    def __init__(self, script: Script, path: str, recorded: frozenset[str]) -> None:
        self.script, self.path, self.recorded = script, path, recorded
        self.arguments: Values | None = None
        self.variables: dict[str, Values] = {
            name: (Text(text=os.environ[name]),) for name in KNOWN_ANYWHERE if name in os.environ
        }
        self.exported: set[str] = set()
        self.export_all = False
        self.functions: dict[str, Body] = {}
        self.loops: dict[str, str] = {}
        self.maybe: int | None = None
        self.wrappers: tuple[str, ...] = ()
        self.outer: int | None = None  # the line of an `eval` or `bash -c` around it
        self.depth = 0
        self.steps = 0

    @abstractmethod
    def run(self, body: Body) -> bool:
        """Follow statements. Returns False if the script, or the function, ends among them."""

    def expander(self) -> Expander:
        return Expander(self.variables, self.arguments, self.path)

    def simple(self, command: Simple) -> bool | None:
        if command.arithmetic is not None:
            self._arithmetic(command.arithmetic)
            return None
        expander = self.expander()
        own = [self._assignment(one, expander) for one in command.assignments]
        words = [text for word in command.words for text in expander.word(word)]
        self.script.passes_arguments |= expander.passes_arguments and bool(words)
        self._files(command, words, expander)
        if not words:
            for name, values in own:
                self._set(name, values)
            return True
        name = words[0].text
        if name in _BRACKETS:
            return conditions.decide(words[1:-1] if words[-1].text == _BRACKETS[name] else words[1:])
        if name == "test":
            return conditions.decide(words[1:])
        if name in _DECLARE:
            return self._declare(name, command, expander)
        return self._named(name, words, own, command.line)

    def _named(self, name: str, words: list[Text], own: list[tuple[str, Values]], line: int) -> bool | None:
        if name in ("true", "false", ":"):
            return name != "false"
        if name in ("exit", "return"):
            return ENDED
        if name in ("break", "continue", "getopts", "wait", "trap", "shopt", "alias", "ulimit", "umask"):
            return True
        if name == "shift":
            return self._shift(words[1].text if words[1:] else "1")
        if name == "set":
            self.export_all |= any("a" in word.text for word in words[1:] if word.text.startswith("-"))
            return True
        if name == "unset":
            for word in words[1:]:
                self.variables[word.text] = (EMPTY,)
            return True
        if name in ("read", "mapfile", "readarray"):
            for word in words[1:]:
                if word.text.isidentifier():
                    self.variables[word.text] = (unknown(word.text, f"line {line}: ${word.text} is read as input"),)
            return True
        if name in ("exec", "command", "builtin", "time") and len(words) > 1 and not words[1].text.startswith("-"):
            return self._named(words[1].text, words[1:], own, line)
        if name == "eval":
            return self._inline(words[1:], self.arguments, own, line)
        if name in WRAPPERS and (at := _shell_at(words)) is not None:
            before, self.wrappers = self.wrappers, (*self.wrappers, name)
            self._shell(words[at:], own, line)
            self.wrappers = before
            return True
        if name in ("source", "."):
            return self._other_script(words[1:], own, line, same=True)
        if name in self.functions and name not in self.recorded:
            return self._call(self.functions[name], tuple(words[1:]), own)
        if name in _SHELLS and len(words) > 1:
            return self._shell(words, own, line)
        if name.endswith((".sh", ".bash")):
            return self._other_script(words, own, line, same=False)
        self._record(words, own, line)
        return True

    def _record(self, words: list[Text], own: list[tuple[str, Values]], line: int) -> None:
        seen = self.exported if not self.export_all else set(self.variables)
        environment = {name: self.variables[name][0] for name in seen if self.variables.get(name)}
        environment |= {name: values[0] for name, values in own if values}
        self.script.commands.append(
            Command(
                line=self.outer or line,
                words=tuple(words),
                environment=environment,
                variables=dict(self.variables),
                loops=dict(self.loops),
                maybe=self.maybe,
                wrappers=self.wrappers,
            )
        )

    def _assignment(self, token: Token, expander: Expander) -> tuple[str, Values]:
        head, rest = token.parts[0].text.partition("=")[::2]
        adds = head.endswith("+")
        name, _, index = head.rstrip("+").partition("[")
        before = self.variables.get(name, ())
        if token.array is not None:
            items = tuple(text for word in token.array for text in expander.word(word))
            return name, (before + items if adds else items)
        first = Part(kind="text", text=rest, quoted=token.parts[0].quoted)
        value = expander.one((first, *token.parts[1:]), token.line)
        if index:
            return name, (unknown(name, f"line {token.line}: single items of an array are set"),)
        return name, ((before[0] + value if before else value),) if adds else (value,)

    def _set(self, name: str, values: Values) -> None:
        if sum(len(value.text) for value in values) > LARGEST:
            raise ConfigError(f"${name} grows to more than {LARGEST:,} characters")
        self.variables[name] = values

    def _declare(self, how: str, command: Simple, expander: Expander) -> bool:
        exports = how == "export"
        for word in command.words[1:]:
            text = expander.one(word.parts, word.line).text
            if text.startswith("-"):
                exports |= "x" in text and how in ("declare", "typeset")
                continue
            name = text.partition("=")[0].rstrip("+")
            if "=" in text or word.array is not None:
                self._set(*self._assignment(word, expander))
            if exports:
                self.exported.add(name)
        return True

    def _arithmetic(self, token: Token) -> None:
        """Follow `((...))`: it is not computed, so what it sets or tests is not known."""
        text = self.expander().one(token.parts, token.line).text
        for name in filter(None, (name for found in _SET.findall(text) for name in found)):
            self.variables[name] = (unknown(name, f"line {token.line}: ${name} is changed by (({text}))"),)

    # ---- functions, other scripts, files

    def _shift(self, number: str) -> bool:
        """Drop the first arguments, as bash does: none if there are fewer. Those of the script are not known."""
        if self.arguments is None or not number.isdecimal():
            return True
        enough = int(number) <= len(self.arguments)
        if enough:
            self.arguments = self.arguments[int(number) :]
        return enough

    def _call(self, body: Body, arguments: Values, own: list[tuple[str, Values]]) -> bool | None:
        return self._with(lambda: self.run(body), arguments, self.path, own)

    def _with(
        self, work: Callable[[], bool], arguments: Values | None, path: str, own: list[tuple[str, Values]]
    ) -> bool | None:
        if self.depth >= DEEPEST:
            return None
        before, before_path = self.arguments, self.path
        for name, values in own:
            self._set(name, values)
            self.exported.add(name)
        self.depth += 1
        self.arguments, self.path = arguments, path
        work()
        self.depth -= 1
        self.arguments, self.path = before, before_path
        return None

    def _nested(self, text: str, path: str, arguments: Values | None, own: list[tuple[str, Values]]) -> bool | None:
        body = parse(text)
        return self._with(lambda: self.run(body), arguments, path, own)

    def _inline(
        self, words: list[Text], arguments: Values | None, own: list[tuple[str, Values]], line: int
    ) -> bool | None:
        """Follow a script that is given as words."""
        before, self.outer = self.outer, self.outer or line
        result = self._nested(self._source(words), self.path, arguments, own)
        self.outer = before
        return result

    def _source(self, words: list[Text]) -> str:
        """Return words as the text of a script. A placeholder becomes a variable, because `<` would redirect there."""
        text = " ".join(word.text for word in words)
        for placeholder, why in {one for word in words for one in word.missing}:
            name = f"__unknown_{len(self.variables)}"
            self.variables[name] = (Text(text=placeholder, missing=((placeholder, why),)),)
            text = text.replace(placeholder, f"${{{name}}}")
        return text

    def _shell(self, words: list[Text], own: list[tuple[str, Values]], line: int) -> bool | None:
        rest = words[1:]
        while rest and rest[0].text.startswith("-") and "c" not in rest[0].text:
            rest = rest[1:]
        if rest and rest[0].text.startswith("-"):  # bash -c "text"
            return self._inline(rest[1:2], tuple(rest[3:]), own, line)
        return self._other_script(rest, own, line, same=False)

    def _other_script(self, words: list[Text], own: list[tuple[str, Values]], line: int, *, same: bool) -> bool | None:
        """Follow another script: `bash other.sh`, or `source other.sh` in the `same` shell."""
        if not words or words[0].missing:
            return None
        name = words[0].text
        places = (name, os.path.join(os.path.dirname(self.path), name))
        path = next((place for place in places if os.path.isfile(place)), None)
        if path is None:
            if not name.endswith(("activate", "bashrc", "profile", "conda.sh")):
                self.script.remarks.append(f"line {line}: {name} is not there, so it was not read")
            return None
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            self.script.remarks.append(f"line {line}: {name} cannot be read ({error})")
            return None
        arguments = tuple(words[1:]) if words[1:] or not self._passes_on(same) else self.arguments
        try:
            return self._nested(text, path, arguments, own)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def _passes_on(self, same: bool) -> bool:
        return same or self.script.passes_arguments

    def _files(self, command: Simple, words: list[Text], expander: Expander) -> None:
        """Keep the text of a file that is written with a here-document."""
        if not command.documents or not words or words[0].text not in ("cat", "tee"):
            return
        targets = [expander.one(token.parts, token.line) for token in command.outputs]
        targets += [word for word in words[1:] if words[0].text == "tee" and not word.text.startswith("-")]
        for target in targets:
            self.script.files[target.text] = expander.one(command.documents[-1].document, command.line)
