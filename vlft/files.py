"""Files and folders that appear whole, locks that a kill leaves open, and the user's cache folders.

What a run resumes from is on disk before it has its name: `durable=True`, `sync_tree`. Caches, pages and lists are not
synced: what a power cut takes from them is made again. Knows nothing of what the files hold.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Self


def cache_folder(environ: Mapping[str, str], *, variable: str, name: str) -> Path | None:
    """The folder that `variable` names, or `vlft/NAME` in the user's cache folder.

    Returns:
        None if the variable is 0 or empty, or the user has no home folder: nothing is kept.
    """
    given = environ.get(variable)
    if given is not None:
        return None if given.strip() in ("", "0") else Path(given)
    cache = environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):  # the XDG specification has relative ones ignored
        return Path(cache) / "vlft" / name
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "vlft" / name if os.path.isabs(home) else None


# ---- files


@functools.cache
def umask() -> int:
    """The rights that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def open_to_others(folder: Path) -> None:
    """Give a folder's files the rights that newly made files have here.

    safetensors 0.8 writes for the owner alone, and a server often runs as another user.
    """
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask())


@contextlib.contextmanager
def appearing_path(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """A spare path beside `path`, with its ending, for a writer that takes a name; its file becomes `path` at the end.

    Several processes may write the same file at the same time: the last one wins.

    Args:
        durable: the content is on disk before it has its name.

    Raises:
        OSError: it cannot be written; the spare file is removed, and `path` is as it was.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, spare = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=f".tmp{path.suffix}")
    os.close(descriptor)
    try:
        yield Path(spare)
        if durable:
            sync(spare)
        os.chmod(spare, 0o666 & ~umask())  # `mkstemp` keeps others from reading
        os.replace(spare, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(spare)
        raise
    if durable:
        sync(path.parent)


@contextlib.contextmanager
def appearing(path: str | Path, *, durable: bool = False) -> Iterator[IO[bytes]]:
    """A file to write; otherwise as `appearing_path`."""
    with appearing_path(path, durable=durable) as spare, open(spare, "wb") as out:
        yield out


def write_text(path: str | Path, text: str, *, durable: bool = False) -> None:
    """Write a file of text, whole or not at all. Halves of characters, which JSON may hold, become `\\udxxx`."""
    with appearing(path, durable=durable) as out:
        out.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, document: object, *, indent: int | None = 2, durable: bool = False) -> None:
    """Write a file of JSON, whole or not at all."""
    write_text(path, json.dumps(document, indent=indent, ensure_ascii=False) + "\n", durable=durable)


def sync(path: str | Path) -> None:
    """Have the content of a file, or the names in a folder, on disk.

    Raises:
        OSError: as `os.fsync`.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Have everything in a folder on disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


# ---- folders


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


@contextlib.contextmanager
def workshop(folder: Path, *, interrupted: Callable[[], None] | None = None) -> Iterator[Path]:
    """An empty folder to build something in, held by this process; what is left in it at the end is removed.

    Args:
        folder: it is made, with its parents. What a killed process left in it is removed first.
        interrupted: called if there was something left.

    Raises:
        BlockingIOError: another process works in it.
        OSError: it cannot be made or written.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder)
        with contextlib.suppress(FileNotFoundError):  # another process has just finished with it
            lock.take()
            if lock.is_of(folder):
                break
        lock.release()
    with lock:
        left = list(folder.iterdir())
        if left and interrupted is not None:
            interrupted()
        for path in left:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            yield folder
        finally:
            if lock.is_of(folder):
                shutil.rmtree(folder)


# ---- locks


class Lock:
    """The lock on a folder or file: `flock`, so it ends with the process, and a kill leaves none behind.

    A context manager, too, that takes it unless it is taken, and gives it back.

    Args:
        path: of a folder that exists, or of a file, which is made and stays.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._handle: int | None = None

    def take(self, *, wait: bool = False) -> None:
        """Hold the lock until `release`, or until this process ends.

        Args:
            wait: for another process to give it back.

        Raises:
            BlockingIOError: another process holds it.
            OSError: the path cannot be opened, or its file system has no locks.
        """
        from filelock import lock_descriptor

        flags = os.O_RDONLY if os.path.isdir(self.path) else os.O_RDWR | os.O_CREAT
        handle = os.open(self.path, flags, 0o666)
        try:
            if not lock_descriptor(handle, blocking=wait):
                raise BlockingIOError(errno.EWOULDBLOCK, "another process holds it", str(self.path))
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        _not_in_children(self)

    def release(self) -> None:
        """Give it back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def is_of(self, path: Path) -> bool:
        """Whether what is locked is what has this name now."""
        try:
            return self._handle is not None and os.path.samestat(os.fstat(self._handle), path.stat())
        except FileNotFoundError:
            return False

    def __enter__(self) -> Self:
        if self._handle is None:
            self.take()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _not_in_children(lock: Lock) -> None:
    """Loader workers inherit the handle and outlive a killed trainer for seconds, in which it would still be held."""
    inherited = weakref.ref(lock)

    def close() -> None:
        if (held := inherited()) is not None:
            held.release()

    os.register_at_fork(after_in_child=close)
