"""Every page, independent of its template: texts cannot run as code, and nothing is loaded."""

from __future__ import annotations

import ast
import base64
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError

import vlft
from vlft.checkpoint.serving import Serving
from vlft.demo.page import as_html
from vlft.pages.charts import Series, chart
from vlft.pages.web import TEMPLATES, environment, render

HOSTILE = "</td><script>alert('1')</script>\x1b[2J\x9b&\ud800"
SHOWN = "&lt;/td&gt;&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;␛[2J\ufffd&amp;\ufffd"


@pytest.mark.parametrize(
    "template",
    [
        "{{ x }}",
        "{{ x | string }}",
        "{{ [x] | join(', ') }}",
        "{{ error }}",
        "{% macro m(y) %}{{ y }}{% endmacro %}{{ m(x) }}",
        "{% set y %}{{ x }}{% endset %}{{ y }}",
        "{{ x[:200] if x }}",
        "{{ thing.x }}",
    ],
)
def test_no_template_can_forget_to_escape(template):
    shown = environment().from_string(template).render(x=HOSTILE, error=ValueError(HOSTILE), thing={"x": HOSTILE})
    assert shown == SHOWN


def test_no_template_switches_escaping_off():
    for file in TEMPLATES.iterdir():
        assert not re.search(r"\|\s*safe\b|autoescape|Markup|https?:|url\(|@import", file.read_text()), file.name


def test_a_name_that_the_context_lacks_is_an_error():
    with pytest.raises(UndefinedError):
        render("demo.html.j2", title="x")


def test_no_html_is_written_in_python():
    tag = re.compile(r"</?(div|p|span|table|tbody|tr|td|th|section|figure|h1|h2|ul|li|pre|dl|dt|dd|svg|path|b)\b[ >/]")
    for file in Path(vlft.__path__[0]).rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)) if tag.search(source) else ():
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
                assert not tag.search(text), f"{file}:{node.lineno}"


def test_a_script_runs_by_its_digest_alone():
    page = render("report.html.j2", script="charts.js", **REPORT)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f'Content-Security-Policy" content="{policy}"' in page
    assert "document.querySelectorAll" in script


def test_pages_have_one_style():
    pages = [render("report.html.j2", script="charts.js", **REPORT), as_html(scores=[], examples=[], commands=["a"])]
    (style,) = {re.search(r"<style>(.*?)</style>", page, re.S)[1] for page in pages}  # type: ignore[index]
    assert style.strip() == (TEMPLATES / "style.css").read_text().strip()
    assert all("script-src" not in page for page in pages[1:])


def test_names_of_charts_and_rows_are_text():
    drawn = chart(HOSTILE, [Series(name=HOSTILE, x=np.arange(3.0), y=np.ones(3))])
    skipped = {"title": HOSTILE, "field": HOSTILE, "reason": HOSTILE}
    page = render("report.html.j2", script="charts.js", **{**REPORT, "charts": [drawn], "skipped": [skipped]})
    assert page.count("<script>") == 1
    assert page.count(SHOWN) == 3 + 3  # the title and its label, the key; the row
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", page)


REPORT: dict = {
    "title": "run",
    "name": "run",
    "trains": "",
    "now": "now",
    "written": 0,
    "state": {"step": None, "word": "running"},
    "left": "",
    "live": False,
    "broken": 0,
    "missing": (),
    "facts": [],
    "charts": [],
    "thinned_from": 0,
    "thinned_to": 500,
    "spent": [],
    "asked": [],
    "notes": [],
    "sampled": [],
    "kept": 0,
    "shown_text": 10,
    "files": [],
    "skipped": [],
    "more_skipped": 0,
    "left_out": [],
    "versions": [],
    "base": {"model": "base", "revision": None, "fingerprint": "f"},
    "settings": [],
    "config": "",
    "serving": Serving(commands={"vllm": "vllm serve <b>"}, notes=("a <b>note",)),
}
