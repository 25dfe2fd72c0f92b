"""Write a check as a folder: `report.html` (one page that needs no network), `report.json`, `quarantine.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import ImageOps

from vlft.check import REFUSED, WORST, Check
from vlft.check.fix import QUARANTINE, write_quarantine
from vlft.check.kinds import by_kind, kind_key
from vlft.check.result import Checked
from vlft.data.files.index import RowIndex
from vlft.data.media.pictures import Unreadable, open_picture
from vlft.data.sample import Image, Sample, Text
from vlft.errors import BadRow, ConfigError, DataError
from vlft.files import write_json
from vlft.pages.web import picture_uri, render, write_page

THUMB = 150  # pixels of a thumbnail's longer side
THUMBS = 6  # thumbnails of a row
WORDS = 260  # characters of a row's text
KINDS = 200  # kinds that are listed, of refused rows and of warnings each
PICTURED = 40  # kinds of these whose first rows are shown with pictures
ROWS = 200  # rows of a kind that are listed
FIRST = 8  # kinds that the tables show without a click


def refuse_folder(folder: str) -> None:
    """Raise an error before a long check if `--report` would overwrite files that no earlier check wrote.

    Raises:
        ConfigError: with the name of the file.
    """
    here = Path(folder)
    if here.exists() and not here.is_dir():
        raise ConfigError(f"--report {folder}: is a file. Use a folder.")
    there = [name for name in ("report.json", "report.html", QUARANTINE) if (here / name).exists()]
    if not there:
        return
    try:
        earlier = json.loads((here / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = None
    if not isinstance(earlier, dict) or not {"rows", "ok", "bad"} <= earlier.keys():
        raise ConfigError(
            f"--report {folder}: {there[0]} in it was not written by a check, and would be overwritten. Use another "
            "folder."
        )


def write_report(checked: Check, folder: str) -> Path:
    """Write the three files. The folder is created if it does not exist.

    Returns:
        path of the page.

    Raises:
        ConfigError: a file cannot be written.
    """
    page = Path(folder) / "report.html"
    try:
        os.makedirs(folder, exist_ok=True)
        write_quarantine(checked, Path(folder))
        write_json(Path(folder) / "report.json", checked.found.as_json(), indent=1)
        write_page(page, as_html(checked))
    except OSError as error:
        raise ConfigError(f"--report {folder}: cannot be written ({error.strerror}). Use another folder.") from error
    return page


def as_html(checked: Check) -> str:
    """Return the page: figures, histograms, and the rows of each kind of fault."""
    return render("check.html.j2", **context(checked))


def context(checked: Check) -> dict[str, Any]:
    """Return the variables of the template `check.html.j2`."""
    found, notable = checked.found, checked.notable.rows
    one = "row" if found.samples == found.ok else "sample"
    names = ", ".join(os.path.basename(file) for file in found.counts)
    return {
        "title": f"check of {names}",
        "names": names,
        "facts": _facts(found),
        "decoded": found.decoded,
        "charts": [
            (f"Tokens of a {one}", found.tokens.histogram if found.tokens else ()),
            ("Pictures and videos of a row", found.pictures_per_row),
            ("Thousand pixels of a picture", found.kilopixels),
        ],
        "first": FIRST,
        "faults": [
            _faults("Refused", "bad", found.bad, checked, before=REFUSED),
            _faults("Possible problems", "warn", found.warnings, checked, unlisted=found.unlisted),
        ],
        "remarkable": [
            {"name": kind, "rows": [_row(place, what, checked.index) for place, what in notable[kind]]}
            for kind in WORST
            if kind in notable
        ],
    }


def _faults(
    title: str, style: str, rows: Sequence[BadRow], checked: Check, *, before: str = "", unlisted: int = 0
) -> dict[str, Any]:
    """Return the kinds of faults, the most frequent first, each with its rows.

    Args:
        title: title of the list.
        style: CSS class of the title, and the beginning of the anchors.
        rows: the rows with these faults.
        checked: the check that found them.
        before: prefix of these kinds in `checked.notable`.
        unlisted: number of further rows of any kind.
    """
    kinds = by_kind(rows)
    shown = []
    for number, (name, of_kind) in enumerate(kinds[:KINDS], start=1):
        pictured = checked.notable.rows.get(before + kind_key(of_kind[0].reason), []) if number <= PICTURED else []
        heads = {what for _, what in pictured}
        rest = [text for row in of_kind if (text := str(row)) not in heads]
        shown.append(
            {
                "anchor": f"{style}-{number}",
                "name": name,
                "count": len(of_kind),
                "rows": [_row(place, what, checked.index) for place, what in pictured],
                "rest": rest[:ROWS],
                "more": max(0, len(rest) - ROWS),
            }
        )
    return {
        "title": title,
        "style": style,
        "total": len(rows) + unlisted,
        "unlisted": unlisted,
        "kinds": shown,
        "more": {"kinds": len(kinds) - len(shown), "rows": sum(len(some) for _, some in kinds[KINDS:])},
    }


def _facts(found: Checked) -> list[tuple[str, str, str]]:
    """Return (name, figure, CSS class) of each figure."""
    facts = [
        ("rows", f"{found.rows:,}", ""),
        ("can be trained", f"{found.ok:,}", ""),
        ("refused", f"{len(found.bad):,}", "bad" if found.bad else "good"),
        ("warnings", f"{len(found.warnings) + found.unlisted:,}", ""),
        ("pictures", f"{found.images:,}", ""),
        ("videos", f"{found.videos:,}", ""),
    ]
    if found.pairs is not None:
        facts += [("pairs", f"{found.pairs.pairs:,}", ""), ("chosen is longer", f"{found.pairs.longer_chosen:,}", "")]
    if found.tokens is not None:
        facts += [("samples", f"{found.samples:,}", "")] if found.samples != found.ok else []
        trained = found.tokens.supervised
        facts += [("tokens" if trained else "tokens of prompts", f"{found.tokens.total:,}", "")]
        facts += [("of them trained", f"{trained:,}", "")] if trained else []
    return facts


def _row(place: int, what: str, index: RowIndex) -> dict[str, Any]:
    """Return a row for the gallery: why it is listed, thumbnails, and the beginning of its text."""
    name = index.name_of(place)
    shown: dict[str, Any] = {"head": what if name in what else f"{name}: {what}"}
    shown |= {"pictures": [], "unreadable": [], "more": 0}
    try:
        sample = index[place]
    except DataError:
        text = str(index.raw(place))
    else:
        text = _text(sample)
        shown |= _pictures(sample, what)
    return shown | {"words": text[:WORDS], "cut": len(text) > WORDS}


def _pictures(sample: Sample, what: str) -> dict[str, Any]:
    """Return thumbnails, and why the other pictures cannot be read, unless `what` says so."""
    parts = [part for part in sample.media if isinstance(part, Image)]
    pictures, unreadable = [], []
    for part in parts[:THUMBS]:
        try:
            picture = ImageOps.contain(open_picture(part.path), (THUMB, THUMB))
        except Unreadable as error:
            unreadable += [] if part.path in what else [(part.field, error)]
            continue
        pictures.append({"alt": part.field, "title": part.path, "uri": picture_uri(picture, "JPEG")})
    return {"pictures": pictures, "unreadable": unreadable, "more": max(0, len(parts) - THUMBS)}


def _text(sample: Sample) -> str:
    """Return the turns of the row as text, one line per turn."""
    lines = []
    for turn in sample.all_turns:
        text = "".join(
            part.text if isinstance(part, Text) else f"<{type(part).__name__.lower()}>" for part in turn.parts
        )
        lines.append(f"{turn.role}: {text}")
    return "\n".join(lines)
