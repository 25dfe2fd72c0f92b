"""`vlft.text`: numbers, durations and tables as text for people."""

from __future__ import annotations

import math
import sys

import pytest

from vlft.text import counted, duration, error_text, label, plural, printable, scaled, short, table


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (counted(1, "row"), "1 row"),
        (counted(0, "row"), "0 rows"),
        (counted(0, "path", zero="no"), "no paths"),
        (counted(12345, "row"), "12,345 rows"),
        (counted(2, "process"), "2 processes"),
        (counted(1, "process"), "1 process"),
        (counted(0.5, "epoch"), "0.5 epochs"),
        (counted(1.0, "epoch"), "1 epoch"),
        (plural(2, "batch"), "batches"),
        (plural(2, "box"), "boxes"),
        (short("a" * 5, 5), "aaaaa"),
        (short("a" * 6, 5), "aaaaa..."),
        (error_text(ValueError("one\n  two.")), "one two"),
        (error_text(ValueError()), "ValueError"),
        (error_text(ValueError("x" * 400), most=3), "xxx..."),
        (scaled(12345), "12,345"),
        (scaled(12_340_000), "12.3 M"),
        (scaled(1.2e9), "1.20 G"),
        (scaled(math.nan), "-"),
        (label(12000), "12k"),
        (label(0.00002), "2e-05"),
        (duration(3.21), "3.2 s"),
        (duration(9.97), "10 s"),
        (duration(95), "95 s"),
        (duration(119.6), "2 min 00 s"),
        (duration(590.2), "9 min 50 s"),
        (duration(599.7), "10 min"),
        (duration(720), "12 min"),
        (duration(3599), "1 h 00 min"),
        (duration(11100), "3 h 05 min"),
        (duration(190_000), "2 days 5 h"),
        (printable("\x1b[2J\x9b\x7f\ud800\ta\n"), "␛[2J\ufffd␡\ufffd\ta\n"),
    ],
)
def test_words(said, wanted):
    assert said == wanted


HEADS = ("what", "parameters", "learning rate")
ROWS = [("language", "12,345,678", "0.0002"), ("[red]\x1b文字", "9", "frozen")]


def test_a_table_in_a_pipe_is_plain_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert table(HEADS, ROWS, soft=[1]).splitlines() == [
        "what        parameters  learning rate",
        "language    12,345,678         0.0002",
        "[red]␛文字           9         frozen",
    ]
    assert table(("", ""), [("a", "b"), ("long", "c")], indent=2, last="left").splitlines() == [
        "  a     b",
        "  long  c",
    ]


def test_a_table_on_a_terminal_fits_it(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    styled = table(HEADS, ROWS, soft=[1])
    assert "\x1b[1m" in styled
    assert "\x1b[2m" in styled
    monkeypatch.setenv("NO_COLOR", "1")
    for columns in (60, 30):
        monkeypatch.setenv("COLUMNS", str(columns))
        plain = table(HEADS[:2], [("/folder/of/many/letters-longer-than/the/terminal", "12,345,678")])
        assert "\x1b" not in plain
        assert max(map(len, plain.splitlines())) <= columns
        assert "12,345,678" in plain  # a number is never broken, a name is
        assert "longer-than/the/terminal" in "".join(line[: columns - 12].strip() for line in plain.splitlines()[1:])


def test_a_table_wider_than_the_terminal_becomes_sentences(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "36")
    rows = [("language", "12,345,678", "0.0002", "0.1"), ("vision_frozen", "9", "frozen", "-")]
    assert table((*HEADS, "weight decay"), rows).splitlines() == [
        "language: parameters 12,345,678,",
        "  learning rate 0.0002, weight decay",
        "  0.1",
        "vision_frozen: parameters 9,",
        "  learning rate frozen",
    ]
