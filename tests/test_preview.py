"""`vlft preview`: it shows the ids of the stock processor, marks trained tokens only, and reassembles the pixels."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from conftest import MIXED_ROWS, row
from PIL import Image
from stock import NAMES, stock

from vlft.cli.main import main

INDEX = {raw["id"]: i for i, raw in enumerate(MIXED_ROWS)}


def preview(*argv) -> int:
    return main(["preview", *map(str, argv)])


@pytest.fixture(scope="module")
def flags(base, media, mixed_json):
    return [mixed_json, "--image_folder", media, "--model_id", base]


@pytest.mark.parametrize("name", NAMES)
def test_json_is_what_the_model_gets(capsys, flags, samples, encoded, encoder, name):
    assert preview(*flags, "--index", INDEX[name], "--json") == 0
    shown, theirs, ours = json.loads(capsys.readouterr().out), stock(samples[name], encoder), encoded[name]
    assert shown["id"] == name
    assert shown["input_ids"] == theirs["input_ids"][0].tolist()
    for key in ("image_grid_thw", "video_grid_thw"):
        assert shown[key] == (theirs[key].tolist() if key in theirs else [])
    assert shown["position_ids"] == ours.positions_3T.tolist()
    assert shown["text"] == ours.text
    trained = [i for i, label in enumerate(shown["labels"]) if label != -100]
    assert all(shown["labels"][i] == shown["input_ids"][i] for i in trained)
    answers = [turn["value"] for turn in MIXED_ROWS[INDEX[name]]["conversations"] if turn["from"] == "gpt"]
    decoded = encoder.processor.tokenizer.decode([shown["labels"][i] for i in trained])
    assert decoded == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_what_a_person_reads(capsys, flags, encoded):
    assert preview(*flags, "--index", INDEX["both"]) == 0
    out = capsys.readouterr().out
    still, clip = (medium.grid for medium in encoded["both"].media)
    assert f"{flags[0]}[{INDEX['both']}] (id both)" in out
    assert f"{len(encoded['both'].input_ids_T)} tokens: 12 trained, " in out
    assert f"picture 1: 224x168 -> {still.w * 14}x{still.h * 14}, {still.w}x{still.h} patches, " in out
    assert f"video 1: 24 frames of 160x112 at 8 fps -> {clip.t * 2} frames of {clip.w * 14}x{clip.h * 14}, " in out
    assert f"<|vision_start|><|image_pad|> x{still.tokens(2)}<|vision_end|>and <|vision_start|>" in out
    assert f"<|video_pad|> x{clip.tokens(2)}<|vision_end|>: which is hot?" in out
    assert "assistant\n⟦The coffee.<|im_end|>⟧" in out
    assert re.findall("⟦(.*?)⟧", out.partition("between")[2].partition("\n")[2]) == ["The coffee.<|im_end|>"]
    assert "\x1b" not in out


def test_a_terminal_gets_colour_unless_asked_not_to(capsys, monkeypatch, flags):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert preview(*flags, "--index", INDEX["two-turns"]) == 0
    out = capsys.readouterr().out
    assert re.findall("\x1b\\[1;32m(.*?)\x1b\\[0m", out)[1:] == [
        "A flower and an astronaut.<|im_end|>",
        "Yes.<|im_end|>",
    ]
    monkeypatch.setenv("NO_COLOR", "1")
    assert preview(*flags, "--index", INDEX["two-turns"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def odd_rows(tmp_path_factory, media):
    """A refused row, and a row with a warning whose text tries to break out of a page or a terminal."""
    nasty = row("</div><script>alert('&')</script>\x1b[2J", "<image>é \U0001f600 e\u0301?", id="<b>", image="china.jpg")
    nasty["conversations"].append({"from": "human", "value": "And?"})
    path = tmp_path_factory.mktemp("odd") / "odd.jsonl"
    path.write_text("\n".join(map(json.dumps, [row("", "Q?", id="empty"), nasty])), encoding="utf-8")
    return path


def test_page_is_complete_and_needs_no_network(capsys, tmp_path, flags, encoded):
    page = tmp_path / "row.html"
    assert preview(*flags, "--index", INDEX["both"], "--html", page, "--json") == 0
    assert json.loads(capsys.readouterr().out)["id"] == "both"
    html = page.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["row.html"]
    assert "http:" not in html
    assert "https:" not in html
    pixels = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))))
        for uri in re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    ]
    frames = [frame for medium in encoded["both"].media for frame in medium.pixels.numpy()]
    assert len(pixels) == len(frames) == 1 + 6
    assert all(np.array_equal(one, two) for one, two in zip(pixels, frames, strict=True))
    assert re.search(r"<mark>The coffee\.<span[^>]*>&lt;\|im_end\|&gt;</span></mark>", html)
    assert html.count("<mark>") == 2  # the legend and the answer
    assert "prefers-color-scheme:dark" in html
    assert 'name="viewport"' in html


def test_pixels_are_the_picture_resized(media, encoded):
    frame = encoded["still"].media[0].pixels[0].numpy().astype(float)
    theirs = Image.open(media / "china.jpg").resize(frame.shape[1::-1], Image.Resampling.BICUBIC)
    assert np.abs(frame - np.asarray(theirs, dtype=float)).mean() < 1


def test_what_a_row_says_stays_text(capsys, tmp_path, base, media, odd_rows):
    page = tmp_path / "row.html"
    flags = [odd_rows, "--image_folder", media, "--model_id", base, "--index", 1, "--html", page]
    assert preview(*flags) == 0
    out = capsys.readouterr().out
    html = page.read_text(encoding="utf-8")
    assert "\x1b" not in out + html
    assert "␛[2J" in out
    assert "\U0001f600 é?" in out  # the tokenizer's normal form, as the model reads it
    assert "<script>" not in html
    assert "&lt;/div&gt;&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;" in html
    assert "(id &lt;b&gt;)" in html
    assert "warning: conversations[2]: a human turn comes last" in out
    assert "warning: conversations[2]: a human turn comes last" in html


def test_a_refused_row_is_its_reason(capsys, base, media, odd_rows):
    assert preview(odd_rows, "--image_folder", media, "--model_id", base, "--index", 0, "--json") == 1
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert (shown["index"], shown["field"]) == (0, "conversations[1].value")
    assert shown["refused"] == "the answer is empty. Write one, or drop the turn"
    assert shown["row"] == json.loads(odd_rows.read_text(encoding="utf-8").splitlines()[0])
    where = f"{odd_rows}[0].conversations[1].value (id empty)"
    assert err == f"refused: {where}: the answer is empty. Write one, or drop the turn\n"
    assert preview(odd_rows, "--image_folder", media, "--model_id", base, "--index", 0) == 1
    text = capsys.readouterr().out
    assert text.startswith(f"{odd_rows}[0] (id empty)\nrefused: conversations[1].value: the answer is empty. ")
    assert '"from": "gpt"' in text


def test_a_picture_that_is_missing(capsys, base, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([row("A.", "<image>Q?", image="gone.jpg")]), encoding="utf-8")
    assert preview(tmp_path / "x.json", "--model_id", base) == 1
    assert f"{tmp_path / 'x.json'}[0].image: " in capsys.readouterr().err


@pytest.mark.parametrize("index", [7, 12345, -1])
def test_an_index_out_of_range(capsys, flags, index):
    assert preview(*flags, "--index", index) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert f"--index {index}: {flags[0]} has 7 rows, counted from 0. Use 0 to 6." in err


def test_pixel_flags_act(capsys, flags):
    assert preview(*flags, "--index", 0, "--json", "--image_max_pixels", 16 * 28 * 28) == 0
    (grid,) = json.loads(capsys.readouterr().out)["image_grid_thw"]
    assert grid[1] * grid[2] // 4 <= 16


def test_wrong_commands(capsys, flags, tmp_path, mixed_json):
    assert preview(mixed_json, __file__, "--model_id", "x") == 2
    assert "2 data files" in capsys.readouterr().err
    assert preview(*flags, "--html", tmp_path / "no" / "where.html") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "cannot be written (No such file or directory)" in err


def test_a_row_without_a_base(capsys, flags, encoded, tmp_path):
    """The turns and the pictures are shown, and tokens of pictures by the published pixel limits."""
    file, _, media = flags[:3]
    page = tmp_path / "row.html"
    index = INDEX["both"]
    assert preview(file, "--image_folder", media, "--index", index, "--html", page) == 0
    out = capsys.readouterr().out
    still, clip = (medium.grid for medium in encoded["both"].media)
    assert "tokens are not counted without a base (--model_id)" in out
    assert f"user: <|image_pad|> x{still.tokens(2)}and <|video_pad|> x" in out
    assert "assistant: ⟦The coffee.⟧" in out
    assert page.read_text(encoding="utf-8").count("<img ") == 1 + clip.t * 2
    assert preview(file, "--image_folder", media, "--index", index, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["input_ids"] is None
    assert shown["tokens"] is None
    assert shown["image_grid_thw"] == [[still.t, still.h, still.w]]


# ---- several rows


def test_several_rows_on_one_page(capsys, tmp_path, flags, encoded):
    page = tmp_path / "rows.html"
    assert preview(*flags, "--index", "4,0-2,4", "--html", page, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["id"] for row in rows] == ["both", "still", "two-turns", "clip"]
    assert preview(*flags, "--index", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out) == rows[3 - 0]
    html = page.read_text(encoding="utf-8")
    for row_ in rows:
        assert f"{row_['tokens']:,} tokens: {row_['supervised']:,} trained" in html
    # The clip has 8 frames per second and lasts 3 seconds less one frame. 2 frames per second are taken.
    times = [float(text) for text in re.findall(r"<small>([\d.]+) s</small>", html)]
    frames = encoded["clip"].media[0].grid.t * 2
    assert times == pytest.approx([round(i * 23 / (frames - 1)) / 8 for i in range(frames)] * 2, abs=0.006)
    assert html.count("<img ") == 1 + 1 + 2 + 2 * frames
    assert html.count("<mark>") == 1 + 1 + 1 + 2 + 1
    assert "are shown at" not in html


def test_a_page_of_many_pixels_is_scaled_down_and_says_so(tmp_path, flags, monkeypatch, encoded):
    from vlft.preview import page as pages

    full = sum(f.shape[0] * f.shape[1] for n in ("still", "clip") for m in encoded[n].media for f in m.pixels)
    monkeypatch.setattr(pages, "PAGE_PIXELS", full // 4)
    path = tmp_path / "rows.html"
    assert preview(*flags, "--index", "0,2", "--html", path) == 0
    html = path.read_text(encoding="utf-8")
    assert "Pictures are shown at 50% of the width and height" in html
    uris = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    shapes = [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri)))).shape for uri in uris]
    assert sum(height * width for height, width, _ in shapes) == pytest.approx(full / 4, rel=0.05)


def test_one_refused_row_among_several(capsys, tmp_path, base, media, odd_rows):
    page = tmp_path / "rows.html"
    argv = [odd_rows, "--image_folder", media, "--model_id", base, "--index", "0-1", "--html", page]
    assert preview(*argv, "--json") == 1
    out, err = capsys.readouterr()
    first, second = json.loads(out)["rows"]
    assert first["refused"].startswith("the answer is empty")
    assert second["id"] == "<b>"
    assert f"refused: {odd_rows}[0].conversations[1].value (id empty): the answer is empty" in err
    html = page.read_text(encoding="utf-8")
    assert "refused: conversations[1].value: the answer is empty" in html
    assert "&#34;from&#34;: &#34;gpt&#34;" in html
    assert "(id &lt;b&gt;)" in html


@pytest.mark.parametrize(
    ("index", "status", "message"),
    [
        ("x", 2, "'x' is not a row number"),
        ("3-", 2, "'3-' is not a row number"),
        ("5-3", 2, "5-3 is reversed"),
        ("0-200", 2, "more than 200 rows"),
        ("", 2, "'' is not a row number"),
        ("1,99", 1, "has 7 rows, counted from 0"),
    ],
)
def test_wrong_rows(capsys, flags, index, status, message):
    assert preview(*flags, "--index", index) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
