"""Follow the statements of a shell script, and collect the commands that it would run. Nothing is executed.

A branch whose condition is not known is also followed; a variable whose value depends on it is not known afterwards.
Neighbours: `commands` has the simple commands, `syntax` the statements. `vlft.config.migrate` reads the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from vlft.config.shell import conditions
from vlft.config.shell.commands import ENDED, Command, Commands, Script
from vlft.config.shell.expand import Text, Values, unknown
from vlft.config.shell.syntax import Body, Chain, Choice, Function, Group, Loop, Simple, Statement, parse
from vlft.errors import ConfigError

MOST_STEPS = 5_000  # commands that are followed
__all__ = ["Command", "Script", "follow"]


def follow(text: str, path: str = "", recorded: frozenset[str] = frozenset()) -> Script:
    """Return the commands of a script.

    Args:
        text: its text.
        recorded: functions that are recorded as commands, and not followed.
        path: its file; "" if it has none. Scripts that it calls or reads are found from the working directory, or
            beside this file.

    Raises:
        ConfigError: the text is no valid script, or it would take too long to follow.
    """
    script = Script()
    walker = _Walker(script, path, recorded)
    walker.run(parse(text))
    return script


class _Walker(Commands):
    def run(self, body: Body) -> bool:
        """Follow statements. Returns False if the script, or the function, ends among them."""
        return all(self._statement(one) is not ENDED for one in body)

    def _statement(self, one: Statement) -> bool | None:
        """Follow a statement. Returns whether it succeeds: None if that is not known, or `ENDED`."""
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise ConfigError(f"line {one.line}: the script runs more than {MOST_STEPS:,} commands")
        match one:
            case Simple():
                return self.simple(one)
            case Function():
                self.functions[one.name] = one.body
                return True
            case Group():
                before = dict(self.variables)
                goes_on = self.run(one.body)
                if one.subshell:
                    self.variables = before
                return True if goes_on or one.subshell else ENDED
            case Loop():
                return self._loop(one)
            case Choice():
                return self._case(one) if one.word is not None else self._if(one)
            case Chain():
                return self._chain(one)

    def _goes_on(self, one: Statement) -> bool:
        return self._statement(one) is not ENDED

    def _chain(self, chain: Chain) -> bool | None:
        result = self._statement(chain.parts[0])
        for operator, part in zip(chain.operators, chain.parts[1:], strict=True):
            if result is ENDED:
                return ENDED
            if operator == "|":
                result = self._statement(part)
                continue
            wanted = operator == "&&"
            if result is None:
                self._branches([partial(self._goes_on, part)], chain.line, certain=False)
            elif result is wanted:
                result = self._statement(part)
        return (None if result is None else not result) if chain.negated and result is not ENDED else result

    def _if(self, choice: Choice) -> bool | None:
        branches: list[Callable[[], bool]] = []
        certain = False
        for test, body in choice.branches:
            holds: bool | None = True
            for one in test:
                holds = self._statement(one)
            if holds is False:
                continue
            branches.append(partial(self.run, body))
            if holds is True:
                certain = True
                break
        return self._branches(branches, choice.line, certain=certain)

    def _case(self, choice: Choice) -> bool | None:
        assert choice.word is not None
        value = self.expander().one(choice.word.parts, choice.line)
        branches: list[Callable[[], bool]] = []
        certain = False
        for patterns, (_, body) in zip(choice.patterns, choice.branches, strict=True):
            texts = [self.expander().one(pattern.parts, choice.line) for pattern in patterns]
            holds = any(text.text == "*" for text in texts) or any(
                conditions.decide((value, Text(text="="), text)) for text in texts if not value.missing
            )
            if not holds and not value.missing:
                continue
            branches.append(partial(self.run, body))
            if holds:
                certain = True
                break
        return self._branches(branches, choice.line, certain=certain)

    def _branches(self, branches: Sequence[Callable[[], bool]], line: int, *, certain: bool) -> bool | None:
        """Follow branches. One of them is taken or, if not `certain`, at most one."""
        if certain and len(branches) == 1:
            return True if branches[0]() else ENDED
        before, maybe = dict(self.variables), self.maybe
        ends = [] if certain else [before]
        for branch in branches:
            self.variables, self.maybe = dict(before), line
            if branch():
                ends.append(self.variables)
        self.maybe = maybe
        if not ends:
            return ENDED
        names = dict.fromkeys(name for end in ends for name in end)
        self.variables = {name: self._joined(name, [end.get(name) for end in ends], line) for name in names}
        return None

    def _joined(self, name: str, values: Sequence[Values | None], line: int) -> Values:
        """Return the value of a variable after branches that leave it with these values (None: not set)."""
        if all(value == values[0] for value in values) and values[0] is not None:
            return values[0]
        known = [value for value in values if value is not None]
        base = min(known, key=_length)
        added = [rest for value in known if (rest := _added(base, value)) is not None]
        if len(known) == len(values) and len(added) == len(values) and _length(base):
            for rest in filter(None, added):
                self.script.remarks.append(
                    f"line {line}: ${name} also gets {rest} if a condition holds that is not known. It is left out"
                )
            return base
        return (unknown(name, f"line {line}: ${name} depends on a condition that is not known"),)

    def _loop(self, loop: Loop) -> bool | None:
        if loop.items is None:
            for one in loop.test:
                if self._statement(one) is ENDED:
                    return ENDED
            if loop.name:
                self.variables[loop.name] = (unknown(loop.name, f"line {loop.line}: ${loop.name} is set by a loop"),)
            self._branches([partial(self.run, loop.body)], loop.line, certain=False)
            return True
        expander = self.expander()
        items = [text for word in loop.items for text in expander.word(word)]
        if expander.passes_arguments or not items:
            items = items or [unknown(loop.name, f"line {loop.line}: ${loop.name} is set by a loop over arguments")]
        before = dict(self.loops)
        for item in items:
            self.variables[loop.name] = (item,)
            self.loops[loop.name] = item.text
            self.run(loop.body)
        self.loops = before
        return True


def _length(values: Values) -> int:
    return sum(len(value.text) for value in values)


def _added(base: Values, values: Values) -> str | None:
    """Return what values have more than a base, for an array or a list of words; None if they differ from it."""
    if values[: len(base)] == base:
        return " ".join(value.text for value in values[len(base) :])
    if len(base) == len(values) == 1 and values[0].text.startswith(f"{base[0].text} "):
        return values[0].text.removeprefix(base[0].text).strip()
    return None
