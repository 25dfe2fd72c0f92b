"""What vlft keeps between runs: the user's folders for it, and files that appear whole. Knows not what is kept."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO


def cache_folder(environ: Mapping[str, str], *, variable: str, name: str) -> Path | None:
    """The folder that `variable` names, or `vlft/NAME` in the user's cache folder.

    Returns:
        None where the variable is 0 or empty, or nobody knows the user's home: nothing is kept.
    """
    given = environ.get(variable)
    if given is not None:
        return None if given.strip() in ("", "0") else Path(given)
    cache = environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):  # the XDG specification has relative ones ignored
        return Path(cache) / "vlft" / name
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "vlft" / name if os.path.isabs(home) else None


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def appearing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write that has its name only once all of it is written, whoever else writes it at the same time.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")
    try:
        with open(descriptor, "wb") as out:
            yield out
        os.chmod(aside, 0o666 & ~_umask())  # `mkstemp` keeps others from reading
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def put_in_place(folder: Path, target: Path, *, last: str) -> None:
    """Give a finished folder its name, at once.

    A mount point and the working directory cannot be replaced: the shell would stay in a folder that is gone. Into
    them the entries are moved.

    Args:
        target: not there, or an empty folder.
        last: the entry that is moved last, without which what is there counts as unfinished.

    Raises:
        OSError: as `os.rename`.
    """
    if not (os.path.ismount(target) or (target.exists() and target.samefile(os.curdir))):
        os.rename(folder, target)
        return
    for entry in sorted(folder.iterdir(), key=lambda path: path.name == last):
        shutil.move(entry, target / entry.name)
    folder.rmdir()
