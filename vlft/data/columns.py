"""Tables on disk, opened: which files a path means, their columns, and their rows a batch at a time.

Knows Arrow and the two layouts of Hugging Face data sets; what is made of the rows is `vlft.data.unpack`'s.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vlft.errors import ConfigError

PYARROW = "parquet files and data set folders need pyarrow. Install it: pip install pyarrow"
READ_AT_A_TIME = 1 << 20  # bytes of a column; a row group of pictures may have gigabytes
# One of these has to be there; the others are told from it (`vlft.data.shapes`).
TALKS = ("conversations", "messages", "conversation", "output", "response")
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_SHARD = re.compile(r"(.+?)[-_]\d+[-_]of[-_]\d+", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened table.

    Attributes:
        schema: pyarrow's. rows: how many. batches: gives them, so many at a time at most where the file can.
    """

    schema: Any
    rows: int
    batches: Callable[[int], Iterator[Any]]


def sources_of(path: str) -> list[str]:
    """The files of a table, in order.

    Args:
        path: a `.parquet` file, a folder of such files (its own, or those in `data/`), or a folder of `save_to_disk`.

    Raises:
        ConfigError: it is none of these, or several splits in one.
    """
    if not os.path.isdir(path):
        if not os.path.isfile(path):
            what = "is no regular file" if os.path.exists(path) else "no such file"
            raise ConfigError(f"{path}: {what}. Name the data file itself, from {os.getcwd()} or by its absolute path.")
        return [path]
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        inside = sorted(name for name in os.listdir(path) if os.path.isdir(os.path.join(path, name)))
        one = os.path.join(path, "train" if "train" in inside else "".join(inside[:1]))
        raise ConfigError(f"{path}: holds several splits ({', '.join(inside)}). Name one: {one}")
    state = os.path.join(path, "state.json")
    if os.path.isfile(state):
        return _saved(path, state)
    for folder in (path, os.path.join(path, "data")):
        shards = _shards(folder)
        if shards:
            return shards
    raise ConfigError(
        f"{path}: a folder without .parquet files, and not one that `save_to_disk` of datasets wrote (it has no "
        "state.json). Name a data file, or a folder that holds one of the two."
    )


def _saved(path: str, state: str) -> list[str]:
    try:
        with open(state, encoding="utf-8") as file:
            content = json.load(file)
        if content.get("_indices_data_files") or content.get("_indices_files"):
            raise ConfigError(
                f"{path}: holds a selection of rows beside the rows. Write it anew with the datasets of today "
                "(load_from_disk, then save_to_disk)."
            )
        names = [os.path.basename(entry["filename"]) for entry in content["_data_files"]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{state}: is not what save_to_disk writes ({error!r}). Save the data set again.") from error
    files = [os.path.join(path, name) for name in names]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing or not files:
        raise ConfigError(f"{path}: {', '.join(missing) or 'no data file'} is missing. Copy the whole folder.")
    return files


def _shards(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(".parquet") and name[0] != ".")
    stems = {(shard[1] if (shard := _SHARD.match(name)) else os.path.splitext(name)[0]).lower() for name in names}
    splits = sorted({stem for stem in stems if re.split(r"[-_.]", stem)[0] in SPLITS})
    if len(splits) > 1:
        raise ConfigError(
            f"{folder}: holds several splits ({', '.join(splits)}). Name the files of one: "
            f"{os.path.join(folder, splits[-1])}*.parquet"
        )
    return [os.path.join(folder, name) for name in names]


def open_source(path: str, files: list[str]) -> Source:
    """The files as one table.

    Raises:
        ConfigError: one is damaged, cut short, encrypted, or has other columns than the first.
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
                f"{file}: its columns are not those of {files[0]}: {', '.join(differing)}. Name them apart."
            )

    def batches(rows: int) -> Iterator[Any]:
        for file, table in zip(files, tables, strict=True):
            try:
                yield from table.batches(rows)
            except (pyarrow.ArrowException, OSError) as error:
                raise _damaged(file, error) from error

    return Source(schema=first, rows=sum(table.rows for table in tables), batches=batches)


def _parquet(file: str) -> Source:
    import pyarrow
    from pyarrow import parquet

    with open(file, "rb") as content:
        start = content.read(4)
        content.seek(-min(4, os.path.getsize(file)), os.SEEK_END)
        end = content.read(4)
    if b"PARE" in (start, end):
        raise ConfigError(f"{file}: is encrypted. Name a file that is not.")
    if start != b"PAR1":
        raise ConfigError(f"{file}: is not a parquet file, whatever its name says. Write it again.")
    if end != b"PAR1":
        raise ConfigError(f"{file}: is cut short: a parquet file ends in PAR1. Fetch or write it again.")
    try:
        # Not pre-buffered, and in small steps: a row group of pictures would be read whole.
        table = parquet.ParquetFile(file, buffer_size=READ_AT_A_TIME, pre_buffer=False)
        rows, schema = table.metadata.num_rows, table.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error
    return Source(schema=schema, rows=rows, batches=lambda some: table.iter_batches(batch_size=some, use_threads=False))


def _arrow(file: str) -> Source:
    import pyarrow

    def opened() -> Any:
        # Mapped: batches are read where they lie, and leave memory as they please.
        return pyarrow.ipc.open_stream(pyarrow.memory_map(file))

    try:
        schema = opened().schema
        rows = sum(batch.num_rows for batch in opened())
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error
    return Source(schema=schema, rows=rows, batches=lambda some: iter(opened()))


def _damaged(file: str, error: Exception) -> ConfigError:
    text = str(error).split("\n")[0]
    if "encrypt" in text.lower() or "decrypt" in text.lower():
        return ConfigError(f"{file}: is encrypted ({text}). Name a file that is not.")
    return ConfigError(f"{file}: damaged or cut short ({text}). Fetch or write it again.")


def check_columns(path: str, schema: Any) -> None:
    """Refuse a table without a conversation, or with columns of types that hold none.

    Raises:
        ConfigError: names the columns there are, or the one that is wrong and its type.
    """
    import pyarrow

    kinds = pyarrow.types
    if not set(schema.names) & set(TALKS):
        raise ConfigError(
            f"{path}: no column is a conversation: it has {', '.join(schema.names) or 'none'}. Rename one to "
            f"{', '.join(TALKS[:2])}, or to instruction and output, or query and response: data/README.md."
        )
    listed = ("conversations", "messages", "conversation")
    for field in schema:
        kind = getattr(field.type, "storage_type", field.type)
        text = kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)
        # Of lists in any of Arrow's layouts; a struct of lists is how `datasets` kept a list of structs.
        nested = kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_list_view(kind) or kinds.is_struct(kind)
        if kinds.is_null(kind):
            continue
        if field.name in listed and not nested:
            raise ConfigError(f"{path}: its column {field.name} is {field.type}, where a list of turns belongs.")
        if field.name in ("image", "images", "video", "videos") and not (
            text or nested or kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)
        ):
            raise ConfigError(
                f"{path}: its column {field.name} is {field.type}, where paths, bytes, or structs of bytes and path "
                "belong."
            )
        if field.name in ("instruction", "output", "query", "response") and not text:
            raise ConfigError(f"{path}: its column {field.name} is {field.type}, where text belongs.")
