"""Read `--data_mix FILE`: several data sets, and how often the rows of each are trained. Opens no data file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vlft.config.columns import Columns, read_columns
from vlft.config.yaml_file import read_text
from vlft.errors import ConfigError

_NUMBERS = ("weight", "repeat", "cap")


@dataclass(frozen=True, kw_only=True)
class MixedSet:
    """One data set: an entry of a mix, or a data file of `--data_path`.

    Attributes:
        path: a data file, as for `--data_path`.
        image_folder: where its media paths start. None: `--image_folder`, or the file's own folder.
        weight: its share of an epoch's rows, relative to the weights of the other sets.
        repeat: how often each of its rows is trained in an epoch; 1.5 trains half of them twice.
        cap: maximum number of its rows that are used.
        columns: which of its columns hold the parts of a row. None: `--columns`.
    """

    path: str
    image_folder: str | None = None
    weight: float | None = None
    repeat: float | None = None
    cap: int | None = None
    columns: Columns | None = None


def read_mix(path: str) -> tuple[MixedSet, ...]:
    """Read the data sets of a mix file.

    Raises:
        ConfigError: the file cannot be read, or has an invalid entry.
    """
    sets = tuple(_one(path, place, raw) for place, raw in enumerate(raw_entries(path)))
    if not sets:
        raise ConfigError(f"--data_mix {path}: lists no data set. Write each data set as - path: train.json")
    seen: dict[str, int] = {}
    for place, one in enumerate(sets):
        if one.path in seen:
            first = seen[one.path]
            raise ConfigError(
                f"--data_mix {path}[{place}].path: {one.path} is already listed as [{first}]. Use repeat there."
            )
        seen[one.path] = place
    weighted = [place for place, one in enumerate(sets) if one.weight is not None]
    if weighted and len(weighted) < len(sets):
        without = next(place for place in range(len(sets)) if place not in weighted)
        raise ConfigError(
            f"--data_mix {path}: [{weighted[0]}] has a weight and [{without}] has none. Weights are relative to each "
            "other: set one for every data set, or use repeat and cap."
        )
    return sets


def raw_entries(path: str) -> list[Any]:
    """Return the entries of a mix file as they are written; `read_mix` checks them.

    Raises:
        ConfigError: the file cannot be read, or holds no list.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"--data_mix {path}: cannot be read: {error.strerror}. Name a YAML file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--data_mix {path}: not in UTF-8: {error}. Save it as UTF-8") from error
    found = read_text(f"--data_mix {path}", text)
    if not isinstance(found, list):
        what = "nothing" if found is None else type(found).__name__
        raise ConfigError(f"--data_mix {path}: found {what}, not a list. Write each data set as - path: train.json")
    return found


def _one(file: str, place: int, raw: Any) -> MixedSet:
    where = f"--data_mix {file}[{place}]"
    if isinstance(raw, str):
        raw = {"path": raw}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: {raw!r} is not a data set. Write - path: train.json")
    known = [field.name for field in fields(MixedSet)]
    if unknown := [str(key) for key in raw if key not in known]:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}. Keys are {', '.join(known)}.")
    for key in ("path", "image_folder"):
        value = raw.get(key)
        if (key == "path" or value is not None) and (not isinstance(value, str) or not value.strip()):
            raise ConfigError(f"{where}.{key}: is {value!r}, not a path. Name the {key.replace('_', ' ')}.")
    for key in _NUMBERS:
        value = raw.get(key)
        if value is None:
            continue
        whole = key == "cap"
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            kind = "a whole number" if whole else "a number"
            raise ConfigError(f"{where}.{key}: is {value!r}, not {kind} above 0. To leave a set out, delete its entry.")
    if raw.get("weight") is not None and raw.get("repeat") is not None:
        raise ConfigError(
            f"{where}: weight {raw['weight']} and repeat {raw['repeat']} both set how often its rows are trained. "
            "Keep one."
        )
    columns = raw.get("columns")
    read = None if columns is None else read_columns(columns, where=f"{where}.columns")
    return MixedSet(**{**raw, "columns": read})
