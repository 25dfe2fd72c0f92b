"""The tokens of a row and of its parts, `EncodedTokens.branches`, as numbers and in messages. Opens no file."""

from __future__ import annotations

from collections.abc import Sequence

from vlft.data.sample import Cost


def laid_out(branches: Sequence[int], *, shared: bool) -> int:
    """Return the tokens that a preference row takes in a batch.

    Args:
        branches: tokens of the prompt, then of each answer.
        shared: whether the answers share the tokens of the prompt, or each follows a copy of them.
    """
    prompt, *answers = branches
    return prompt * (1 if shared else len(answers)) + sum(answers)


def named_parts(cost: Cost) -> str:
    """The parts of a preference row with their tokens, for a message; "" for other rows.

    >>> named_parts(Cost(tokens=25, supervised=11, patches=0, branches=(6, 7, 6)))
    'prompt 6 for each of 2 answers, chosen 7, rejected 6'
    """
    if not cost.branches:
        return ""
    prompt, chosen, *rejected = (f"{tokens:,}" for tokens in cost.branches)
    each = "" if cost.tokens == sum(cost.branches) else f" for each of {1 + len(rejected)} answers"
    return f"prompt {prompt}{each}, chosen {chosen}, rejected {' and '.join(rejected)}"


def too_long(what: str, cost: Cost, *, vision: int, limit: int) -> str:
    """Say that a row is longer than `--max_length`, and what to do.

    Args:
        what: name of the row in the message.
        cost: its cost.
        vision: tokens of its pictures and videos.
        limit: the value of the flag.
    """
    parts = f"{vision:,} of them pictures and videos"
    if cost.branches:
        parts = f"{named_parts(cost)}; {vision:,} of the prompt are pictures and videos"
    return (
        f"the {what} is {cost.tokens:,} tokens long ({parts}), --max_length is {limit:,}. Raise --max_length, lower "
        "--image_max_pixels or --video_max_pixels, split the row, or let --over_length handle such rows."
    )
