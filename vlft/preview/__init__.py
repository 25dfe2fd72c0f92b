"""Show rows as the model sees them: the tokens, which of them are trained, and the resized pictures.

`preview_rows` reads and encodes rows. `vlft.preview.text` shows them on a terminal, `vlft.preview.page` as a web page.
Only the page needs pixels, and so torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.recipe import Recipe
from vlft.data.encode import UNTRAINED
from vlft.data.media import read as media_io
from vlft.data.media.read import MediaError, depth_remarks
from vlft.data.pieces import KIND_TEXT
from vlft.data.prompts import PromptEncoder, asked
from vlft.data.render import refused
from vlft.data.rows.source import as_found
from vlft.data.sample import EncodedTokens, Sample, Text, Video
from vlft.errors import BadRow, DataError
from vlft.families import DEFAULT, Family
from vlft.preview.media import Medium, media_of
from vlft.setup import Base, open_base, open_some, stock_probe
from vlft.text import counted


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive tokens that are all trained or all untrained: text, or the pads of one medium.

    Attributes:
        text: the tokens as text; for a medium, its pad once.
        trained: whether the tokens are trained.
        medium: the medium that the pads stand for; None for text.
        step: the time step of the medium that they stand for; None: the whole medium.
        answer: of a preference row, which answer the tokens belong to: `chosen`, `rejected`, `rejected 2` and so on; ""
            for its prompt, and for other rows.
    """

    text: str
    trained: bool
    medium: Medium | None = None
    step: int | None = None
    answer: str = ""

    @property
    def pads(self) -> int:
        """Number of pads; 0 for text."""
        if self.medium is None:
            return 0
        return self.medium.tokens if self.step is None else self.medium.tokens // self.medium.grid.t


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A row as the model sees it.

    Attributes:
        sample: the parsed row.
        tokens: the row as tokens; None without a base.
        media: its pictures and videos, in the order of their tags.
        pieces: the whole row, in order.
        control_tokens: texts that the model reads as control tokens; the page shades them.
        is_prompt: whether the model samples completions after the last piece, and none of the row is trained.
    """

    sample: Sample
    tokens: EncodedTokens | None
    media: tuple[Medium, ...]
    pieces: tuple[Piece, ...]
    control_tokens: tuple[str, ...]
    is_prompt: bool = False

    @property
    def title(self) -> str:
        upto = "" if self.sample.answer is None else f", the sample that ends with {self.sample.turns[-1].field}"
        return _title(self.sample) + upto

    @property
    def trained(self) -> int:
        """Number of trained tokens; 0 without a base."""
        return 0 if self.tokens is None else int((self.tokens.labels_T != UNTRAINED).sum())

    @property
    def counts(self) -> str:
        """The numbers of tokens, as text."""
        vision = sum(medium.tokens for medium in self.media)
        of_media = f", {vision:,} of pictures and videos" if self.media else ""
        if self.tokens is None:
            return f"tokens are not counted without a base (--model_id){of_media}"
        if self.is_prompt:
            return f"{len(self.tokens.input_ids_T):,} tokens of the prompt{of_media}"
        names = ("prompt", *answer_names(len(self.tokens.branches) - 1))
        each = zip(names, self.tokens.branches, strict=True) if self.tokens.branches else ()
        of_answers = "".join(f", {count:,} of {name}" for name, count in each)
        return f"{len(self.tokens.input_ids_T):,} tokens: {self.trained:,} trained{of_media}{of_answers}"

    def as_json(self) -> dict[str, Any]:
        """Return the document of `vlft preview --json`. Labels are aligned with input_ids, -100 where untrained.

        Without a base the entries on tokens are null.
        """
        tokens = self.tokens

        def grids(*, videos: bool) -> list[list[int]]:
            return [[m.grid.t, m.grid.h, m.grid.w] for m in self.media if m.is_video == videos]

        return {
            "file": self.sample.file,
            "index": self.sample.index,
            "id": self.sample.id,
            "tokens": None if tokens is None else len(tokens.input_ids_T),
            "supervised": None if tokens is None else self.trained,
            "warnings": [{"field": field, "reason": remark} for field, remark in self.sample.warnings],
            "media": [
                {"field": m.field, "path": m.path, "source": m.source, "shown": m.shown, "tokens": m.tokens}
                for m in self.media
            ],
            "input_ids": None if tokens is None else tokens.input_ids_T.tolist(),
            "labels": None if tokens is None else tokens.labels_T.tolist(),
            "position_ids": None if tokens is None else tokens.positions_3T.tolist(),
            "image_grid_thw": grids(videos=False),
            "video_grid_thw": grids(videos=True),
            "text": "".join(piece.text for piece in self.pieces) if tokens is None else tokens.text,
            "branches": None if tokens is None else list(tokens.branches),
        }


@dataclass(frozen=True, kw_only=True)
class Split:
    """A row that is trained as several samples, one for each answer with the turns before it (`--turns`).

    Attributes:
        sample: the parsed row.
        samples: its samples, in the order of the answers.
    """

    sample: Sample
    samples: tuple[Preview, ...]

    @property
    def title(self) -> str:
        """The row, and how many samples it has."""
        return f"{_title(self.sample)}: {counted(len(self.samples), 'sample')} (--turns)"

    def as_json(self) -> dict[str, Any]:
        """Return the document of `vlft preview --json`: counts of the row, and each sample with its tokens.

        The entries on tokens are null, because the row has no single list of them.
        """
        most = self.samples[-1].as_json()
        entries = [{"answer": one.sample.turns[-1].field, **one.as_json()} for one in self.samples]
        whole = {name: sum(entry[name] for entry in entries) for name in ("tokens", "supervised")}
        no_tokens = dict.fromkeys(("input_ids", "labels", "position_ids", "text"))
        warnings = [json.loads(one) for one in dict.fromkeys(json.dumps(w) for e in entries for w in e["warnings"])]
        return most | whole | no_tokens | {"warnings": warnings, "samples": entries}


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A refused row.

    Attributes:
        row: where it is, and the reason.
        raw: the row as it is in its file; None if the file cannot be read there.
    """

    row: BadRow
    raw: object = None

    @property
    def title(self) -> str:
        name = f" (id {self.row.id})" if self.row.id is not None else ""
        return f"{self.row.file}[{self.row.index}]{name}"

    def as_json(self) -> dict[str, Any]:
        """Return the document of `vlft preview --json`."""
        row = self.row
        found = {"file": row.file, "index": row.index, "id": row.id, "field": row.field, "refused": row.reason}
        return found | {"row": self.raw}


def preview_rows(
    file: str, indices: Sequence[int], data: DataFlags, model: ModelFlags, *, given: frozenset[str]
) -> Iterator[Preview | Split | Refused]:
    """Read several rows and encode them as for training. The base is opened once.

    Args:
        file: data file.
        indices: indices of the rows in the file, from 0, in the order of the result.
        data: flags of the data, as for training.
        model: flags of the model, as for training. Without a base the rows are shown as text, and tokens of pictures
            are counted with the published pixel limits of the default family.
        given: names of the flags that the user set.

    Yields:
        for each index, the row, or why it is refused.

    Raises:
        ConfigError: a row does not exist, or a flag cannot be applied.
        CheckpointError: the base is missing, incomplete, or not a Qwen-VL.
    """
    base = open_base(data, model, given=given, plain=True) if model.model_id is not None else None
    family = DEFAULT if base is None else base.family
    probe = stock_probe(data, family) if base is None else None
    rows = open_some(file, indices, data, family)
    for place in range(len(rows)):
        try:
            row = rows[place]
            if probe is None:
                yield preview_row(row, cast("Base", base))
            else:
                prompt = data.method == "grpo"
                yield sketch(asked(row) if prompt else row, probe.recipe, family, is_prompt=prompt)
        except DataError as error:
            yield Refused(row=error.row, raw=as_found(rows.raw(place)))


def preview_row(row: Sample, base: Base) -> Preview | Split:
    """Encode a parsed row for `base` as it is trained, whole or split into samples.

    Raises:
        DataError: its media cannot be decoded, or it is too long.
    """
    samples = base.encoder.samples(row)
    previews = tuple(preview_sample(sample, base) for sample in samples)
    return previews[0] if samples[0].answer is None else Split(sample=row, samples=previews)


def answer_names(count: int) -> list[str]:
    """Return the names of the answers of a preference row, the chosen one first."""
    return ["chosen", *(f"rejected {i}" if i > 1 else "rejected" for i in range(1, count))]


def _title(sample: Sample) -> str:
    name = f" (id {sample.id})" if sample.id is not None else ""
    return f"{sample.file}[{sample.index}]{name}"


def preview_sample(row: Sample, base: Base) -> Preview:
    """Encode a row or a sample of a split row for `base`, and check that its media can be decoded.

    Raises:
        DataError: its media cannot be decoded, or it is too long.
    """
    sample, tokens = base.encoder.shown(row)
    media = media_of(sample, tokens.grids, base.recipe)
    return Preview(
        sample=_remarked(sample),
        tokens=tokens,
        media=media,
        pieces=tuple(_pieces(tokens, media, base.processor.tokenizer, base.family)),
        control_tokens=base.family.control_tokens,
        is_prompt=isinstance(base.encoder, PromptEncoder),
    )


def sketch(sample: Sample, recipe: Recipe, family: Family, *, is_prompt: bool = False) -> Preview:
    """Show a parsed row without a base: the text of its turns, and its media.

    Args:
        sample: the row, or its prompt.
        recipe: how media are decoded.
        family: whose pads stand for media.
        is_prompt: whether it is a prompt. Nothing of a prompt is trained.

    Raises:
        DataError: its media cannot be decoded.
    """
    try:
        grids = [media_io.measure(part, recipe) for part in sample.media]
    except MediaError as error:
        raise refused(sample, error.field, error.reason) from error
    media = media_of(sample, grids, recipe)
    return Preview(
        sample=_remarked(sample),
        tokens=None,
        media=media,
        pieces=tuple(
            replace(one, trained=one.trained and not is_prompt) for one in _turns(sample, iter(media), family)
        ),
        control_tokens=family.control_tokens,
        is_prompt=is_prompt,
    )


def _remarked(sample: Sample) -> Sample:
    remarks = [remark for part in sample.media for remark in depth_remarks(part)]
    return replace(sample, warnings=(*sample.warnings, *remarks))


def _turns(sample: Sample, media: Iterator[Medium], family: Family) -> Iterator[Piece]:
    """Split the row into its texts and media, each turn after its role."""
    pair = sample.rejected
    names = [*[""] * (len(sample.turns) - 1), *(answer_names(1 + len(pair)) if pair else [""])]
    for turn, answer in zip(sample.all_turns, names, strict=True):
        yield Piece(text=f"{turn.role}: ", trained=False, answer=answer)
        for part in turn.parts:
            if isinstance(part, Text):
                yield Piece(text=part.text, trained=part.trained and turn.role == "assistant", answer=answer)
            else:
                pad = family.video_pad if isinstance(part, Video) else family.image_pad
                yield Piece(text=pad, trained=False, medium=next(media))
        yield Piece(text="\n", trained=False, answer=answer)


def _pieces(encoded: EncodedTokens, media: tuple[Medium, ...], tokenizer: Any, family: Family) -> Iterator[Piece]:
    """Split the row at its media, at its answers, and wherever training starts or stops."""
    ids, kinds = encoded.input_ids_T.tolist(), encoded.kinds_T.tolist()
    trained = (encoded.labels_T != UNTRAINED).tolist()
    following = iter([(medium, step) for medium in media for step, _ in enumerate(medium.grid.runs)])
    branches = encoded.branches or (len(ids),)
    names = ["", *answer_names(len(branches) - 1)] if encoded.branches else [""]
    answers = np.repeat(names, branches).tolist()
    start = 0
    while start < len(ids):
        if kinds[start] != KIND_TEXT:
            medium, step = next(following)
            pad = family.video_pad if medium.is_video else family.image_pad
            piece = Piece(text=pad, trained=False, medium=medium, step=step if medium.grid.times else None)
            yield piece
            start += piece.pads
            continue
        end = start
        same = (trained[start], answers[start])
        while end < len(ids) and kinds[end] == KIND_TEXT and (trained[end], answers[end]) == same:
            end += 1
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield Piece(text=text, trained=trained[start], answer=answers[start])
        start = end
