"""Write the rows that can be trained to one file, or divided into several, and the others to `quarantine.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlft.check import Check
from vlft.data.division import split, wanted_rows
from vlft.data.files.index import RowIndex
from vlft.data.rows.source import as_found, home_of
from vlft.data.rows.write_back import written
from vlft.errors import BadRow, ConfigError
from vlft.files import appearing
from vlft.text import counted

QUARANTINE = "quarantine.jsonl"
ENDINGS = (".json", ".jsonl")
PARTS = ("train", "eval", "test")  # parts of --split, in the order of its shares


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `write_clean` has written.

    Attributes:
        rows: file -> number of its rows.
        quarantine: path of the file with the rows that are left out.
        repeats: how many of these repeat an earlier row; None without `--dedup`.
        remarks: what the user should know about the division.
    """

    rows: dict[str, int]
    quarantine: Path
    repeats: int | None
    remarks: tuple[str, ...]


def targets(out: str, shares: Sequence[float] | None) -> list[str]:
    """Return the data files that `--fix OUT` writes: OUT, or with `--split` OUT-train, OUT-eval and OUT-test."""
    if shares is None:
        return [out]
    stem, ending = os.path.splitext(out)
    return [f"{stem}-{part}{ending}" for part in PARTS[: len(shares)]]


def refuse_target(out: str, index: RowIndex, *, shares: Sequence[float] | None = None) -> None:
    """Raise an error before a long check if `--fix` could not write its result.

    Raises:
        ConfigError: the ending is not that of a data file, a file already exists, or media paths of the rows would
            lead elsewhere from its folder.
    """
    target = Path(out)
    if target.suffix not in ENDINGS:
        raise ConfigError(f"--fix {out}: not a data file. Use a name that ends in .json or .jsonl.")
    for path in targets(out, shares):
        if Path(path).exists():
            named = "" if path == out else f" {path}"
            raise ConfigError(f"--fix {out}:{named} already exists. Use a new file, or remove it.")
    if (kept := target.parent / QUARANTINE).exists():
        raise ConfigError(f"--fix {out}: {kept} already exists, and refused rows go there. Rename or remove it.")
    folders = {file.image_folder for file in index.files}
    if len(folders) > 1:
        some = " and ".join(str(folder) for folder in list(folders)[:2])
        raise ConfigError(
            f"--fix {out}: media paths in this file would start from one folder, but the data sets use several "
            f"({some}). Fix them one by one: vlft check-data FILE --image_folder DIR --fix OUT"
        )
    for file in index.files:
        folder = os.path.abspath(home_of(file.name) or ".")
        if file.image_folder is None and folder != os.path.dirname(os.path.abspath(out)):
            raise ConfigError(
                f"--fix {out}: without --image_folder, media paths start from {folder}, where {file.name} is. Write "
                "OUT into that folder, or pass --image_folder."
            )


def write_clean(
    checked: Check, out: str, *, dedup: bool = False, shares: Sequence[float] | None = None, seed: int = 42
) -> Written:
    """Write the rows that can be trained, and all other rows to `quarantine.jsonl` beside them.

    Rows are written unchanged, except for the tags that `--missing_tags first` added. Rows of `--eval_path` are not
    written: a row that is trained can no longer be used to evaluate.

    Args:
        checked: the check.
        out: a new `.json` or `.jsonl` file.
        dedup: leave out rows that repeat an earlier row.
        shares: divide the rows into `targets(out, shares)`; rows that share a picture or video stay together.
        seed: of the division.

    Raises:
        ConfigError: a file cannot be written, or the rows cannot be divided.
    """
    mine = checked.good < checked.training
    repeats = {place: row for place, row in checked.repeats.items() if dedup and place < checked.training}
    mine &= ~np.isin(checked.good, list(repeats))
    rows = np.flatnonzero(mine)
    remarks: tuple[str, ...] = ()
    part_of = np.zeros(len(rows), dtype=np.int64)
    if shares is not None:
        part_of, remarks = _divided(checked, rows, shares, seed)
    files = dict(zip(targets(out, shares), range(len(shares or [1])), strict=True))
    try:
        for path, part in files.items():
            _write_rows(checked.index, checked.good[rows[part_of == part]].tolist(), path)
        left_out = [*checked.found.bad, *repeats.values()]
        quarantine = write_quarantine(checked, Path(out).parent, left_out)
    except OSError as error:
        raise ConfigError(
            f"--fix {out}: cannot be written ({error.strerror}). Use a file in another folder."
        ) from error
    counts = {path: int((part_of == part).sum()) for path, part in files.items()}
    return Written(rows=counts, quarantine=quarantine, repeats=len(repeats) if dedup else None, remarks=remarks)


def _divided(
    checked: Check, rows: np.ndarray, shares: Sequence[float], seed: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the part of each row, and a remark if the parts do not have the shares that were asked for."""
    compared = checked.compared
    asked, there = ",".join(f"{share:g}" for share in shares), counted(len(rows), "row")
    groups = compared.groups(rows.tolist())
    names, sizes = np.unique(groups, return_counts=True)
    largest, why = int(sizes.max(initial=0)), ""
    if largest > 1:
        bond = compared.bond(rows[groups == names[sizes.argmax()]].tolist())
        why = f"rows that share a picture or video stay together, and {largest:,} rows share {bond}"
    if len(names) < len(shares):
        raise ConfigError(
            f"--split {asked}: {there} cannot be divided into {len(shares)} files{': ' if why else ''}{why}. Use fewer "
            "shares, or more data."
        )
    part_of = split(groups, compared.stable[rows], shares, seed=seed)
    counts = [int((part_of == part).sum()) for part in range(len(shares))]
    exact = [share * len(rows) for share in shares]
    if counts == wanted_rows(len(rows), shares):
        close = all(abs(count - one) < 1 for count, one in zip(counts, exact, strict=True))
        why = "" if close else f"there are {there}, and each file gets at least one"
    if not why:
        return part_of, ()
    numbers = ", ".join(f"{count:,} of {there} ({count / len(rows):.1%})" for count in counts)
    return part_of, (f"--split {asked} cannot be met exactly. The files have {numbers}: {why}",)


def _write_rows(index: RowIndex, places: Sequence[int], path: str) -> None:
    with appearing(path) as file:
        array = path.endswith(".json")
        file.write(b"[\n" if array else b"")
        for number, place in enumerate(places):
            file.write((b",\n" if array else b"\n") if number else b"")
            file.write(_line(_as_trained(index, place)))
        file.write(b"\n]\n" if array else b"\n")


def write_quarantine(checked: Check, folder: Path, rows: Sequence[BadRow] | None = None) -> Path:
    """Write rows that are left out with their reasons: `file`, `index`, `id`, `field`, `reason`, `row`.

    Args:
        rows: the rows; None: all refused rows.

    Raises:
        OSError: the file cannot be written.
    """
    path = folder / QUARANTINE
    with appearing(path) as file:
        for entry in _entries(checked.index, checked.found.bad if rows is None else rows):
            file.write(_line(entry) + b"\n")
    return path


def _as_trained(index: RowIndex, place: int) -> object:
    raw = index.raw(place)
    return written(raw, index[place].added) if index.flags.missing_tags == "first" else raw


def _entries(index: RowIndex, rows: Sequence[BadRow]) -> Iterator[dict[str, Any]]:
    places = {file.name: place for place, file in enumerate(index.files)}
    for row in sorted(rows, key=lambda row: (places[row.file], row.index)):
        yield {
            "file": row.file,
            "index": row.index,
            "id": row.id,
            "field": row.field,
            "reason": row.reason,
            "row": as_found(index.files[places[row.file]].raw(row.index)),
        }


def _line(value: object) -> bytes:
    # Lone surrogates stay escaped: UTF-8 cannot encode them, and they may be the reason for the refusal.
    text = json.dumps(value, ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()
