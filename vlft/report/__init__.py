"""Write a page about a run, during the run or after it, or about several runs: curves, times, rows, answers, settings.

`vlft.report.read` reads a run folder, `state` tells its progress, `vlft.pages.charts` prepares charts. `page` builds
the page of a run and `compare` that of several. The page is the only file that is written. No module here imports
torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from vlft.errors import CheckpointError, ConfigError
from vlft.pages.web import write_page
from vlft.report.compare import compared
from vlft.report.page import as_html
from vlft.report.read import Run, read_run
from vlft.text import counted

__all__ = ["NAME", "make_report", "write_report"]

NAME = "report.html"
COMPARED = "compare.html"


def write_report(folder: str | Path, html: str | Path | None = None, *, ended: bool = False) -> Path:
    """Write the page of a run.

    Args:
        folder: folder of the run, which may still be running.
        html: path of the page; None writes `report.html` in the run folder, and the page reloads itself while the run
            continues.
        ended: the run itself says that it ends now.

    Returns:
        path of the page.

    Raises:
        CheckpointError: the folder holds no run.
        ConfigError: a file that is not an HTML page exists at this path.
        OSError: the page cannot be written, or a file of the run cannot be read.
    """
    target = Path(folder) / NAME if html is None else Path(html)
    write_page(target, as_html(read_run(folder), ended=ended, rewritten=html is None))
    return target


def make_report(
    folders: Sequence[str | Path], html: str | Path | None = None, *, say: Callable[[str], None] = lambda line: None
) -> Path:
    """Write the page of a run, or one page about several runs, for the command line.

    Args:
        folders: one or more run folders.
        html: path of the page; None: `report.html` in the run folder, or `compare.html` for several runs.
        say: prints a warning for the user.

    Raises:
        CheckpointError: a folder holds no run; the message names each such folder.
        ConfigError: a file cannot be read, the page cannot be written, or a run is named twice.
    """
    runs = _read_all(folders)
    for run in runs:
        if run.broken:
            say(f"warning: {run.folder}: {counted(run.broken, 'line')} could not be read: {run.damaged}")
    if len(runs) > 1:
        target, page = Path(html or COMPARED), compared(runs)
    else:
        target = Path(folders[0]) / NAME if html is None else Path(html)
        page = as_html(runs[0], rewritten=html is None)
    try:
        write_page(target, page)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}). Use another file: --html") from error
    return target


def _read_all(folders: Sequence[str | Path]) -> list[Run]:
    runs: list[Run] = []
    wrong: list[str] = []
    named: dict[str, str | Path] = {}
    for folder in folders:
        path = os.path.realpath(folder)
        if path in named:
            raise ConfigError(f"{folder}: is the same run as {named[path]}. Name each run once.")
        named[path] = folder
        try:
            runs.append(read_run(folder))
        except CheckpointError as error:
            wrong.append(str(error))
        except OSError as error:
            wrong.append(f"{error.filename}: cannot be read ({error.strerror}). Check its permissions.")
    if wrong:
        raise CheckpointError("\n  ".join(wrong))
    return runs
