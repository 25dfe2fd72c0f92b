"""Score labels with a model: how likely is each of some answers to a row? Uses data and model, as `vlft.answering`.

questions and labels  --label_scores-->  label -> log-probability
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

from vlft.answering import as_tensors
from vlft.answering.batches import in_batches
from vlft.data.encode import Encoder
from vlft.data.sample import Sample, Text, Turn
from vlft.errors import ConfigError, DataError
from vlft.model.generate import Speaker
from vlft.model.scoring import endings_logprobs


def label_scores(
    questions: Sequence[Sample],
    labels: Sequence[str],
    encoder: Encoder,
    speaker: Speaker,
    *,
    batch: int = 1,
    limit: int | None = None,
) -> Iterator[dict[str, float]]:
    """Score labels as answers to conversations, in order. As `label_scores_by_place`, without its order.

    Yields:
        for each question, label -> log-probability, in the order of the labels.
    """
    places = range(len(questions))
    found = label_scores_by_place(questions, labels, encoder, speaker, order=places, batch=batch, limit=limit)
    return (scores for _, scores in found)


def label_scores_by_place(
    questions: Sequence[Sample],
    labels: Sequence[str],
    encoder: Encoder,
    speaker: Speaker,
    *,
    order: Sequence[int],
    batch: int = 1,
    limit: int | None = None,
    smaller: Callable[[int], None] = lambda batch: None,
    refuse: Callable[[int, DataError], None] | None = None,
) -> Generator[tuple[int, dict[str, float]], None, None]:
    """Score labels as answers to conversations, in any order, with smaller batches where memory does not suffice.

    A score does not depend on the rest of the batch.

    The score of a label is the log-probability of its tokens and of the token that ends the turn, after the prompt that
    a server makes of the conversation. It is the negative of the loss, summed over tokens, that a row with this answer
    has in training. Labels are answers without thoughts, so the prompt is that of an answer without thoughts.

    Args:
        questions: conversations that end in a user turn, for example from `vlft.answering.question_of`.
        labels: the answers to score.
        encoder: conversations -> tokens and pixels.
        speaker: the model.
        order: places in `questions`, each once.
        batch: number of questions computed together, and most pairs of question and label in one forward.
        limit: most tokens of prompt and label together that the model supports; None: no limit.
        smaller: as for `vlft.answering.batches.in_batches`.
        refuse: as for `in_batches`.

    Returns:
        an iterator over the places of questions, with label -> log-probability (natural logarithm, at most 0), in the
        order of the labels.

    Raises:
        ConfigError: the errors of `label_tokens`; from the iterator: a conversation does not end in a user turn or is
            too long.
        DataError: a picture or video of a row cannot be read; from the iterator.
    """
    endings = label_tokens(labels, encoder)
    longest = max(map(len, endings))

    def compute(places: Sequence[int]) -> list[tuple[int, dict[str, float]]]:
        prompts = []
        for question in (questions[place] for place in places):
            prompt = as_tensors(encoder.prompt(replace(question, thinking=False)), encoder.recipe)
            if limit is not None and len(prompt.ids_T) + longest > limit:
                raise ConfigError(
                    f"{question.file}[{question.index}]: the prompt is {len(prompt.ids_T):,} tokens long and the "
                    f"longest label {longest:,}; the model supports {limit:,} together. Use fewer or smaller media."
                )
            prompts.append(prompt)
        scores_BE = endings_logprobs(speaker, prompts, endings, together=len(places))
        return [
            (place, dict(zip(labels, row, strict=True))) for place, row in zip(places, scores_BE.tolist(), strict=True)
        ]

    return in_batches(compute, questions, order=order, batch=batch, smaller=smaller, refuse=refuse)


def label_tokens(labels: Sequence[str], encoder: Encoder) -> list[list[int]]:
    """The tokens that an answer with each label has in training, with the token that ends the turn.

    An answer is tokenised apart from its prompt, so that its tokens are the same in all rows.

    Raises:
        ConfigError: the chat template renders two labels alike, or the recipe or the chat template has no answers
            without thoughts.
    """
    asked = Turn(role="user", parts=(Text(text="?"),), field="question")
    found: dict[tuple[int, ...], str] = {}
    for index, label in enumerate(labels):
        answer = Turn(role="assistant", parts=(Text(text=label),), field="label")
        question = Sample(file="labels", index=index, id=label, turns=(asked,), thinking=False)
        prompt = encoder.prompt(question).input_ids_T
        try:
            row = encoder.tokens(replace(question, turns=(asked, answer), answer=1)).input_ids_T
        except DataError as error:  # its advice is for rows of a file
            raise ConfigError(f"--labels: {label!r}: {error.row.reason.rstrip('.')}.") from error
        ids = tuple(row[len(prompt) :].tolist())
        if ids in found:
            raise ConfigError(f"labels {found[ids]!r} and {label!r} have the same tokens. Remove one of them.")
        found[ids] = label
    return [list(ids) for ids in found]
