"""Resolve the media paths of rows, and decide which of them may be followed.

Asks the file system about links. Opens no file, and writes only embedded pictures.

A data file may come from anywhere. A relative path must therefore stay in its folder after `..` and links are
resolved, and nothing is fetched, unless flags allow it. An absolute path is used as written: LLaVA files are full of
them.
"""

from __future__ import annotations

import os
import re

from vlft.data.rows.embedded import Embedded, NotEmbedded
from vlft.data.rows.fetch import SCHEMES, RemoteMedia
from vlft.text import short

LONGEST_PATH = 4096  # characters; Linux accepts at most this many bytes (PATH_MAX)
LONGEST_URL = 8000  # characters; RFC 9110 asks servers to accept this many
SHOWN = 100  # characters of a name in a message

_REMOTE = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*://|data:)")


class NoAccess(Exception):
    """A path that is not followed. The message says why and what to do; it does not name the row."""


class Access:
    """The files that rows may name.

    Use one object for all rows of a run. It caches resolved folders, so that a file costs one `lstat`.

    Args:
        outside: relative paths may lead out of their folder (`--allow_outside_folder`).
        remote: where files fetched by http(s) are saved (`--allow_remote_media`). None: addresses are refused.
        embedded: where pictures embedded in rows are saved. None: they are refused.
    """

    def __init__(
        self, *, outside: bool = False, remote: RemoteMedia | None = None, embedded: Embedded | None = None
    ) -> None:
        self.outside = outside
        self.remote = remote
        self.embedded = embedded
        self._folders: dict[str, str] = {}  # path as written -> resolved path

    def locate(self, value: str, *, folder: str, named: str) -> str:
        """Return the file that a row names, absolute or relative to the working directory. It may not exist.

        Args:
            value: the path or address in the row.
            folder: where relative paths start; "" is the working directory.
            named: the name of that folder in messages.

        Raises:
            NoAccess: an address that is not fetched, a path that leads outside, or a path that is too long.
        """
        if _REMOTE.match(value):
            return self._fetched(value)
        path = os.path.join(folder, value)
        if len(path) > LONGEST_PATH:
            raise NoAccess(f"{short(value, SHOWN)} has {len(value):,} characters, a path has {LONGEST_PATH:,} at most")
        if os.path.isabs(value) or self.outside:
            return path
        root = self._folder(folder or ".")
        real = self._resolved(os.path.join(folder or ".", value))
        if not f"{real}{os.sep}".startswith(f"{root.rstrip(os.sep)}{os.sep}"):
            raise NoAccess(
                f"{value} leads outside {named} ({root}), to {real}: {_way_out(root, value)}. "
                "Put the file into the folder or use its absolute path; "
                "or, if you trust the data file with any path, pass --allow_outside_folder"
            )
        return path

    def _fetched(self, value: str) -> str:
        if value[:5].lower() == "data:":
            return self._unpacked(value)
        scheme, shown = value.partition(":")[0].lower(), short(value, SHOWN)
        if scheme not in SCHEMES:
            raise NoAccess(f"{shown} is not a local file, and {scheme}:// is not fetched: download it first")
        if self.remote is None:
            raise NoAccess(
                f"{shown} is not a local file, and nothing is fetched by default: download it first, or pass "
                "--allow_remote_media"
            )
        if len(value) > LONGEST_URL:
            raise NoAccess(f"{shown} has {len(value):,} characters, an address has {LONGEST_URL:,} at most")
        path = self.remote.file_of(value)
        if path in self.remote.failed:
            raise NoAccess(self.remote.failed[path])
        return path

    def _unpacked(self, value: str) -> str:
        if self.embedded is None:
            raise NoAccess(
                f"{value[:30]}... is an embedded picture, and there is no folder to save it in: set VLFT_MEDIA_CACHE"
            )
        try:
            return self.embedded.file_of(value)
        except NotEmbedded as error:
            raise NoAccess(f"{value[:30]}... {error}. Embed the picture again or save it as a file") from error

    def _folder(self, path: str) -> str:
        if path not in self._folders:
            self._folders[path] = self._resolved(path)
        return self._folders[path]

    def _resolved(self, path: str) -> str:
        """Return what `os.path.realpath` returns, with one `lstat` if the folder is cached."""
        head, tail = os.path.split(path)
        if not head or tail in ("", ".", "..") or head.count(os.sep) > 64:
            return _real(path)
        here = os.path.join(self._folder(head), tail)
        return _real(here) if os.path.islink(here) else here


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # not a valid file name (a lone surrogate, a null); opening it reports that
        return os.path.abspath(path)


def _way_out(root: str, value: str) -> str:
    """Name the first link on the path that leads outside, or say that `..` does."""
    at = root
    for part in value.split(os.sep):
        at = os.path.join(at, part)
        if os.path.islink(at) and not f"{_real(at)}{os.sep}".startswith(f"{root.rstrip(os.sep)}{os.sep}"):
            return f"{at} is a link to {os.readlink(at)}"
    return 'it climbs out by ".."'
