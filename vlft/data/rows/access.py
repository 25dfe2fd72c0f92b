"""Where the media paths of rows lead, and which are followed. Asks the file system about links; opens no file,
and writes none but embedded pictures.

A data file may come from anywhere, so a relative path has to stay in its folder once `..` and links are resolved, and
nothing is fetched, unless flags say otherwise. An absolute path is taken as it stands: LLaVA files are full of them.
"""

from __future__ import annotations

import os
import re

from vlft.data.rows.embedded import Embedded, NotEmbedded
from vlft.data.rows.fetch import SCHEMES, RemoteMedia
from vlft.text import short

LONGEST_PATH = 4096  # characters; Linux takes no more bytes (PATH_MAX)
LONGEST_URL = 8000  # characters; RFC 9110 asks servers to take so many
SHOWN = 100  # characters of a name in a message

_REMOTE = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*://|data:)")


class NoAccess(Exception):
    """A path that is not followed; the message says why and what to do, and names no row."""


class Access:
    """What rows may name. One serves all rows of a run, since it remembers folders: a file costs one `lstat`.

    Args:
        outside: relative paths may lead out of their folder (`--allow_outside_folder`).
        remote: where what http(s) addresses name is kept (`--allow_remote_media`); None: addresses are refused.
        embedded: where pictures written into rows are kept; None: they are refused.
    """

    def __init__(
        self, *, outside: bool = False, remote: RemoteMedia | None = None, embedded: Embedded | None = None
    ) -> None:
        self.outside = outside
        self.remote = remote
        self.embedded = embedded
        self._folders: dict[str, str] = {}  # as written -> without links

    def locate(self, value: str, *, folder: str, named: str) -> str:
        """The file that a row means, absolute or from the working directory; whether it is there is not asked.

        Args:
            value: as the row has it.
            folder: where relative paths start; "" is the working directory.
            named: that folder in a message.

        Raises:
            NoAccess: an address that is not fetched, a path that leads outside, or one that no system takes.
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
                "Put the file into the folder or name it by its absolute path; "
                "or, if the data file is to be trusted with any path: --allow_outside_folder"
            )
        return path

    def _fetched(self, value: str) -> str:
        if value[:5].lower() == "data:":
            return self._unpacked(value)
        scheme, shown = value.partition(":")[0].lower(), short(value, SHOWN)
        if scheme not in SCHEMES:
            raise NoAccess(f"{shown} is not a file here, and {scheme}:// is not fetched: download it first")
        if self.remote is None:
            raise NoAccess(
                f"{shown} is not a file here, and nothing is fetched unasked: download it first, or have vlft "
                "do so with --allow_remote_media"
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
                f"{value[:30]}... is an embedded picture, and there is no folder to keep it in: set VLFT_MEDIA_CACHE"
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
        """As `os.path.realpath`, by one `lstat` where the folder is known."""
        head, tail = os.path.split(path)
        if not head or tail in ("", ".", "..") or head.count(os.sep) > 64:
            return _real(path)
        here = os.path.join(self._folder(head), tail)
        return _real(here) if os.path.islink(here) else here


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # no file has such a name (half a character, a null), as opening it will say
        return os.path.abspath(path)


def _way_out(root: str, value: str) -> str:
    """The first link on the way that leads out, or that it climbs."""
    at = root
    for part in value.split(os.sep):
        at = os.path.join(at, part)
        if os.path.islink(at) and not f"{_real(at)}{os.sep}".startswith(f"{root.rstrip(os.sep)}{os.sep}"):
            return f"{at} is a link to {os.readlink(at)}"
    return 'it climbs out by ".."'
