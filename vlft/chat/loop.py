"""A conversation with a person, line by line. Reads and writes through functions; knows no terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vlft.chat import Chat, Kind, Sampling, question, require_file
from vlft.data.sample import Text, Turn
from vlft.errors import VlftError

HELP = "/image PATH and /video PATH go with the next question, /new begins again, /quit or Ctrl-D ends"
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
    """Talk until the person leaves; what goes wrong with one question is said, and the conversation goes on.

    Args:
        chat: who answers.
        media: shown with the first question.
        sampling: of every answer.
        read: gives a line; raises EOFError at the end, KeyboardInterrupt to give up the line.
        write: takes pieces of answers, each answer ending in a newline.
        say: takes remarks, a line each.
    """
    turns: list[Turn] = []
    shown = list(media)
    while True:
        try:
            line = read().strip()
        except EOFError:
            say("")  # the cursor stands behind the prompt, here and below
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
            say(f"({line} is no command: {HELP})")
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
    """The conversation after one question, and the media that still wait for one."""
    said: list[str] = []

    def stream(piece: str) -> None:
        said.append(piece)
        write(piece)

    try:
        asked = question(text, shown, family=chat.family)
        answer = chat.reply([*turns, asked], sampling, stream=stream).text
        write("\n")
    except VlftError as error:
        say(f"error: {error}\n(the question is taken back{', and what was shown with it' if shown else ''})")
        return turns, []
    except KeyboardInterrupt:
        answer = "".join(said)
        if not answer.strip():
            say("\n(stopped before a word was said: the question is taken back)")
            return turns, shown
        write("\n")
        say("(stopped; what was said so far counts as the answer)")
    return [*turns, asked, Turn(role="assistant", parts=(Text(text=answer),), field="answer")], []
