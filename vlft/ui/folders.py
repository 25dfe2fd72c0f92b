"""List what a folder of the user holds: data files, models, runs, folders in it. Reads names and small files only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vlft.errors import ConfigError
from vlft.ui.small import document

ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".tar")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
#: Files that are no data although they have such an ending.
OTHERS = (
    *("vlft.json", "config.json", "tokenizer.json", "tokenizer_config.json"),
    *("metrics.jsonl", "answers.jsonl", "completions.jsonl", "quarantine.jsonl"),
)
MOST_FILES, MOST_NAMES, DEEP = 200, 20_000, 2
MOST_CONFIG = 4 << 20  # bytes of a config.json


@dataclass(frozen=True, kw_only=True)
class Found:
    """The contents of a folder.

    Attributes:
        folder: absolute path.
        data: data files with their sizes in bytes, in order. Names that are not UTF-8 are shown with U+FFFD, here and
            below, and cannot be opened.
        models: folders with a model or an adapter's base.
        runs: run folders, the newest first.
        folders: folders directly in it.
        pictures: number of picture files that were seen.
        cut: the folder has more names than are read.
    """

    folder: Path
    data: tuple[tuple[str, int], ...]
    models: tuple[str, ...]
    runs: tuple[str, ...]
    folders: tuple[str, ...]
    pictures: int
    cut: bool


def find(folder: str) -> Found:
    """List a folder and the folders in it, two levels deep.

    Raises:
        ConfigError: it does not exist, is a file, or cannot be read.
    """
    if not folder:
        raise ConfigError("Type the path of a folder on this machine.")
    top = Path(os.path.abspath(os.path.expanduser(folder)))
    data: list[tuple[str, int]] = []
    models: list[str] = []
    runs: list[tuple[float, str]] = []
    inner: list[str] = []
    pictures = seen = 0
    waiting = [(top, 0)]
    while waiting and seen < MOST_NAMES:
        here, depth = waiting.pop(0)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            if here != top:
                continue
            raise ConfigError(
                f"{top}: cannot be opened ({error.strerror}). Type the path of another folder."
            ) from error
        names = {entry.name for entry in entries}
        seen += len(names)
        if depth and "vlft.json" in names and "metrics.jsonl" in names:
            runs.append((_changed(here), str(here)))
            continue
        if "config.json" in names and _is_model(here / "config.json"):
            models.append(str(here))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                inner += [] if depth else [entry.name]
                waiting += [(Path(entry.path), depth + 1)] if depth < DEEP else []
            elif entry.name.lower().endswith(PICTURES):
                pictures += 1
            elif entry.name.lower().endswith(ENDINGS) and entry.name not in OTHERS and len(data) < MOST_FILES:
                data += [(_shown(entry.path), entry.stat().st_size)] if entry.is_file() else []
    return Found(
        folder=top,
        data=tuple(data),
        models=tuple(map(_shown, models)),
        runs=tuple(_shown(path) for _, path in sorted(runs, reverse=True)),
        folders=tuple(map(_shown, inner)),
        pictures=pictures,
        cut=bool(waiting),
    )


def _is_model(path: Path) -> bool:
    return bool(document(path, MOST_CONFIG).get("model_type"))


def _changed(folder: Path) -> float:
    try:
        return os.stat(folder).st_mtime
    except OSError:
        return 0.0


def _shown(name: str) -> str:
    """Return a name as it can be sent to a browser: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")
