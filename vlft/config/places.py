"""Paths that flags name: whether they are there, and the near miss where they are not. Opens nothing."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

from vlft.config.kinds import Place

PATTERN = re.compile(r"[*?\[]|\{.*\}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHOWN = 3
FEW = 2000  # names of a folder that are compared letter by letter


def problem(place: Place, path: str) -> str:
    """What is wrong with a path that a flag names; "" where nothing is."""
    if path in place.words:
        return ""
    if place.of == "out":
        return _not_writable(Path(path).expanduser())
    there: dict[str, Callable[[str], bool]] = {"file": os.path.isfile, "folder": os.path.isdir}
    if there.get(place.of, os.path.exists)(path):
        if place.holds is None or os.path.isfile(os.path.join(path, place.holds[0])):
            return ""
        return f"no {place.holds[1]} there (it has no {place.holds[0]}). Name a {place.holds[1]}-N folder, or auto"
    if os.path.exists(path):
        return f"is no {place.of}"
    if place.rows and PATTERN.search(path):
        return ""  # the data layer expands it
    hint = near_miss(path)
    if place.rows and HUB_ID.fullmatch(path) and not os.path.isdir(os.path.dirname(path)):
        hint += f". If it is a data set of the Hugging Face hub: hf download {path} --repo-type dataset --local-dir DIR"
    return f"no such {place.of if place.of == 'folder' else 'file'}{hint}"


def near_miss(path: str) -> str:
    """A hint at what may have been meant by a path that is not there, to be put behind a message; "" without one.

    Looks for another letter case, another ending, a doubled or missing folder, and a slip of the fingers.
    """
    for found in (_other_folder(path), _in_folder(path)):
        if found and found != path:
            return f". Did you mean {found}?"
    missing = _first_missing(path)
    return f" ({missing} does not exist)" if missing not in (path, "") else ""


def _other_folder(path: str) -> str:
    """The path without a folder that stands there twice, or that the working directory is in already."""
    parts = Path(path).parts
    for place in range(1, len(parts)):
        if parts[place] == parts[place - 1]:
            shorter = str(Path(*parts[:place], *parts[place + 1 :]))
            if os.path.exists(shorter):
                return shorter
    if len(parts) > 1 and parts[0] == Path.cwd().name and os.path.exists(Path(*parts[1:])):
        return str(Path(*parts[1:]))
    return ""


def _in_folder(path: str) -> str:
    """The path with the first part that is not there replaced by the closest that is, if the rest is there then."""
    missing = _first_missing(path)
    if not missing:
        return ""
    folder, name = os.path.split(missing)
    names, by_case, by_stem = _listed(os.path.abspath(folder))
    like = [*by_case.get(name.lower(), ()), *by_stem.get(os.path.splitext(name.lower())[0], ())]
    if len(names) <= FEW:
        like += difflib.get_close_matches(name, names, n=SHOWN, cutoff=0.8)
    rest = path[len(missing) :]
    return next((meant for other in like if os.path.exists(meant := os.path.join(folder, other) + rest)), "")


@functools.lru_cache(maxsize=64)
def _listed(folder: str) -> tuple[list[str], dict[str, list[str]], dict[str, list[str]]]:
    """Names in a folder; by their small letters; by those without the ending. A run may miss thousands of files."""
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError):
        names = []
    by_case: dict[str, list[str]] = {}
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_case.setdefault(name.lower(), []).append(name)
        by_stem.setdefault(os.path.splitext(name.lower())[0], []).append(name)
    return names, by_case, by_stem


def _first_missing(path: str) -> str:
    """The shortest beginning of a path that is not there; "" where all of it is."""
    parts = Path(path).parts
    for end in range(1, len(parts) + 1):
        beginning = str(Path(*parts[:end]))
        if not os.path.lexists(beginning):
            return beginning
    return ""


def _not_writable(path: Path) -> str:
    """Why a folder cannot be written; "" where it can. The first of its folders that is there decides."""
    there = path
    while not os.path.exists(there) and there != there.parent:
        there = there.parent
    if not os.path.isdir(there):
        return "is a file. Name a folder" if there == path else f"{there} is a file, so there can be no folder in it"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} is not writable"
    return ""
