"""Read one row of a data file as a question for two models. Reads no media and imports no torch."""

from __future__ import annotations

import functools
import os
import stat
from dataclasses import dataclass

from vlft.config.flags import DataFlags
from vlft.data.sample import Image, Text
from vlft.errors import ConfigError, VlftError
from vlft.families import DEFAULT
from vlft.setup import open_rows, open_some
from vlft.ui.words import ROW

MOST_DIGITS = 12  # of the number of a row


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question.

    Attributes:
        question: its text.
        images: paths of its pictures, in order.
        videos: paths of its videos.
        right: the row's own answer; "" for a question of one's own.
    """

    question: str
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    right: str = ""


def asked_row(file: str, index: str, images: str) -> Asked:
    """Return the first question of a row.

    Args:
        file: data file.
        index: number of the row, from 0.
        images: folder of the media; "": that of the file.

    Raises:
        ConfigError: there is no such row, or `vlft chat` cannot show what is in it.
        DataError: the row cannot be read.
    """
    if not file:
        raise ConfigError("Choose a data file to take a row from.")
    if not (index.isascii() and index.isdecimal() and len(index) <= MOST_DIGITS):
        raise ConfigError(f"Row {index[:40]!r}: is no number of a row. Rows are counted from 0.")
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        return _asked(file, int(index), images)  # several files, or an error
    answer = _kept(file, int(index), images, (found.st_mtime_ns, found.st_size))
    if isinstance(answer, VlftError):
        raise answer
    return answer


@functools.lru_cache(maxsize=64)
def _kept(file: str, index: int, images: str, changed: tuple[int, int]) -> Asked | VlftError:
    """The question, or what is wrong with the row: it is asked for every two seconds."""
    try:
        return _asked(file, index, images)
    except VlftError as error:
        return error.with_traceback(None)


def row_count(file: str, images: str) -> int | None:
    """Return the number of rows of a data file; None if it cannot be read without further flags."""
    try:
        found = os.stat(file)
        return _counted(file, images, (found.st_mtime_ns, found.st_size)) if stat.S_ISREG(found.st_mode) else None
    except (OSError, ValueError, VlftError):
        return None


@functools.lru_cache(maxsize=8)
def _counted(file: str, images: str, changed: tuple[int, int]) -> int:
    return len(open_rows([file], DataFlags(data_path=[file], image_folder=images or None), DEFAULT))


def _asked(file: str, index: int, images: str) -> Asked:
    try:
        row = open_some(file, [index], DataFlags(data_path=[file], image_folder=images or None), DEFAULT)[0]
    except ConfigError as error:
        raise ConfigError(str(error).replace("--index", f'"{ROW[0]}" (step {ROW[1]})')) from error
    place = next(place for place, turn in enumerate(row.turns) if turn.role == "user")
    pictures: list[str] = []
    videos: list[str] = []
    for part in row.turns[place].parts:
        if isinstance(part, Text):
            continue
        if isinstance(part, Image):
            pictures.append(part.path)
        elif part.path is not None:
            videos.append(part.path)
        else:
            raise ConfigError(
                f"{file}[{index}]: its video is a list of frames, which vlft chat cannot show. Use another row."
            )
    text = "".join(part.text for part in row.turns[place].parts if isinstance(part, Text)).strip()
    answers = [turn for turn in row.turns[place:] if turn.role == "assistant"]
    right = "".join(part.text for turn in answers[:1] for part in turn.parts if isinstance(part, Text))
    return Asked(question=text, images=tuple(pictures), videos=tuple(videos), right=right)
