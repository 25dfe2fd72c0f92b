"""Faults grouped by kind, and the page of a check: each kind leads to its rows, and no value is hidden."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest
from build import row, write_image
from refused_rows import REFUSED

from vlft.check.kinds import by_kind, kind_key
from vlft.cli.main import main
from vlft.errors import BadRow

HINT = "Put it there, or correct the path"
ONE_KIND = {
    "decimals and whole numbers": (
        "a.png: the longer side is 250.5 times the shorter, at most 200",
        "b.png: the longer side is 1,300 times the shorter, at most 200",
        "a.png, b.png: the longer side is 250.5 to 1,300 times the shorter, at most 200",
    ),
    "names with blanks, folders and other endings": (
        f"C:/my photos/a 1.jpg: no such file (a 1.jpg does not exist). {HINT}",
        f"b.tar.gz: no such file (b.tar.gz does not exist). {HINT}",
        f"C:/my photos/a 1.jpg, b.tar.gz: no such file (a 1.jpg, b.tar.gz does not exist). {HINT}",
    ),
    "quotes": ("unknown role 'bot'. Use gpt", "unknown role 'x y'. Use gpt", "unknown role 'bot', 'x y'. Use gpt"),
    "one folder": ("/a b/c.png: is empty", "/a b/d.png: is empty", "/a b/c.png, d.png: is empty"),
    "other folders": ("a/c.png: is empty", "a/b/c.png: is empty", "a/c.png, a/b/c.png: is empty"),
    "sizes": ("4x4 pixels: tiny, to 28x28", "6x9 pixels: tiny, to 28x28", "4x4, 6x9 pixels: tiny, to 28x28"),
    "one and many": ("1 tag, 2 paths. Drop 1", "2 tags, 1 path. Drop 1", "1 to 2 tags, 1 to 2 paths. Drop 1"),
    "lists of names": ("holds a.jpg and b.jpg, not c", "holds a.jpg, not c", "holds a.jpg and b.jpg; a.jpg, not c"),
    "addresses": ("http://x.y/a?b=1 is remote", "s3://y/c.jpg is remote", "http://x.y/a?b=1, s3://y/c.jpg is remote"),
    "dots": ("Qwen2.5-VL reads H.264, not 3", "Qwen2.5-VL reads H.264, not 4", "Qwen2.5-VL reads H.264, not 3 to 4"),
    "null characters": ("a\0text\0 of 1", "a\0text\0 of 2", "a\ufffdtext\ufffd of 1 to 2"),
}  # fmt: skip


def bad(*reasons: str) -> list[BadRow]:
    return [
        BadRow(file="rows.json", index=i, id=None, field="image", reason=reason) for i, reason in enumerate(reasons)
    ]


@pytest.mark.parametrize("case", ONE_KIND)
def test_reasons_that_differ_in_values_only(case):
    *reasons, text = ONE_KIND[case]
    rows = bad(*reasons)
    assert by_kind(rows) == [(text, rows)]
    assert len({kind_key(reason) for reason in reasons}) == 1


def test_many_values_are_counted_and_a_kind_of_one_row_is_its_reason():
    rows = bad("is empty", *(f"{'long/' * 40}{i}.jpg: no such file" for i in range(12)), "is blank")
    (text, most), *others = by_kind(rows)
    assert most == rows[1:13]
    assert re.fullmatch(r"long/long/\S*…\S*/0\.jpg, 1\.jpg, 2\.jpg and 9 more: no such file", text)
    assert others == [("is empty", rows[:1]), ("is blank", rows[13:])]


def test_the_page_links_each_kind_to_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "tiny.png", 9, 20)
    for i in range(3):
        write_image(tmp_path / f"flat{i}.png", 3000 + 150 * i, 12)
    rows = [raw for raw, *_ in REFUSED.values()]
    rows += [row("<image>?", "A line.", image=f"flat{i % 3}.png", id=f"flat-{i}") for i in range(230)]
    rows += [row("<image>?", f"Tiny {i}.", image="tiny.png") for i in range(9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    argv = ["check-data", "rows.json", "--headers_only", "--workers", "1", "--report", "look"]
    assert main(argv) == 1
    capsys.readouterr()
    page = unescape((tmp_path / "look" / "report.html").read_text())
    sections = dict(re.findall(r'<section id="([\w-]+)">(.*?)</section>', page, re.S))
    links = re.findall(r'<td><a href="#([\w-]+)">(.*?)</a></td><td>([\d,]+)</td>', page)
    assert [anchor for anchor, *_ in links] == list(sections)
    assert links[0][1:] == (
        "flat0.png, flat1.png, flat2.png: 3000x12, 3150x12, 3300x12: the longer side is 250.0 to 275.0 times the "
        "shorter, and at most 200 times is supported. Crop it",
        "230",
    )
    found = json.loads((tmp_path / "look" / "report.json").read_text())
    kinds = dict(by_kind([BadRow(**one) for one in found["bad"] + found["warnings"]]))
    assert {name for _, name, _ in links} == set(kinds)
    for anchor, name, count in links:
        assert int(count.replace(",", "")) == len(kinds[name])
        listed = [str(one) for one in kinds[name] if str(one) in sections[anchor]]
        assert len(listed) == min(len(kinds[name]), 206)  # 6 with pictures, 200 listed
    assert "and 24 more rows of this kind: report.json lists all rows" in sections["bad-1"]
