"""The page of an evaluation: figures and verdicts by hand, limits of its size, hostile texts, and a real browser."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import shutil
import time
from collections.abc import Iterator

import numpy as np
import pytest
from browser import Browser
from PIL import Image

from vlft.data.media.pictures import open_picture, open_thumbnail
from vlft.errors import ConfigError
from vlft.evaluation.page import as_html, context, refuse_path, write_page
from vlft.evaluation.page_figures import axis, confusion_of, number, signed
from vlft.evaluation.page_rows import chosen
from vlft.evaluation.result import AnsweredRow, Confusion, Evaluation, Figure
from vlft.evaluation.words import common, marked

HOSTILE = "</section><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">'\"&\x1b[2J"
browser_needed = pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")


def figure(value: float, low: float, high: float, rows: int = 4) -> Figure:
    return Figure(value=value, low=low, high=high, rows=rows)


def row(index: int, reference: str, *answers: str, **more) -> AnsweredRow:
    scores = {"exact_match": tuple(float(answer == reference) for answer in answers)}
    return AnsweredRow(
        file="held_out.json",
        index=index,
        id=None,
        **({"question": "<image>What is it?", "references": (reference,), "answers": answers, "scores": scores} | more),
    )


def evaluation(rows, models=("base", "tuned"), **more) -> Evaluation:
    given = {
        "data": ("data/held_out.json",),
        "figures": {"exact_match": tuple(figure(0.5, 0.25, 0.75) for _ in models)},
        "outs": tuple(f"eval/{name}.jsonl" for name in models),
    }
    return Evaluation(models=models, rows=tuple(rows), **(given | more))


ROWS = (
    row(0, "a red cat", "a cat", "a red cat"),  # better
    row(1, "two dogs", "two dogs", "three dogs", cut=(False, True)),  # worse
    row(2, "a bird", "a bird", "a bird"),  # equal
    row(3, "x" * 300, "", " ", question="What is written?", turns=(("user", "Hello"), ("assistant", "Hi"))),  # empty
)


# ---- words


def test_common_words_are_a_longest_common_subsequence():
    def length(a, b) -> int:  # by trying all subsequences
        some = (kept for n in range(len(a), -1, -1) for kept in itertools.combinations(a, n))
        return next(len(kept) for kept in some if all(word in it for it in [iter(b)] for word in kept))

    texts = [tuple("abcab"), tuple("bacba"), tuple("ccc"), (), tuple("abccba"), tuple("cabbac")]
    for a, b in itertools.product(texts, repeat=2):
        pairs = common(a, b)
        assert all(a[i] == b[j] for i, j in pairs)
        assert all(i < k and j < m for (i, j), (k, m) in itertools.pairwise(pairs))
        assert len(pairs) == length(a, b)


def _split(text: str, *others: str | None) -> list[str]:
    """Pieces in which `-` stands for omitted words, and `*` for words that the first other text lacks."""
    pieces = marked(text, others)
    assert "".join(piece.text for piece in pieces if not piece.omitted) == text
    return [f"{'-' if one.omitted else '*' if one.missing[0] else ''}{one.text}" for one in pieces]


def test_words_that_differ_are_marked():
    assert _split("A red cat, on the mat", "a cat on a mat") == [
        *("A ", "*red", " cat", "*,", " on ", "*the", " mat"),  # "the" replaces "a"
    ]
    assert _split("A cat sits.", "So a big black cat sits on it.") == [
        "-So",
        "A ",
        "-big black",
        "cat sits",
        "-on it",
        ".",
    ]
    assert _split("猫在桌子上", "猫在椅子上") == ["猫在", "*桌", "子上"]
    assert _split("one two", None) == _split("one two", "One  TWO") == ["one two"]
    assert _split("", "a b") == ["-a b"]
    assert _split("a b", "") == ["*a b"]
    assert _split("", "") == []


def test_each_other_text_has_its_marks():
    pieces = marked("a b c", ["a b", "b c"])
    assert [(one.text, one.missing) for one in pieces] == [
        *(("a", (False, True)), (" b ", (False, False)), ("c", (True, False))),
    ]


def test_long_texts_are_compared_quickly():
    words = np.random.default_rng(0).choice(list("abcdef"), size=(2, 50_000))
    a, b = (" ".join(some) for some in words)
    start = time.process_time()
    assert "".join(piece.text for piece in marked(a, [b]) if not piece.omitted) == a
    assert time.process_time() - start < 2


# ---- figures


@pytest.mark.parametrize(
    ("higher", "difference", "verdict"),
    [
        (True, (0.2, 0.1, 0.3), "better"),
        (True, (-0.2, -0.3, -0.1), "worse"),
        (False, (-0.2, -0.3, -0.1), "better"),
        (False, (0.2, 0.1, 0.3), "worse"),
        (True, (0.1, 0.0, 0.3), "unclear"),  # 0 belongs to the interval
        (True, (0.1, -0.1, 0.3), "unclear"),
        (True, (0.0, 0.0, 0.0), "equal"),
        (True, (math.nan, math.nan, math.nan), "unknown"),
    ],
)
def test_a_difference_is_clear_where_its_interval_lacks_0(higher, difference, verdict):
    found = evaluation(ROWS, higher={"exact_match": higher}, differences={"exact_match": (None, figure(*difference))})
    (metric,) = context(found)["metrics"]
    assert metric["models"][0]["difference"] is None
    assert metric["models"][1]["difference"]["verdict"] == verdict
    words = {
        "unclear": "no clear difference</b> to base",
        "equal": "no difference</b> to base",
        "unknown": "is not known",
    }
    assert words.get(verdict, f"{verdict}</b> than base") in as_html(found)


def test_rows_that_changed_are_counted():
    found = evaluation(ROWS, differences={"exact_match": (None, figure(0.0, -0.5, 0.5))})
    assert "Rows: 1 better, 1 worse, 2 equal." in as_html(found)
    lower = dataclasses.replace(found, higher={"exact_match": False}, rows=(*ROWS, ROWS[0]))
    assert "Rows: 1 better, 2 worse, 2 equal." in as_html(lower)


def test_intervals_are_drawn_to_scale():
    found = evaluation(ROWS, figures={"exact_match": (figure(0.4, 0.3, 0.6), figure(0.8, 0.7, 1.0))})
    (metric,) = context(found)["metrics"]
    ticks = [float(tick["label"]) for tick in metric["ticks"]]
    places = [tick["at"] for tick in metric["ticks"]]
    for one, values in zip(metric["models"], ((0.3, 0.4, 0.6), (0.7, 0.8, 1.0)), strict=True):
        assert one["drawn"] == pytest.approx(np.interp(values, ticks, places))


@pytest.mark.parametrize("values", [(0, 0, 0), (1, 1, 1), (0.5, 0.5), (0.81, 0.812), (-3, 250), (7e-9, 8e-9), (1e12,)])
def test_an_axis_holds_its_values(values):
    start, end, ticks = axis(values)
    assert start <= min(values) <= max(values) <= end
    assert 2 <= len(ticks) <= 8
    assert (ticks[0], ticks[-1]) == pytest.approx((start, end))
    if min(values) >= 0 and max(values) <= 1 and max(values) > 1e-3:
        assert 0 <= start < end <= 1 + 1e-9


def test_a_metric_that_applies_to_no_row_has_no_figure():
    nothing = figure(math.nan, math.nan, math.nan, rows=0)
    html = as_html(evaluation(ROWS, figures={"iou": (nothing, nothing)}))
    assert "<b>-</b>" in html
    assert "0 of 4 rows" in html
    assert "nan" not in html.lower()
    some = as_html(evaluation(ROWS, figures={"iou": (nothing, figure(0.5, 0.4, 0.6, rows=3))}))
    assert some.index("0 of 4 rows") < some.index("3 of 4 rows")


def test_numbers_for_people():
    assert [number(x) for x in (0.8125, 0, 12.345, 1234.5, math.nan, 0.00012)] == [
        *("0.812", "0.000", "12.35", "1,234", "-", "0.00012"),
    ]
    assert [signed(x) for x in (0.12, -0.034, 0, math.inf)] == ["+0.120", "−0.034", "0", "-"]


def test_confusions_are_a_table_or_of_many_labels_a_list():
    small = confusion_of("base", 0, Confusion(labels=("cat", "dog"), counts=((3, 1), (0, 0))))
    assert (small["right"], small["total"]) == (3, 4)
    assert [(line["name"], line["right"]) for line in small["lines"]] == [("cat", 0.75), ("dog", None)]
    labels = tuple(f"label {i}" for i in range(30))
    counts = tuple(tuple(5 if i == j else int((i, j) == (2, 7)) * 4 for j in range(30)) for i in range(30))
    large = Confusion(labels=labels, counts=counts)
    assert confusion_of("base", 0, large)["listed"] == [{"right": "label 2", "chosen": "label 7", "count": 4, "of": 9}]
    html = as_html(evaluation(ROWS, confusions=(large, large)))
    assert "<td>label 2</td><td>label 7</td><td>4</td><td>9</td>" in html


# ---- rows


def many(count: int, models: int, **more) -> Evaluation:
    chance = np.random.default_rng(0)
    scores = np.round(chance.random((count, models)), 3)
    rows = [
        row(i, "a b c", *(f"a b {i} {m}" for m in range(models)), scores={"rouge_l": tuple(scores[i].tolist())}, **more)
        for i in range(count)
    ]
    figures = tuple(figure(float(one), 0.4, 0.6, count) for one in scores.mean(0))
    return evaluation(rows, tuple(f"model {m}" for m in range(models)), figures={"rouge_l": figures})


def test_the_worst_and_the_most_changed_of_many_rows_are_shown():
    found = many(2000, 3)
    scores = np.array([one.scores["rouge_l"] for one in found.rows])
    places = chosen(found)
    assert len(places) == len(set(places)) == 300
    wanted = [scores[:, m].argsort(kind="stable")[:10] for m in range(3)]
    wanted += [
        order for m in (1, 2) for order in np.split((scores[:, m] - scores[:, 0]).argsort()[np.r_[:10, -10:0]], 2)
    ]
    assert set(np.concatenate(wanted).tolist()) <= set(places)
    html = as_html(found)
    assert "300 of 2,000 rows are on this page" in html
    assert html.count('<section class="row"') == 300


def test_empty_and_cut_answers_are_shown_first_of_many_rows():
    found = many(2000, 1)
    rows = list(found.rows)
    rows[1234] = dataclasses.replace(rows[1234], answers=("",), scores={"rouge_l": (1.0,)})
    rows[1235] = dataclasses.replace(rows[1235], cut=(True,), scores={"rouge_l": (1.0,)})
    assert {1234, 1235} <= set(chosen(dataclasses.replace(found, rows=tuple(rows))))


def test_rows_fill_the_page_where_all_scores_are_equal():
    found = many(2000, 2)
    rows = [dataclasses.replace(one, answers=("a", "a"), scores={"rouge_l": (1.0, 1.0)}) for one in found.rows]
    places = chosen(dataclasses.replace(found, rows=tuple(rows)))
    assert len(places) == 300
    assert max(np.diff(sorted(places))) <= 7  # spread over all rows


def test_a_large_evaluation_is_written_quickly_and_stays_small(tmp_path):
    chance = np.random.default_rng(0)
    files = []
    for i in range(8):
        files.append(tmp_path / f"{i}.jpg")
        Image.fromarray(chance.integers(0, 255, (600, 800, 3), dtype=np.uint8)).save(files[-1], quality=60)
    media = tuple(("image", str(file)) for file in files)
    start = time.process_time()
    write_page(tmp_path / "page.html", many(2000, 3, media=media))
    assert time.process_time() - start < 10
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(html) < 10_000_000
    assert "pictures are only named" in html  # noise: a thumbnail of it is large
    assert "2 more media" in html


def test_long_texts_do_not_make_a_large_page():
    text = "<b>&" * 25_000
    found = many(200, 3, question=text, references=(text,) * 9, turns=(("user", text),) * 9)
    rows = tuple(dataclasses.replace(one, answers=(text, text[::-1], "word " * 20_000)) for one in found.rows)
    start = time.process_time()
    html = as_html(dataclasses.replace(found, rows=rows))
    assert time.process_time() - start < 10
    assert len(html.encode()) < 10_000_000
    shown = html.count('<section class="row"')
    assert 10 < shown < 200
    scores = [one.scores["rouge_l"] for one in rows]
    for worst in (min(range(200), key=lambda i: scores[i][m]) for m in range(3)):
        assert f"held_out.json[{worst}]" in html
    assert f"{shown} of 200 rows are on this page" in html
    assert "98,000 more characters" in html


def test_media_that_cannot_be_shown_are_named(tmp_path):
    Image.new("RGB", (900, 300), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    kinds = {"red.png": "image", "broken.jpg": "image", "gone.png": "frame", "clip.mp4": "video"}
    media = tuple((kind, str(tmp_path / name)) for name, kind in kinds.items())
    html = as_html(evaluation([row(0, "a", "a", "b", media=media)]))
    assert html.count("data:image/jpeg;base64,") == 1
    text = re.sub(r"<[^>]+>", "", html)
    assert "image broken.jpg cannot be opened" in text
    assert "frame gone.png cannot be opened" in text
    assert "video clip.mp4" in text
    assert "3 more" not in text


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_thumbnail_is_a_small_upright_picture(tmp_path, orientation):
    ramp = np.linspace(0, 255, 1600).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[None], ramp[:1200, None], np.uint8(90)), axis=-1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    thumbnail, whole = open_thumbnail(str(tmp_path / "a.jpg"), 160), open_picture(str(tmp_path / "a.jpg"))
    assert thumbnail.size == ((160, 120) if orientation == 1 else (120, 160))
    small = np.asarray(whole.resize(thumbnail.size, Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(np.asarray(thumbnail, dtype=float) - small).mean() < 3


def test_thoughts_are_folded_and_not_compared():
    html = as_html(evaluation([row(0, "a cat", "<think>\nhm, a dog?\n</think>\n\na cat", "<think></think>")]))
    assert re.search(r"<details><summary class=\"soft\">thoughts</summary>.*?hm, a dog\?", html)
    assert html.count("(empty)") == 1
    assert 'class="word r"' not in html


def test_every_text_is_escaped():
    hostile = row(
        *(0, HOSTILE, HOSTILE, HOSTILE + "x"),
        question=HOSTILE,
        turns=((HOSTILE, HOSTILE),),
        media=(("image", f"/{HOSTILE}"), (HOSTILE, f"/{HOSTILE}")),
        scores={HOSTILE: (0.0, None)},
        label_scores=({HOSTILE: -1.0}, {HOSTILE: -1.0}),
    )
    found = evaluation(
        [dataclasses.replace(hostile, file=HOSTILE, id=HOSTILE)],
        models=(HOSTILE, HOSTILE + "2"),
        data=(HOSTILE,),
        figures={HOSTILE: (figure(0, 0, 0), figure(0, 0, 0))},
        differences={HOSTILE: (None, figure(0.1, 0.05, 0.2))},
        texts={HOSTILE: HOSTILE},
        confusions=(Confusion(labels=(HOSTILE,), counts=((1,),)),) * 2,
        outs=(HOSTILE, HOSTILE),
        notes=(HOSTILE,),
    )
    html = as_html(found)
    assert html.count("<script") == 1
    assert "<img" not in html
    assert "\x1b" not in html
    assert re.search(r"script-src 'sha256-[^']{44}'\"", html)


def test_a_page_does_not_overwrite_other_files(tmp_path):
    (tmp_path / "answers.jsonl").write_text("{}\n")
    for path, reason in (("answers.jsonl", "not an HTML page"), ("gone/page.html", "No such file"), (".", "directory")):
        for refused in (lambda p: refuse_path(p), lambda p: write_page(p, evaluation(ROWS))):
            with pytest.raises(ConfigError, match=reason):
                refused(tmp_path / path)
    assert (tmp_path / "answers.jsonl").read_text() == "{}\n"
    for _ in range(2):
        refuse_path(tmp_path / "page.html")
        write_page(tmp_path / "page.html", evaluation(ROWS))


# ---- in a browser

INDICES = "[...document.querySelectorAll('.row:not([hidden])')].map(one => +one.textContent.match(/\\[(\\d+)\\]/)[1])"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.process.kill()
    made.process.wait()


def click(browser: Browser, kind: str) -> list[int]:
    browser.value(f"document.querySelector('[data-kind={kind}]').click()")
    return browser.value(INDICES)


def choose(browser: Browser, name: str, value: str) -> list[int]:
    return _enter(browser, f"#{name}", value)


def _enter(browser: Browser, where: str, value: str) -> list[int]:
    script = f"it = document.querySelector('{where}'); it.value = '{value}'; it.dispatchEvent(new Event('input'))"
    browser.value(f"{{ const {script}; }}")
    return browser.value(INDICES)


@browser_needed
def test_filters_and_orders(browser, tmp_path):
    rows = [
        dataclasses.replace(one, scores=one.scores | {"cer": cer})
        for one, cer in zip(ROWS, ((0.5, 0.0), (0.0, 0.25), (0.0, 0.75), (None, 1.0)), strict=True)
    ]
    figures = {"exact_match": (figure(0.5, 0, 1),) * 2, "cer": (figure(0.5, 0, 1),) * 2}
    write_page(tmp_path / "page.html", evaluation(rows, figures=figures, higher={"cer": False}))
    browser.open(tmp_path / "page.html", width=1200)
    assert browser.value(INDICES) == [1, 0, 3, 2]  # largest change first, of equal ones the worst answer first
    assert [click(browser, kind) for kind in ("changed", "better", "worse", "cut", "empty")] == [
        *([1, 0, 3], [0], [1], [1], [3]),
    ]
    assert sorted(click(browser, "all")) == [0, 1, 2, 3]
    assert choose(browser, "order", "place") == [0, 1, 2, 3]
    assert choose(browser, "order", "worst") == [1, 3, 0, 2]
    assert choose(browser, "metric", "cer") == [3, 2, 1, 0]  # a smaller figure is better
    assert choose(browser, "order", "change") == [2, 0, 1, 3]
    assert click(browser, "worse") == [2, 1]
    click(browser, "all")
    assert _enter(browser, ".filters input", "WRITTEN is") == [3]
    assert browser.value("document.querySelector('#count').textContent") == "1 row"
    assert browser.value("document.querySelector('[data-kind=worse] span').textContent") == "0"


@browser_needed
def test_of_three_models_any_is_compared_with_the_first(browser, tmp_path):
    rows = [row(0, "a", "a", "b", "a"), row(1, "a", "b", "b", "a"), row(2, "a", "a", "a", "b")]
    write_page(tmp_path / "page.html", evaluation(rows, models=("base", "one", "two")))
    browser.open(tmp_path / "page.html", width=1200)
    assert click(browser, "worse") == [0]
    assert choose(browser, "model", "2") == [2]
    assert click(browser, "better") == [1]


@browser_needed
@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_is_wider_than_the_window(browser, tmp_path, width):
    long = "averylongwordwithoutanyblank" * 12
    rows = [row(i, long, long + "x", f"x {long}", question=long, scores={long: (0.0, 1.0)}) for i in range(3)]
    labels = tuple(f"label number {i}" for i in range(20))
    found = evaluation(
        rows,
        models=(f"runs/{long}", f"runs/{long}/checkpoint-2"),
        figures={long: (figure(0.1, 0.05, 0.2), figure(123456.789, 123.4, 999999.9))},
        differences={long: (None, figure(0.1, 0.05, 0.2))},
        confusions=(Confusion(labels=labels, counts=((7,) * 20,) * 20),) * 2,
    )
    write_page(tmp_path / "page.html", found)
    browser.open(tmp_path / "page.html", width=width)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelector('.filters').hidden") is False


@browser_needed
def test_markup_in_a_row_does_not_run(browser, tmp_path):
    write_page(tmp_path / "page.html", evaluation([row(0, HOSTILE, HOSTILE, HOSTILE, question=HOSTILE)]))
    browser.open(tmp_path / "page.html", width=1200)
    assert browser.value("document.title") == "vlft: base on held_out.json"
    assert browser.value("document.querySelectorAll('script').length") == 1
    assert HOSTILE.split("\x1b")[0] in browser.value("document.querySelector('.row').textContent")
