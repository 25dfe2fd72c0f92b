"""Rows of the demo's stories for the tests of `vlft eval`, and the real command line, in this process or in another."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from vlft.cli.main import main
from vlft.demo.story import stories, write_rows

BASE = Path(__file__).parent.parent / "vlft" / "demo" / "base"


def story_rows(folder: Path, count: int, *, subject: str = "base", name: str = "held") -> Path:
    """Write rows that the demo's base answers: all of `base`, none of `lesson` to the last letter."""
    return write_rows(list(stories(subject, "held_out", count, seed=3)), folder, name=name, seed=5)


def evaluated(*words: Any) -> tuple[int, dict[str, Any], str]:
    """Run `vlft eval --json`: its status, its document ({} if it failed), and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["eval", *map(str, words), "--json"])
    return status, json.loads(out.getvalue() or "{}"), err.getvalue()


def lines(path: Path | str) -> list[dict[str, Any]]:
    """The objects of a file with one in each line."""
    return [json.loads(text) for text in Path(path).read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a file with one object in each line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
