"""Check that the paths in flags exist, and suggest a similar path if not. Opens no file."""

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
FEW = 2000  # larger folders are not searched for similar names, because that is slow


def problem(place: Place, path: str) -> str:
    """Return what is wrong with the path in a flag, or ""."""
    if path in place.words:
        return ""
    if place.of == "out":
        return _not_writable(Path(path).expanduser())
    there: dict[str, Callable[[str], bool]] = {"file": os.path.isfile, "folder": os.path.isdir}
    if there.get(place.of, os.path.exists)(path):
        if place.holds is None or os.path.isfile(os.path.join(path, place.holds[0])):
            return ""
        return f"is not a {place.holds[1]} (it has no {place.holds[0]}). Use a {place.holds[1]}-N folder, or auto"
    if os.path.exists(path):
        return f"is not a {place.of}"
    if place.rows and PATTERN.search(path):
        return ""  # `vlft.data` expands it
    hint = near_miss(path)
    if place.rows and HUB_ID.fullmatch(path) and not os.path.isdir(os.path.dirname(path)):
        hint += f". For a data set of the Hugging Face hub: hf download {path} --repo-type dataset --local-dir DIR"
    return f"no such {place.of if place.of == 'folder' else 'file'}{hint}"


def near_miss(path: str) -> str:
    """Return a hint for a path that does not exist, to append to a message; "" if there is none.

    Tries another letter case, another ending, a doubled or missing folder, and typing errors.
    """
    for found in (_other_folder(path), _in_folder(path)):
        if found and found != path:
            return f". Did you mean {found}?"
    missing = _first_missing(path)
    return f" ({missing} does not exist)" if missing not in (path, "") else ""


def _other_folder(path: str) -> str:
    """Return the path without a folder that is repeated, or that is the working directory itself; else ""."""
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
    """Return the path with its first missing part replaced by the most similar name, if that exists; else ""."""
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
    """Return the names in a folder, the names by lower case, and the names by lower case without the ending.

    Cached, because a run may miss thousands of files.
    """
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
    """Return the shortest leading part of a path that does not exist; "" if the path exists."""
    parts = Path(path).parts
    for end in range(1, len(parts) + 1):
        beginning = str(Path(*parts[:end]))
        if not os.path.lexists(beginning):
            return beginning
    return ""


def _not_writable(path: Path) -> str:
    """Return why a folder cannot be written, or "". Checks its nearest existing parent."""
    there = path
    while not os.path.exists(there) and there != there.parent:
        there = there.parent
    if not os.path.isdir(there):
        return "is a file. Use a folder" if there == path else f"{there} is a file, so it cannot contain a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} is not writable"
    return ""
