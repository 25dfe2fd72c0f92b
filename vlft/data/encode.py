"""Sample + media -> EncodedSample: the tokens, labels and pixels of one row, as the served model will see them.

The model's own chat template renders the text. An assistant turn is the text that the template adds after its
generation prompt. Needs a processor and `vlft.data.media.read`, but no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vlft.config.recipe import Recipe
from vlft.data.boxes import has_boxes, in_model_space
from vlft.data.branches import laid_out, named_parts
from vlft.data.features.reader import CachedMedia
from vlft.data.media import decode as decoder
from vlft.data.media import read as media_io
from vlft.data.media.read import MediaError
from vlft.data.over_length import TooLong, fitted
from vlft.data.pieces import KIND_TEXT, Piece, Pieces
from vlft.data.positions import mrope_positions
from vlft.data.render import NotFlat, refused, render, thinking_of
from vlft.data.rows.parts import trained_answers, up_to
from vlft.data.sample import (
    Cost,
    EncodedMedia,
    EncodedPrompt,
    EncodedSample,
    EncodedTokens,
    Grid,
    Image,
    Sample,
    Video,
)
from vlft.errors import ConfigError
from vlft.families import Family

UNTRAINED = -100


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Everything needed to turn a `Sample` into tokens and pixels. It is picklable, for the loader's workers.

    Attributes:
        family: names of the control tokens.
        processor: the base model's stock processor. Only its tokenizer and chat template are used.
        recipe: all settings that determine the tokens and pixels of a row.
        cached: has the features of media that need not be decoded; None: all are decoded.
        share: let the answers of a preference row share the tokens of its prompt, if the family can (`shared`).
    """

    family: Family
    processor: Any
    recipe: Recipe
    cached: CachedMedia | None = None
    share: bool = True
    _pieces: Pieces = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        made = Pieces(family=self.family, processor=self.processor, recipe=self.recipe)
        object.__setattr__(self, "_pieces", made)  # here, so that it is the same in all processes that are forked later

    @property
    def shared(self) -> bool:
        """Whether the answers of a preference row share the tokens of its prompt in a batch.

        A recurrent layer carries its state from token to token, so that each answer needs a copy of the prompt.
        """
        return self.share and "recurrent" not in self.family.features

    def encode(self, sample: Sample) -> EncodedSample:
        """Encode one row: tokens, labels, positions and pixels. `recipe.fit` changes a row that is over the limit.

        Raises:
            DataError: a medium cannot be opened or decoded, or the row is longer than `recipe.max_length`.
            ConfigError: media or answers cannot be found in the output of the chat template.
        """
        import torch

        sample, known, pieces = self._to_train(sample) if self.recipe.fit is not None else (sample, None, [])
        media = self._decode(sample)
        grids = [m.grid for m in media]
        if grids != known:
            pieces = self._pieces.of(self._with_boxes(sample, grids), grids)
        tokens = self._tokens(sample, pieces, grids)
        return EncodedSample(
            file=sample.file,
            index=sample.index,
            id=sample.id,
            input_ids_T=torch.from_numpy(tokens.input_ids_T),
            labels_T=torch.from_numpy(tokens.labels_T),
            kinds_T=torch.from_numpy(tokens.kinds_T),
            positions_3T=torch.from_numpy(tokens.positions_3T),
            media=media,
            text=tokens.text,
            changed=sample.changed,
            branches=tokens.branches,
            shared=self.shared,
        )

    def shown(self, sample: Sample) -> tuple[Sample, EncodedTokens]:
        """The row of `as_trained`, and its tokens without pixels, from file headers alone. Needs no torch.

        Raises:
            DataError, ConfigError: the errors of `measure`.
        """
        sample, grids, pieces = self._to_train(sample)
        return sample, self._tokens(sample, pieces, grids)

    def tokens(self, sample: Sample) -> EncodedTokens:
        """The tokens of `shown`, which are those of `encode`."""
        return self.shown(sample)[1]

    def prompt(self, sample: Sample) -> EncodedPrompt:
        """Encode a conversation that waits for its next answer. `encode` begins the row of that conversation alike.

        Raises:
            ConfigError: its last turn is not the user's.
            DataError: the errors of `encode`.
        """
        last = sample.turns[-1]
        if last.role != "user":
            raise ConfigError(
                f"{sample.file}[{sample.index}].{last.field}: a prompt ends with a user turn, this one ends with a "
                f"turn of {last.role}. Remove that turn."
            )
        import torch

        media = self._decode(sample)
        grids = [m.grid for m in media]
        tokens = self._tokens(sample, self._pieces.of(self._with_boxes(sample, grids), grids, unanswered=True), grids)
        return EncodedPrompt(
            input_ids_T=torch.from_numpy(tokens.input_ids_T),
            kinds_T=torch.from_numpy(tokens.kinds_T),
            media=media,
            text=tokens.text,
        )

    def measure(self, sample: Sample) -> Cost:
        """Count the tokens and patches of a row from file headers alone. They equal those of `encode`.

        A row that is split into samples (`samples`) has the costs of all of them. It is refused if one of them is.

        Raises:
            DataError: the errors of `encode`, except those that only decoding finds.
            ConfigError: the errors of `encode`.
        """
        if self.recipe.turns == "auto":
            try:
                return self._measured(sample)  # a row that stays whole is rendered only once
            except NotFlat:
                if len(self.samples(sample)) == 1:
                    raise
        parts = [self._measured(part) for part in self.samples(sample)]
        return Cost.of_parts(parts) if sample.answer is None and parts[0].answer is not None else parts[0]

    def measure_prompt(self, sample: Sample) -> Cost:
        """Count the tokens and patches of `prompt` from file headers alone, as `measure` does for a row."""
        grids = self._grids(sample)
        pieces = self._pieces.of(self._with_boxes(sample, grids), grids, unanswered=True)
        return replace(self._cost(sample, pieces, grids), supervised=0)

    def _measured(self, sample: Sample) -> Cost:
        sample, grids, pieces = self._to_train(sample)
        cost = self._cost(sample, pieces, grids)
        self._refuse_long(sample, cost, vision=sum(grid.tokens(self.recipe.merge_size) for grid in grids))
        return cost

    def samples(self, sample: Sample) -> tuple[Sample, ...]:
        """Return what a row is trained as, by `recipe.turns`: the row itself, or the turns up to each of its answers.

        Raises:
            DataError: the chat template refuses the row.
        """
        answers = trained_answers(sample)
        if sample.answer is not None or len(answers) < 2:
            return (sample,)
        if self.recipe.turns == "last":
            return (up_to(sample, answers[-1]),)
        if self.recipe.turns == "auto":
            try:
                render(sample, self.processor, self.family, self.recipe, unanswered=False)
            except NotFlat:
                pass
            else:
                return (sample,)
        return tuple(up_to(sample, answer) for answer in answers)

    def as_trained(self, sample: Sample) -> Sample:
        """Return the row that `encode` encodes: itself, or as `recipe.fit` changes it, with a warning."""
        return self._to_train(sample)[0]

    def _to_train(self, sample: Sample) -> tuple[Sample, list[Grid], list[Piece]]:
        """Return the row of `as_trained`, and its grids and pieces, so that it is rendered and tokenised only once."""
        grids = self._grids(sample)
        pieces = self._pieces.of(self._with_boxes(sample, grids), grids)
        if not self._over(sample, self._cost(sample, pieces, grids)):
            return sample, grids, pieces
        made = self._fitted(sample)
        return self._to_train(replace(made, warnings=(*made.warnings, ("row", made.changed))))

    def as_written(self, sample: Sample) -> Sample:
        """Return the row with the boxes in its text as the model reads and writes them.

        Raises:
            DataError: the errors of `measure`.
        """
        return self._with_boxes(sample, self._grids(sample))

    def _grids(self, sample: Sample) -> list[Grid]:
        try:
            return [media_io.measure(part, self.recipe) for part in sample.media]
        except MediaError as error:
            raise refused(sample, error.field, error.reason) from error

    def _cost(self, sample: Sample, pieces: Sequence[Piece], grids: Sequence[Grid]) -> Cost:
        branches = self._branches(pieces, grids)
        return Cost(
            tokens=self._laid_out(branches),
            supervised=sum(int(np.count_nonzero(piece.trained)) for piece in pieces),
            patches=sum(grid.patches for grid in grids),
            changed=sample.changed,
            answer=sample.answer,
            thinking=thinking_of(sample, self.recipe),
            branches=branches if len(branches) > 1 else (),
            images=sum(isinstance(part, Image) for part in sample.media),
            videos=sum(isinstance(part, Video) for part in sample.media),
        )

    def _laid_out(self, branches: Sequence[int]) -> int:
        return laid_out(branches, shared=self.shared) if len(branches) > 1 else branches[0]

    def _branches(self, pieces: Sequence[Piece], grids: Sequence[Grid]) -> tuple[int, ...]:
        """Return the tokens of a row as `EncodedTokens.branches`; of a plain row one number, all its tokens."""
        lengths = [0] * (1 + pieces[-1].branch)
        for piece in pieces:
            lengths[piece.branch] += len(piece.ids) - piece.media
        lengths[0] += sum(grid.tokens(self.recipe.merge_size) for grid in grids)
        return tuple(lengths)

    def _over(self, sample: Sample, cost: Cost) -> bool:
        """Whether the row must be made to fit. A row is changed only once, even if a file changes in the meantime."""
        fit = self.recipe.fit
        return fit is not None and not sample.changed and fit.over(cost.tokens, cost.patches)

    def _fitted(self, sample: Sample) -> Sample:
        def text_tokens(some: Sample) -> int:
            grids = self._grids(some)
            return self._laid_out(self._branches(self._pieces.of(self._with_boxes(some, grids), grids), ()))

        fit = self.recipe.fit
        if fit is None:
            return sample
        if fit.how == "drop_media" and has_boxes(sample, self.recipe.box_format):
            grids = self._grids(sample)
            cost = self._cost(sample, self._pieces.of(self._with_boxes(sample, grids), grids), grids)
            why = (
                f"the row has {cost.tokens:,} tokens{_named(cost)} and {cost.patches:,} patches; {fit.limit}, and no "
                "picture is dropped from a row with boxes in its pictures"
            )
            raise refused(sample, "conversations", f"{why}. Split the row, or use --over_length shrink", too_long=True)
        try:
            copies = 1 if self.shared else 1 + len(sample.rejected)
            return fitted(sample, fit, self.recipe, text_tokens, copies=copies)
        except MediaError as error:
            raise refused(sample, error.field, error.reason) from error
        except TooLong as error:
            grids = self._grids(sample)
            cost = self._cost(sample, self._pieces.of(self._with_boxes(sample, grids), grids), grids)
            parts = f". Its tokens: {named_parts(cost)}" if cost.branches else ""
            raise refused(sample, "conversations", f"{error}{parts}", too_long=True) from error

    def _decode(self, sample: Sample) -> tuple[EncodedMedia, ...]:
        decode = decoder.decode if self.cached is None else self.cached.decode
        try:
            return tuple(decode(part, self.recipe) for part in sample.media)
        except MediaError as error:
            raise refused(sample, error.field, error.reason) from error

    def _with_boxes(self, sample: Sample, grids: Sequence[Grid]) -> Sample:
        """Return the row with its boxes as the family writes them, for pictures of these grids."""
        box_format, patch_size = self.recipe.box_format, self.recipe.patch_size
        try:
            return in_model_space(sample, grids, family=self.family, box_format=box_format, patch_size=patch_size)
        except MediaError as error:
            raise refused(sample, error.field, error.reason) from error

    def _tokens(self, sample: Sample, pieces: Sequence[Piece], grids: Sequence[Grid]) -> EncodedTokens:
        """Return the tokens of a row whose media have these grids."""
        runs = [run for grid in grids for run in grid.runs]
        tokens = [run.tokens(self.recipe.merge_size) for run in runs]
        ids = np.concatenate([piece.ids for piece in pieces])
        trained = np.concatenate([piece.trained for piece in pieces])
        kinds = np.zeros(len(ids), dtype=np.uint8)
        for pad, kind in self._pieces.pads.items():
            kinds[ids == pad] = kind
        stands = np.flatnonzero(kinds)
        counts = np.ones(len(ids), dtype=np.int64)
        counts[stands] = tokens
        cost = self._cost(sample, pieces, grids)
        self._refuse_long(sample, cost, vision=sum(tokens))
        labels = np.where(trained & (kinds == KIND_TEXT), ids, UNTRAINED)
        text_runs = (np.diff([-1, *stands, len(ids)]) - 1).tolist()
        segments = [*(part for pair in zip(text_runs[:-1], runs, strict=True) for part in pair), text_runs[-1]]
        positions_3T = mrope_positions(
            segments, merge=self.recipe.merge_size, tokens_per_second=self.recipe.tokens_per_second
        )
        return EncodedTokens(
            input_ids_T=np.repeat(ids, counts),
            labels_T=np.repeat(labels, counts),
            kinds_T=np.repeat(kinds, counts),
            positions_3T=_from_prompt(positions_3T, cost.branches),
            grids=tuple(grids),
            text="".join(piece.text for piece in pieces),
            branches=cost.branches,
        )

    def _refuse_long(self, sample: Sample, cost: Cost, *, vision: int) -> None:
        limit = self.recipe.max_length
        if cost.tokens > limit:
            what = "row" if sample.answer is None else f"row up to {sample.turns[-1].field}"
            parts = f"{vision:,} of them pictures and videos"
            if cost.branches:
                parts = f"{named_parts(cost)}; {vision:,} of the prompt are pictures and videos"
            raise refused(
                sample,
                "conversations",
                f"the {what} is {cost.tokens:,} tokens long ({parts}), --max_length is "
                f"{limit:,}. Raise --max_length, lower --image_max_pixels or --video_max_pixels, split the row, or let "
                "--over_length handle such rows.",
                too_long=True,
            )


def _named(cost: Cost) -> str:
    return f" ({named_parts(cost)})" if cost.branches else ""


def _from_prompt(positions_3T: np.ndarray, branches: Sequence[int]) -> np.ndarray:
    """Let the positions of each answer of a preference row continue those of the prompt, which ends with text."""
    if not branches:
        return positions_3T
    prompt, *answers = branches
    first_31 = positions_3T[:, prompt, None]
    return np.concatenate([positions_3T[:, :prompt], *(first_31 + np.arange(tokens) for tokens in answers)], axis=1)
