"""The door of the public functions: what type each argument must have, and error messages in the words of Python."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from vlft.api.objects import Base, Rows
from vlft.config import table
from vlft.errors import DataError, UsageError, VlftError
from vlft.text import short

P = ParamSpec("P")
T = TypeVar("T")
#: Attribute of a model that `load_model` returned: the folder of its base.
_OF_BASE = "_vlft_base_folder"
_FROM = {"base": "open_base()", "rows": "load_rows()", "model": "load_model()"}


def speaks_python(function: Callable[P, T]) -> Callable[P, T]:
    """Let the errors of a public function begin with its name, and spell flags as keyword arguments."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except DataError:
            raise  # it begins with the row
        except VlftError as error:
            text = in_python(str(error))
            name = f"{function.__name__}()"
            error.args = (text if text.startswith(name) else f"{name}: {text}",)
            raise

    return called


def in_python(text: str) -> str:
    """Return a message of the command line without its prefix, its help line and the dashes of flags.

    Lines with a whole command (`vlft merge FOLDER --out ...`) are not changed.
    """
    text = re.sub(r"^vlft [a-z-]+: ", "", text)
    text = re.sub(r"\n  All flags: vlft .*", "", text)
    return "\n".join(
        line if re.search(r"\bvlft [a-z-]+ .*--", line) else re.sub(r"(?<![\w-])--(\w+)", _bare, line)
        for line in text.split("\n")
    )


def _bare(flag: re.Match[str]) -> str:
    return flag[1] if flag[1] in table.OF_TRAIN else flag[0]


def check_arguments(function: str, **given: Any) -> None:
    """Check the arguments `base`, `rows` and `model` of a public function.

    Raises:
        UsageError: one is not what the function of vlft returns, or they belong to different bases.
    """
    kinds = {"base": Base, "rows": Rows}
    wrong = [
        f"{name} is {_shown(value)}, pass what {_FROM[name]} returns{_inside(value) if name == 'model' else ''}"
        for name, value in given.items()
        if not (isinstance(value, kinds[name]) if name in kinds else _loaded(value))
    ]
    if wrong:
        raise UsageError(f"{function}(): {'; '.join(wrong)}")
    base = given["base"]
    if (rows := given.get("rows")) is not None and _print(rows.base) != _print(base):
        raise UsageError(
            f"{function}(): the rows were loaded with another base ({rows.base.opened.name}), or with other flags of "
            f"open_base(). Load them again with this base ({base.opened.name})"
        )
    if (model := given.get("model")) is not None and (folder := vars(model)[_OF_BASE]) != _folder(base):
        raise UsageError(f"{function}(): the model was loaded from another base ({folder}). Pass the base of the model")


def mark_model(model: torch.nn.Module, base: Base) -> None:
    """Remember that `load_model` made the model, and the base that it came from."""
    vars(model)[_OF_BASE] = _folder(base)


def _loaded(value: Any) -> bool:
    return isinstance(value, torch.nn.Module) and _OF_BASE in vars(value)


def _inside(value: Any) -> str:
    """Say where the model is inside a wrapper, such as DDP or torch.compile."""
    if isinstance(value, torch.nn.Module):
        for name, child in value.named_children():
            if _loaded(child):
                return f" (its .{name})"
    return ""


def _folder(base: Base) -> str:
    return str(base.opened.folder.resolve())


def _print(base: Base) -> tuple[str, str]:
    """What decides the tokens and patches of a row."""
    return base.opened.family.model_type, base.opened.recipe.print


def _shown(value: Any) -> str:
    if value is None:
        return "None"
    kind = f"a {type(value).__name__}"
    return f"{short(repr(value))} ({kind})" if isinstance(value, str | int | float | list | tuple) else kind
