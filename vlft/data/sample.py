"""The records that pass between the stages of the data path. Types only: no files, no tokens, no models.

Letters in shapes: T tokens of a row, P patches, M media (stills and videos), N merged patches (= vision tokens),
K supervised tokens, S samples in a batch.
"""

from __future__ import annotations

import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

import numpy as np

if TYPE_CHECKING:
    import torch

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A piece of a turn's text, as the user wrote it.

    `trained` is of answers: false where the row masks the piece. No text of another turn is trained, whatever it says.
    """

    text: str
    trained: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Overrides:
    """What a row says of the budgets of one picture or video; None: nothing, so that the run's hold.

    Attributes:
        min_pixels, max_pixels: of a still, or of a video frame, after resizing.
        fps, nframes, max_frames: frames taken of a video file, as the flags of these names.
        video_start, video_end: the part of a video file they are taken from, in seconds.
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
    field: str  # where in the row it was named, for messages: "image[1]"
    overrides: Overrides = Overrides()

    @property
    def files(self) -> tuple[tuple[str, str], ...]:
        """(field, path) of its one file."""
        return ((self.field, self.path),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """A video file (one path) or a list of frame pictures (`frames`), exactly one of the two."""

    path: str | None = None
    frames: tuple[str, ...] = ()
    field: str
    overrides: Overrides = Overrides()

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
    field: str  # where in the row it stands: "conversations[2]"

    @property
    def trained(self) -> Literal["all", "some", "none"]:
        """How much of the turn is trained; the token that ends it is, where the last character is."""
        flags = {part.trained for part in self.parts if isinstance(part, Text)}
        if self.role != "assistant" or flags == {False}:
            return "none"
        return "some" if False in flags else "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Objects:
    """What stands for `<ref-object>` and `<bbox>` in a row's text, in the order of these (`vlft.data.rows.objects`).

    Attributes:
        refs: names. boxes: x1, y1, x2, y2, or a point x, y.
        unit: of the boxes: `pixels` of the original picture, or `0-1`.
        pictures: of each box, which of the row's pictures it is in, from 0.
        guessed: whether the row leaves that open, and has several.
    """

    refs: tuple[str, ...]
    boxes: tuple[tuple[float, ...], ...]
    unit: Literal["pixels", "0-1"]
    pictures: tuple[int, ...]
    guessed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One parsed row: a conversation whose tags have become parts, so counts cannot disagree later.

    Attributes:
        file, index, id: as in `vlft.errors.BadRow`.
        turns: in order; at least one user turn and one assistant turn with text.
        warnings: (field, remark) pairs on things taken but worth a look.
        objects: the boxes that its text has placeholders for, or None.
        changed: what `--over_length` did to it; "" where it is as the data file has it.
        added: (field of a text, tags) that `--missing_tags first` put before that text.
    """

    file: str
    index: int
    id: str | None
    turns: tuple[Turn, ...]
    warnings: tuple[tuple[str, str], ...] = ()
    objects: Objects | None = None
    changed: str = ""
    added: tuple[tuple[str, str], ...] = ()

    @property
    def media(self) -> tuple[Media, ...]:
        """Stills and videos in the order of their tags."""
        return tuple(part for turn in self.turns for part in turn.parts if not isinstance(part, Text))


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Patches of one still or video: `t` time steps (2 frames each), `h` x `w` patches of 14 x 14 pixels."""

    t: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w

    def tokens(self, merge: int) -> int:
        """Tokens in the language model, after `merge` x `merge` patches became one."""
        return self.patches // merge**2


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a row costs, known without decoding: `tokens` in the language model, `patches` in the ViT.

    `changed` is as in `Sample`: the row costs this once it is changed so.
    """

    tokens: int
    supervised: int
    patches: int
    changed: str = ""


class Costs(Sequence[Cost]):
    """Costs of many rows, a column a field: 4 bytes a row and field where a `Cost` has a hundred.

    Attributes:
        columns: field -> int32 [R].
        changed: place -> what `--over_length` did to the row, where it did something.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], changed: Mapping[int, str] | None = None) -> None:
        self.columns = dict(columns)
        self.changed = dict(changed or {})

    @classmethod
    def of(cls, costs: Iterable[Cost]) -> Costs:
        """The same costs in columns; what is in columns already is left as it is."""
        if isinstance(costs, Costs):
            return costs
        found = {name: array.array("i") for name in ("tokens", "supervised", "patches")}
        changed = {}
        for place, cost in enumerate(costs):
            for name, column in found.items():
                column.append(getattr(cost, name))
            if cost.changed:
                changed[place] = cost.changed
        return cls({name: np.array(column, dtype=np.int32) for name, column in found.items()}, changed)

    def take(self, places: np.ndarray) -> Costs:
        """The costs at these places, in their order."""
        changed = {}
        if self.changed:
            changed = {new: self.changed[old] for new, old in enumerate(places.tolist()) if old in self.changed}
        return Costs({name: column[places] for name, column in self.columns.items()}, changed)

    @property
    def tokens(self) -> np.ndarray:
        return self.columns["tokens"]

    @property
    def supervised(self) -> np.ndarray:
        return self.columns["supervised"]

    @property
    def patches(self) -> np.ndarray:
        return self.columns["patches"]

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, place: int) -> Cost: ...

    @overload
    def __getitem__(self, place: slice) -> Costs: ...

    def __getitem__(self, place: int | slice) -> Cost | Costs:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        return Cost(
            tokens=int(self.tokens[place]),
            supervised=int(self.supervised[place]),
            patches=int(self.patches[place]),
            changed=self.changed.get(place, ""),
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Costs)
            and self.changed == other.changed
            and all(np.array_equal(column, other.columns[name]) for name, column in self.columns.items())
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedMedia:
    """Pixels of one still or video, in the ViT's patch order.

    Attributes:
        grid: its patches.
        patches: uint8 [P, 3, 14, 14] for a still (the frame stands once), [P, 3, 2, 14, 14] for a video.
        is_video: which of the two.
    """

    grid: Grid
    patches: torch.Tensor
    is_video: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSample:
    """One row as the model sees it.

    Attributes:
        file, index, id: of the row.
        input_ids_T: int64, media tags expanded to one pad token per merged patch.
        labels_T: int64, aligned with `input_ids_T` (not shifted), -100 where untrained.
        kinds_T: uint8, 0 text, 1 picture, 2 video.
        positions_3T: int64, M-RoPE positions: time, height, width.
        media: stills and videos in the order of their tags.
        text: the rendered conversation, one pad token per medium.
        changed: as in `Sample`.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """A conversation that waits for its next answer, as the model sees it; attributes as in `EncodedSample`.

    `input_ids_T` ends in the chat template's generation prompt.
    """

    input_ids_T: torch.Tensor
    kinds_T: torch.Tensor
    media: tuple[EncodedMedia, ...]
    text: str
