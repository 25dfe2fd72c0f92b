"""An answer of which some is trained: characters -> tokens. Knows a tokenizer, and neither templates nor rows."""

from __future__ import annotations

from typing import Any

from vlft.data.sample import Text, Turn


class NoSpans(Exception):
    """Why spans cannot be found in a rendered answer; the message names no row."""


def trained_tokens(turn: Turn, rendered: str, tokenizer: Any) -> list[bool]:
    """Whether each token of a rendered answer is trained: all of its characters are in texts of the turn that are.

    What the template puts before and behind the text, the token that ends the turn above all, goes with the text's
    first and last character.

    Args:
        turn: whose texts say what is trained.
        rendered: the answer as the chat template has it, with its end.
        tokenizer: a fast one.

    Raises:
        NoSpans: the template changes the text, or the tokenizer knows no characters.
    """
    texts = [part for part in turn.parts if isinstance(part, Text)]
    said = "".join(part.text for part in texts)
    flags = [part.trained for part in texts for _ in part.text]
    start = rendered.rfind(said)
    if start < 0:  # some templates strip an answer
        lead, kept = len(said) - len(said.lstrip()), said.strip()
        flags, start = flags[lead : lead + len(kept)], rendered.rfind(kept)
    if start < 0:
        raise NoSpans(
            "the chat template changes the text of the answer, so the spans that are trained cannot be found in it. "
            "Use the base model's own chat template"
        )
    behind = len(rendered) - start - len(flags)
    of_text = [flags[0]] * start + flags + [flags[-1]] * behind
    trained, done = [], 0
    for first, last in _offsets(rendered, tokenizer):
        first = min(first, done)  # some tokenizers leave spaces out of their offsets
        trained.append(all(of_text[first:last]))
        done = max(done, last)
    return trained


def _offsets(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """First character of each token, and the one after its last."""
    if not tokenizer.is_fast:
        raise NoSpans(
            "spans of the answer are trained (train_detail), and the base's tokenizer cannot say which characters a "
            "token has. Use a base with tokenizer.json"
        )
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
