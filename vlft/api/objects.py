"""What `open_base` and `load_rows` return: a base and its rows, which the other public functions take."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np

from vlft import setup
from vlft.api.keywords import Flag
from vlft.data.sample import Sample
from vlft.errors import BadRow


@dataclass(frozen=True, kw_only=True)
class Base:
    """An opened base model whose weights are not loaded yet. `open_base` returns it.

    Attributes:
        opened: folder, config, family, processor and encoder, as `vlft train` opens them.
        flags: the flags that were passed to `open_base`.
    """

    opened: setup.Base = field(repr=False)
    flags: Mapping[str, Flag]

    @property
    def processor(self) -> Any:
        """The stock processor of transformers, with the pixel and frame settings of the flags."""
        return self.opened.processor

    @property
    def config(self) -> Any:
        """The base's config, a config object of transformers."""
        return self.opened.config


@dataclass(frozen=True, kw_only=True)
class Rows(Sequence[Sample]):
    """Rows that can be trained. `load_rows` returns it. Indexing parses a row; no media are opened.

    A row that is split into samples (`turns`) has an entry for each: the turns up to an answer, which alone is trained.

    A slice is `Rows` again, with the costs of its rows and all of `skipped`.

    Attributes:
        measured: the rows, the cost of each row, and the refused rows.
        base: the base that they were measured with.
        flags: the flags that were passed to `open_base` and `load_rows`.
    """

    measured: setup.MeasuredRows = field(repr=False)
    base: Base = field(repr=False)
    flags: Mapping[str, Flag]

    def __len__(self) -> int:
        return len(self.measured.rows.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Sample | Rows:
        samples, count = self.measured.rows.samples, len(self)
        if isinstance(index, slice):
            rows = replace(self.measured.rows, samples=samples[index])
            costs = self.measured.costs.take(np.arange(count)[index])
            return replace(self, measured=replace(self.measured, rows=rows, costs=costs))
        place = row_index(index)
        if not -count <= place < count:
            raise IndexError(f"rows[{place}]: there are {count} rows, the first is rows[0]")
        return samples[place]

    @property
    def skipped(self) -> tuple[BadRow, ...]:
        """Rows that are not trained, each with its reason (`on_bad_row="skip"`)."""
        return self.measured.rows.bad


def row_index(index: Any) -> int:
    """Return the index of a row as an int.

    Raises:
        TypeError: it is not a whole number.
    """
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise TypeError(f"the index of a row is {index!r} (a {type(index).__name__}), must be a whole number")
    return operator.index(index)
