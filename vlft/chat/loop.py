"""Hold a conversation with a user, line by line. Reads and writes through functions, independent of a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vlft.chat import Chat, Kind, Sampling, question, require_file
from vlft.data.sample import Text, Turn
from vlft.errors import VlftError

HELP = "/image PATH and /video PATH add media to the next question, /new starts again, /quit or Ctrl-D ends"
KINDS: dict[str, Kind] = {"/image": "image", "/video": "video"}


def converse(
    chat: Chat,
    media: Sequence[tuple[Kind, str]],
    sampling: Sampling,
    *,
    read: Callable[[], str],
    write: Callable[[str], None],
    say: Callable[[str], None],
) -> None:
    """Answer questions until the user leaves. An error in one question is printed, and the conversation continues.

    Args:
        chat: the model.
        media: added to the first question.
        sampling: for every answer.
        read: returns a line; raises EOFError at the end, and KeyboardInterrupt to drop the line.
        write: called with pieces of answers; each answer ends in a newline.
        say: called with remarks, one line each.
    """
    turns: list[Turn] = []
    shown = list(media)
    while True:
        try:
            line = read().strip()
        except EOFError:
            say("")  # the cursor is still after the prompt, here and below
            return
        except KeyboardInterrupt:
            say(f"\n({HELP})")
            continue
        word, _, rest = line.partition(" ")
        if not line:
            continue
        if word == "/quit":
            return
        if word == "/new":
            turns, shown = [], []
            say("(a new conversation)")
        elif word in KINDS:
            path = str(Path(rest.strip().strip("'\"")).expanduser())
            try:
                require_file(KINDS[word], path)
                shown.append((KINDS[word], path))
            except VlftError as error:
                say(f"error: {error}")
        elif line.startswith("/") and word == line and line.count("/") == 1:
            say(f"({line} is not a command: {HELP})")
        else:
            turns, shown = _ask(chat, turns, shown, line, sampling, write, say)


def _ask(
    chat: Chat,
    turns: list[Turn],
    shown: list[tuple[Kind, str]],
    text: str,
    sampling: Sampling,
    write: Callable[[str], None],
    say: Callable[[str], None],
) -> tuple[list[Turn], list[tuple[Kind, str]]]:
    """Answer one question.

    Returns:
        the conversation after it, and media for the next question.
    """
    said: list[str] = []

    def stream(piece: str) -> None:
        said.append(piece)
        write(piece)

    try:
        asked = question(text, shown, family=chat.family)
        answer = chat.reply([*turns, asked], sampling, stream=stream).text
        write("\n")
    except VlftError as error:
        say(f"error: {error}\n(the question is dropped{', with its media' if shown else ''})")
        return turns, []
    except KeyboardInterrupt:
        answer = "".join(said)
        if not answer.strip():
            say("\n(stopped before the answer began: the question is dropped)")
            return turns, shown
        write("\n")
        say("(stopped; the text so far counts as the answer)")
    return [*turns, asked, Turn(role="assistant", parts=(Text(text=answer),), field="answer")], []
