"""The "data" of a run record: what became of the rows of each data file. Used by `record` and `folder`."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from vlft.errors import BadRow
from vlft.setup import MeasuredRows


def with_skipped(data: list[dict[str, Any]], skipped: list[BadRow]) -> list[dict[str, Any]]:
    """The entries with these rows skipped, too."""
    result = []
    for entry in data:
        known = {row["index"] for row in entry["skipped"]}
        new = [
            {"index": row.index, "id": row.id, "field": row.field, "reason": row.reason}
            for row in skipped
            if _same(row.file, entry["file"]) and row.index not in known
        ]
        rows = sorted([*entry["skipped"], *new], key=lambda row: row["index"])
        trained = entry["rows"] - len(rows) - entry.get("not_drawn", 0)
        result.append({**entry, "skipped": rows, "trained": trained})
    return result


def _same(one: str, other: str) -> bool:
    """Whether two spellings name one file: config.yaml has absolute paths, whatever the flags had."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def data_entries(
    measured: MeasuredRows,
) -> list[dict[str, Any]]:
    """The "data" of a run record: per file the rows read, trained and skipped, and those that --over_length changed.

    Of a mix, also the rows that are not drawn, and how many draws an epoch makes: rows = trained + skipped + not_drawn.
    """
    counts, bad = measured.rows.counts, measured.rows.bad
    rows: dict[str, list[dict[str, Any]]] = {file: [] for file in counts}
    for sample, change in measured.changed:
        rows[sample.file].append({"index": sample.index, "id": sample.id, "change": change})
    empty = [
        {"file": file, "rows": count, "trained": count, "skipped": [], **_changes(rows[file])}
        for file, count in counts.items()
    ]
    refused = Counter(row.file for row in bad)
    for entry in empty:
        if (drawn := measured.drawn.get(entry["file"])) is not None:
            left = entry["rows"] - refused[entry["file"]] - drawn.rows
            entry |= {"draws_an_epoch": drawn.draws, "not_drawn": left}
    return with_skipped(empty, list(bad))


def _changes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many rows have fewer pixels, how many fewer media, and which."""
    shrunk = sum(row["change"].startswith("shrunk") for row in rows)
    return {"shrunk": shrunk, "lost_media": len(rows) - shrunk, "changed": rows}
