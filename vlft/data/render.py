"""Renders conversations with the base's own chat template, split where answers begin and end. No tokens, no pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from vlft.data.sample import Image, Sample, Text, Turn
from vlft.errors import BadRow, ConfigError, DataError
from vlft.families import Family


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A piece of a rendered row, before it is tokenised.

    Attributes:
        text: text of the piece.
        turn: turn of the answer that the piece is; None between answers.
    """

    text: str
    turn: Turn | None = None


def render(sample: Sample, processor: Any, family: Family, *, unanswered: bool) -> list[Rendered]:
    """Render a conversation, split into answers and the text between them.

    Args:
        processor: the base's processor. Its chat template is used, or that of its tokenizer.
        unanswered: end the text with the template's generation prompt.

    Raises:
        DataError: the template refuses the conversation.
        ConfigError: the answers cannot be found in the rendered text.
    """
    messages = [_message(turn) for turn in sample.turns]
    answers = [k for k, turn in enumerate(sample.turns) if turn.role == "assistant"]
    prompts = _templates(sample, processor, [messages[:k] for k in answers], add_generation_prompt=True)
    uptos = _templates(sample, processor, [messages[: k + 1] for k in answers], add_generation_prompt=False)
    if answers and answers[-1] == len(messages) - 1 and not unanswered:
        whole = uptos[-1]
    else:
        (whole,) = _templates(sample, processor, [messages], add_generation_prompt=unanswered)
    pieces, done = [], 0
    for k, prompt, upto in zip(answers, prompts, uptos, strict=True):
        end = upto.rfind(family.end_of_turn) + len(family.end_of_turn)
        start = len(prompt)
        if not (whole.startswith(upto) and upto.startswith(prompt) and done <= start < end):
            raise ConfigError(
                f"{sample.turns[k].field} of {sample.file}[{sample.index}]: the chat template does not render an "
                f"answer as generation prompt + answer + {family.end_of_turn}, so the trained tokens cannot "
                "be found. Use the base model's own chat template."
            )
        pieces += [Rendered(text=whole[done:start]), Rendered(text=whole[start:end], turn=sample.turns[k])]
        done = end
    pieces.append(Rendered(text=whole[done:]))
    return [piece for piece in pieces if piece.text]


def _templates(
    sample: Sample, processor: Any, conversations: list[list[dict[str, Any]]], *, add_generation_prompt: bool
) -> list[str]:
    """Render conversations with the chat template.

    Raises:
        DataError: the template refuses them (`raise_exception`). A jinja2 error itself cannot leave a worker.
    """
    if not conversations:
        return []
    try:
        return processor.tokenizer.apply_chat_template(
            conversations,
            chat_template=processor.chat_template or processor.tokenizer.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:
        reason = f"the base's chat template refuses this conversation: {error}. Change its turns, or remove the row."
        raise refused(sample, "conversations", reason) from error


def _message(turn: Turn) -> dict[str, Any]:
    """Convert one turn to the form that chat templates take."""
    if all(isinstance(part, Text) for part in turn.parts):
        return {"role": turn.role, "content": "".join(part.text for part in turn.parts if isinstance(part, Text))}
    content = [
        {"type": "text", "text": part.text}
        if isinstance(part, Text)
        else {"type": "image" if isinstance(part, Image) else "video"}
        for part in turn.parts
    ]
    return {"role": turn.role, "content": content}


def refused(sample: Sample, field: str, reason: str, *, too_long: bool = False) -> DataError:
    """Build the error of a row that cannot be trained."""
    return DataError(
        BadRow(file=sample.file, index=sample.index, id=sample.id, field=field, reason=reason, too_long=too_long)
    )
