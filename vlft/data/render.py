"""Renders conversations with the base's own chat template, split where answers begin and end. No tokens, no pixels.

A served model sees the messages before its answer, rendered with a generation prompt, and writes the answer and the end
of the turn. `render` returns exactly that. One text can hold several answers if the template renders each message in
the same way whatever follows it. Otherwise `render` raises `NotFlat`, and the row is cut into samples
(`vlft.data.rows.parts`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from vlft.config.recipe import Recipe
from vlft.config.thinking import APART, CLOSE, ENABLE, OPEN, takes_thoughts_apart, thinks, thoughts_of
from vlft.data.rows.parts import trained_answers
from vlft.data.sample import Image, Sample, Text, Turn
from vlft.errors import BadRow, ConfigError, DataError
from vlft.families import Family

TAIL = 64  # characters at the end of a prompt, more than any block for thoughts that templates put there


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A piece of a rendered row, before it is tokenised.

    Attributes:
        text: text of the piece.
        turn: turn of the answer that the piece is; None between answers.
        branch: of a preference row, the answer that the piece belongs to, from 1; 0 for the prompt and in other rows.
    """

    text: str
    turn: Turn | None = None
    branch: int = 0


class NotFlat(ConfigError):
    """No single text has every answer of a row after the prompt that a served model sees."""


def render(sample: Sample, processor: Any, family: Family, recipe: Recipe, *, unanswered: bool) -> list[Rendered]:
    """Render a conversation, split into answers and the text between them.

    A preference row is rendered as the prompt that a server makes of its turns before the answers, and each answer with
    what the template writes after it.

    Args:
        processor: the base's processor. Its chat template is used, or that of its tokenizer.
        recipe: whether answers have thoughts.
        unanswered: end the text with the template's generation prompt.

    Raises:
        DataError: the template refuses the conversation, or an answer's thoughts do not fit the prompt before it.
        NotFlat: the row has several answers, and its template does not render them in one text.
        ConfigError: the answers cannot be found in the rendered text.
    """
    thinking = thinking_of(sample, recipe, unanswered=unanswered)
    dialogue = _Dialogue(
        sample=sample,
        processor=processor,
        end_of_turn=family.end_of_turn,
        arguments=recipe.template_arguments(thinking),
        chosen=recipe.thinking if ENABLE in recipe.switches else None,
    )
    trained = trained_answers(sample)
    if sample.rejected and not unanswered:
        return dialogue.branches()
    if sample.answer is not None:
        return dialogue.prompt() if unanswered else dialogue.one(sample.answer)
    try:
        return dialogue.flat(unanswered=unanswered)
    except NotFlat:
        if unanswered:
            return dialogue.prompt()
        if len(trained) != 1:
            raise
        return dialogue.one(trained[0])


def thinking_of(sample: Sample, recipe: Recipe, *, unanswered: bool = False) -> bool | None:
    """Whether the model thinks before the last trained answer of a row, or before the answer that is asked for.

    Returns:
        None if the template has no switch, or if it decides.
    """
    if ENABLE not in recipe.switches:
        return None
    if recipe.thinking != "auto":
        return recipe.thinking == "on"
    if unanswered:
        return sample.thinking
    answers = trained_answers(sample)
    return thinks(_text(sample.turns[answers[-1]])) if answers else None


@dataclass(frozen=True, kw_only=True)
class _Dialogue:
    """A conversation and its chat template.

    Attributes:
        sample: the row.
        processor: the base's processor.
        end_of_turn: token that ends a turn.
        arguments: of the template.
        chosen: `--thinking`; None if the template has no switch.
    """

    sample: Sample
    processor: Any
    end_of_turn: str
    arguments: dict[str, bool]
    chosen: str | None

    def flat(self, *, unanswered: bool) -> list[Rendered]:
        """Render the whole row as one text."""
        turns = self.sample.turns
        answers = [k for k, turn in enumerate(turns) if turn.role == "assistant"]
        prompts = self._rendered(answers, prompt=True)
        uptos = self._rendered([k + 1 for k in answers])
        if answers and answers[-1] == len(turns) - 1 and not unanswered:
            whole = uptos[-1]
        else:
            (whole,) = self._rendered([len(turns)], prompt=unanswered)
        pieces, done = [], 0
        for k, prompt, upto in zip(answers, prompts, uptos, strict=True):
            end = upto.rfind(self.end_of_turn) + len(self.end_of_turn)
            start = len(prompt)
            if not (whole.startswith(upto) and upto.startswith(prompt) and done <= start < end):
                raise self._not_flat(turns[k])
            if turns[k].trained != "none" and not unanswered:
                self._check(turns[k], prompt, whole[start:end], alone=False)
            pieces += [Rendered(text=whole[done:start]), Rendered(text=whole[start:end], turn=turns[k])]
            done = end
        pieces.append(Rendered(text=whole[done:]))
        return [piece for piece in pieces if piece.text]

    def one(self, answer: int) -> list[Rendered]:
        """Render the turns up to an answer, as the prompt and the answer. What follows is left out."""
        (prompt,), (upto,) = self._rendered([answer], prompt=True), self._rendered([answer + 1])
        said, _ = self._answer(self.sample.turns[answer], prompt, upto)
        return [Rendered(text=prompt), said]

    def branches(self) -> list[Rendered]:
        """Render the turns before the last one as the prompt, then the last answer and each rejected one."""
        answers = (self.sample.turns[-1], *self.sample.rejected)
        before = self._messages[:-1]
        (prompt,) = self._texts([before], prompt=True)
        uptos = self._texts([[*before, _message(turn, thoughts_apart=self._apart)] for turn in answers])
        pieces = [Rendered(text=prompt)]
        for branch, (turn, upto) in enumerate(zip(answers, uptos, strict=True), start=1):
            # The prompt is that of the chosen answer.
            if branch > 1 and self.chosen == "auto" and self._misfits(turn, prompt):
                raise refused(self.sample, turn.field, self._unlike(turn))
            said, after = self._answer(turn, prompt, upto)
            pieces += [replace(said, branch=branch), Rendered(text=after, branch=branch)]
        return [piece for piece in pieces if piece.text]

    def _answer(self, turn: Turn, prompt: str, upto: str) -> tuple[Rendered, str]:
        """Return an answer as its only prompt has it, and what the template writes after it.

        Args:
            prompt: the turns before the answer, with the generation prompt.
            upto: the turns up to and with the answer.
        """
        end = upto.rfind(self.end_of_turn) + len(self.end_of_turn)
        if not (upto.startswith(prompt) and len(prompt) < end):
            if thinks(_text(turn)) and self._misfits(turn, prompt):
                raise refused(self.sample, turn.field, self._misfit(turn))
            raise ConfigError(self._unfound(turn, prompt))
        self._check(turn, prompt, upto[len(prompt) : end], alone=True)
        return Rendered(text=upto[len(prompt) : end], turn=turn), upto[end:]

    def prompt(self) -> list[Rendered]:
        """Render the conversation with the generation prompt, as a server does."""
        (text,) = self._rendered([len(self.sample.turns)], prompt=True)
        return [Rendered(text=text)]

    def _rendered(self, ends: list[int], *, prompt: bool = False) -> list[str]:
        """Render the turns before each of some places, with or without a generation prompt."""
        return self._texts([self._messages[:end] for end in ends], prompt=prompt)

    def _texts(self, conversations: list[list[dict[str, Any]]], *, prompt: bool = False) -> list[str]:
        """Render conversations, with or without a generation prompt.

        Raises:
            DataError: the template refuses them (`raise_exception`). A jinja2 error itself cannot leave a worker.
        """
        if not conversations:
            return []
        try:
            return self.processor.tokenizer.apply_chat_template(
                conversations,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=prompt,
                **self.arguments,
            )
        except TemplateError as error:
            reason = (
                f"the base's chat template refuses this conversation: {error}. Change its turns, or remove the row."
            )
            raise refused(self.sample, "conversations", reason) from error

    @property
    def _template(self) -> Any:
        return self.processor.chat_template or self.processor.tokenizer.chat_template

    @cached_property
    def _messages(self) -> list[dict[str, Any]]:
        """The turns in the form that chat templates take."""
        return [_message(turn, thoughts_apart=self._apart) for turn in self.sample.turns]

    @cached_property
    def _apart(self) -> bool:
        return takes_thoughts_apart(self._template)

    def _check(self, turn: Turn, prompt: str, answer: str, *, alone: bool) -> None:
        """Check that an answer, as rendered, is what a model writes after a prompt.

        Args:
            alone: whether the answer is the only one of its sample, so that `--thinking auto` fits it.

        Raises:
            NotFlat: the answer needs another prompt, which it has in a sample of its own.
            DataError: its thoughts do not fit the prompt, or the template leaves out a part of its text.
        """
        if self._misfits(turn, prompt):
            if self.chosen == "auto" and not alone:
                raise self._not_flat(turn)
            raise refused(self.sample, turn.field, self._misfit(turn))
        said = _text(turn) + self.end_of_turn
        if answer == said or not all(isinstance(part, Text) for part in turn.parts):
            return
        if not _squeezed(prompt[-TAIL:] + answer).endswith(_squeezed(said)):
            lost = "Write thoughts first, as one block <think>thoughts</think>, and the answer after it"
            raise refused(self.sample, turn.field, f"the base's chat template leaves out a part of this answer. {lost}")

    @staticmethod
    def _misfits(turn: Turn, prompt: str) -> bool:
        """Whether an answer has thoughts after a prompt that ends them, or none after a prompt that begins them."""
        before, does = prompt[-TAIL:].rstrip(), thinks(_text(turn))
        return (before.endswith(OPEN) and not does) or (before.endswith(CLOSE) and does)

    def _misfit(self, turn: Turn) -> str:
        if thinks(_text(turn)):
            return (
                "the answer has thoughts (<think>...</think>), but --thinking off trains answers without them. Remove "
                "the block, or use --thinking auto, which decides for each answer"
            )
        if self.chosen is not None:
            return (
                "the answer has no thoughts (<think>...</think>), but --thinking on trains answers with them. Write "
                "thoughts before it, or use --thinking auto, which decides for each answer"
            )
        return (
            "the answer has no thoughts (<think>...</think>), but the chat template of this base begins every answer "
            "with <think>, so the model would learn to stop thinking. Write thoughts before the answer, or start from "
            "a base that answers without thoughts, such as an Instruct model"
        )

    def _unlike(self, turn: Turn) -> str:
        has, chosen = ("thoughts", "none") if thinks(_text(turn)) else ("no thoughts", "some")
        return (
            f"this answer has {has} (<think>...</think>) and the chosen one has {chosen}, but both follow one prompt, "
            "and the chat template ends it differently for answers with thoughts. Write both answers with thoughts, or "
            "both without"
        )

    def _not_flat(self, turn: Turn) -> NotFlat:
        return NotFlat(
            f"{turn.field} of {self.sample.file}[{self.sample.index}]: in the text of the whole row, the chat template "
            "does not render this answer as a model writes it, so the answers of the row must be encoded one by one "
            "(Encoder.samples)."
        )

    def _unfound(self, turn: Turn, prompt: str) -> str:
        where = f"{turn.field} of {self.sample.file}[{self.sample.index}]"
        if prompt.endswith(OPEN + "\n") and not thinks(_text(turn)):
            return (
                f"{where}: the chat template begins every answer with {OPEN}, and this answer has no thoughts. Write "
                f"{OPEN}thoughts{CLOSE} before it, or use the base model's own chat template."
            )
        return (
            f"{where}: the chat template does not render an answer as generation prompt + answer + "
            f"{self.end_of_turn}, so the trained tokens cannot be found. Use the base model's own chat template."
        )


def _message(turn: Turn, *, thoughts_apart: bool) -> dict[str, Any]:
    """Convert one turn to the form that chat templates take.

    Args:
        thoughts_apart: whether the template takes the thoughts of an answer apart from its text.
    """
    if all(isinstance(part, Text) for part in turn.parts):
        text = _text(turn)
        found = thoughts_of(text) if thoughts_apart and turn.role == "assistant" else None
        if found is not None:
            return {"role": turn.role, "content": found[1], APART: found[0]}
        return {"role": turn.role, "content": text}
    content = [
        {"type": "text", "text": part.text}
        if isinstance(part, Text)
        else {"type": "image" if isinstance(part, Image) else "video"}
        for part in turn.parts
    ]
    return {"role": turn.role, "content": content}


def _text(turn: Turn) -> str:
    return "".join(part.text for part in turn.parts if isinstance(part, Text))


def _squeezed(text: str) -> str:
    """A text without blanks: templates trim thoughts and answers, and put line breaks between them."""
    return "".join(text.split())


def refused(sample: Sample, field: str, reason: str, *, too_long: bool = False) -> DataError:
    """Build the error of a row that cannot be trained."""
    return DataError(
        BadRow(file=sample.file, index=sample.index, id=sample.id, field=field, reason=reason, too_long=too_long)
    )
