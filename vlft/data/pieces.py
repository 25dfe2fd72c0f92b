"""Sample -> pieces of its rendered text with their tokens. Each row is rendered and tokenised once.

A row's pieces depend on its texts and on the grids of its media, not on pixels. They are kept in memory that all
processes share which are forked later (`vlft.data.shared_cache`): measuring the costs of rows fills it, and the
loader's workers read it, also those of later epochs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlft.config.recipe import Recipe
from vlft.data.render import Rendered, refused, render
from vlft.data.sample import Grid, Image, Sample, Text
from vlft.data.shared_cache import SharedCache
from vlft.data.spans import NoSpans, trained_tokens
from vlft.data.tokenise import token_ids
from vlft.data.video_text import with_times
from vlft.errors import ConfigError
from vlft.families import Family

KIND_TEXT, KIND_IMAGE, KIND_VIDEO = 0, 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A piece of a rendered row: an answer, or the text between two answers.

    Attributes:
        text: text of the piece.
        trained: bool [tokens], whether each token is trained.
        ids: int64 [tokens], with one token per run of vision tokens (`Grid.runs`).
        media: how many of the tokens stand for such a run.
        branch: as in `vlft.data.render.Rendered`.
    """

    text: str
    trained: np.ndarray
    ids: np.ndarray
    media: int
    branch: int = 0


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Makes pieces. Attributes are those of `vlft.data.encode.Encoder`."""

    family: Family
    processor: Any
    recipe: Recipe
    _kept: SharedCache = field(init=False, repr=False, compare=False, default_factory=SharedCache)

    def of(self, sample: Sample, grids: Sequence[Grid], *, unanswered: bool = False) -> list[Piece]:
        """Render the conversation and tokenise its pieces, with a single pad token per run of vision tokens.

        With `unanswered`, the text ends with the template's generation prompt, and no answer follows.

        Answers are tokenised separately from the prompt before them, as when served: a newline at the start of an
        answer must not merge with the newline of "<|im_start|>assistant\\n".

        Raises:
            DataError: the chat template refuses the row, or nothing is trained.
            ConfigError: media or answers cannot be found in the output of the chat template.
        """
        if unanswered:
            return self._made(sample, grids, unanswered=True)
        key = self._key(sample, grids)
        if (kept := self._kept.get(key)) is not None:
            return _unpacked(kept)
        pieces = self._made(sample, grids, unanswered=False)
        self._kept.put(key, _packed(pieces))
        return pieces

    @functools.cached_property
    def pads(self) -> dict[int, int]:
        """Maps the pad token of a picture or video to its kind."""
        token_id = self.processor.tokenizer.convert_tokens_to_ids
        return {token_id(self.family.image_pad): KIND_IMAGE, token_id(self.family.video_pad): KIND_VIDEO}

    def _key(self, sample: Sample, grids: Sequence[Grid]) -> bytes:
        """Everything that pieces depend on, besides what is the same for all rows of a run."""
        turns = [
            (turn.role, *((part.text, part.trained) if isinstance(part, Text) else type(part) for part in turn.parts))
            for turn in sample.all_turns
        ]
        times = [(len(grid.runs), grid.times) for grid in grids]
        template = str(self.processor.chat_template or self.processor.tokenizer.chat_template)
        kind = (sample.answer, sample.thinking, len(sample.rejected))
        return repr((hash(template), *kind, times, turns)).encode()

    def _made(self, sample: Sample, grids: Sequence[Grid], *, unanswered: bool) -> list[Piece]:
        rendered = render(sample, self.processor, self.family, self.recipe, unanswered=unanswered)
        rendered = with_times(rendered, grids, self.family)
        piece_ids = token_ids(self.processor.tokenizer, [one.text for one in rendered])
        wanted = [
            KIND_IMAGE if isinstance(part, Image) else KIND_VIDEO
            for part, grid in zip(sample.media, grids, strict=True)
            for _ in grid.runs
        ]
        found = [[self.pads[token] for token in ids if token in self.pads] for ids in piece_ids]
        kinds = [kind for some in found for kind in some]
        if kinds != wanted:
            raise ConfigError(
                f"the chat template wrote {kinds.count(KIND_IMAGE)} pictures and {kinds.count(KIND_VIDEO)} videos for "
                f"{sample.file}[{sample.index}], which has {wanted.count(KIND_IMAGE)} and {wanted.count(KIND_VIDEO)} "
                "(or their order differs). Use a chat template that writes each medium in its place."
            )
        pieces = [
            Piece(
                text=one.text,
                trained=self._trained(sample, one, len(ids)),
                ids=np.array(ids, dtype=np.int64),
                media=len(some),
                branch=one.branch,
            )
            for one, ids, some in zip(rendered, piece_ids, found, strict=True)
        ]
        masked = any(one.turn is not None and one.turn.trained != "all" for one in rendered)
        if masked and not unanswered and not any(piece.trained.any() for piece in pieces):
            raise refused(
                sample, "conversations", "no token is entirely inside a trained span: nothing to learn. Widen a span"
            )
        if sample.rejected and not unanswered:
            _check_branches(sample, pieces)
        return pieces

    def _trained(self, sample: Sample, rendered: Rendered, tokens: int) -> np.ndarray:
        """Return whether each token of a piece is trained: bool [tokens]."""
        turn = rendered.turn
        if turn is None or turn.trained != "some":
            return np.full(tokens, turn is not None and turn.trained == "all")
        try:
            return np.array(trained_tokens(turn, rendered.text, self.processor.tokenizer), dtype=bool)
        except NoSpans as error:
            raise ConfigError(
                f"{turn.field} of {sample.file}[{sample.index}]: {error}, or mask whole turns."
            ) from error


def _check_branches(sample: Sample, pieces: Sequence[Piece]) -> None:
    """Refuse a preference row in which an answer has no trained token, or two answers have the same tokens."""
    answers = (sample.turns[-1], *sample.rejected)
    seen: dict[tuple[int, ...], str] = {}
    for branch, turn in enumerate(answers, start=1):
        own = [piece for piece in pieces if piece.branch == branch]
        ids = tuple(token for piece in own for token in piece.ids.tolist())
        if not any(piece.trained.any() for piece in own):
            raise refused(sample, turn.field, "no token of this answer is trained: nothing to compare. Train all of it")
        if ids in seen:
            raise refused(
                sample,
                turn.field,
                f"this answer has the same tokens as {seen[ids]}, so neither can be preferred. Change one of them, or "
                "remove the row",
            )
        seen[ids] = turn.field


def _packed(pieces: Sequence[Piece]) -> bytes:
    """Pieces as bytes: their number, then four numbers of each, then ids of 4 bytes, flags of one bit, and texts."""
    texts = [piece.text.encode() for piece in pieces]
    sizes = [(len(piece.ids), piece.media, len(text), piece.branch) for piece, text in zip(pieces, texts, strict=True)]
    head = np.array([len(pieces), *(size for four in sizes for size in four)], dtype=np.uint32)
    ids = np.concatenate([piece.ids for piece in pieces]).astype(np.uint32)
    trained = np.packbits(np.concatenate([piece.trained for piece in pieces]))
    return b"".join((head.tobytes(), ids.tobytes(), trained.tobytes(), *texts))


def _unpacked(kept: bytes) -> list[Piece]:
    (count,) = np.frombuffer(kept, np.uint32, 1)
    sizes = np.frombuffer(kept, np.uint32, 4 * count, offset=4).reshape(-1, 4).tolist()
    tokens, start = sum(size[0] for size in sizes), 4 + 16 * len(sizes)
    ids = np.frombuffer(kept, np.uint32, tokens, offset=start).astype(np.int64)
    start += 4 * tokens
    flags = np.frombuffer(kept, np.uint8, -(-tokens // 8), offset=start)
    trained = np.unpackbits(flags, count=tokens).view(bool)
    start += len(flags)
    pieces, first = [], 0
    for length, media, letters, branch in sizes:
        last = first + length
        text = kept[start : start + letters].decode()
        pieces.append(Piece(text=text, trained=trained[first:last], ids=ids[first:last], media=media, branch=branch))
        first, start = last, start + letters
    return pieces
