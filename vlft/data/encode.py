"""Sample + media -> EncodedSample: the tokens, labels and pixels of one row, as the served model will see them.

The model's own chat template renders the text. An assistant turn is the text that the template adds after its
generation prompt. Needs a processor and `vlft.data.media.read`, but no model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlft.config.recipe import Recipe
from vlft.data.boxes import has_boxes, in_model_space
from vlft.data.features.reader import CachedMedia
from vlft.data.media import decode as decoder
from vlft.data.media import read as media_io
from vlft.data.media.read import MediaError
from vlft.data.over_length import TooLong, fitted
from vlft.data.positions import mrope_positions
from vlft.data.render import NotFlat, Rendered, refused, render, thinking_of
from vlft.data.rows.parts import trained_answers, up_to
from vlft.data.sample import Cost, EncodedMedia, EncodedPrompt, EncodedSample, EncodedTokens, Grid, Image, Sample
from vlft.data.spans import NoSpans, trained_tokens
from vlft.data.tokenise import token_ids
from vlft.data.video_text import with_times
from vlft.errors import ConfigError
from vlft.families import Family

UNTRAINED = -100
KIND_TEXT, KIND_IMAGE, KIND_VIDEO = 0, 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """A piece of a rendered row: an answer, or the text between two answers.

    Attributes:
        text: text of the piece.
        trained: whether each token is trained.
        ids: tokens of the piece, with one token per run of vision tokens (`Grid.runs`).
        media: how many of the tokens stand for such a run.
    """

    text: str
    trained: np.ndarray
    ids: list[int]
    media: int


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Everything needed to turn a `Sample` into tokens and pixels. It is picklable, for the loader's workers.

    Attributes:
        family: names of the control tokens.
        processor: the base model's stock processor. Only its tokenizer and chat template are used.
        recipe: all settings that determine the tokens and pixels of a row.
        cached: has the features of media that need not be decoded; None: all are decoded.
    """

    family: Family
    processor: Any
    recipe: Recipe
    cached: CachedMedia | None = None

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
            pieces = self._tokenised(self._with_boxes(sample, grids), grids)
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
        )

    def tokens(self, sample: Sample) -> EncodedTokens:
        """Encode one row without its pixels, from file headers alone. The tokens are those of `encode`. Needs no torch.

        Raises:
            DataError, ConfigError: the errors of `measure`.
        """
        sample, grids, pieces = self._to_train(sample)
        return self._tokens(sample, pieces, grids)

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
        tokens = self._tokens(sample, self._tokenised(self._with_boxes(sample, grids), grids, unanswered=True), grids)
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

    def _measured(self, sample: Sample) -> Cost:
        sample, grids, pieces = self._to_train(sample)
        cost = self._cost(sample, pieces, grids)
        self._refuse_long(sample, cost.tokens, vision=sum(grid.tokens(self.recipe.merge_size) for grid in grids))
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
        """Return the row that `encode` encodes: the row itself, or the row as `recipe.fit` changes it, with a warning.

        Raises:
            DataError, ConfigError: the errors of `measure`.
        """
        return self._to_train(sample)[0]

    def _to_train(self, sample: Sample) -> tuple[Sample, list[Grid], list[_Piece]]:
        """Return the row of `as_trained`, and its grids and pieces, so that it is rendered and tokenised only once."""
        grids = self._grids(sample)
        pieces = self._tokenised(self._with_boxes(sample, grids), grids)
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

    def _cost(self, sample: Sample, pieces: Sequence[_Piece], grids: Sequence[Grid]) -> Cost:
        return Cost(
            tokens=sum(len(piece.ids) - piece.media for piece in pieces)
            + sum(grid.tokens(self.recipe.merge_size) for grid in grids),
            supervised=sum(int(np.count_nonzero(piece.trained)) for piece in pieces),
            patches=sum(grid.patches for grid in grids),
            changed=sample.changed,
            answer=sample.answer,
            thinking=thinking_of(sample, self.recipe),
        )

    def _over(self, sample: Sample, cost: Cost) -> bool:
        """Whether the row must be made to fit. A row is changed only once, even if a file changes in the meantime."""
        fit = self.recipe.fit
        return fit is not None and not sample.changed and fit.over(cost.tokens, cost.patches)

    def _fitted(self, sample: Sample) -> Sample:
        def text_tokens(some: Sample) -> int:
            grids = self._grids(some)
            pieces = self._tokenised(self._with_boxes(some, grids), grids)
            return sum(len(piece.ids) - piece.media for piece in pieces)

        fit = self.recipe.fit
        if fit is None:
            return sample
        if fit.how == "drop_media" and has_boxes(sample, self.recipe.box_format):
            grids = self._grids(sample)
            cost = self._cost(sample, self._tokenised(self._with_boxes(sample, grids), grids), grids)
            why = (
                f"the row has {cost.tokens:,} tokens and {cost.patches:,} patches; {fit.limit}, and no picture is "
                "dropped from a row with boxes in its pictures"
            )
            raise refused(sample, "conversations", f"{why}. Split the row, or use --over_length shrink", too_long=True)
        try:
            return fitted(sample, fit, self.recipe, text_tokens)
        except MediaError as error:
            raise refused(sample, error.field, error.reason) from error
        except TooLong as error:
            raise refused(sample, "conversations", str(error), too_long=True) from error

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

    def _tokens(self, sample: Sample, pieces: Sequence[_Piece], grids: Sequence[Grid]) -> EncodedTokens:
        """Return the tokens of a row whose media have these grids."""
        runs = [run for grid in grids for run in grid.runs]
        tokens = [run.tokens(self.recipe.merge_size) for run in runs]
        ids = np.array([token for piece in pieces for token in piece.ids])
        trained = np.concatenate([piece.trained for piece in pieces])
        kinds = np.zeros(len(ids), dtype=np.uint8)
        for pad, kind in self._pads.items():
            kinds[ids == pad] = kind
        stands = np.flatnonzero(kinds)
        counts = np.ones(len(ids), dtype=np.int64)
        counts[stands] = tokens
        self._refuse_long(sample, int(counts.sum()), vision=sum(tokens))
        labels = np.where(trained & (kinds == KIND_TEXT), ids, UNTRAINED)
        text_runs = (np.diff([-1, *stands, len(ids)]) - 1).tolist()
        segments = [*(part for pair in zip(text_runs[:-1], runs, strict=True) for part in pair), text_runs[-1]]
        return EncodedTokens(
            input_ids_T=np.repeat(ids, counts),
            labels_T=np.repeat(labels, counts),
            kinds_T=np.repeat(kinds, counts),
            positions_3T=mrope_positions(
                segments, merge=self.recipe.merge_size, tokens_per_second=self.recipe.tokens_per_second
            ),
            grids=tuple(grids),
            text="".join(piece.text for piece in pieces),
        )

    def _tokenised(self, sample: Sample, grids: Sequence[Grid], *, unanswered: bool = False) -> list[_Piece]:
        """Render the conversation and tokenise its pieces, with a single pad token per run of vision tokens.

        With `unanswered`, the text ends with the template's generation prompt, and no answer follows.

        Answers are tokenised separately from the prompt before them, as when served: a newline at the start of an
        answer must not merge with the newline of "<|im_start|>assistant\\n".
        """
        rendered = render(sample, self.processor, self.family, self.recipe, unanswered=unanswered)
        rendered = with_times(rendered, grids, self.family)
        piece_ids = token_ids(self.processor.tokenizer, [one.text for one in rendered])
        wanted = [
            KIND_IMAGE if isinstance(part, Image) else KIND_VIDEO
            for part, grid in zip(sample.media, grids, strict=True)
            for _ in grid.runs
        ]
        found = [[self._pads[token] for token in ids if token in self._pads] for ids in piece_ids]
        kinds = [kind for some in found for kind in some]
        if kinds != wanted:
            raise ConfigError(
                f"the chat template wrote {kinds.count(KIND_IMAGE)} pictures and {kinds.count(KIND_VIDEO)} videos for "
                f"{sample.file}[{sample.index}], which has {wanted.count(KIND_IMAGE)} and {wanted.count(KIND_VIDEO)} "
                "(or their order differs). Use a chat template that writes each medium in its place."
            )
        pieces = [
            _Piece(text=one.text, trained=self._trained(sample, one, ids), ids=ids, media=len(some))
            for one, ids, some in zip(rendered, piece_ids, found, strict=True)
        ]
        masked = any(one.turn is not None and one.turn.trained != "all" for one in rendered)
        if masked and not unanswered and not any(piece.trained.any() for piece in pieces):
            raise refused(
                sample, "conversations", "no token is entirely inside a trained span: nothing to learn. Widen a span"
            )
        return pieces

    def _trained(self, sample: Sample, rendered: Rendered, ids: list[int]) -> np.ndarray:
        """Return whether each token of a piece is trained: bool [tokens]."""
        turn = rendered.turn
        if turn is None or turn.trained != "some":
            return np.full(len(ids), turn is not None and turn.trained == "all")
        try:
            return np.array(trained_tokens(turn, rendered.text, self.processor.tokenizer), dtype=bool)
        except NoSpans as error:
            raise ConfigError(
                f"{turn.field} of {sample.file}[{sample.index}]: {error}, or mask whole turns."
            ) from error

    @functools.cached_property
    def _pads(self) -> dict[int, int]:
        """Maps the pad token of a picture or video to its kind."""
        token_id = self.processor.tokenizer.convert_tokens_to_ids
        return {token_id(self.family.image_pad): KIND_IMAGE, token_id(self.family.video_pad): KIND_VIDEO}

    def _refuse_long(self, sample: Sample, tokens: int, *, vision: int) -> None:
        limit = self.recipe.max_length
        if tokens > limit:
            what = "row" if sample.answer is None else f"row up to {sample.turns[-1].field}"
            raise refused(
                sample,
                "conversations",
                f"the {what} is {tokens:,} tokens long ({vision:,} of them pictures and videos), --max_length is "
                f"{limit:,}. Raise --max_length, lower --image_max_pixels or --video_max_pixels, split the row, or let "
                "--over_length handle such rows.",
                too_long=True,
            )
