"""Write a page about a run, during the run or after it: curves, where the time went, rows, answers, settings.

`vlft.report.read` reads the run folder, `vlft.report.charts` prepares the charts, `vlft.report.page` builds the page.
The page is the only file that is written.
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
        folder: folder of the run, which may still be running.
        html: path of the page; None writes `report.html` in the run folder.

    Returns:
        path of the page.

    Raises:
        CheckpointError: the folder holds no run.
        ConfigError: a file that is not an HTML page exists at this path.
        OSError: the page cannot be written.
    """
    target = Path(folder) / NAME if html is None else Path(html)
    write_page(target, as_html(read_run(folder)))
    return target


def make_report(folder: str | Path, html: str | Path | None = None) -> Path:
    """Write the page of a run for the command line: `write_report`, with a message if the page cannot be written.

    Raises:
        CheckpointError: the folder holds no run.
        ConfigError: the page cannot be written.
    """
    try:
        return write_report(folder, html)
    except OSError as error:
        target = Path(folder) / NAME if html is None else html
        raise ConfigError(f"{target}: cannot be written ({error.strerror}). Use another file: --html") from error
