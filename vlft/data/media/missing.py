"""Say where a missing picture or video might be, and which flag or change would find all files of that kind.

Neighbours: `vlft.config.places` does the same for paths in flags. `vlft.data.media.read` calls this for rows.
"""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Iterator

from vlft.config.places import near_miss, similar, spellings, tails

SUBFOLDERS = 64  # subfolders that are searched
ABOVE = 3  # folders above the image folder that are searched
FEW = 200  # larger folders are not searched for typing errors: thousands of files may be missing


def missing(path: str, folder: str | None = None) -> str:
    """Return the message about a file that does not exist.

    Args:
        path: the file, absolute or relative to the working directory.
        folder: where relative paths of its row start; None if it is in no row.
    """
    found = None if folder is None else _found(path, _in_row(path, folder), folder)
    if found is not None:
        return f"{path}: no such file. Found as {_shown(found[0])}: {found[1]}"
    hint = near_miss(path, few=FEW, numbers=False)
    end = "" if hint.endswith("?") else "."
    return f"{path}: no such file{hint}{end} Put it there, or correct the path or --image_folder"


def _found(path: str, value: str, folder: str) -> tuple[str, str] | None:
    """Return where the file may be, and what to change to have it found. Searches the likely places first."""
    others = list(spellings(value))
    for other, why in others:
        if os.path.exists(found := os.path.join(folder, other)):
            return found, f"the path {why}. Correct the rows"
    written = [(value, ""), *((other, f", and the path {why}") for other, why in others)]
    for places in (_other_folder, _renamed, functools.partial(_shorter, value)):
        for one, why in written:
            for found, change in places(one, folder):
                if os.path.exists(found):
                    return found, f"{change}{why}"
    return None


def _in_row(path: str, folder: str) -> str:
    """Return the path as its row has it."""
    start = f"{folder.rstrip('/')}/" if folder else ""
    return path[len(start) :] if path.startswith(start) else path


def _other_folder(value: str, folder: str) -> Iterator[tuple[str, str]]:
    """Yield the places of a path that starts in another folder than the image folder."""
    if value.startswith("/"):
        return
    here = os.path.abspath(folder)
    for left_out, rest in tails(value):
        if f"{here}/".endswith(f"/{left_out}"):
            flag = f"pass --image_folder {_word(here[: -len(left_out)])}"
            yield os.path.join(folder, rest), f'{flag} or, if only some paths have "{left_out}", remove it there'
    for other in (*_above(folder), "."):
        yield os.path.join(other, value), f"pass --image_folder {_word(other)}"
    for other in _below(folder or "."):
        added = f"{os.path.relpath(other, folder or '.')}/"
        flag = f"pass --image_folder {_word(other)}"
        yield os.path.join(other, value), f'{flag} or, if only some files are there, add "{added}" to their paths'


def _renamed(value: str, folder: str) -> Iterator[tuple[str, str]]:
    """Yield the place of a file whose letter case or ending differs."""
    path = os.path.join(folder, value)
    if like := similar(path, few=0):
        how = "the letter case" if like.lower() == path.lower() else "the ending"
        yield like, f"{how} differs. Rename the files, or correct the rows"


def _shorter(own: str, value: str, folder: str) -> Iterator[tuple[str, str]]:
    """Yield the places of a path without its first folders, such as a path of another machine.

    Args:
        own: the path as its row has it; `value` may be another spelling.
    """
    for other in (folder, *_above(folder), ".", *_below(folder or ".")):
        for left_out, rest in tails(value):
            if other != folder and "/" not in rest and other not in _below(folder or "."):
                continue  # a file of this name, in a folder that has nothing to do with the row
            flag = "" if other == folder else f" and pass --image_folder {_word(other)}"
            if own.replace("\\", "/").endswith(rest):
                left_out = own[: -len(rest)]
            yield os.path.join(other, rest), f'remove "{left_out}" from the paths in the rows{flag}'


def _above(folder: str) -> list[str]:
    above: list[str] = []
    here = os.path.abspath(folder or ".")
    while len(above) < ABOVE and os.path.dirname(here) not in (here, "/"):
        here = os.path.dirname(here)
        above.append(here)
    return above


@functools.lru_cache(maxsize=16)
def _below(folder: str) -> tuple[str, ...]:
    """Return the first subfolders of a folder, and then those of the subfolders. Cached: thousands may be missing."""
    found: list[str] = []
    level = [folder]
    for _ in range(2):
        level = [path for one in level for path in _subfolders(one)][: SUBFOLDERS - len(found)]
        found += level
    return tuple(found)


def _subfolders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def _word(path: str) -> str:
    """Return a path as one word of a command line."""
    return shlex.quote(_shown(path))


def _shown(path: str) -> str:
    """Return a path as a user would write it: relative if it is in the working directory."""
    path, here = os.path.abspath(path), os.getcwd()
    return os.path.relpath(path, here) if f"{path}/".startswith(f"{here}/") else path
