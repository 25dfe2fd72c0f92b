"""Partly trained answers: from trained characters to trained tokens. Uses a tokenizer, no templates and no rows."""

from __future__ import annotations

from typing import Any

from vlft.data.sample import Text, Turn

IN_PROMPT = 32  # characters of an answer, without blanks, that a generation prompt may have: `<think></think>`


class NoSpans(Exception):
    """The trained spans cannot be found in a rendered answer. The message does not name the row."""


def trained_tokens(turn: Turn, rendered: str, tokenizer: Any) -> list[bool]:
    """Return whether each token of a rendered answer is trained: whether all its characters are in trained texts.

    Text that the template adds before the answer is trained if the answer's first character is; text that it adds after
    the answer, such as the token that ends the turn, if the last character is.

    Args:
        turn: turn whose texts are trained or not.
        rendered: the answer as the chat template renders it, with its end.
        tokenizer: a fast tokenizer.

    Raises:
        NoSpans: the template changes the text, or the tokenizer does not report character offsets.
    """
    texts = [part for part in turn.parts if isinstance(part, Text)]
    said = "".join(part.text for part in texts)
    flags = [part.trained for part in texts for _ in part.text]
    start = rendered.rfind(said)
    if start < 0:  # some templates strip an answer
        lead, kept = len(said) - len(said.lstrip()), said.strip()
        if (start := rendered.rfind(kept)) >= 0:
            flags = flags[lead : lead + len(kept)]
        else:
            flags, start = _aligned(said, flags, rendered), 0
    behind = len(rendered) - start - len(flags)
    of_text = [flags[0]] * start + flags + [flags[-1]] * behind
    trained, done = [], 0
    for first, last in _offsets(rendered, tokenizer):
        first = min(first, done)  # the offsets of some tokenizers leave out spaces
        trained.append(all(of_text[first:last]))
        done = max(done, last)
    return trained


def _aligned(said: str, flags: list[bool], rendered: str) -> list[bool]:
    """Return whether each character of a rendered answer is trained, up to the last character of the answer.

    Templates put other blanks around thoughts, and the generation prompt may have their beginning. A blank is
    trained if the characters before and after it are.

    Raises:
        NoSpans: the texts differ in more than blanks and in the beginning of the answer.
    """
    ours = [(one, flag) for one, flag in zip(said, flags, strict=True) if not one.isspace()]
    places = [place for place, one in enumerate(rendered) if not one.isspace()]
    for count in range(min(len(ours), len(places)), max(0, len(ours) - IN_PROMPT), -1):
        tail = ours[len(ours) - count :]
        if [one for one, _ in tail] == [rendered[place] for place in places[:count]]:
            break
    else:
        raise NoSpans(
            "the chat template changes the text of the answer, so the trained spans cannot be found in it. "
            "Use the base model's own chat template"
        )
    found, done = [], 0
    for one in rendered[: places[count - 1] + 1]:
        around = tail[max(0, done - 1) : done + 1]  # of a blank: the characters before and after it
        found.append(all(flag for _, flag in around) if one.isspace() else tail[done][1])
        done += not one.isspace()
    return found


def _offsets(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Return the first character of each token, and the one after its last."""
    if not tokenizer.is_fast:
        raise NoSpans(
            "spans of the answer are trained (train_detail), and the base's tokenizer cannot say which characters a "
            "token has. Use a base with tokenizer.json"
        )
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
