"""Save pictures and videos that are embedded in rows as files, named by their content. Decodes no picture.

The bytes are saved unchanged and never encoded again: the model trains on exactly what the data set holds.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from pathlib import Path

from vlft.data.media.kinds import kind_of_file
from vlft.errors import ConfigError
from vlft.files import appearing

_DATA = re.compile(r"data:[^,;]*(?:;[^,;]+)*?;base64,", re.IGNORECASE)


class NotEmbedded(Exception):
    """A text that is not an embedded picture. The message says why."""


def ending_of(head: bytes) -> str:
    """Return the file ending for content that starts with these bytes; `.bin` if the format is unknown.

    `vlft.data.rows.media_refs` uses the ending to tell lists of frames from lists of videos. Opening a `.bin` file
    refuses it.
    """
    kind = kind_of_file(head)
    return ".bin" if kind is None or kind.holds == "neither" else kind.ending


class Embedded:
    """Saves the content of `data:` addresses, each once, however often its row is read.

    Args:
        folder: where the files are saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file_of(self, address: str) -> str:
        """Return the file with the content of an address. The file is written if it does not exist.

        Raises:
            NotEmbedded: the address is not base64, or is empty.
            ConfigError: the folder cannot be written.
        """
        start = _DATA.match(address)
        if start is None:
            raise NotEmbedded("is not written data:image/...;base64,...")
        text = address[start.end() :].encode(errors="replace")
        digest = hashlib.sha256(text).hexdigest()[:40]  # of the text, so that a saved one is not decoded again
        try:
            head = base64.b64decode(text[:64])
        except binascii.Error:
            head = b""  # it may contain line ends; decoding all of it below reports real errors
        path = str(self.folder / digest[:2] / f"{digest}{ending_of(head)}")
        if not os.path.isfile(path):
            try:
                content = base64.b64decode(b"".join(text.split()), validate=True)
            except binascii.Error as error:
                raise NotEmbedded(f"is not complete base64 ({error})") from error
            if not content:
                raise NotEmbedded("is empty")
            try:
                with appearing(path) as out:
                    out.write(content)
            except OSError as error:
                raise ConfigError(
                    f"{self.folder}: embedded pictures cannot be saved there ({error}). Set VLFT_MEDIA_CACHE to a "
                    "folder that can be written"
                ) from error
        return path
