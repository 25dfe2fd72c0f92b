"""A check as a folder to look through: `report.html` (one page, no network), `report.json`, `quarantine.jsonl`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import ImageOps

from vlft.check import REFUSED, Check
from vlft.check.fix import QUARANTINE, write_quarantine
from vlft.check.result import Bucket, Checked, kind_of_reason
from vlft.data.files.index import RowIndex
from vlft.data.media.pictures import Unreadable, open_picture
from vlft.data.sample import Image, Sample, Text
from vlft.errors import ConfigError, DataError
from vlft.files import appearing
from vlft.pages.web import document, picture_uri, safe, write_page

THUMB = 150  # pixels of a thumbnail's longer side
THUMBS = 6  # of a row
WORDS = 260  # characters of a row's text
KINDS = 40  # kinds of rows in the gallery
FIRST = 8  # kinds of faults that are shown unasked

_STYLE = """
.big{display:flex;flex-wrap:wrap;gap:.6rem 2rem;margin:1rem 0}.big b{display:block;font-size:1.5rem;line-height:1.2}
.bars{display:grid;grid-template-columns:auto 1fr auto;gap:.15rem .7rem;align-items:center;
font-variant-numeric:tabular-nums;font-size:.9rem}
.bars span:nth-child(3n+1){text-align:right;color:var(--soft)}
.bar{display:block;height:.9rem;border-radius:.2rem;background:var(--good);min-width:2px;opacity:.75}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1rem}
.grid section{margin:0}.grid h2{margin-top:0}td:last-child{white-space:nowrap}
.row{border-top:1px solid var(--line);padding:.6rem 0}.row:first-of-type{border-top:0}
.thumbs{display:flex;flex-wrap:wrap;gap:.3rem;margin:.4rem 0}.thumbs img{border-radius:.3rem;max-width:100%}
.words{white-space:pre-wrap;font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;color:var(--soft)}
summary{cursor:pointer;font-weight:600}
"""


def refuse_folder(folder: str) -> None:
    """Say before a long check that `--report` would overwrite what is not of an earlier check.

    Raises:
        ConfigError: names the file.
    """
    here = Path(folder)
    if here.exists() and not here.is_dir():
        raise ConfigError(f"--report {folder}: is a file. Name a folder.")
    there = [name for name in ("report.json", "report.html", QUARANTINE) if (here / name).exists()]
    if not there:
        return
    try:
        earlier = json.loads((here / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = None
    if not isinstance(earlier, dict) or not {"rows", "ok", "bad"} <= earlier.keys():
        raise ConfigError(
            f"--report {folder}: {there[0]} there is not of an earlier check, and would be overwritten. Name another "
            "folder."
        )


def write_report(checked: Check, folder: str) -> Path:
    """Write the three files; the folder is made where it is missing.

    Returns:
        the page.

    Raises:
        ConfigError: they cannot be written.
    """
    page = Path(folder) / "report.html"
    try:
        os.makedirs(folder, exist_ok=True)
        write_quarantine(checked, Path(folder))
        with appearing(Path(folder) / "report.json") as out:
            out.write(json.dumps(checked.found.as_json(), indent=1).encode())
        write_page(page, as_html(checked))
    except OSError as error:
        raise ConfigError(f"--report {folder}: cannot be written ({error.strerror}). Name another folder.") from error
    return page


def as_html(checked: Check) -> str:
    """The page: figures, histograms, and a few rows of each kind that is worth a look."""
    found = checked.found
    names = ", ".join(os.path.basename(file) for file in found.counts)
    charts = "".join(
        f"<section><h2>{title}</h2>{_bars(buckets)}</section>"
        for title, buckets in (
            ("Tokens of a row", found.tokens.histogram if found.tokens else ()),
            ("Pictures and videos of a row", found.pictures_per_row),
            ("Thousand pixels of a picture", found.kilopixels),
        )
        if buckets
    )
    kinds = sorted(checked.notable.rows.items(), key=lambda kind: kind[0].startswith(REFUSED))
    gallery = "".join(_kind(kind, rows, checked.index) for kind, rows in kinds[:KINDS])
    if len(kinds) > KINDS:
        gallery += f'<p class="soft">and {len(kinds) - KINDS} more kinds: report.json has all rows</p>'
    return document(
        title=f"check of {names}",
        style=_STYLE,
        body=f"""<h1>{safe(names)}</h1>
{_figures(found)}
<div class="grid">{charts}</div>
{_reasons("Refused", "bad", found.bad)}
{_reasons("Worth a look", "warn", found.warnings)}
<h2>Rows to look at</h2>
{gallery or '<p class="soft">none</p>'}""",
    )


def _figures(found: Checked) -> str:
    verdict = "good" if not found.bad else "bad"
    items = [
        ("rows", f"{found.rows:,}"),
        ("can be trained", f"{found.ok:,}"),
        ("refused", f'<span class="{verdict}">{len(found.bad):,}</span>'),
        ("warnings", f"{len(found.warnings) + found.unlisted:,}"),
        ("pictures", f"{found.images:,}"),
        ("videos", f"{found.videos:,}"),
    ]
    if found.tokens is not None:
        items += [("tokens", f"{found.tokens.total:,}"), ("of them trained", f"{found.tokens.supervised:,}")]
    how = "Every picture and frame was decoded." if found.decoded else "Headers were read; nothing was decoded."
    figures = "".join(f"<div><b>{value}</b>{name}</div>" for name, value in items)
    return f'<div class="big">{figures}</div><p class="soft">{how}</p>'


def _reasons(title: str, style: str, rows: Sequence) -> str:
    """How many rows have which fault, most first."""
    if not rows:
        return ""
    counts = Counter(kind_of_reason(row.reason) for row in rows)
    lines = [f"<tr><td>{safe(kind)}</td><td>{count:,}</td></tr>" for kind, count in counts.most_common()]
    table = f'<div class="scroll"><table>{"".join(lines[:FIRST])}</table></div>'
    if rest := lines[FIRST:]:
        more = f'<summary class="soft">and {len(rest):,} kinds more</summary>'
        table += f'<details>{more}<div class="scroll"><table>{"".join(rest)}</table></div></details>'
    return f'<h2 class="{style}">{title}: {len(rows):,}</h2>{table}'


def _bars(buckets: Sequence[Bucket]) -> str:
    most = max(bucket.rows for bucket in buckets)
    lines = []
    for bucket in buckets:
        span = f"{bucket.start:,}" if bucket.start == bucket.end else f"{bucket.start:,}&ndash;{bucket.end:,}"
        bar = f'<span class="bar" style="width:{100 * bucket.rows / most:.1f}%"></span>' if bucket.rows else ""
        lines.append(f"<span>{span}</span><span>{bar}</span><span>{bucket.rows:,}</span>")
    return f'<div class="bars">{"".join(lines)}</div>'


def _kind(kind: str, rows: Sequence[tuple[int, str]], index: RowIndex) -> str:
    shown = "".join(f'<div class="row">{_row(place, what, index)}</div>' for place, what in rows)
    style = "bad" if kind.startswith(REFUSED) else ""
    return f'<section><details open><summary class="{style}">{safe(kind)}</summary>{shown}</details></section>'


def _row(place: int, what: str, index: RowIndex) -> str:
    name = f"{index.files[index.file_of[place]].name}[{index.row_of[place]}]"
    head = safe(what) if name in what else f"{safe(name)}: {safe(what)}"
    try:
        return f"<p>{head}</p>{_thumbs(index[place])}{_words(index[place])}"
    except DataError:
        raw = str(index.raw(place))
        return f'<p>{head}</p><p class="words">{safe(raw[:WORDS])}{"…" if len(raw) > WORDS else ""}</p>'


def _thumbs(sample: Sample) -> str:
    pictures = [part for part in sample.media if isinstance(part, Image)]
    shown = []
    for part in pictures[:THUMBS]:
        try:
            picture = ImageOps.contain(open_picture(part.path), (THUMB, THUMB))
        except Unreadable as error:
            shown.append(f'<span class="bad">{safe(part.field)}: {safe(error)}</span>')
            continue
        shown.append(f'<img alt="{safe(part.field)}" title="{safe(part.path)}" src="{picture_uri(picture, "JPEG")}">')
    more = f'<span class="soft">and {len(pictures) - THUMBS} more</span>' if len(pictures) > THUMBS else ""
    return f'<div class="thumbs">{"".join(shown)}{more}</div>' if shown else ""


def _words(sample: Sample) -> str:
    lines = []
    for turn in sample.turns:
        text = "".join(
            part.text if isinstance(part, Text) else f"<{type(part).__name__.lower()}>" for part in turn.parts
        )
        lines.append(f"{turn.role}: {text}")
    whole = "\n".join(lines)
    return f'<p class="words">{safe(whole[:WORDS])}{"…" if len(whole) > WORDS else ""}</p>'
