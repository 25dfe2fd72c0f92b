"""Score labels with a model: how likely is each of some answers to a row? Uses data and model, as `vlft.answering`.

questions and labels  --label_scores-->  label -> log-probability
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from vlft.answering import as_tensors
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
    """Score labels as answers to conversations, in order. A score does not depend on the rest of the batch.

    The score of a label is the log-probability of its tokens and of the token that ends the turn, after the prompt that
    a server makes of the conversation. It is the negative of the loss, summed over tokens, that a row with this answer
    has in training. Labels are answers without thoughts, so the prompt is that of an answer without thoughts.

    Args:
        questions: conversations that end in a user turn, for example from `vlft.answering.question_of`.
        labels: the answers to score.
        encoder: conversations -> tokens and pixels.
        speaker: the model.
        batch: number of questions computed together, and most pairs of question and label in one forward.
        limit: most tokens of prompt and label together that the model supports; None: no limit.

    Yields:
        for each question, label -> log-probability (natural logarithm, at most 0), in the order of the labels.

    Raises:
        ConfigError: a conversation does not end in a user turn or is too long; or the errors of `label_tokens`.
        DataError: a picture or video of a row cannot be read.
    """
    endings = label_tokens(labels, encoder)
    longest = max(map(len, endings))
    for start in range(0, len(questions), batch):
        prompts = []
        for question in questions[start : start + batch]:
            prompt = as_tensors(encoder.prompt(replace(question, thinking=False)), encoder.recipe)
            if limit is not None and len(prompt.ids_T) + longest > limit:
                raise ConfigError(
                    f"{question.file}[{question.index}]: the prompt is {len(prompt.ids_T):,} tokens long and the "
                    f"longest label {longest:,}; the model supports {limit:,} together. Use fewer or smaller media."
                )
            prompts.append(prompt)
        scores_BE = endings_logprobs(speaker, prompts, endings, together=batch)
        for row in scores_BE.tolist():
            yield dict(zip(labels, row, strict=True))


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
