"""Render web pages that need no network, from `templates/`. They share one style, light and dark, that fits phones.

The environment, not the templates, escapes every text and makes its control characters visible. A page can load
nothing, and run only the script of vlft that it names. The module does not depend on the contents of the pages.
"""

from __future__ import annotations

import base64
import errno
import functools
import hashlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.errors import ConfigError
from vlft.files import appearing
from vlft.text import counted, duration, printable

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL.Image import Image

TEMPLATES = Path(__file__).parent / "templates"


@functools.cache
def environment() -> Environment:
    """Return the jinja2 environment that renders the templates."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"thousands": _thousands, "percent": _percent, "counted": counted, "duration": duration}
    return made


def render(template: str, *, script: str | None = None, **context: object) -> str:
    """Return a page.

    Args:
        template: name of a file in `templates/`.
        script: name of a JavaScript file in `templates/`, for the end of the page. A browser compares its digest.
        context: variables of the template, always with `title`. Texts must not be escaped.

    Raises:
        jinja2.TemplateError: the template is wrong, or uses a variable that the context does not have.
    """
    from markupsafe import Markup

    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script is not None:
        source = environment().get_template(script).render()
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode("ascii")
        policy += f"; script-src 'sha256-{digest}'"
    return environment().get_template(template).render(policy=Markup(policy), script=script, **context)


def _visible(value: object) -> str:
    return printable(value if isinstance(value, str) else str(value))  # a `str` may be markup of a macro, so keep it


def _thousands(number: float) -> str:
    return f"{number:,.0f}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}"


def write_page(path: str | Path, html: str) -> None:
    """Write a page atomically.

    Raises:
        OSError: the page cannot be written, e.g. because its folder does not exist.
        ConfigError: the file already exists and is not an HTML page. A mistyped name must not overwrite a data file.
    """
    refuse_path(path)
    with appearing(path) as out:
        out.write(html.encode("utf-8", "replace"))


def refuse_path(path: str | Path) -> None:
    """Raise the errors of `write_page` that can be seen before there is a page.

    Raises:
        OSError: `path` is a folder, or its folder does not exist.
        ConfigError: the file already exists and is not an HTML page.
    """
    if Path(path).is_file() and not _is_page(Path(path)):
        raise ConfigError(f"{path}: already exists and is not an HTML page. Use another file, or remove it.")
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    os.stat(Path(path).parent)  # `appearing` would create the folder; a mistyped name must not


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    return not head or head.startswith((b"<!doctype html", b"<html"))


def picture_uri(picture: Image, kind: str = "PNG") -> str:
    """Return a picture as a data URI, for the `src` of an `img`."""
    file = io.BytesIO()
    picture.save(file, format=kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode("ascii")
