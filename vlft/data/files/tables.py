"""Find the files of a table, and choose the reader that opens them. The readers know the file formats.

A table is a data file that is unpacked before it is read (`vlft.data.files.unpack`): parquet, Arrow, CSV, tars, and
folders.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
from collections.abc import Iterator

from vlft.data.files import folders
from vlft.data.files.arrow import arrow_source
from vlft.data.files.delimited import delimited_source
from vlft.data.files.tars import tar_source
from vlft.data.rows.source import LINES, PICTURES, VIDEOS, Source
from vlft.errors import ConfigError

ARROW = (".parquet", ".arrow")
DELIMITED = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TABLES = (*ARROW, *DELIMITED, *TARS)
READ = "supported are .json, .jsonl, .csv, .tsv, .parquet, .arrow and .tar, and folders (see data/README.md)"
PACKED = ("gz", "zip", "xz", "bz2", "zst", "7z", "rar")
# Endings -> what such a file is, and how to get rows from it.
ELSEWHERE: dict[tuple[str, ...], str] = {
    (".xlsx", ".xls", ".ods"): "is a spreadsheet. Save it as CSV UTF-8, with a header, and name the .csv",
    tuple(f".{ending}" for ending in PACKED): "is compressed. Unpack it (gunzip, unzip, unxz, zstd -d), and name the "
    "unpacked file",
    (".txt", ".md", ".log", ".doc", ".docx", ".pdf", ".html"): "is plain text or a document, and a data file is a list "
    'of rows. Write each row as a line of a .jsonl: {"image": "a.jpg", "conversations": [...]}',
    (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"): "may run code when it is read, so it is not read. Load it "
    "with your own code, and write its rows as .jsonl (json.dumps of each)",
    (".npy", ".npz", ".h5", ".hdf5", ".mat"): "holds arrays. Write the pictures as .png, and rows that name them as "
    ".jsonl",
    (".tfrecord", ".tfrecords", ".record"): "is a TensorFlow file. Read it with tensorflow_datasets, and write its "
    "rows as .jsonl and its pictures as files",
    (
        ".db",
        ".sqlite",
        ".sqlite3",
        ".mdb",
        ".lmdb",
        ".duckdb",
    ): "is a database. Write the result of your query as .csv or .jsonl",
    (".feather", ".orc", ".avro"): "is not supported. Convert it: pyarrow.parquet.write_table(table, 'train.parquet')",
    (".yaml", ".yml"): "is not a data file. Pass a list of data sets as --data_mix FILE, and flags as --config FILE",
    (".safetensors", ".gguf"): "holds the weights of a model. Name data here; the model is --model_id",
    (*PICTURES, *VIDEOS): "is a picture or video. Name a data file whose rows name it",
}
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
MOST_FILES = 100_000  # files that a pattern may match
_SHARD = re.compile(r"(.+?)[-_]\d+[-_]of[-_]\d+", re.IGNORECASE)
_BRACE = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def is_table(path: str) -> bool:
    """Return whether a data file is a table, which is unpacked: it has such an ending, or is a folder."""
    return path.lower().endswith(TABLES) or os.path.isdir(path)


def sources_of(path: str) -> list[str]:
    """Return the files of a table, in order.

    Args:
        path: a file, a pattern of files (`shard-{000..010}.tar`, `part-*.parquet`), or a folder: written by
            `save_to_disk`, with such files (in it or in its `data/`), or with pictures.

    Raises:
        ConfigError: the path is none of these, holds several splits, or files are missing.
    """
    if os.path.isdir(path):
        return _folder(path)
    if os.path.isfile(path):
        return [path]
    if os.path.exists(path):
        raise ConfigError(f"{path}: is not a regular file. {name_it()}")
    files = _matching(path)
    if not files:
        raise missing(path)
    return files


def missing(path: str) -> ConfigError:
    """Return the error for a data file that does not exist."""
    hub = ""
    if glob.has_magic(path) or _BRACE.search(path):
        hub = f" A pattern may match {', '.join(ending for ending in TABLES[:4])} and .tar files. For other files, let "
        hub += "the shell expand it: remove the quotes around it."
    elif _REPO.fullmatch(path) and not os.path.isdir(os.path.dirname(path)):
        hub = f" If it is a data set of the Hugging Face hub: hf download {path} --repo-type dataset --local-dir DIR"
    return ConfigError(f"{path}: no such file. {name_it()}{hub}")


def name_it() -> str:
    """Return the advice for a path that is not a data file."""
    return f"Name the data file itself, relative to {os.getcwd()} or by its absolute path."


def refuse_ending(path: str) -> ConfigError:
    """Return the error for a file of a kind that is not supported."""
    name = path.lower()
    for endings, what in ELSEWHERE.items():
        if name.endswith(endings):
            return ConfigError(f"{path}: {what}.")
    ending = os.path.splitext(path)[1]
    kind = f"the ending {ending} is not supported" if ending else "has no ending, so its format is unknown"
    return ConfigError(f"{path}: {kind}; {READ}. Convert it, or give it the ending of its format.")


def open_source(path: str, files: list[str]) -> Source:
    """Open the files as one table.

    Args:
        path: the data file as the user named it.
        files: the files of the table, from `sources_of`.

    Raises:
        ConfigError: the errors of the reader of their format.
    """
    if os.path.isdir(path):
        if files == [metadata := folders.metadata_of(path)]:
            return folders.metadata_source(path, str(metadata))
        if not files[0].lower().endswith(TABLES):
            return folders.classes_source(path, folders.classes_of(path))
    for endings, opened in ((ARROW, arrow_source), (DELIMITED, delimited_source), (TARS, tar_source)):
        if files[0].lower().endswith(endings):
            return opened(path, files)
    raise refuse_ending(files[0])


# ---- patterns


def _matching(path: str) -> list[str]:
    """Return the files that a pattern matches; empty if it is not a pattern, or nothing matches."""
    names = list(itertools.islice(_braces(path), MOST_FILES + 1))
    if len(names) > MOST_FILES:
        raise ConfigError(f"{path}: matches more than {MOST_FILES:,} files. Name a folder, or fewer files.")
    found = [each for name in names for each in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    absent = [name for name in found if not os.path.isfile(name)]
    if absent and len(names) > 1:
        more = f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""
        raise ConfigError(f"{path}: {absent[0]}{more} of its {len(found):,} files do not exist. {name_it()}")
    return [] if absent else found


def _braces(path: str) -> Iterator[str]:
    """Expand the braces of `a-{0..2}.tar` and `{a,b}.tar` as a shell does."""
    found = _BRACE.search(path)
    if found is None:
        yield path
        return
    inner = _RANGE.fullmatch(found[1])
    if inner:
        first, last = int(inner[1]), int(inner[2])
        width = max(map(len, inner.groups())) if "0" in (inner[1][:1], inner[2][:1]) else 0
        words: Iterator[str] = (f"{n:0{width}d}" for n in range(first, last + 1))
    else:
        words = iter(found[1].split(","))
    for word in words:
        yield from _braces(f"{path[: found.start()]}{word}{path[found.end() :]}")


# ---- folders


def _folder(path: str) -> list[str]:
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        inside = sorted(name for name in os.listdir(path) if os.path.isdir(os.path.join(path, name)))
        one = os.path.join(path, "train" if "train" in inside else "".join(inside[:1]))
        raise ConfigError(f"{path}: holds several splits ({', '.join(inside)}). Name one: {one}")
    state = os.path.join(path, "state.json")
    if os.path.isfile(state):
        return _saved(path, state)
    if (metadata := folders.metadata_of(path)) is not None:
        return [metadata]
    if shards := _shards(path):
        return shards
    classes = folders.classes_of(path)
    splits = [name for name in classes if name.lower() in SPLITS]
    if splits:
        raise ConfigError(
            f"{path}: holds splits ({', '.join(splits)}), not data. Name one: {os.path.join(path, splits[0])}"
        )
    if classes:
        return [os.path.join(path, file) for files in classes.values() for file in files]
    raise _no_data(path)


def _no_data(path: str) -> ConfigError:
    names = sorted(name for name in os.listdir(path) if name[0] != ".")
    rows = [name for name in names if name.lower().endswith((".json", *LINES))]
    if rows:
        return ConfigError(
            f"{path}: a folder with {', '.join(rows[:5])}. Name the data file itself: {os.path.join(path, rows[0])}"
        )
    if media := folders.loose_media(names):
        return ConfigError(
            f"{path}: a folder of {len(media):,} pictures or videos ({media[0]}) without text. Add a metadata.csv with "
            f"file_name, question and answer, or name a data file and pass --image_folder {path}"
        )
    return ConfigError(
        f"{path}: a folder without data. It holds {', '.join(names[:5]) or 'nothing'}. Supported are folders with "
        ".parquet, .arrow, .csv or .tar files, with pictures and a metadata.csv, or written by save_to_disk of "
        "datasets. Name one, or a data file."
    )


def _saved(path: str, state: str) -> list[str]:
    try:
        with open(state, encoding="utf-8") as file:
            content = json.load(file)
        if content.get("_indices_data_files") or content.get("_indices_files"):
            raise ConfigError(
                f"{path}: holds a selection of rows in addition to the rows. Write it again with a current version of "
                "datasets (load_from_disk, then save_to_disk)."
            )
        names = [os.path.basename(entry["filename"]) for entry in content["_data_files"]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{state}: was not written by save_to_disk ({error!r}). Save the data set again.") from error
    files = [os.path.join(path, name) for name in names]
    absent = [file for file in files if not os.path.isfile(file)]
    if absent or not files:
        raise ConfigError(f"{path}: {', '.join(absent) or 'no data file'} is missing. Copy the whole folder.")
    return files


def _shards(path: str) -> list[str]:
    """Return the table files in a folder or in its `data/`, of one format and one split; parquet has priority."""
    for ending, endings in ((".parquet", (".parquet",)), (".arrow", (".arrow",)), (".tar", TARS), (".csv", DELIMITED)):
        for folder in (path, os.path.join(path, "data")):
            names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
            found = [name for name in names if name.lower().endswith(endings) and name[0] != "."]
            if ending == ".parquet" and found and (tars := [name for name in names if name.lower().endswith(TARS)]):
                raise ConfigError(
                    f"{folder}: holds .parquet and .tar files ({found[0]}, {tars[0]}). Name those that are the data: "
                    f"'{os.path.join(folder, '*.tar')}' or '{os.path.join(folder, '*.parquet')}'"
                )
            if found:
                return [os.path.join(folder, name) for name in _one_split(folder, found, ending)]
    return []


def _one_split(folder: str, names: list[str], ending: str) -> list[str]:
    stems = {(shard[1] if (shard := _SHARD.match(name)) else name.partition(".")[0]).lower() for name in names}
    splits = sorted({stem for stem in stems if re.split(r"[-_.]", stem)[0] in SPLITS})
    if len(splits) > 1:
        raise ConfigError(
            f"{folder}: holds several splits ({', '.join(splits)}). Name the files of one: "
            f"{os.path.join(folder, splits[-1])}*{ending}"
        )
    return names
