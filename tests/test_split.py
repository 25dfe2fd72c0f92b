"""`check-data --fix --dedup --split`, and what training and evaluation data share."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from build import row, write_image

from vlft.cli.main import main
from vlft.data.division import split, wanted_rows
from vlft.data.identity import Marked
from vlft.data.sample import Sample
from vlft.text import short_path


def asked(i: int, image: str | list[str] | None = None, answer: str | None = None) -> dict:
    tags = "<image>" * (len(image) if isinstance(image, list) else image is not None)
    return row(f"{tags}What is {i}?", answer or f"Number {i}.", **({} if image is None else {"image": image}))


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def fixed(capsys, *argv: object, status: int = 0) -> str:
    """Run `check-data` and return its stderr."""
    assert main(["check-data", *map(str, argv), "--workers", "0"]) == status
    return capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    """A folder of 20 different pictures `0.png` to `19.png`, and `copy.png` with the bytes of `0.png`."""
    for i in range(20):
        write_image(tmp_path / "images" / f"{i}.png", 30 + i, 40)
    shutil.copy(tmp_path / "images" / "0.png", tmp_path / "images" / "copy.png")
    return tmp_path


@pytest.mark.parametrize("how", [[], ["--headers_only"]])
def test_rows_that_repeat_an_earlier_row_are_left_out(folder, capsys, how):
    rows = [asked(0, "0.png"), asked(1), asked(0, "0.png"), asked(0, "copy.png"), asked(0, "1.png"), asked(1)]
    data = write(folder / "all.json", [dict(one, id=i) for i, one in enumerate(rows)])
    out = folder / "new" / "clean.json"  # the folder does not exist
    err = fixed(capsys, data, "--image_folder", folder / "images", "--fix", out, "--dedup", *how)
    assert [one["id"] for one in read(out)] == [0, 1, 4]
    left = read(folder / "new" / "quarantine.jsonl")
    assert [(one["index"], one["reason"]) for one in left] == [
        (2, f"the same turns and pictures as {data}[0]"),
        (3, f"the same turns and pictures as {data}[0]"),
        (5, f"the same turns and pictures as {data}[1]"),
    ]
    assert left[0]["row"]["id"] == 2
    assert "3 rows: " in err
    assert f"0 rows refused, 3 repeated: {folder}/new/quarantine.jsonl" in err


def test_files_with_equal_beginnings_are_not_equal(folder, capsys):
    """Bitmaps have no compression: equal sizes, and the first bytes are the last line of pixels."""
    from PIL import Image

    pixels = np.zeros((60, 60, 3), dtype=np.uint8)
    for name, value in (("a", 1), ("b", 2), ("same", 1)):
        pixels[0] = value
        Image.fromarray(pixels).save(folder / "images" / f"{name}.bmp")
    data = write(folder / "all.json", [asked(0, f"{name}.bmp") for name in ("a", "b", "same")])
    fixed(capsys, data, "--image_folder", folder / "images", "--fix", folder / "o.json", "--dedup", "--headers_only")
    assert [one["image"] for one in read(folder / "o.json")] == ["a.bmp", "b.bmp"]


def groups_of(folder: Path) -> list[dict]:
    """60 rows: 40 with pictures that several rows share, also through a third row; 20 with text only."""
    rows = [asked(i, f"{2 + i % 18}.png") for i in range(36)]
    rows += [asked(36, ["0.png", "1.png"]), asked(37, "copy.png"), asked(38, "1.png"), asked(39, "0.png")]
    return rows + [asked(40 + i % 15, answer=f"Text {i}.") for i in range(20)]


def parts_of(stem: Path) -> dict[str, str]:
    """Answer -> the part that holds its row."""
    return {
        one["conversations"][1]["value"]: part
        for part in ("train", "eval", "test")
        for one in read(stem.with_name(f"{stem.name}-{part}.jsonl"))
    }


def test_a_split_keeps_what_shares_a_picture_together(folder, capsys):
    rows = groups_of(folder)
    data = write(folder / "all.json", rows)
    flags = ["--image_folder", folder / "images", "--split", "0.7,0.2,0.1"]
    more = ["--vision", "lora", "--bf16", "false", "--missing_tags", "first"]
    err = fixed(capsys, data, *flags, "--fix", folder / "a.jsonl", *more)
    where = parts_of(folder / "a")
    assert len(where) == 60
    assert Counter(where.values()) == {"train": 42, "eval": 12, "test": 6}
    for shared in (["Number 36.", "Number 37.", "Number 38.", "Number 39."], ["Text 0.", "Text 15."]):
        assert len({where[answer] for answer in shared}) == 1
    for i in range(18):
        assert where[f"Number {i}."] == where[f"Number {i + 18}."]
    assert err.splitlines()[-1] == (
        f"train with them: vlft train --data_path {folder}/a-train.jsonl --eval_path {folder}/a-eval.jsonl "
        "--eval_strategy epoch --output_dir output/run --model_id MODEL --bf16 false "
        f"--image_folder {folder}/images --vision lora"
    )
    assert "42 rows (70.0%)" in err
    assert "no effect here, training only: --bf16\n" in err
    (folder / "quarantine.jsonl").unlink()

    # The order of rows and files, a move, and the kind of check do not matter; the seed does.
    moved = folder / "elsewhere"
    shutil.copytree(folder / "images", moved / "images")
    two = [write(moved / "z.json", rows[::-1][:30]), write(moved / "a.json", rows[::-1][30:])]
    flags[1] = moved / "images"
    fixed(capsys, *two, *flags, "--fix", moved / "b.jsonl", "--seed", "42", "--headers_only")
    assert parts_of(moved / "b") == where
    (moved / "quarantine.jsonl").unlink()
    assert "no effect" not in fixed(capsys, *two, *flags, "--fix", moved / "c.jsonl", "--seed", "1", "--headers_only")
    assert parts_of(moved / "c") != where


def test_shares_that_cannot_be_met(folder, capsys):
    flags = ["--image_folder", folder / "images", "--headers_only"]
    large = write(folder / "large.json", [asked(i, "3.png") for i in range(8)] + [asked(8, "4.png"), asked(9)])
    err = fixed(capsys, large, *flags, "--fix", folder / "l.json", "--split", "0.5,0.5")
    assert "8 rows (80.0%): " in err
    assert "cannot be met exactly" in err
    assert f"8 rows share {short_path(str(folder / 'images/3.png'))} of {large}[0]" in err
    (folder / "quarantine.jsonl").unlink()
    few = write(folder / "few.json", [asked(i, f"{i}.png") for i in range(4)])
    err = fixed(capsys, few, *flags, "--fix", folder / "f.json", "--split", "0.9,0.05,0.05")
    assert [len(read(folder / f"f-{part}.json")) for part in ("train", "eval", "test")] == [2, 1, 1]
    assert "each file gets at least one" in err
    (folder / "quarantine.jsonl").unlink()
    one = write(folder / "one.json", [asked(i, "3.png") for i in range(8)])
    err = fixed(capsys, one, *flags, "--fix", folder / "o.json", "--split", "0.9,0.1", status=1)
    assert "8 rows cannot be divided into 2 files" in err
    assert f"8 rows share {short_path(str(folder / 'images/3.png'))} of {one}[0]" in err
    assert not list(folder.glob("o-*"))


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--dedup"], 1, "--dedup has no effect without --fix"),
        (["--split", "0.9,0.1"], 1, "--split has no effect without --fix"),
        (["--fix", "o.json", "--split", "0.9,0.2"], 2, "must sum to 1, not 1.1. Did you mean 0.818,0.182?"),
        (["--fix", "o.json", "--split", "90,5,5"], 2, "must sum to 1, not 100. Did you mean 0.9,0.05,0.05?"),
        (["--fix", "o.json", "--split", "1"], 2, "two shares (train, eval) or three"),
        (["--fix", "o.json", "--split", "0.9,0.1,0"], 2, "above 0"),
        (["--fix", "o.json", "--split", "most"], 2, "must be two or three shares"),
    ],
)
def test_flags_that_make_no_sense(folder, capsys, monkeypatch, flags, status, message):
    monkeypatch.chdir(folder)
    write(folder / "a.json", [asked(0)])
    assert message in fixed(capsys, "a.json", *flags, status=status)


def test_a_file_that_is_there_is_not_written_over(folder, capsys):
    data = write(folder / "a.json", [asked(i) for i in range(4)])
    write(folder / "o-eval.json", [])
    err = fixed(capsys, data, "--fix", folder / "o.json", "--split", "0.5,0.5", status=1)
    assert f"{folder}/o-eval.json already exists" in err


@pytest.mark.parametrize("seed", range(3))
def test_any_groups_fill_every_part(seed):
    draw = np.random.default_rng(seed)
    for _ in range(30):
        rows, parts = int(draw.integers(3, 60)), int(draw.integers(2, 4))
        groups = draw.integers(0, rows, rows)
        groups[:parts] = rows + np.arange(parts)  # at least as many groups as parts
        shares = draw.dirichlet(np.ones(parts)).tolist()
        stable = np.frombuffer(draw.bytes(16 * rows), dtype="V16")
        found = split(groups, stable, shares, seed=seed)
        assert set(found.tolist()) == set(range(parts))
        assert all(len(set(found[groups == group].tolist())) == 1 for group in set(groups.tolist()))
        order = draw.permutation(rows)
        assert (split(groups[order], stable[order], shares, seed=seed) == found[order]).all()
        alone = split(np.arange(rows), stable, shares, seed=seed)
        assert np.bincount(alone, minlength=parts).tolist() == wanted_rows(rows, shares)


# ---- what training and evaluation share


def test_what_training_and_evaluation_share_is_said(folder, base, capsys):
    train = write(folder / "train.json", [asked(i, f"{i}.png") for i in range(5)] + [asked(5)])
    shared = [asked(9, "10.png"), dict(asked(5), id="again"), asked(7, "images/../3.png"), asked(8, "link.png")]
    (folder / "images" / "link.png").symlink_to("4.png")
    (folder / "images" / "images").mkdir()
    held = write(folder / "eval.json", shared)
    flags = ["--image_folder", folder / "images", "--eval_path", held]
    same = f"1 of 4 evaluation rows is also trained, so their evaluation says nothing about new rows: {train}[5] and "
    same += f"{held}[1] are the same row"
    pictures = f"2 more of 4 evaluation rows share pictures or videos with trained rows: {train}[3] and {held}[2] share"
    assert main(["check-data", str(train), *map(str, flags), "--headers_only", "--workers", "0", "--json"]) == 0
    remarks = json.loads(capsys.readouterr().out)["overlap"]
    assert remarks[0] == same
    assert remarks[1].startswith(f"{pictures} {short_path(str(folder / 'images/3.png'))}")
    run = ["plan", "--data_path", train, *flags, "--model_id", base, "--output_dir", folder / "run"]
    run += ["--eval_strategy", "epoch", "--dataloader_num_workers", 0, "--json"]
    for _ in range(2):  # the second time costs are cached
        assert main(list(map(str, run))) == 0
        assert json.loads(capsys.readouterr().out)["notes"][: len(remarks)] == remarks
    flags[-1] = write(folder / "eval.json", [asked(9, "10.png")])
    assert main(["check-data", str(train), *map(str, flags), "--workers", "0"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_message_survives_a_row_that_was_changed_during_the_check():
    changed = [Sample(file="a.json", index=0, id=None, turns=())]  # it named a picture when it was read first
    marked = Marked(index=changed, rows=np.zeros(1), files=np.ones(1), ends=np.ones(1, dtype=np.int64))
    assert marked.shown_path(0) == "a file"
