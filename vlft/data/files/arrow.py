"""Read parquet and Arrow files as rows. `vlft.data.files.tables` finds the files of a path."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlft.data.rows.source import Keep, Source
from vlft.errors import ConfigError

PYARROW = "parquet and Arrow files need pyarrow. Install it: pip install pyarrow"
READ_AT_A_TIME = 1 << 20  # bytes of a column; a row group of pictures may have gigabytes
ROWS_AT_A_TIME = 8  # rows in memory as Python objects; 0.3 GB with 20 pictures of 2 MB per row


@dataclass(frozen=True, kw_only=True)
class _Table:
    """An opened file.

    Attributes:
        schema: schema of pyarrow.
        rows: number of rows.
        batches: function that yields batches of at most so many rows; Arrow files yield their own batches.
    """

    schema: Any
    rows: int
    batches: Callable[[int], Iterator[Any]]


def arrow_source(path: str, files: Sequence[str]) -> Source:
    """Open parquet or Arrow files as one table.

    Args:
        path: the data file as the user named it, for messages.
        files: the files of the table, in order.

    Raises:
        ConfigError: a file is damaged, cut short, encrypted, has other columns than the first, or has columns whose
            types cannot hold conversations, text or media.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(PYARROW) from error
    tables = [_parquet(file) if file.lower().endswith(".parquet") else _arrow(file) for file in files]
    first = tables[0].schema
    for file, table in zip(files, tables, strict=True):
        if sorted(table.schema.names) != sorted(first.names):
            differing = sorted(set(table.schema.names) ^ set(first.names))
            raise ConfigError(
                f"{file}: its columns are not those of {files[0]}: {', '.join(differing)}. Pass them as separate data "
                "files."
            )
    _check_types(path, first)

    def rows(keep: Keep) -> Iterator[dict[str, Any]]:
        done = 0
        for file, table in zip(files, tables, strict=True):
            labels = _class_labels(table.schema)
            try:
                for batch in table.batches(ROWS_AT_A_TIME):
                    for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
                        some = _python(path, batch.slice(start, ROWS_AT_A_TIME), done)
                        yield from (_labelled(row, labels) for row in some)
                        done += len(some)
                        keep.done(len(some))
            except (pyarrow.ArrowException, OSError) as error:
                raise _damaged(file, error) from error

    return Source(columns=tuple(first.names), size=sum(table.rows for table in tables), unit="row", rows=rows)


def _python(path: str, batch: Any, done: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except ValueError as error:  # text that is not UTF-8
        raise ConfigError(f"{path}: rows from {done} on cannot be read: {error}. Fix them.") from error


def _class_labels(schema: Any) -> dict[str, list[str]]:
    """Return the columns that `datasets` stores as class numbers, with the names of the classes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}  # files of other tools have no such metadata, or another format
    return {name: names for name, names in found.items() if isinstance(names, list)}


def _labelled(row: dict[str, Any], labels: dict[str, list[str]]) -> dict[str, Any]:
    for name, names in labels.items():
        value = row.get(name)
        if isinstance(value, int) and -1 <= value < len(names):
            row[name] = names[value] if value >= 0 else None  # in `datasets`, -1 means no class
    return row


def _parquet(file: str) -> _Table:
    import pyarrow
    from pyarrow import parquet

    with open(file, "rb") as content:
        start = content.read(4)
        content.seek(-min(4, os.path.getsize(file)), os.SEEK_END)
        end = content.read(4)
    if b"PARE" in (start, end):
        raise ConfigError(f"{file}: is encrypted. Name a file that is not.")
    if start != b"PAR1":
        raise ConfigError(f"{file}: is not a parquet file, although its name says so. Write the file again.")
    if end != b"PAR1":
        raise ConfigError(f"{file}: is cut short: a parquet file ends in PAR1. Download or write it again.")
    try:
        # No pre-buffering, and small reads: otherwise a whole row group of pictures would be in memory.
        table = parquet.ParquetFile(file, buffer_size=READ_AT_A_TIME, pre_buffer=False)
        rows, schema = table.metadata.num_rows, table.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error
    return _Table(schema=schema, rows=rows, batches=lambda some: table.iter_batches(batch_size=some, use_threads=False))


def _arrow(file: str) -> _Table:
    import pyarrow

    with open(file, "rb") as content:
        as_file = content.read(6) == b"ARROW1"  # the file format, as in Feather; `datasets` writes the stream format

    def opened() -> Any:
        # Memory-mapped: batches are read in place, and the system may free their pages at any time.
        mapped = pyarrow.memory_map(file)
        return pyarrow.ipc.open_file(mapped) if as_file else pyarrow.ipc.open_stream(mapped)

    def batches() -> Iterator[Any]:
        table = opened()
        return (table.get_batch(i) for i in range(table.num_record_batches)) if as_file else iter(table)

    try:
        schema = opened().schema
        rows = sum(batch.num_rows for batch in batches())
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error
    return _Table(schema=schema, rows=rows, batches=lambda some: batches())


def _damaged(file: str, error: Exception) -> ConfigError:
    text = str(error).split("\n")[0]
    if "encrypt" in text.lower() or "decrypt" in text.lower():
        return ConfigError(f"{file}: is encrypted ({text}). Name a file that is not.")
    return ConfigError(f"{file}: damaged or cut short ({text}). Download or write it again.")


def _check_types(path: str, schema: Any) -> None:
    """Refuse columns whose types cannot hold what their names say, before hours of unpacking."""
    import pyarrow

    kinds = pyarrow.types
    for field in schema:
        kind = getattr(field.type, "storage_type", field.type)
        text = kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)
        # Lists in any of Arrow's layouts. Older `datasets` stores a list of structs as a struct of lists.
        nested = kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_list_view(kind) or kinds.is_struct(kind)
        if kinds.is_null(kind):
            continue
        if field.name in ("conversations", "messages", "conversation") and not (nested or text):
            raise ConfigError(f"{path}: its column {field.name} is {field.type}, where a list of turns belongs.")
        if field.name in ("image", "images", "video", "videos") and not (
            text or nested or kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)
        ):
            raise ConfigError(
                f"{path}: its column {field.name} is {field.type}, where paths, bytes, or structs of bytes and path "
                "belong."
            )
        if field.name in ("instruction", "output", "query", "response") and not (text or nested):
            raise ConfigError(f"{path}: its column {field.name} is {field.type}, where text belongs.")
