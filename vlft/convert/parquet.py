"""Read the rows of parquet shards, a few at a time. Independent of what a row means."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlft.errors import ConfigError
from vlft.text import error_text

ROWS_AT_ONCE = 4  # a row may hold a dozen pictures of several MB
BUFFER = 1 << 20  # bytes read ahead per column; without it a whole row group is in memory
_NUMBERED = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<count>\d+)$")  # as Hugging Face names shards


class BadShard(Exception):
    """A parquet file with rows that cannot be read. The message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A parquet file.

    Attributes:
        path: path of the file.
        size: its size in bytes.
        split: the word that its name starts with, e.g. `train`.
        rows: number of rows in its footer; 0 if the footer cannot be read.
        fault: why no row of it can be read, or None.
    """

    path: Path
    size: int
    split: str
    rows: int
    fault: str | None = None


def find_shards(folder: Path, *, splits: Sequence[str], columns: Sequence[str]) -> tuple[list[Shard], list[str]]:
    """Find the parquet files of the wanted splits in a folder, at any depth, sorted by split and name.

    A file belongs to the split that its name starts with (`train-00000-of-00012.parquet`, `train.parquet`).

    Args:
        folder: the folder to search.
        splits: the wanted splits, in order.
        columns: the columns that a file must have.

    Returns:
        The shards, and remarks about files with other names and about numbers that are missing from a series.

    Raises:
        ConfigError: the folder does not exist, or holds no file of a split.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder. Name the folder that the parquet files were downloaded to.")
    files = sorted(file for file in folder.rglob("*.parquet") if file.is_file())
    shards, others = [], []
    for file in files:
        split = next((word for word in splits if re.match(rf"{word}([-_.]|$)", file.name)), None)
        if split is None:
            others.append(str(file.relative_to(folder)))
        else:
            shards.append(_shard(file, split, columns))
    if not shards:
        found = f"{len(files)} parquet files with other names" if files else "no parquet file at all"
        wanted = " or ".join(f"{split}*.parquet" for split in splits)
        raise ConfigError(f"{folder}: no {wanted} in it, {found}. Name the folder the set was downloaded to.")
    remarks = [f"not read, because its name starts with neither {' nor '.join(splits)}: {name}" for name in others]
    return sorted(shards, key=lambda shard: splits.index(shard.split)), remarks + _missing(shards)


def _missing(shards: Sequence[Shard]) -> list[str]:
    """Return remarks about incomplete series of shards, such as 3 files of `-of-00012`."""
    series: dict[tuple[str, int], int] = {}
    for shard in shards:
        if match := _NUMBERED.match(shard.path.stem):
            key = (str(shard.path.parent / match["split"]), int(match["count"]))
            series[key] = series.get(key, 0) + 1
    return [f"{name}-*: {found} of {count} files found" for (name, count), found in series.items() if found < count]


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
        fault = "holds no rows. Download it again, or remove it"
    return Shard(path=file, size=size, split=split, rows=rows, fault=fault)


def read_rows(shard: Shard, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard without a `fault`, as Python values, in order.

    Raises:
        BadShard: the rest of the shard cannot be read.
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
