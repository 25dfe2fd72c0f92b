"""Pictures and videos written into rows -> files, named by what they hold. Knows neither rows nor pixels.

The bytes are kept as they came, never encoded again: what is trained is what the data set has.
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
    """Why text is no embedded picture."""


def ending_of(head: bytes) -> str:
    """The ending that a file which starts so has, by which lists of frames are told from lists of videos
    (`vlft.data.rows.media_refs`); `.bin` for what is not known, which opening it will refuse."""
    kind = kind_of_file(head)
    return ".bin" if kind is None or kind.holds == "neither" else kind.ending


class Embedded:
    """Keeps what `data:` addresses hold, each once, however often its row is read.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file_of(self, address: str) -> str:
        """The file that holds it, written unless it is there.

        Raises:
            NotEmbedded: it is not base64, or holds nothing.
            ConfigError: the folder cannot be written.
        """
        start = _DATA.match(address)
        if start is None:
            raise NotEmbedded("is not written data:image/...;base64,...")
        text = address[start.end() :].encode(errors="replace")
        digest = hashlib.sha256(text).hexdigest()[:40]  # of the text, so that a known one need not be decoded
        try:
            head = base64.b64decode(text[:64])
        except binascii.Error:
            head = b""  # line ends in it, perhaps; what is wrong, decoding all of it says
        path = str(self.folder / digest[:2] / f"{digest}{ending_of(head)}")
        if not os.path.isfile(path):
            try:
                content = base64.b64decode(b"".join(text.split()), validate=True)
            except binascii.Error as error:
                raise NotEmbedded(f"is not whole base64 ({error})") from error
            if not content:
                raise NotEmbedded("holds nothing")
            try:
                with appearing(path) as out:
                    out.write(content)
            except OSError as error:
                raise ConfigError(
                    f"{self.folder}: embedded pictures cannot be kept there ({error}). Set VLFT_MEDIA_CACHE to a folder"
                ) from error
        return path
