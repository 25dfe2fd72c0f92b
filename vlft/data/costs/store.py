"""Cache of per-row values on disk, in SQLite: key -> JSON value. Written during a run, and read by later runs.

There is one file per data file and set of settings. A key is a hash of everything that its value depends on, so an
entry is never out of date. Values are written as they arrive, so that a killed run resumes where it stopped. Failures
cost time and print a note; they never stop a run. Values are opaque.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = 6  # increase it whenever values may differ from earlier ones
KEPT_FILES = 200
KEPT_BYTES = 2 << 30
SECONDS = 5.0  # between two commits
TABLE = "CREATE TABLE IF NOT EXISTS kept (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID"
WAIT = 10.0  # seconds to wait for another process that writes


class Store:
    """One file of the cache. The process that created the object writes it; that process and its forks read it.

    Args:
        path: path of the file; it is created with its folder if it is missing.
        note: receives a line for the user if the file cannot be read or written.
        what: name of the cached values, for this line.
    """

    def __init__(self, path: Path, *, note: Callable[[str], None], what: str) -> None:
        self.path = path
        self._note = note
        self._what = what
        self._readers: dict[int, Any] = {}
        self._used = 0
        self._waiting: list[tuple[bytes, str]] = []
        self._written = time.monotonic()
        self._usable = self._open()

    def get(self, key: bytes) -> Any:
        """Return the value of a key, or None."""
        if not self._usable:
            return None
        import sqlite3

        try:
            found = self._reader().execute("SELECT value FROM kept WHERE key = ?", (key,)).fetchone()
            return None if found is None else json.loads(found[0])
        except (sqlite3.Error, ValueError):
            return None  # the value is computed again; writing it reports what is wrong

    def put(self, key: bytes, value: Any) -> None:
        """Save a value."""
        self._waiting.append((key, json.dumps(value)))
        self._used += 1
        if time.monotonic() - self._written > SECONDS:
            self._write()

    def use(self) -> None:
        """Count an entry that was reused."""
        self._used += 1

    def close(self, *, whole: bool) -> None:
        """Write pending values. Remove the file if more than half of its entries are no longer used.

        Args:
            whole: all rows have been scanned, so entries that were not used are out of use.
        """
        self._write()
        if self._usable and whole:
            with contextlib.suppress(OSError):
                if self._size() > 2 * self._used + 1000:
                    self.path.unlink()
                else:
                    os.utime(self.path)
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        with contextlib.suppress(OSError):  # a shared folder that this user may not list
            prune(self.path.parent)

    def _open(self) -> bool:
        try:
            import sqlite3
        except ImportError as error:  # some builds of Python lack it
            return self._give_up(error)
        for again in (True, False):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.closing(sqlite3.connect(self.path, timeout=WAIT)) as file, file:
                    file.execute(TABLE)
                    (state,) = file.execute("PRAGMA quick_check(1)").fetchone()
                    if state != "ok":
                        raise sqlite3.DatabaseError(state)
                    columns = [column[1] for column in file.execute("PRAGMA table_info(kept)")]
                    if columns != ["key", "value"]:
                        raise sqlite3.DatabaseError(f"its columns are {columns}")
                return True
            except sqlite3.OperationalError as error:
                return self._give_up(error)
            except sqlite3.DatabaseError as error:
                if not again:
                    return self._give_up(error)
                self._note(f"{self.path} cannot be used ({error}): {self._what} are computed again")
                with contextlib.suppress(OSError):
                    self.path.unlink()
            except OSError as error:
                return self._give_up(error)
        return False

    def _give_up(self, error: Exception) -> bool:
        self._note(
            f"{self.path.parent}: {self._what} cannot be saved for the next run ({error}). Set VLFT_COST_CACHE to a "
            "folder on a local disk"
        )
        self._usable = False
        return False

    def _reader(self) -> Any:
        import sqlite3

        pid = os.getpid()  # a connection must not be used after a fork
        if pid not in self._readers:
            self._readers = {pid: sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=WAIT)}
        return self._readers[pid]

    def _write(self) -> None:
        if self._usable and self._waiting:
            import sqlite3

            try:
                with contextlib.closing(sqlite3.connect(self.path, timeout=WAIT)) as file, file:
                    file.execute(TABLE)  # another run may have removed the file in the meantime
                    file.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", self._waiting)
            except sqlite3.Error as error:
                self._give_up(error)
        self._waiting.clear()
        self._written = time.monotonic()

    def _size(self) -> int:
        import sqlite3

        try:
            return int(self._reader().execute("SELECT count(*) FROM kept").fetchone()[0])
        except sqlite3.Error:
            return 0


def prune(folder: Path) -> None:
    """Remove the least recently used files."""
    entries = []
    for item in os.scandir(folder) if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # another run also removes files
            if item.name.endswith((".sqlite", ".npz")):  # vlft 0.1 wrote .npz
                stat = item.stat()
                entries.append((stat.st_mtime_ns, stat.st_size, item.path))
    size = 0
    for place, (_, bytes_, path) in enumerate(sorted(entries, reverse=True)):
        size += bytes_
        if place and (place >= KEPT_FILES or size > KEPT_BYTES):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
