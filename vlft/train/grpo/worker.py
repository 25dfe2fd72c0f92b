"""The process that computes rewards. It reads one JSON object per line from stdin and answers with one per line.

    python -m vlft.train.grpo.worker

`vlft.train.grpo.rewards` starts it, and ends it if it takes too long. If a reward raises, a second answer has the
completion that it raises for, because the search takes time. A reward may print: its stdout is stderr here. It reads
nothing from stdin, and processes that it forks do not hold the pipes to the run. A killed run leaves neither this
process behind, whatever a reward is doing, nor those that a reward started.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import inspect
import json
import math
import numbers
import os
import queue
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from vlft.config.rewards import COLUMNS, ELSEWHERE
from vlft.config.thinking import spoken

Scores = Callable[..., Any]
LARGEST = 1e18  # of a reward: TRL computes with their squares in float32, which ends at 3.4e38
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
SHOWN = 1000  # characters of an error's text
#: The arguments of a reward.
PASSED = ("prompts", "completions", "completion_ids", *COLUMNS, "trainer_state", "log_extra", "log_metric")


class Refused(Exception):
    """A reward cannot be used, or gave something else than numbers. The text is for the user.

    Attributes:
        place: index of the completion, or None.
    """

    def __init__(self, text: str, place: int | None = None) -> None:
        super().__init__(text)
        self.place = place


def load(kind: str, what: str, file: str) -> Scores:
    """Return the function of a reward, with TRL's signature.

    Raises:
        Refused: the file cannot be imported, or has no such function.
    """
    if kind == "format":
        return _format(re.compile(what, re.DOTALL))
    return _built_in(what) if kind == "built_in" else _function(Path(file), what)


def text_of(message: Any) -> str:
    """The text of a completion or of an answer, in any of TRL's forms."""
    if isinstance(message, str):
        return message
    if isinstance(message, Mapping):
        return text_of(message.get("content") or "")
    return "".join(part.get("text") or "" if "type" in part else text_of(part) for part in message or ())


def _format(pattern: re.Pattern[str]) -> Scores:
    def score(completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(pattern.fullmatch(text_of(one)) is not None) for one in completions]

    return score


def _built_in(name: str) -> Scores:
    def score(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float | None]:
        # As `vlft.metrics.case`: thoughts are not compared.
        pairs = zip(completions, answer, strict=True)
        return [one(spoken(text_of(said)), spoken(right)) for said, right in pairs]

    if name == "edit_ratio":
        from vlft.metrics.sequences import edit_distance

        def one(said: str, right: str) -> float | None:
            longest = max(len(said), len(right))
            return 1.0 - edit_distance(said, right) / longest if longest else 1.0

    else:
        from vlft.metrics import find
        from vlft.metrics.case import Case

        (metric,) = find([name])

        def one(said: str, right: str) -> float | None:
            found = metric.score(Case(answer=said, references=(right,)))
            if found is None:
                raise ValueError(f"{name} needs {metric.needs}, and the answer of this row is {right[:80]!r}")
            return found[0] / found[1]

    return score


def _function(file: Path, name: str) -> Scores:
    function = getattr(_module(file), name, None)
    if not callable(function):
        raise Refused(f"it has no function {name!r}. Add `def {name}(completions, **columns):`")
    if inspect.iscoroutinefunction(function):
        raise Refused(f"{name} is declared with `async def`. Write it with `def`")
    _check_arguments(function, name)
    return function


def _check_arguments(function: Scores, name: str) -> None:
    """Refuse a function that cannot be called with `PASSED`. Its signature may be unknown, if it is written in C."""
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except (ValueError, TypeError):
        return
    takes = signature.parameters.values()
    asked = [
        one for one in takes if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    ]
    if unknown := [one.name for one in asked if one.name not in PASSED]:
        hint = f". {ELSEWHERE}" if unknown[0] in ("solution", "assistant") else ""
        raise Refused(
            f"{name} asks for {unknown[0]!r}, and a row has no such column. It has {', '.join(COLUMNS)}{hint}"
        )
    if not any(one.kind is one.VAR_KEYWORD for one in takes):
        lacks = [one for one in PASSED if one not in signature.parameters]
        if lacks:
            raise Refused(
                f"{name} takes no {lacks[0]!r}, which every reward is called with. Write "
                f"`def {name}(completions, **columns):`"
            )


def _module(file: Path) -> ModuleType:
    """The module of a file, under the name by which `import` finds it, also in processes that a reward spawns."""
    for known in list(sys.modules.values()):
        if getattr(known, "__file__", None) == str(file):
            return known
    sys.path.insert(0, str(file.parent))  # as if the file were run: its neighbours can be imported
    module_name = f"vlft_reward_{file.stem}" if file.stem in sys.modules else file.stem
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise Refused(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses of the file look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # also sys.exit of a file that is a script
        raise Refused(f"it cannot be imported: {_where(error, file)}") from error
    return module


def _where(error: BaseException, file: Path | None) -> str:
    """The line of the user's file that an error comes from, and the error; also the line that raised it, elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [one.lineno for one in frames if one.filename == str(file)]
    if isinstance(error, SyntaxError) and error.filename == str(file):
        own = [error.lineno]
    place = f"{file.name}:{own[-1]} raised " if file is not None and own else ""
    deep = frames[-1] if frames and own and frames[-1].filename != str(file) else None
    inner = f" ({os.path.basename(deep.filename)}:{deep.lineno}, in {deep.name})" if deep is not None else ""
    return f"{place}{type(error).__name__}: {_text(error)}{inner}"


def _text(value: Any, as_text: Callable[[Any], str] = str) -> str:
    """The text of a user's object, which may be long or raise."""
    try:
        text = as_text(value)
    except Exception:  # noqa: BLE001 - it is the user's code
        return "an object without a text"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} and {len(text) - SHOWN:,} more characters"


def scored(function: Scores, file: Path | None, asked: Mapping[str, Any], **tools: Any) -> list[float]:
    """Call a reward and check what it returns.

    Args:
        function: of `load`.
        file: the user's file, for messages.
        asked: prompts, completions, completion_ids and columns, lists of the same length.
        tools: more arguments that TRL passes: trainer_state, log_extra, log_metric.

    Raises:
        Refused: it raises (then the error is the cause), or does not return one finite number for each completion.
    """
    many = len(asked["completions"])
    try:
        returned = function(**asked, **tools)
        if isinstance(returned, (str, bytes, Mapping)) or not hasattr(returned, "__iter__"):
            raise Refused(f"returned {_short(returned)} instead of a list of {many} numbers")
        listed = list(returned)
    except Refused:
        raise
    except BaseException as error:  # also sys.exit and KeyboardInterrupt: nothing in a reward ends the process
        raise Refused(_where(error, file)) from error
    if len(listed) != many:
        raise Refused(f"returned {len(listed)} numbers for {many} completions. Return one for each")
    return [_number(one, place) for place, one in enumerate(listed)]


def _number(one: Any, place: int) -> float:
    try:
        value = one.item() if hasattr(one, "item") and not isinstance(one, numbers.Real) else one
        found = float(value) if hasattr(value, "__float__") else math.nan
    except OverflowError:  # an integer beyond 1e308
        found = LARGEST * 10
    except Exception:  # noqa: BLE001 - any object may be returned
        found = math.nan
    if LARGEST < abs(found) < math.inf:
        raise Refused(
            f"returned {_short(one)}. TRL compares rewards in float32: return numbers between -{LARGEST:g} and "
            f"{LARGEST:g}",
            place,
        )
    if not math.isfinite(found):
        raise Refused(f"returned {_short(one)}. Return a finite number for every completion", place)
    return found


def _culprit(function: Scores, asked: Mapping[str, Any], tools: Mapping[str, Any]) -> int | None:
    """The index of the first completion for which the reward raises when called with it alone."""
    for place in range(len(asked["completions"])):
        alone = {name: [values[place]] for name, values in asked.items()}
        try:
            returned = function(**alone, **tools)
            if isinstance(returned, Iterator):
                list(returned)  # a generator raises only now
        except BaseException:  # noqa: BLE001 - it is the user's code, and only the place is wanted
            return place
    return None


def _short(value: Any) -> str:
    text = _text(value, repr)
    return f"{text[:80] + ('...' if len(text) > 80 else '')} ({type(value).__name__})"


def _metric(name: Any, value: Any) -> float:
    if not math.isfinite(found := float(value)):
        raise ValueError(f"log_metric({name!r}, {value!r}): log finite numbers")
    return found


def _answers(message: Mapping[str, Any], loaded: list[tuple[Scores, Path | None]]) -> Iterator[dict[str, Any]]:
    """The answer to a message. If a reward raises, `searches` is set and a second answer has the place."""
    if "load" in message:
        one = message["load"]
        loaded.append((load(**one), Path(one["file"]) if one["file"] else None))
        yield {}
        return
    function, file = loaded[message["reward"]]
    metrics: list[tuple[str, float]] = []
    extra: list[tuple[str, list[Any]]] = []
    tools = {
        "trainer_state": SimpleNamespace(**message["state"]),
        "log_metric": lambda name, value: metrics.append((str(name), _metric(name, value))),
        "log_extra": lambda column, values: extra.append((column, [str(value) for value in values])),
    }
    try:
        found = scored(function, file, message["asked"], **tools)
    except Refused as refused:
        if refused.__cause__ is None:
            raise
        yield {"refused": str(refused), "place": None, "searches": True}
        yield {"refused": str(refused), "place": _culprit(function, message["asked"], tools)}
        return
    yield {"scores": found, "metrics": metrics, "extra": extra}


def _lines(pipe: int) -> Iterator[str]:
    """The lines of a pipe. A thread reads them, so that the process ends with its parent even in an endless loop."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        unread = b""
        while more := os.read(pipe, 1 << 20):
            *lines, unread = (unread + more).split(b"\n")
            for line in lines:
                waiting.put(line.decode())
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield waiting.get()


def _die_with_the_run() -> None:
    """End this process if the run is killed, even inside C code, and then all processes of its group."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    ended, alive = os.pipe()
    os.register_at_fork(after_in_child=lambda: os.close(alive))
    if os.fork() == 0:
        for pipe in (0, 1):
            os.close(pipe)
        os.read(ended, 1)  # returns when the process that holds `alive` has ended
        os.killpg(0, signal.SIGKILL)
    os.close(ended)


def main() -> None:
    """Answer until stdin ends."""
    if os.getpgrp() == os.getpid():  # as `vlft.train.grpo.rewards` starts it
        _die_with_the_run()
    asked, answers, nothing = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # `sys.stdin` too is now empty
    os.dup2(2, 1)
    for pipe in (asked, answers):
        os.register_at_fork(after_in_child=functools.partial(os.close, pipe))
    sys.path.append(os.getcwd())  # last, so that a file there replaces no module
    loaded: list[tuple[Scores, Path | None]] = []

    def answer(said: dict[str, Any]) -> None:
        with open(answers, "wb", closefd=False) as out:
            out.write(json.dumps(said).encode() + b"\n")

    for line in _lines(asked):
        try:
            for said in _answers(json.loads(line), loaded):
                answer(said)
        except Refused as refused:
            answer({"refused": str(refused), "place": refused.place})


if __name__ == "__main__":
    main()
