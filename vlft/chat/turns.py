"""Make turns of what a user types: questions with pictures and videos, and the system turn. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vlft.config.places import near_miss
from vlft.data.media.kinds import HEAD, kind_of_file
from vlft.data.sample import Image, Sample, Text, Turn, Video
from vlft.errors import ConfigError
from vlft.families import Family

Kind = Literal["image", "video"]
HOLDS = {"image": "picture", "video": "video"}
MOVING = (".gif", ".webp", ".png", ".avif")  # pictures that may move, so that a reader of videos may take them


def question(text: str, media: Sequence[tuple[Kind, str]], *, family: Family) -> Turn:
    """Make a user turn of a question: pictures and videos in order, then the text.

    Args:
        text: as the user typed it.
        media: kind and path of each picture and video.
        family: its control tokens are refused in the text, as in training rows.

    Raises:
        ConfigError: the text is empty, or contains control tokens or picture tags, or a file does not exist.
    """
    if not text.strip():
        raise ConfigError('the prompt is empty. Ask something: vlft chat MODEL "What is this?"')
    _refuse_marks("prompt", text, family)
    for kind, path in media:
        require_file(kind, path)
    shown = [
        Image(path=path, field="prompt") if kind == "image" else Video(path=path, field="prompt")
        for kind, path in media
    ]
    return Turn(role="user", parts=(*shown, Text(text=text)), field="prompt")


def system_turn(text: str, *, family: Family) -> Turn:
    """Make the system turn of a conversation. It is rendered as the system turn of a training row.

    Args:
        text: as the user typed it.
        family: its control tokens are refused in the text, as in training rows.

    Raises:
        ConfigError: the text is empty, or contains control tokens or picture tags.
    """
    if not text.strip():
        raise ConfigError("the text of the system turn is empty. Leave out --system to have none.")
    _refuse_marks("system turn", text, family)
    return Turn(role="system", parts=(Text(text=text),), field="system")


def _refuse_marks(what: str, text: str, family: Family) -> None:
    """Refuse a text that would not be read as text."""
    forged = [token for token in (*family.control_tokens, "<image>", "<video>") if token in text]
    if forged:
        raise ConfigError(
            f"the {what} contains {', '.join(forged)}, which marks a turn or a picture. Remove it, and "
            "add pictures and videos with --image and --video (in the loop: /image and /video)."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"character {error.start} of the {what} is not valid Unicode. Write it in UTF-8.") from error


def require_file(kind: Kind, path: str, *, before: str = "--") -> None:
    """Refuse a picture or video that does not exist, or is a file of another kind.

    Args:
        kind: what the file must be.
        path: of the file.
        before: what stands before `kind` where the user named the file.

    Raises:
        ConfigError: the path is not a file; the message says what it is instead.
    """
    named = f"{before}{kind} {path}"
    if not Path(path).is_file():
        if Path(path).is_dir():
            raise ConfigError(f"{named}: a folder, not a file. Name a file in it.")
        hint = near_miss(path)
        advice = "" if hint.endswith("?") else f" (looked for {Path(path).absolute()}). Correct the path."
        raise ConfigError(f"{named}: no such file{advice or hint}")
    try:
        with open(path, "rb") as file:
            found = kind_of_file(file.read(HEAD))
    except OSError as error:
        raise ConfigError(f"{named}: cannot be read ({error.strerror}). Check its permissions.") from error
    other: dict[str, str] = {holds: name for name, holds in HOLDS.items() if name != kind}
    if found is not None and found.holds in other and found.ending not in MOVING:
        raise ConfigError(f"{named}: is {found.name}. Use {before}{other[found.holds]}.")


def conversation(turns: Sequence[Turn]) -> Sample:
    """Return turns as a row, for the encoder."""
    return Sample(file="chat", index=0, id=None, turns=tuple(turns))
