"""An encoder for methods that train no answer of a row: rows are measured up to their last question.

So a row is not refused for an answer that the model never sees: its thoughts need not fit `--thinking`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlft.data.encode import Encoder
from vlft.data.render import refused, thinking_of
from vlft.data.rows.parts import question_of, trained_answers
from vlft.data.sample import Cost, EncodedTokens, Sample


def asked(sample: Sample) -> Sample:
    """A row up to its last question.

    Raises:
        DataError: it has no answer that a reward could compare with.
    """
    if not trained_answers(sample):
        raise refused(sample, "conversations", "the row has no answer that a reward could compare with. Add one")
    return question_of(sample)


@dataclass(frozen=True, kw_only=True)
class PromptEncoder(Encoder):
    """An encoder whose rows are prompts: the turns up to the last question that has an answer."""

    def measure(self, sample: Sample) -> Cost:
        """Count the tokens and patches of the prompt of a row from file headers alone. No token is trained.

        Raises:
            DataError: a medium cannot be read, or the prompt is longer than `recipe.max_length`.
            ConfigError: media cannot be found in the output of the chat template.
        """
        question = asked(sample)
        cost, media = self.measure_prompt(question), self._grids(question)
        self._refuse_long(sample, cost, vision=sum(grid.tokens(self.recipe.merge_size) for grid in media))
        return replace(cost, thinking=thinking_of(question, self.recipe, unanswered=True))

    def shown(self, sample: Sample) -> tuple[Sample, EncodedTokens]:
        """Return the conversation before the row's last answer, and its tokens, which are those of `prompt`.

        Raises:
            DataError, ConfigError: the errors of `measure`.
        """
        self.measure(sample)
        question = asked(sample)
        grids = self._grids(question)
        pieces = self._pieces.of(self._with_boxes(question, grids), grids, unanswered=True)
        return question, self._tokens(question, pieces, grids)

    def _refuse_long(self, sample: Sample, cost: Cost, *, vision: int) -> None:
        limit = self.recipe.max_length
        if cost.tokens > limit:
            raise refused(
                sample,
                "conversations",
                f"the prompt is {cost.tokens:,} tokens long ({vision:,} of them pictures and videos), --max_length is "
                f"{limit:,}. Raise --max_length, lower --image_max_pixels, or skip such rows with --over_length skip",
                too_long=True,
            )

    def samples(self, sample: Sample) -> tuple[Sample, ...]:
        """Return the row itself: it has one prompt, however many answers it has."""
        return (sample,)
