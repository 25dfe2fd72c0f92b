"""A metric of the user: a function in a Python file, called once for each row.

    # tone.py; vlft eval RUN rows.json --metric tone.py:polite
    def polite(answer, reference):
        return "please" in answer.lower()

The function takes any of `answer`, `reference` (the row's own right answer), `references` (a list of all of them),
`question` and `row` (a dict) by these names. It returns a number, True or False, or None if it does not apply to the
row. The figure is the mean. With `polite.higher = False` after the function, a smaller figure is better.

The file is the user's own code, and runs as such.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from vlft.errors import ConfigError, VlftError
from vlft.metrics.case import Case, Metric, mean
from vlft.metrics.names import OWN
from vlft.text import error_text, short

ARGUMENTS = ("answer", "reference", "references", "question", "row")


def own_metric(word: str) -> Metric:
    """Return the metric of a word such as `tone.py:polite`. Its name is the word.

    Raises:
        ConfigError: the file or the function is missing or cannot be used. The metric's `score` raises VlftError, with
            the row and the line of the file, if the function fails or returns something else.
    """
    written, colon, name = word.rpartition(":")
    if not colon or not name.isidentifier():
        raise ConfigError(f"metric {word}: name a function of a Python file: {OWN}")
    path = Path(written).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"metric {word}: there is no file {path}. Check the path: {OWN}")
    function = getattr(_load(path, word), name, None)
    if not callable(function):
        found = "no function" if function is None else f"a {type(function).__name__} and no function"
        raise ConfigError(f"metric {word}: {written} has {found} {name!r}. Add `def {name}(answer, reference):`")
    return Metric(
        name=word,
        text=_first_line(function) or f"{name} of {written}",
        score=_score(function, _accepted(function, word), path, word),
        value=mean,
        higher=bool(getattr(function, "higher", True)),
        needs=f"a number from {name}",
    )


def _load(path: Path, word: str) -> ModuleType:
    """Run the file, under a module name that no other file has."""
    name = f"vlft_metric_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"metric {word}: {path} is no Python file. Its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of the file look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"metric {word}: {_where(error, path)}. The file must be importable") from error
    return module


def _accepted(function: Callable[..., Any], word: str) -> tuple[str, ...]:
    """Return which of `ARGUMENTS` the function takes by name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metric {word}: its arguments cannot be read. Write it with `def`") from error
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"metric {word} is declared with `async def`. Write it with `def`")
    takes = ", ".join(ARGUMENTS)
    for one in parameters:
        needed = one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        if needed and (one.name not in ARGUMENTS or one.kind is one.POSITIONAL_ONLY):
            raise ConfigError(f"metric {word} has the argument {one.name!r}. It may have, by name: {takes}")
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return ARGUMENTS
    named = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    return tuple(name for name in ARGUMENTS if name in named)


def _score(
    function: Callable[..., Any], accepted: tuple[str, ...], path: Path, word: str
) -> Callable[[Case], tuple[float, float] | None]:
    def score(case: Case) -> tuple[float, float] | None:
        given = {
            "answer": case.answer,
            "reference": case.references[0],
            "references": list(case.references),
            "question": case.question,
            "row": dict(case.row),
        }
        try:
            returned = function(**{name: given[name] for name in accepted})
        except Exception as error:
            raise VlftError(f"{_row(case)}: metric {word}: {_where(error, path)}") from error
        if returned is None:
            return None
        if isinstance(returned, np.bool_ | numbers.Real):
            try:
                number = float(returned)
            except OverflowError:
                number = math.inf
            if math.isfinite(number):
                return number, 1.0
        kind = type(returned).__name__
        what = f"{short(repr(returned), 80)} ({kind})"
        raise VlftError(f"{_row(case)}: metric {word} returned {what}. Return a finite number, True, False or None")

    return score


def _row(case: Case) -> str:
    """Return the name of a row as messages begin."""
    if "file" in case.row and "index" in case.row:
        return f"{case.row['file']}[{case.row['index']}]"
    return "a row"


def _where(error: BaseException, path: Path) -> str:
    """Return the line of the user's file that an error comes from, and the error."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines = [error.lineno]
    place = f"{path.name}:{lines[-1]}" if lines else path.name
    return f"{place} raised {type(error).__name__}: {error_text(error)}"


def _first_line(function: Callable[..., Any]) -> str:
    lines = (inspect.getdoc(function) or "").splitlines() if inspect.isfunction(function) else []
    return lines[0].strip() if lines else ""
