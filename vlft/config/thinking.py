"""What a chat template lets a run decide about thoughts (`<think>...</think>`).

Reads the source of a template, renders nothing. `vlft.data.render` passes the arguments to the template.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

Thinking = Literal["auto", "on", "off"]
Turns = Literal["auto", "split", "last"]

#: Arguments of chat templates that vlft sets. `enable_thinking` decides how the generation prompt ends.
#: `preserve_thinking` keeps the thoughts of earlier answers, which other templates drop.
ENABLE, PRESERVE = "enable_thinking", "preserve_thinking"
OPEN, CLOSE = "<think>", "</think>"
#: Key of a message with the thoughts of its answer.
APART = "reasoning_content"
_COMMENT = re.compile(r"\{#.*?#\}", re.S)
_FINDS = re.compile(r"""["']</think>["']\s*(in\b|\))""")


@functools.lru_cache(maxsize=16)
def reads(template: object, name: str) -> bool:
    """Whether the source of a chat template reads an argument, or a key of a message, of this name."""
    return isinstance(template, str) and re.search(rf"\b{name}\b", _COMMENT.sub("", template)) is not None


def switches_of(template: object) -> tuple[str, ...]:
    """The arguments among `enable_thinking` and `preserve_thinking` that a chat template takes."""
    return tuple(name for name in (ENABLE, PRESERVE) if reads(template, name))


@functools.lru_cache(maxsize=16)
def finds_thoughts(template: object) -> bool:
    """Whether a chat template finds the thoughts in the text of an answer, by `'</think>' in content` or a split."""
    return isinstance(template, str) and _FINDS.search(_COMMENT.sub("", template)) is not None


def takes_thoughts_apart(template: object) -> bool:
    """Whether a chat template takes the thoughts of an answer as `reasoning_content`, and only so.

    Servers pass them so (vLLM and SGLang parse them). The template of Qwen3.8 does not find them in the text.
    """
    return reads(template, APART) and not finds_thoughts(template)


def thoughts_of(answer: str) -> tuple[str, str] | None:
    """Split an answer into its thoughts and what follows them, both without the line breaks between them.

    An answer may lack `<think>`, because some generation prompts end with it.

    Returns:
        None if the answer has no such block, or more than one, or text before it.
    """
    thoughts, mark, rest = answer.partition(CLOSE)
    before, _, thoughts = thoughts.rpartition(OPEN)
    if not mark or before.strip() or OPEN in rest or CLOSE in rest:
        return None
    return thoughts.strip("\n"), rest.lstrip("\n")


def thinks(answer: str) -> bool:
    """Whether an answer has thoughts. An empty block is what templates write for an answer without thoughts."""
    thoughts, mark, _ = answer.partition(CLOSE)
    return bool(mark) and bool(thoughts.replace(OPEN, "").strip())


def spoken(answer: str) -> str:
    """Return an answer without its thoughts. Nothing is left of one that ends inside a thought."""
    found = thoughts_of(answer)
    if found is not None:
        return found[1]
    return "" if answer.lstrip().startswith(OPEN) and CLOSE not in answer else answer


def written_after(prompt: str, answer: str) -> str:
    """Return an answer as a model would write it after a prompt, with the `<think>` that the prompt ends with.

    Args:
        prompt: its text, with what begins the answer.
        answer: with thoughts or without. Without, an empty block stands for them where the prompt begins one.
    """
    before = prompt.rstrip()
    if before.endswith(CLOSE):
        return spoken(answer)
    if not (opening := opening_of(prompt)):
        return answer
    thoughts, rest = thoughts_of(answer) or ("", answer)
    return f"{opening}{thoughts}\n{CLOSE}\n\n{rest}"


def opening_of(prompt: str) -> str:
    """The `<think>` that ends a prompt, with the blanks after it; "" if the prompt ends otherwise."""
    return prompt[prompt.rfind(OPEN) :] if prompt.rstrip().endswith(OPEN) else ""


def template_arguments(switches: tuple[str, ...], turns: Turns, thinking: bool | None) -> dict[str, bool]:
    """The arguments that a chat template gets.

    Args:
        switches: those that the template takes.
        turns: `--turns`. With `auto` the thoughts of earlier answers are kept where the template can do that.
        thinking: whether the model thinks before its next answer. None: the template's default.
    """
    found = {ENABLE: thinking} if ENABLE in switches and thinking is not None else {}
    return found | ({PRESERVE: True} if PRESERVE in switches and turns == "auto" else {})


def thinking_of_run(settings: Mapping[str, Any]) -> bool | None:
    """Whether the model of a run thinks before its answers.

    Args:
        settings: of the run's record, by name.

    Returns:
        None if it was trained with and without thoughts, or its chat template has no such switch.
    """
    chosen, counts = settings.get("thinking", "auto"), settings.get("thought") or {}
    if ENABLE not in (settings.get("switches") or ()):
        return None
    if chosen != "auto":
        return bool(chosen == "on")
    found = [name for name in ("on", "off") if counts.get(name)]
    return found == ["on"] if len(found) == 1 else None
