"""Atomic writes of files and folders, locks that end with their process, and the user's cache folders.

Files that a run resumes from are synced to disk before they get their name: `durable=True`, `sync_tree`. Caches, pages
and lists are not synced, since they can be rebuilt after a power cut. Independent of what the files contain.
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
    """Return the folder that the environment variable `variable` names, or `vlft/NAME` in the user's cache folder.

    Returns:
        None if the variable is 0 or empty, or the user has no home folder: nothing is cached then.
    """
    given = environ.get(variable)
    if given is not None:
        return None if given.strip() in ("", "0") else Path(given)
    cache = environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):  # the XDG specification says to ignore relative paths
        return Path(cache) / "vlft" / name
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "vlft" / name if os.path.isabs(home) else None


# ---- files


@functools.cache
def umask() -> int:
    """The permissions that this process withholds from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def open_to_others(folder: Path) -> None:
    """Give the files of a folder the permissions that new files of this process get.

    safetensors 0.8 writes files that only their owner can read, and a server often runs as another user.
    """
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask())


@contextlib.contextmanager
def appearing_path(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Write a file atomically, with a writer that takes a path.

    Yields a temporary path next to `path`, with the same ending. Its file is renamed to `path` at the end. Several
    processes may write the same file at the same time: the last one wins.

    Args:
        durable: sync the content to disk before the rename.

    Raises:
        OSError: the file cannot be written. The temporary file is removed, and `path` is unchanged.
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
    """Write a file atomically, through an open binary file. The arguments and errors are those of `appearing_path`."""
    with appearing_path(path, durable=durable) as spare, open(spare, "wb") as out:
        yield out


def write_text(path: str | Path, text: str, *, durable: bool = False) -> None:
    """Write a text file atomically. Lone surrogates, which JSON may contain, become `\\udxxx`."""
    with appearing(path, durable=durable) as out:
        out.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, document: object, *, indent: int | None = 2, durable: bool = False) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(document, indent=indent, ensure_ascii=False) + "\n", durable=durable)


def sync(path: str | Path) -> None:
    """Sync the content of a file, or the names in a folder, to disk.

    Raises:
        OSError: the errors of `os.fsync`.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Sync a folder and everything in it to disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


# ---- folders


def put_in_place(folder: Path, target: Path, *, last: str) -> None:
    """Rename a finished folder to its final name in one operation.

    If the target is a mount point or the working directory, the entries are moved into it instead: a mount point cannot
    be replaced, and the shell would stay in a deleted folder.

    Args:
        target: a path that does not exist, or an empty folder.
        last: the entry that is moved last. A folder without it counts as unfinished.

    Raises:
        OSError: the errors of `os.rename`.
    """
    if not (os.path.ismount(target) or (target.exists() and target.samefile(os.curdir))):
        os.rename(folder, target)
        return
    for entry in sorted(folder.iterdir(), key=lambda path: path.name == last):
        shutil.move(entry, target / entry.name)
    folder.rmdir()


@contextlib.contextmanager
def workshop(folder: Path, *, interrupted: Callable[[], None] | None = None) -> Iterator[Path]:
    """Yield an empty folder to build something in. It is locked by this process and removed at the end.

    Args:
        folder: created with its parents. Files that a killed process left in it are removed first.
        interrupted: called if there were such files.

    Raises:
        BlockingIOError: another process uses the folder.
        OSError: the folder cannot be created or written.
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


def lock_handle(handle: int, *, shared: bool) -> bool | None:
    """Lock an open file until it is closed, without waiting.

    Args:
        handle: of the file.
        shared: whether other processes may hold a shared lock at the same time.

    Returns:
        False if another process holds a lock that excludes this one; None if the file system has no locks. A system
        without `flock` gives no exclusive lock.
    """
    try:
        import fcntl
    except ImportError:
        return None if shared else False
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


class Lock:
    """A lock on a folder or file. It uses `flock`, so the lock ends with the process, even if the process is killed.

    Also a context manager, which takes the lock unless this object already holds it, and releases it.

    Args:
        path: path of an existing folder, or of a file, which is created and never removed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._handle: int | None = None

    def take(self, *, wait: bool = False) -> None:
        """Hold the lock until `release`, or until this process ends.

        Args:
            wait: wait for another process to release it.

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
        """Release the lock."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def is_of(self, path: Path) -> bool:
        """Whether the locked folder or file is the one that has this path now."""
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
    """Release the lock in forked processes.

    Loader workers inherit the file handle and outlive a killed trainer by seconds. They would still hold the lock.
    """
    inherited = weakref.ref(lock)

    def close() -> None:
        if (held := inherited()) is not None:
            held.release()

    os.register_at_fork(after_in_child=close)
