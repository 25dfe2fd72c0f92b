"""Parquet shards on disk -> rows, a few at a time. Knows nothing of what a row means, nor of what becomes of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlft.errors import ConfigError
from vlft.text import error_text

ROWS_AT_ONCE = 4  # each may hold a dozen pictures of several MB
BUFFER = 1 << 20  # bytes of a column read ahead; without it a whole row group is in memory
_NUMBERED = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<count>\d+)$")  # as Hugging Face names shards


class BadShard(Exception):
    """A parquet file of which some or all rows cannot be read; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A parquet file.

    Attributes:
        path: of the file. size: its bytes.
        split: the word its name begins with, e.g. `train`.
        rows: in it by its footer; 0 where `fault` says that the footer cannot be used.
        fault: why no row of it can be read, or None.
    """

    path: Path
    size: int
    split: str
    rows: int
    fault: str | None = None


def find_shards(folder: Path, *, splits: Sequence[str], columns: Sequence[str]) -> tuple[list[Shard], list[str]]:
    """The parquet files of the wanted splits, below a folder, in the order of split and name.

    A file belongs to the split that its name begins with (`train-00000-of-00012.parquet`, `train.parquet`).

    Returns:
        the shards; and remarks: files of another name, and numbers that are missing from a series.

    Raises:
        ConfigError: no such folder, or nothing in it that belongs to a split.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder. Name the one that the parquet files were downloaded to.")
    files = sorted(file for file in folder.rglob("*.parquet") if file.is_file())
    shards, others = [], []
    for file in files:
        split = next((word for word in splits if re.match(rf"{word}([-_.]|$)", file.name)), None)
        if split is None:
            others.append(str(file.relative_to(folder)))
        else:
            shards.append(_shard(file, split, columns))
    if not shards:
        found = f"{len(files)} parquet files, none of them named so" if files else "no parquet file at all"
        wanted = " or ".join(f"{split}*.parquet" for split in splits)
        raise ConfigError(f"{folder}: no {wanted} in it, {found}. Name the folder the set was downloaded to.")
    remarks = [f"not read, since its name says neither {' nor '.join(splits)}: {name}" for name in others]
    return sorted(shards, key=lambda shard: splits.index(shard.split)), remarks + _missing(shards)


def _missing(shards: Sequence[Shard]) -> list[str]:
    """Series of shards that are not whole, such as 3 files of `-of-00012`."""
    series: dict[tuple[str, int], int] = {}
    for shard in shards:
        if match := _NUMBERED.match(shard.path.stem):
            key = (str(shard.path.parent / match["split"]), int(match["count"]))
            series[key] = series.get(key, 0) + 1
    return [f"{name}-*: {found} of {count} files are there" for (name, count), found in series.items() if found < count]


def _shard(file: Path, split: str, columns: Sequence[str]) -> Shard:
    import pyarrow as pa

    size = os.path.getsize(file)
    try:
        with _open(file) as parquet:
            have = parquet.schema_arrow.names
            rows = parquet.metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        reason = "empty" if not size else f"damaged or cut short ({error_text(error)})"
        return Shard(path=file, size=size, split=split, rows=0, fault=f"{reason}. Download it again")
    fault = None
    if lacking := [name for name in columns if name not in have]:
        fault = f"no column {', '.join(lacking)}; it has {', '.join(have) or 'none'}. Name the folder of the right set"
    elif not rows:
        fault = "holds no rows. Download it again, or take it away"
    return Shard(path=file, size=size, split=split, rows=rows, fault=fault)


def read_rows(shard: Shard, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a shard that has no `fault`, as Python values, in order.

    Raises:
        BadShard: from here on nothing can be read.
    """
    import pyarrow as pa

    try:
        with _open(shard.path) as parquet:
            for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(columns), use_threads=False):
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: text that is not UTF-8
        raise BadShard(f"damaged ({error_text(error)}). Download it again") from error


def _open(file: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True)
