"""The costs of many samples as arrays, one per field. Numbers only."""

from __future__ import annotations

import array
from collections.abc import Iterable, Mapping, Sequence
from typing import overload

import numpy as np

from vlft.data.sample import Cost

#: Fields of `Cost` that are None for most samples.
_RARE = ("answer", "thinking")
_BRANCHES = "branches "


class Costs(Sequence[Cost]):
    """Costs of many samples, in one column per field: 4 bytes per entry, while a `Cost` object takes a hundred.

    Attributes:
        columns: field -> int32 [R]. `answer` and `thinking` are there only if a sample has them; -1 is None. So are
            `branches 0`, `branches 1`, ...: the parts of a preference row, `Cost.branches`.
        changed: index of a sample -> how `--over_length` changed it; only for changed samples.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], changed: Mapping[int, str] | None = None) -> None:
        self.columns = dict(columns)
        self.changed = dict(changed or {})

    @classmethod
    def of(cls, costs: Iterable[Cost]) -> Costs:
        """Convert costs to columns. A `Costs` object is returned unchanged."""
        if isinstance(costs, Costs):
            return costs
        found = {name: array.array("i") for name in ("tokens", "supervised", "patches", "images", "videos", *_RARE)}
        branches: list[array.array] = []
        changed = {}
        place = -1
        for place, cost in enumerate(costs):
            for name, column in found.items():
                value = getattr(cost, name)
                column.append(-1 if value is None else value)
            for part, tokens in enumerate(cost.branches):
                if part == len(branches):
                    branches.append(array.array("i"))
                _fill(branches[part], place)
                branches[part].append(tokens)
            if cost.changed:
                changed[place] = cost.changed
        for part, column in enumerate(branches):
            _fill(column, place + 1)
            found[f"{_BRANCHES}{part}"] = column
        columns = {name: np.array(column, dtype=np.int32) for name, column in found.items()}
        return cls({k: v for k, v in columns.items() if k not in _RARE or (v >= 0).any()}, changed)

    def take(self, places: np.ndarray) -> Costs:
        """Return the costs of the rows at these indices, in the order of the indices."""
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

    @property
    def most_media(self) -> dict[str, int]:
        """The largest number of pictures and of videos in one sample; 0 without samples."""
        return {name: int(self.columns[name].max(initial=0)) for name in ("images", "videos")}

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
            images=int(self.columns["images"][place]),
            videos=int(self.columns["videos"][place]),
            changed=self.changed.get(place, ""),
            answer=self._rare("answer", place),
            thinking=None if (thinking := self._rare("thinking", place)) is None else bool(thinking),
            branches=tuple(int(parts_R[place]) for parts_R in self.branches if parts_R[place] >= 0),
        )

    @property
    def branches(self) -> list[np.ndarray]:
        """Tokens of the prompts, of the chosen answers, and so on, each int32 [R] with -1 for none."""
        return [column for name, column in self.columns.items() if name.startswith(_BRANCHES)]

    def _rare(self, name: str, place: int) -> int | None:
        value = int(self.columns[name][place]) if name in self.columns else -1
        return None if value < 0 else value

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Costs)
            and self.changed == other.changed
            and self.columns.keys() == other.columns.keys()
            and all(np.array_equal(column, other.columns[name]) for name, column in self.columns.items())
        )


def _fill(column: array.array, length: int) -> None:
    """Extend a column with -1 up to a length."""
    column.extend([-1] * (length - len(column)))
