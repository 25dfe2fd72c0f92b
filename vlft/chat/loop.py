"""Hold a conversation with a user, line by line. Reads and writes through functions, independent of a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlft.chat.commands import Command, files_in, help_lines, parse
from vlft.chat.model import Chat
from vlft.chat.saved import append_row, media_of
from vlft.chat.turns import Kind, question, require_file, system_turn
from vlft.data.sample import Text, Turn
from vlft.errors import VlftError
from vlft.model.generate import Sampling

HELP = "/help lists the commands, Ctrl-D ends"
KINDS: dict[str, Kind] = {"/image": "image", "/video": "video"}


def converse(
    chat: Chat,
    media: Sequence[tuple[Kind, str]],
    sampling: Sampling,
    *,
    system: Turn | None = None,
    read: Callable[[], str],
    write: Callable[[str], None],
    say: Callable[[str], None],
) -> None:
    """Answer questions until the user leaves. An error in one question is printed, and the conversation continues.

    Args:
        chat: the model.
        media: added to the first question.
        sampling: for every answer.
        system: the system turn; None: what the chat template adds by itself, if anything.
        read: returns a line; raises EOFError at the end, and KeyboardInterrupt to drop the line.
        write: called with pieces of answers; each answer ends in a newline.
        say: called with remarks, one line each.
    """
    talk = _Talk(chat, media, sampling, system=system, write=write, say=say)
    while True:
        try:
            line = read().strip()
        except EOFError:
            say("")  # the cursor is still after the prompt, here and below
            return
        except KeyboardInterrupt:
            say(f"\n({HELP})")
            continue
        try:
            command, rest = parse(line)
            if command is None and rest:
                talk.ask(rest)
            elif command is not None and command.name == "/quit":
                return
            elif command is not None:
                talk.obey(command, rest)
        except VlftError as error:
            say(f"error: {error}")


class _Talk:
    """A conversation and what its next question shows. The arguments are those of `converse`.

    Attributes:
        system: the system turn, or None.
        turns: questions and answers so far.
        shown: kind and path of the media of the next question.
    """

    def __init__(
        self,
        chat: Chat,
        media: Sequence[tuple[Kind, str]],
        sampling: Sampling,
        *,
        system: Turn | None,
        write: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self.chat, self.sampling, self.write, self.say = chat, sampling, write, say
        self.system = system
        self.turns: list[Turn] = []
        self.shown = list(media)
        self._added = len(self.shown)  # of `shown`, how many the last command added

    @property
    def whole(self) -> list[Turn]:
        return [*([self.system] if self.system is not None else []), *self.turns]

    def obey(self, command: Command, rest: str) -> None:
        """Carry out a command.

        Raises:
            VlftError: it cannot be carried out. Nothing has changed.
        """
        if command.name in KINDS:
            self._show(KINDS[command.name], rest)
        elif command.name == "/system":
            self._set_system(rest)
        elif command.name == "/save":
            self._save(rest)
        elif command.name == "/undo":
            self._undo()
        elif command.name == "/new":
            self._restart()
            self.say("(a new conversation)")
        else:
            for line in help_lines():
                self.say(line)

    def ask(self, text: str) -> None:
        """Answer a question. If it cannot be answered it is dropped, with its media."""
        said: list[str] = []

        def stream(piece: str) -> None:
            said.append(piece)
            self.write(piece)

        shown, self.shown = self.shown, []
        try:
            asked = question(text, shown, family=self.chat.family)
            answer = self.chat.reply([*self.whole, asked], self.sampling, stream=stream).text
            self.write("\n")
        except VlftError as error:
            self.say(f"error: {error}\n(the question is dropped{', with its media' if shown else ''})")
            return
        except KeyboardInterrupt:
            answer = "".join(said)
            if not answer.strip():
                self.shown = shown
                self.say("\n(stopped before the answer began: the question is dropped)")
                return
            self.write("\n")
            self.say("(stopped; the text so far counts as the answer)")
        self.turns += [asked, Turn(role="assistant", parts=(Text(text=answer),), field="answer")]

    def _restart(self) -> None:
        self.turns, self.shown = [], []

    def _show(self, kind: Kind, rest: str) -> None:
        if not (paths := files_in(rest)):
            self.say(f"(/{kind} needs a file name: /{kind} FILE)")
            for place, (one, path) in enumerate(media_of(self.turns), start=1):
                self.say(f"  {place}. {one} {path}")
            for one, path in self.shown:
                self.say(f"  for the next question: {one} {path}")
            if not (self.shown or media_of(self.turns)):
                self.say("  nothing is shown yet")
            return
        for path in paths:
            require_file(kind, path, before="/")
        self.shown += [(kind, path) for path in paths]
        self._added = len(paths)
        self.say(f"({', '.join(paths)}: shown with the next question)")

    def _set_system(self, rest: str) -> None:
        if not rest:
            now = "none is set; the model's chat template may add its own"
            self.say(f"(system turn: {_text(self.system) if self.system is not None else now})")
            return
        self.system = None if rest in ('""', "''") else system_turn(rest, family=self.chat.family)
        self._restart()
        self.say(f"(a new conversation, {'with this' if self.system is not None else 'without a'} system turn)")

    def _undo(self) -> None:
        if self.shown:
            count = max(1, min(self._added, len(self.shown)))
            gone, self.shown = self.shown[-count:], self.shown[:-count]
            self.say(f"(no longer shown with the next question: {', '.join(path for _, path in gone)})")
        elif self.turns:
            asked = self.turns[-2]
            self.turns = self.turns[:-2]
            self.shown = [("video" if kind == "video" else "image", path) for kind, path in media_of([asked])]
            self._added = len(self.shown)
            kept = f"; shown with the next question: {', '.join(p for _, p in self.shown)}" if self.shown else ""
            self.say(f"(taken back: {_text(asked)}{kept})")
        else:
            self.say("(there is nothing to take back)")

    def _save(self, rest: str) -> None:
        if len(paths := files_in(rest)) != 1:
            self.say("(/save needs one file name: /save FILE.jsonl)")
        elif not self.turns:
            self.say("(there is nothing to save: no question has been answered)")
        else:
            append_row(paths[0], self.whole)
            self.say(f"(saved as a row of {paths[0]})")


def _text(turn: Turn) -> str:
    return "".join(part.text for part in turn.parts if isinstance(part, Text))
