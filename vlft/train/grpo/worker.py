"""The process that computes rewards. It reads one JSON object per line from stdin and answers with one per line.

    python -m vlft.train.grpo.worker

`vlft.train.grpo.rewards` starts it, and ends it if it takes too long. A reward may print: its stdout is stderr here.
When stdin ends the process ends too, whatever a reward is doing, so a killed run leaves none behind.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import numbers
import os
import queue
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlft.config.thinking import spoken

Scores = Callable[..., Any]


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
    sys.path.insert(0, str(file.parent))  # as if the file were run: its neighbours can be imported
    module_name = f"vlft_reward_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise Refused(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses of the file look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise Refused(f"it cannot be imported: {_where(error, file)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise Refused(f"it has no function {name!r}. Add `def {name}(completions, **columns):`")
    if inspect.iscoroutinefunction(function):
        raise Refused(f"{name} is declared with `async def`. Write it with `def`")
    return function


def _where(error: BaseException, file: Path | None) -> str:
    """The line of the user's file that an error comes from, and the error."""
    frames = [one.lineno for one in traceback.extract_tb(error.__traceback__) if one.filename == str(file)]
    if isinstance(error, SyntaxError) and error.filename == str(file):
        frames = [error.lineno]
    place = f"{file.name}:{frames[-1]} raised " if file is not None and frames else ""
    return f"{place}{type(error).__name__}: {error}"


def scored(function: Scores, file: Path | None, asked: Mapping[str, Any], **tools: Any) -> list[float]:
    """Call a reward and check what it returns.

    Args:
        function: of `load`.
        file: the user's file, for messages.
        asked: prompts, completions, completion_ids and columns, lists of the same length.
        tools: more arguments that TRL passes: trainer_state, log_extra, log_metric.

    Raises:
        Refused: it raises, or does not return one finite number for each completion.
    """
    many = len(asked["completions"])
    try:
        returned = function(**asked, **tools)
    except Exception as error:
        raise Refused(_where(error, file), _culprit(function, asked, tools)) from error
    if isinstance(returned, (str, bytes, Mapping)) or not hasattr(returned, "__iter__"):
        raise Refused(f"returned {_short(returned)} instead of a list of {many} numbers")
    listed = list(returned)
    if len(listed) != many:
        raise Refused(f"returned {len(listed)} numbers for {many} completions. Return one for each")
    return [_number(one, place) for place, one in enumerate(listed)]


def _number(one: Any, place: int) -> float:
    value = one.item() if hasattr(one, "item") and not isinstance(one, numbers.Real) else one
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise Refused(f"returned {_short(one)}. Return a finite number for every completion", place)


def _culprit(function: Scores, asked: Mapping[str, Any], tools: Mapping[str, Any]) -> int | None:
    """The index of the first completion for which the reward raises when called with it alone."""
    for place in range(len(asked["completions"])):
        alone = {name: [values[place]] for name, values in asked.items()}
        try:
            function(**alone, **tools)
        except Exception:  # noqa: BLE001 - it is the user's code, and only the place is wanted
            return place
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text[:80] + ('...' if len(text) > 80 else '')} ({type(value).__name__})"


def _answer(message: Mapping[str, Any], loaded: list[tuple[Scores, Path | None]]) -> dict[str, Any]:
    if "load" in message:
        one = message["load"]
        loaded.append((load(**one), Path(one["file"]) if one["file"] else None))
        return {}
    function, file = loaded[message["reward"]]
    metrics: list[tuple[str, float]] = []
    extra: list[tuple[str, list[Any]]] = []
    found = scored(
        function,
        file,
        message["asked"],
        trainer_state=SimpleNamespace(**message["state"]),
        log_metric=lambda name, value: metrics.append((name, float(value))),
        log_extra=lambda column, values: extra.append((column, [str(value) for value in values])),
    )
    return {"scores": found, "metrics": metrics, "extra": extra}


def _lines() -> Iterator[str]:
    """The lines of stdin. A thread reads them, so that the process ends with its parent even in an endless loop."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            waiting.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield waiting.get()


def main() -> None:
    """Answer until stdin ends."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        loaded: list[tuple[Scores, Path | None]] = []
        for line in _lines():
            try:
                said = _answer(json.loads(line), loaded)
            except Refused as refused:
                said = {"refused": str(refused), "place": refused.place}
            out.write(json.dumps(said) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
