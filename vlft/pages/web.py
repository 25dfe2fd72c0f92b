"""Web pages that need no network: one look, light and dark, fit for a phone. Knows nothing of what they say."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from html import escape
from pathlib import Path

from PIL import Image

from vlft.errors import ConfigError
from vlft.files import appearing
from vlft.text import printable

#: What all pages share; a page's own rules come after it.
STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#66707a;--paper:#fbfbf9;--card:#fff;--line:#dfe2e0;
--good:#0b6b33;--bad:#a4332a;--warn:#8a5a00;--learn:#d6f2dd;--learn-ink:#0b5a2b}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7e9;--soft:#98a2ab;--paper:#14171a;--card:#1c2024;--line:#343a40;
--good:#7fdca0;--bad:#f29a90;--warn:#f0bd5a;--learn:#123d25;--learn-ink:#a5ecbf}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem;margin:.6rem 0}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}
p,ul{margin:.3rem 0}ul{padding-left:1.2rem}
.soft{color:var(--soft);font-size:.9rem}.warn{color:var(--warn)}.good{color:var(--good)}.bad{color:var(--bad)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .6rem;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child{text-align:left}
section{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:1rem;margin:1rem 0}
pre{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem;overflow-x:auto;
font:14px/1.6 ui-monospace,Menlo,Consolas,monospace}
"""


def document(*, title: str, style: str, body: str, script: str = "") -> str:
    """A page that can load nothing, and run nothing but `script`: a browser compares its print.

    Args:
        title: as text. style: rules after `STYLE`. body: HTML, its texts through `safe`.
        script: JavaScript of ours at the end of the body.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
        policy += f"; script-src 'sha256-{digest}'"
        script = f"<script>{script}</script>\n"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{safe(title)}</title><style>{STYLE}{style}</style></head><body>
{body}
{script}</body></html>
"""


def write_page(path: str | Path, html: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        OSError: it cannot be written there, e.g. since there is no such folder.
        ConfigError: a file is there that is no page. A mistyped name must not cost a data file.
    """
    if Path(path).is_file() and not _is_page(Path(path)):
        raise ConfigError(f"{path}: is there already and is no HTML page. Name another file, or remove it.")
    os.stat(Path(path).parent)  # `appearing` would make it, and a mistyped name shall not
    with appearing(path) as out:
        out.write(html.encode("utf-8", "replace"))


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    return not head or head.startswith((b"<!doctype html", b"<html"))


def safe(text: object) -> str:
    """Text for a page: control characters visible, markup escaped."""
    return escape(printable(str(text)))


def picture_uri(picture: Image.Image, kind: str = "PNG") -> str:
    """A picture as the `src` of an `img`."""
    file = io.BytesIO()
    picture.save(file, format=kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode("ascii")
