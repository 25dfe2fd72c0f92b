"""Check that the paths in flags exist, and suggest a similar path if not. Opens no file."""

from __future__ import annotations

import difflib
import functools
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

from vlft.config.kinds import Place

PATTERN = re.compile(r"[*?\[]|\{.*\}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHOWN = 3
_DIGITS = re.compile(r"\d+")
FEW = 2000  # larger folders are not searched for similar names, because that is slow


def problem(place: Place, path: str, *, file: str | None = None) -> str:
    """Return what is wrong with the path in a flag, or "".

    Args:
        place: what the flag takes.
        path: relative to the working directory.
        file: the YAML that sets the flag. A path that exists beside it only is named.
    """
    if path in place.words or place.later:
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
    hint = _beside(file, path) or _several(place, path) or _variable(path) or near_miss(path) or _here(path)
    if place.rows and HUB_ID.fullmatch(path) and not os.path.isdir(os.path.dirname(path)):
        hint += f". For a data set of the Hugging Face hub: hf download {path} --repo-type dataset --local-dir DIR"
    return f"no such {place.of if place.of == 'folder' else 'file'}{hint}"


def near_miss(path: str, *, few: int = FEW, numbers: bool = True) -> str:
    """Return a hint for a path that does not exist, to append to a message; "" if there is none.

    `similar` uses `few` and `numbers`.

    Tries other spellings (`spellings`), a doubled or missing folder, the end of a path of another machine, another
    letter case, another ending, and typing errors.
    """
    for found in (_spelled(path), _other_folder(path), _tail(path), similar(path, few=few, numbers=numbers)):
        if found and found != path:
            return f". Did you mean {found}?"
    missing = _first_missing(path)
    return f" ({missing} does not exist{_here(missing)})" if missing not in (path, "") else ""


def _here(path: str) -> str:
    """Return where a name without a folder was looked for; "" for other paths."""
    return "" if os.path.dirname(path) or path == os.sep else f" in {os.getcwd()}"


def _beside(file: str | None, path: str) -> str:
    other = os.path.join(os.path.dirname(file or ""), path)
    if os.path.isabs(path) or not os.path.exists(other):
        return ""
    return f". Paths are relative to the working directory, also in a YAML. Did you mean {other}?"


def _variable(path: str) -> str:
    full = os.path.expandvars(path)
    if full == path:
        return ""
    return f". Only a shell replaces variables. Did you mean {full}?"


def _several(place: Place, path: str) -> str:
    words = path.split()
    if place.many != "some" or len(words) < 2 or not all(map(os.path.exists, words)):
        return ""
    return f". For several write a list in YAML, [{', '.join(words)}], and no quotes around all of them in a shell"


def spellings(path: str) -> Iterator[tuple[str, str]]:
    """Yield other spellings of a path, and what is unusual about this one, in words that follow "the path"."""
    if path.startswith("~"):
        yield os.path.expanduser(path), "starts with ~, which only a shell replaces"
    if path != path.strip():
        yield path.strip(), "has blanks around it"
    for form in ("NFC", "NFD"):
        if (composed := unicodedata.normalize(form, path)) != path:
            yield composed, f"writes accents in another Unicode form than the file name ({form})"
    plain = unquote(path) if "%" in path else path
    if plain != path:
        yield plain, f'is URL-encoded, such as "{_encoded(path)}" for "{unquote(_encoded(path))}"'
    if "\\" in plain:
        yield re.sub(r"^[A-Za-z]:(?=/)", "", plain.replace("\\", "/")), 'has "\\" for "/", as on Windows'


def _encoded(path: str) -> str:
    found = re.search(r"(?:%[0-9A-Fa-f]{2})+", path)
    return found[0] if found else "%"


def tails(path: str) -> Iterator[tuple[str, str]]:
    """Yield (the folders that are left out, the rest) for every shorter end of a path, the longest first."""
    starts = [part.start() for part in re.finditer(r"[^/]+", path) if part[0] != "."]
    for start in starts[0 if path.startswith("/") else 1 :]:
        yield path[:start], path[start:]


def _spelled(path: str) -> str:
    return next((other for other, _ in spellings(path) if os.path.exists(other)), "")


def _tail(path: str) -> str:
    """Return the longest end of a path of another machine that exists in the working directory, with a folder in it."""
    for other in (path, *(other for other, _ in spellings(path))):
        if other.startswith("/"):
            return next((rest for _, rest in tails(other) if "/" in rest and os.path.exists(rest)), "")
    return ""


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


def similar(path: str, *, few: int = FEW, numbers: bool = True) -> str:
    """Return the existing path that is most similar to a path, part by part; "" if there is none.

    Args:
        few: folders with more entries are searched for another letter case or ending only, not for typing errors.
        numbers: accept names that differ in their numbers. Pictures with such names are different pictures.
    """
    for _ in range(len(Path(path).parts)):
        if not (missing := _first_missing(path)):
            return path
        folder, name = os.path.split(missing)
        names, by_case, by_stem = _listed(os.path.abspath(folder))
        like = [*by_case.get(name.lower(), ()), *by_stem.get(os.path.splitext(name.lower())[0], ())]
        if len(names) <= few:
            close = difflib.get_close_matches(name, names, n=SHOWN, cutoff=0.8)
            like += [other for other in close if numbers or _DIGITS.findall(other) == _DIGITS.findall(name)]
        rest = path[len(missing) :]
        found = [os.path.join(folder, other) + rest for other in like]
        # Without a match, the next part may be misspelled too.
        path = next((one for one in found if os.path.exists(one)), found[0] if found and rest else "")
    return path if path and os.path.exists(path) else ""


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
