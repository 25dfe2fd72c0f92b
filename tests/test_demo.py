"""The demo: its stories, its stored base, its scoring, its page, and the whole demo in a few steps."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import torch
from PIL import Image

from vlft.cli.main import main
from vlft.demo import build_base as demo_base
from vlft.demo.folder import claimed
from vlft.demo.page import Example, as_html
from vlft.demo.score import answers, right
from vlft.demo.story import WORDS, Story, chance, stories, write_rows
from vlft.demo.tiny import build_tiny, tiny_processor
from vlft.errors import CheckpointError, ConfigError


def shown(rows: list[Story]) -> set:
    return {(row.is_video, row.looks) for row in rows if len(row.looks) > 1}


@pytest.mark.parametrize("subject", ["base", "lesson"])
def test_the_same_stories_again_and_none_on_both_sides(subject):
    train, held_out = (list(stories(subject, split, 2000, seed=1)) for split in ("train", "held_out"))
    assert train == list(stories(subject, "train", 2000, seed=1))
    assert train != list(stories(subject, "train", 2000, seed=2))
    assert len(shown(train)) > 500
    assert not shown(train) & shown(held_out)
    other_seed = list(stories(subject, "train", 5000, seed=9))
    assert not shown(other_seed) & shown(held_out)
    for kind in ([False, 1], [False, 2], [False, 3], *([[True, 2]] if subject == "lesson" else [])):
        share = sum([row.is_video, len(row.looks)] == kind for row in held_out) / len(held_out)
        assert share > 0.15, kind


def test_pictures_are_the_same_again_and_new_where_held_out(tmp_path):
    rows = list(stories("lesson", "held_out", 12, seed=3))
    for folder, name in (("a", "x"), ("b", "x"), ("c", "y")):
        write_rows(rows, tmp_path / folder, name=name, seed=5)

    def pixels(folder: str) -> list[bytes]:
        return [Image.open(file).tobytes() for file in sorted((tmp_path / folder).rglob("*.png"))]

    assert pixels("a") == pixels("b")
    assert (tmp_path / "a/x.json").read_bytes() == (tmp_path / "b/x.json").read_bytes()
    assert not set(pixels("a")) & set(pixels("c"))


def test_blank_rows_differ_in_pixels_only(tmp_path):
    rows = list(stories("lesson", "train", 20, seed=3))
    seen, blank = (
        json.loads(write_rows(rows, tmp_path, name=name, seed=5, blank=is_blank).read_text())
        for name, is_blank in (("x", False), ("x_blank", True))
    )
    assert [row["conversations"] for row in seen] == [row["conversations"] for row in blank]
    assert len({Image.open(file).tobytes() for file in (tmp_path / "x_blank").iterdir()}) == 1
    assert len({Image.open(file).tobytes() for file in (tmp_path / "x").iterdir()}) > 20


def test_chance_is_that_of_a_guess():
    one, video = (Story(looks=(), question="", answer="", choices=n) for n in (60, 240))
    assert chance([one, video]) == pytest.approx((1 / 60 + 1 / 240) / 2)
    answers = {row.answer for row in stories("lesson", "train", 4000, seed=1) if len(row.looks) == 1}
    assert len(answers) == 60


def test_every_word_is_one_token():
    tokenizer = tiny_processor(words=WORDS).tokenizer
    assert {word: len(tokenizer(word).input_ids) for word in WORDS} == dict.fromkeys(WORDS, 1)
    text = "You are a helpful assistant: naïve, 3 plum trees."
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def generated(folder, file) -> list[str]:
    """Answers from transformers alone."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    said = []
    for row in json.loads(file.read_text()):
        question = row["conversations"][0]["value"]
        content = []
        for line in question.split("\n"):
            text = line.removesuffix("<image>")
            content += [{"type": "text", "text": text}] if text else []
            content += [{"type": "image"}] if line != text else []
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pictures = [Image.open(file.parent / path) for path in row["image"]]
        inputs = processor(text=[text], images=pictures, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        said.append(processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return said


def test_the_stored_base_names_what_it_sees_by_transformers_alone(tmp_path):
    rows = list(stories("base", "held_out", 60, seed=11))
    file = write_rows(rows, tmp_path, name="x", seed=11)
    said = generated(demo_base.STORED, file)
    hits = right(rows, said)
    assert sum(hits) / len(hits) >= 0.9  # 95% or more of 300 rows when it was stored; 60 rows are less precise
    assert answers(demo_base.STORED, file) == said


def test_the_stored_base_is_small_and_whole():
    files = {file.name: file.stat().st_size for file in demo_base.STORED.iterdir()}
    assert set(files) == set(demo_base.SHIPPED)
    assert sum(files.values()) < 3_000_000


def test_quick_demo_to_the_end_and_again(quick_demo, capsys):
    out, text = quick_demo
    for said in ("$ vlft check-data", "$ vlft train", "$ vlft merge", "before", "blind", "chance", "after", "videos"):
        assert said in text
    scores = json.loads((out / "scores.json").read_text())["scores"]
    assert [score["kind"] for score in scores] == ["stories of 1 to 3 pictures", "videos"]
    page = (out / "demo.html").read_text()
    assert page.count("data:image/png;base64,") == 3 + 2 + 4
    weights = (out / "merged" / "model.safetensors").stat().st_mtime_ns

    assert main(["demo", "--quick", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count("this run is finished") == 2
    assert "already exists" in text
    assert (out / "merged" / "model.safetensors").stat().st_mtime_ns == weights

    assert main(["demo", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "holds a demo with rows 64, this one has rows" in error


def test_refusals(tmp_path, capsys, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    assert main(["demo", "--quick", "--out", str(taken)]) == 1
    assert "thesis.txt" in capsys.readouterr().err
    assert [file.name for file in taken.iterdir()] == ["thesis.txt"]
    assert main(["demo", "--quick", "--out", str(taken / "thesis.txt")]) == 1
    assert "is a file. Use a folder" in capsys.readouterr().err
    assert main(["demo", "--quick", "--out", str(taken / "thesis.txt" / "deeper")]) == 1
    assert "Use a folder" in capsys.readouterr().err

    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 5 << 20))
    assert main(["demo", "--quick", "--out", str(tmp_path / "full")]) == 1
    assert "5 MiB are free" in capsys.readouterr().err


def test_one_demo_at_a_time(tmp_path):
    out = tmp_path / "out"
    with claimed(out, {"steps": 1}), pytest.raises(ConfigError, match="another vlft demo"):
        claimed(out, {"steps": 1}).__enter__()


@pytest.mark.grid
def test_rebuild_works_and_a_poor_base_is_not_stored(tmp_path, capsys):
    made = demo_base.rebuild(tmp_path / "work", plan=demo_base.QUICK_REBUILD)
    stored = tmp_path / "base"
    with pytest.raises(CheckpointError, match="is not stored"):
        demo_base.store(made, stored)
    assert not stored.exists()
    good = demo_base.Rebuilt(model=made.model, exact=0.99, chance=0.0, rows=24)
    demo_base.store(good, stored)
    assert {file.name for file in stored.iterdir()} == set(demo_base.SHIPPED)
    assert main(["demo", "--rebuild-base", "--quick", "--out", str(tmp_path / "work")]) == 0


def test_the_page_escapes_and_loads_nothing(tmp_path):
    picture = tmp_path / "p.png"
    Image.new("RGB", (4, 4)).save(picture)
    texts = dict.fromkeys(("question", "right", "before", "blind", "after"), "<script>alert(1)</script>\x1b")
    page = as_html(
        scores=[{"kind": "<b>", "rows": 1, "before": 0, "blind": 0, "chance": 0, "after": 1}],
        examples=[Example(index=0, pictures=(picture,), is_video=False, **texts)],
        commands=["vlft <run>"],
    )
    assert "<script" not in page
    assert "<b>" not in page
    assert "vlft &lt;run&gt;" in page
    assert "\x1b" not in page
    assert "default-src 'none'" in page
    assert "prefers-color-scheme:dark" in page


def test_a_tiny_base_of_old_is_what_it_was(tmp_path):
    """Sizes and words are additions: without them the tests' base keeps its shapes and its vocabulary."""
    config = json.loads((build_tiny(tmp_path / "t") / "config.json").read_text())
    text = config["text_config"]
    assert (text["vocab_size"], text["hidden_size"], text["num_hidden_layers"]) == (320, 64, 2)
