"""A page about a run, while it goes on and afterwards: curves, where the time went, rows, answers, settings.

`read` opens what a run folder holds, `charts` draws, `page` puts it together. Reads only, and writes the one page.
"""

from __future__ import annotations

from pathlib import Path

from vlft.errors import ConfigError
from vlft.pages.web import write_page
from vlft.report.page import as_html
from vlft.report.read import read_run

__all__ = ["NAME", "make_report", "write_report"]

NAME = "report.html"


def write_report(folder: str | Path, html: str | Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        folder: of the run, finished or not.
        html: where to; None: `report.html` in the run folder.

    Returns:
        the page's path.

    Raises:
        CheckpointError: the folder holds no run.
        OSError: it cannot be written there.
    """
    target = Path(folder) / NAME if html is None else Path(html)
    write_page(target, as_html(read_run(folder)))
    return target


def make_report(folder: str | Path, html: str | Path | None = None) -> Path:
    """As `write_report`, for the command line.

    Raises:
        CheckpointError: the folder holds no run.
        ConfigError: the page cannot be written there.
    """
    try:
        return write_report(folder, html)
    except OSError as error:
        target = Path(folder) / NAME if html is None else html
        raise ConfigError(f"{target}: cannot be written ({error.strerror}). Name another file: --html") from error
