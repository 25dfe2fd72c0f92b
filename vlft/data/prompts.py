"""An encoder for methods that train no answer of a row: rows are measured up to their last question.

So a row is not refused for an answer that the model never sees: its thoughts need not fit `--thinking`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlft.data.dataset import MediaProbe
from vlft.data.encode import Encoder
from vlft.data.render import refused, thinking_of
from vlft.data.rows.parts import question_of, trained_answers
from vlft.data.sample import Cost, EncodedTokens, Sample, Video


def asked(sample: Sample) -> Sample:
    """A row up to its last question.

    Raises:
        DataError: it has no answer that a reward could compare with, or a video.
    """
    if not trained_answers(sample):
        raise refused(sample, "conversations", "the row has no answer that a reward could compare with. Add one")
    question = question_of(sample)
    video = next((part for part in question.media if isinstance(part, Video)), None)
    if video is not None:
        raise refused(sample, video.field, "TRL's GRPO takes pictures only, and this is a video. Leave such rows out")
    return question


@dataclass(frozen=True, kw_only=True)
class PromptEncoder(Encoder):
    """An encoder whose rows are prompts: the turns up to the last question that has an answer.

    It decides which rows GRPO cannot take, for every verb: rows without an answer, rows with videos, and prompts that
    leave no room for a completion.

    Attributes:
        completion: tokens that a completion may have (`--max_completion_length`). Prompt and completion fit into
            `recipe.max_length`.
    """

    completion: int = 0

    def measure(self, sample: Sample) -> Cost:
        """Count the tokens and patches of the prompt of a row from file headers alone. No token is trained.

        Raises:
            DataError: the row has no answer or has videos, a medium cannot be read, or the prompt leaves no room for a
                completion.
            ConfigError: media cannot be found in the output of the chat template.
        """
        question = asked(sample)
        cost, media = self.measure_prompt(question), self._grids(question)
        self._refuse_long(question, cost, vision=sum(grid.tokens(self.recipe.merge_size) for grid in media))
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

    def tokens(self, sample: Sample) -> EncodedTokens:
        """The tokens of a whole row, which an export holds.

        Raises:
            DataError, ConfigError: the errors of `measure`.
        """
        self.measure(sample)
        return super().shown(sample)[1]

    def _refuse_long(self, sample: Sample, cost: Cost, *, vision: int) -> None:
        if sample.turns[-1].role != "user":  # a whole row
            self.measure(sample)
            return
        limit = self.recipe.max_length
        if cost.tokens + self.completion > limit:
            room = f"a completion may have {self.completion:,} (--max_completion_length), "
            raise refused(
                sample,
                "conversations",
                f"the prompt is {cost.tokens:,} tokens long ({vision:,} of them pictures), "
                f"{room if self.completion else ''}--max_length is {limit:,}. Raise --max_length, lower "
                "--image_max_pixels or --max_completion_length, or skip such rows with --over_length skip",
                too_long=True,
            )

    def samples(self, sample: Sample) -> tuple[Sample, ...]:
        """Return the row itself: it has one prompt, however many answers it has."""
        return (sample,)


@dataclass(frozen=True, kw_only=True)
class PromptProbe(MediaProbe):
    """A probe that refuses the rows that `PromptEncoder` refuses, except for their length."""

    def cost(self, sample: Sample, *, decode: bool) -> Cost:
        return super().cost(asked(sample), decode=decode)
