"""The records that pass between the stages of the data path. Types only: no files, no tokens, no models.

Letters in shapes: T tokens of a row, P patches, M media (stills and videos), N merged patches (= vision tokens),
K supervised tokens, S samples in a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A piece of a turn's text, as the user wrote it.

    Attributes:
        text: the text.
        trained: in an answer, false if the row masks the piece. Text of other turns is never trained.
    """

    text: str
    trained: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Overrides:
    """Budgets that a row sets for one picture or video. None means that the run's setting applies.

    Attributes:
        min_pixels: minimum pixels of a still, and of a video as the flag `--video_min_pixels` says.
        max_pixels: maximum pixels, likewise.
        fps: frames per second taken from a video file, as the flag of this name; frames per second of a list of frames.
        nframes: number of frames taken from a video file, as the flag of this name.
        max_frames: maximum number of frames taken from a video file.
        video_start: start of the part that frames are taken from, in seconds.
        video_end: end of the part that frames are taken from, in seconds.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    nframes: int | None = None
    max_frames: int | None = None
    video_start: float | None = None
    video_end: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A still picture; `path` is absolute or relative to the working directory, ready to open."""

    path: str
    field: str  # path in the row, for messages: "image[1]"
    overrides: Overrides = Overrides()
    folder: str | None = dataclasses.field(default=None, compare=False, repr=False)  # of relative paths, for messages

    @property
    def files(self) -> tuple[tuple[str, str], ...]:
        """(field, path) of its only file."""
        return ((self.field, self.path),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """A video: either a video file (`path`) or a list of frame pictures (`frames`)."""

    path: str | None = None
    frames: tuple[str, ...] = ()
    field: str
    overrides: Overrides = Overrides()
    folder: str | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def files(self) -> tuple[tuple[str, str], ...]:
        """(field, path) of its file, or of each frame."""
        if self.path is not None:
            return ((self.field, self.path),)
        return tuple((f"{self.field}[{i}]", frame) for i, frame in enumerate(self.frames))


Media = Image | Video
Part = Text | Image | Video


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    role: Role
    parts: tuple[Part, ...]
    field: str  # path in the row: "conversations[2]"

    @property
    def trained(self) -> Literal["all", "some", "none"]:
        """How much of the turn is trained. The token that ends the turn is trained if its last character is."""
        flags = {part.trained for part in self.parts if isinstance(part, Text)}
        if self.role != "assistant" or flags == {False}:
            return "none"
        return "some" if False in flags else "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Objects:
    """Names and boxes for the placeholders `<ref-object>` and `<bbox>` in a row's text (`vlft.data.rows.objects`).

    Attributes:
        refs: names, in the order of `<ref-object>`.
        boxes: x1, y1, x2, y2, or a point x, y, in the order of `<bbox>`.
        unit: unit of the boxes: `pixels` of the original picture, or `0-1`.
        pictures: index of each box's picture among the row's pictures, from 0.
        guessed: whether the row has several pictures and does not say which one a box is in.
    """

    refs: tuple[str, ...]
    boxes: tuple[tuple[float, ...], ...]
    unit: Literal["pixels", "0-1"]
    pictures: tuple[int, ...]
    guessed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One parsed row: a conversation whose tags have become parts, so that counts cannot disagree later.

    Attributes:
        file: data file, spelled as the user named it.
        index: position in that file, from 0.
        id: the row's own `id` as text, or None.
        turns: turns in order; at least one user turn and one assistant turn with text.
        warnings: possible problems of an accepted row, as (field, remark) pairs.
        objects: names and boxes for the placeholders in its text, or None.
        changed: how `--over_length` changed the row; "" if it is unchanged.
        added: (field of a text, tags) pairs: the tags that `--missing_tags first` put before that text.
        answer: place of the only trained turn, the last one, if this is a part of a row (`vlft.data.rows.parts`); None
            for a whole row.
        thinking: in a question, whether the model thinks before it answers; None: as the chat template decides. A row
            with an answer shows it by the answer.
        rejected: of a preference row, other answers to its last question. Each is an assistant turn of texts that would
            be in the place of the last turn, the chosen answer. Only these answers are trained.
        references: further right answers to its last question, which are not trained: `vlft eval` compares with them.
    """

    file: str
    index: int
    id: str | None
    turns: tuple[Turn, ...]
    warnings: tuple[tuple[str, str], ...] = ()
    objects: Objects | None = None
    changed: str = ""
    added: tuple[tuple[str, str], ...] = ()
    answer: int | None = None
    thinking: bool | None = None
    rejected: tuple[Turn, ...] = ()
    references: tuple[str, ...] = ()

    @property
    def all_turns(self) -> tuple[Turn, ...]:
        """The turns, and the rejected answers after them."""
        return (*self.turns, *self.rejected)

    @property
    def media(self) -> tuple[Media, ...]:
        """Stills and videos in the order of their tags."""
        return tuple(part for turn in self.turns for part in turn.parts if not isinstance(part, Text))


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Patch counts of one still or video: `t` time steps (2 frames each) of `h` x `w` patches.

    Attributes:
        pace: of a video, seconds from one time step to the next, for a model whose positions count them; else None.
        times: of a video, the time of each step in seconds, for a model that reads them as text; else empty.
    """

    t: int
    h: int
    w: int
    pace: float | None = None
    times: tuple[float, ...] = ()

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w

    def tokens(self, merge: int) -> int:
        """Return its tokens in the language model, where `merge` x `merge` patches become one token."""
        return self.patches // merge**2

    @property
    def runs(self) -> tuple[Grid, ...]:
        """The grid of each run of consecutive tokens: one run, or with times as text one per step."""
        return (Grid(t=1, h=self.h, w=self.w),) * self.t if self.times else (self,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The cost of a row, known without decoding.

    Attributes:
        tokens: tokens in the language model, as the row is laid out in a batch.
        supervised: trained tokens.
        patches: patches in the ViT.
        changed: how `--over_length` changes the row (`Sample.changed`). The cost is that of the changed row.
        parts: costs of the samples that the row is split into, whose sums the cost has; empty for a whole row.
        answer: `Sample.answer`.
        thinking: whether the model thinks before the answer; None: the chat template has no switch for it.
        branches: `EncodedTokens.branches`.
        images: pictures of the sample; of a row in parts the most of one part.
        videos: videos of it, likewise.
    """

    tokens: int
    supervised: int
    patches: int
    changed: str = ""
    parts: tuple[Cost, ...] = ()
    answer: int | None = dataclasses.field(default=None, compare=False)
    thinking: bool | None = dataclasses.field(default=None, compare=False)
    branches: tuple[int, ...] = dataclasses.field(default=(), compare=False)
    images: int = dataclasses.field(default=0, compare=False)
    videos: int = dataclasses.field(default=0, compare=False)

    @classmethod
    def of_parts(cls, parts: Sequence[Cost]) -> Cost:
        """Return the cost of a row that is split into samples with these costs."""
        return cls(
            tokens=sum(part.tokens for part in parts),
            supervised=sum(part.supervised for part in parts),
            patches=sum(part.patches for part in parts),
            changed="; ".join(dict.fromkeys(part.changed for part in parts if part.changed)),
            parts=tuple(parts),
            images=max(part.images for part in parts),
            videos=max(part.videos for part in parts),
        )

    @property
    def samples(self) -> tuple[Cost, ...]:
        """The costs of what the row is trained as: its parts, or the row itself."""
        return self.parts or (self,)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedMedia:
    """Pixels of one still or video, resized.

    Attributes:
        grid: its patch counts.
        pixels: uint8 [F, H, W, 3], contiguous; a still has one frame, a video two for each time step.
        is_video: true for a video, false for a still.
        features: [layers, N, H], what the vision tower computes of it, from the cache; there are no pixels then.
        key: by which the cache stores its features; None: they are not stored.
    """

    grid: Grid
    pixels: torch.Tensor
    is_video: bool
    features: torch.Tensor | None = None
    key: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedTokens:
    """The tokens of one row, as the model sees it.

    Attributes:
        input_ids_T: int64, media tags expanded to one pad token per merged patch.
        labels_T: int64, aligned with `input_ids_T` (not shifted), -100 for untrained tokens.
        kinds_T: uint8, 0 text, 1 picture, 2 video.
        positions_3T: int64, M-RoPE positions: time, height, width.
        grids: of the stills and videos, in the order of their tags.
        text: the rendered conversation, one pad token per picture, and per video or time step of a video.
        branches: of a preference row, the tokens of its prompt, then of each answer, the chosen one first. The row is
            [prompt | chosen | rejected ...], T their sum, and the positions of each answer continue the prompt's. The
            prompt includes the generation prompt, an answer what the chat template writes after it. Empty for others.
    """

    input_ids_T: np.ndarray
    labels_T: np.ndarray
    kinds_T: np.ndarray
    positions_3T: np.ndarray
    grids: tuple[Grid, ...]
    text: str
    branches: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSample:
    """One row as the model sees it: its name as in `Sample`, tokens and text as in `EncodedTokens`, and pixels.

    Attributes:
        media: stills and videos in the order of their tags.
        changed: how `--over_length` changed the row; "" if it is unchanged.
        shared: of a preference row, whether its answers share the prompt's tokens in a batch.
        reference: of a preference row, the log-probability of each answer under the reference; empty: not known.
    """

    file: str
    index: int
    id: str | None
    input_ids_T: torch.Tensor
    labels_T: torch.Tensor
    kinds_T: torch.Tensor
    positions_3T: torch.Tensor
    media: tuple[EncodedMedia, ...]
    text: str
    changed: str = ""
    branches: tuple[int, ...] = ()
    shared: bool = True
    reference: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """A conversation that waits for its next answer, as the model sees it.

    Attributes:
        input_ids_T: int64, as in `EncodedSample`; ends with the chat template's generation prompt.
        kinds_T: uint8, 0 text, 1 picture, 2 video.
        media: stills and videos in the order of their tags.
        text: the rendered conversation, one pad token per picture, and per video or time step of a video.
    """

    input_ids_T: torch.Tensor
    kinds_T: torch.Tensor
    media: tuple[EncodedMedia, ...]
    text: str
