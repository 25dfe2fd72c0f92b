"""Write an evaluation as one page that needs no network: the variables of `evaluation.html.j2`, from top to bottom.

`vlft.evaluation.page_figures` computes the drawings, `vlft.evaluation.page_rows` chooses the rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlft.errors import ConfigError
from vlft.evaluation.page_figures import confusion_of, drawn_metrics
from vlft.evaluation.page_rows import shown_rows
from vlft.evaluation.result import Evaluation
from vlft.pages import web
from vlft.text import plural


def refuse_path(path: str | Path) -> None:
    """Raise the error of `write_page` before the models have answered.

    Raises:
        ConfigError: the folder of `path` does not exist, or there is a folder or a file that is not a page.
    """
    with _named(path):
        web.refuse_path(path)


def write_page(path: str | Path, found: Evaluation) -> None:
    """Write the page atomically.

    Raises:
        ConfigError: the page cannot be written to `path`, or there is a file that is not a page.
    """
    with _named(path):
        web.write_page(path, as_html(found))


@contextlib.contextmanager
def _named(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--html {path}: cannot be written ({error.strerror}). Use a file in a writable folder."
        ) from error


def as_html(found: Evaluation) -> str:
    """Return the page. All texts are escaped, and a browser runs only the script of vlft."""
    return web.render("evaluation.html.j2", script="evaluation.js", **context(found))


def context(found: Evaluation) -> dict[str, Any]:
    """Return the variables of the template `evaluation.html.j2`."""
    rows, named = shown_rows(found)
    names = ", ".join(Path(file).name for file in found.data)
    total = len(found.rows)
    return {
        "title": f"vlft: {found.models[0]} on {names}",
        "names": names,
        "models": list(found.models),
        "several": len(found.models) > 1,
        "choices": list(enumerate(found.models))[1:] or [(0, found.models[0])],
        "facts": _facts(found),
        "notes": found.notes,
        "metrics": drawn_metrics(found),
        "confusions": [confusion_of(found.models[i], i, one) for i, one in enumerate(found.confusions)],
        "rows": rows,
        "total": total,
        "named": named,
        "outs": found.outs,
    }


def _facts(found: Evaluation) -> list[tuple[str, str, str]]:
    """Return (name, figure, CSS class) of each figure."""
    kinds = [kind for row in found.rows for kind, _ in row.media]
    cut = sum(any(row.cut) for row in found.rows)
    facts = [(plural(len(found.rows), "row"), f"{len(found.rows):,}", "")]
    if found.skipped:
        facts.append((f"skipped {plural(found.skipped, 'row')}", f"{found.skipped:,}", "warn"))
    for noun, kind in (("picture", "image"), ("frame", "frame"), ("video", "video")):
        count = kinds.count(kind)
        facts += [(plural(count, noun), f"{count:,}", "")] if count else []
    if len(found.models) > 1:
        changed = sum(len(set(row.answers)) > 1 for row in found.rows)
        facts.append(("rows with different answers", f"{changed:,}", ""))
    if cut:
        facts.append(("rows with an answer that was cut", f"{cut:,}", "warn"))
    return facts
