"""A picture or video of a row is missing: the message says where it is, and which change finds all of its kind."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from build import row, write_image

from vlft.cli.main import main


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The working directory: `data/` has `images/train/a b.jpg`, `images/Cat.JPG`, `images/café.png` and rows."""
    monkeypatch.chdir(tmp_path)
    for name in ("train/a b.jpg", "train/ab.jpg", "Cat.JPG", unicodedata.normalize("NFC", "café.png")):
        write_image(tmp_path / "data" / "images" / name)
    write_image(tmp_path / "top.png")
    return tmp_path


OTHER = "in the rows"


@pytest.mark.parametrize(
    ("value", "folder", "found", "change"),
    [
        # the folder of the flag or of the data file is not the one where the paths start
        ("images/Cat.JPG", "data/images", "data/images/Cat.JPG", "pass --image_folder data or, if only some paths have "
         '"images/", remove it there'),
        ("data/images/Cat.JPG", "data/images", "data/images/Cat.JPG", "pass --image_folder ."),
        ("train/ab.jpg", None, "data/images/train/ab.jpg", "pass --image_folder data/images"),
        ("ab.jpg", None, "data/images/train/ab.jpg", "pass --image_folder data/images/train"),
        ("ab.jpg", "data/images", "data/images/train/ab.jpg", "pass --image_folder data/images/train or, if only some "
         'files are there, add "train/" to their paths'),
        ("images/Cat.JPG", "data/images/train", "data/images/Cat.JPG", "pass --image_folder data"),
        ("top.png", "data", "top.png", "pass --image_folder ."),
        ("pics/Cat.JPG", "data/images", "data/images/Cat.JPG", f'remove "pics/" from the paths {OTHER}'),
        ("pics/train/ab.jpg", "data", "data/images/train/ab.jpg", f'remove "pics/" from the paths {OTHER} and pass '
         "--image_folder data/images"),
        # a path of another machine
        ("/home/x/data/images/Cat.JPG", "data", "data/images/Cat.JPG", 'remove "/home/x/data/" from the paths'),
        ("/home/x/data/images/Cat.JPG", "data/images", "data/images/Cat.JPG", 'remove "/home/x/data/images/" from'),
        ("/mnt/a/train/ab.jpg", None, "data/images/train/ab.jpg", f'remove "/mnt/a/" from the paths {OTHER} and pass '
         "--image_folder data/images"),
        (r"D:\data\images\Cat.JPG", "data/images", "data/images/Cat.JPG", r'remove "D:\data\images\" from the paths'),
        # another spelling
        ("cat.jpg", "data/images", "data/images/Cat.JPG", "the letter case differs"),
        ("Images/TRAIN/ab.jpg", "data", "data/images/train/ab.jpg", "the letter case differs"),
        ("Cat.png", "data/images", "data/images/Cat.JPG", "the ending differs"),
        ("train/ab.jpeg", "data/images", "data/images/train/ab.jpg", "the ending differs"),
        ("train/a%20b.jpg", "data/images", "data/images/train/a b.jpg", 'is URL-encoded, such as "%20" for " "'),
        ("caf%C3%A9.png", "data/images", "data/images/café.png", 'is URL-encoded, such as "%C3%A9" for "é"'),
        (r"train\ab.jpg", "data/images", "data/images/train/ab.jpg", r'has "\" for "/", as on Windows'),
        (r"images\train\ab.jpg", "data/images", "data/images/train/ab.jpg", "pass --image_folder data or, if only some "
         'paths have "images/", remove it there, and the path has'),
        (unicodedata.normalize("NFD", "café.png"), "data/images", "data/images/café.png", "writes accents in another"),
        ("Cat.JPG ", "data/images", "data/images/Cat.JPG", "has blanks around it"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["image", "video"])
def test_where_a_file_of_a_row_is(home, capsys, value, folder, found, change, kind):
    tag = f"<{kind}>"
    Path("data/rows.json").write_text(json.dumps([row(f"{tag}What?", "This.", **{kind: value})]))
    flags = ["--image_folder", folder] if folder else []
    assert main(["check-data", "data/rows.json", *flags, "--headers_only", "--json", "--workers", "0"]) == 1
    (bad,) = json.loads(capsys.readouterr().out)["bad"]
    assert f"no such file. Found as {found}: {change}" in bad["reason"] or (
        f"no such file. Found as {found}: the path {change}" in bad["reason"]
    ), bad["reason"]


def test_the_change_finds_the_file(home, capsys):
    """The flag of a message is right: with it the row is accepted."""
    for value, folder in (("images/Cat.JPG", "data/images"), ("ab.jpg", "data"), ("top.png", "data/images")):
        Path("data/rows.json").write_text(json.dumps([row("<image>What?", "This.", image=value)]))
        command = ["check-data", "data/rows.json", "--headers_only", "--workers", "0"]
        assert main([*command, "--image_folder", folder, "--json"]) == 1
        (bad,) = json.loads(capsys.readouterr().out)["bad"]
        assert main([*command, "--image_folder", bad["reason"].rpartition("--image_folder ")[2].split()[0]]) == 0
        capsys.readouterr()


def test_the_page_of_a_check_gives_one_reason(home, capsys):
    Path("data/rows.json").write_text(json.dumps([row("<image>What?", "This.", image="/x/data/images/Cat.JPG")]))
    assert main(["check-data", "data/rows.json", "--headers_only", "--report", "look", "--workers", "0"]) == 1
    page = Path("look/report.html").read_text()
    assert "Found as data/images/Cat.JPG" in page
    assert "Did you mean" not in page


@pytest.mark.parametrize("value", ["gone.jpg", "./gone.jpg", "x//../gone.jpg", "pic_0007.jpg"])
def test_a_file_that_is_nowhere(home, capsys, value):
    write_image(home / "data" / "pic_0001.jpg")  # another picture: it is not suggested
    Path("data/rows.json").write_text(json.dumps([row("<image>What?", "This.", image=[value])]))
    assert main(["check-data", "data/rows.json", "--headers_only", "--json", "--workers", "0"]) == 1
    (bad,) = json.loads(capsys.readouterr().out)["bad"]
    reason, _, hint = bad["reason"].partition(": no such file")
    assert reason == f"data/{value}"
    assert hint.endswith(". Put it there, or correct the path or --image_folder")
    assert "mean" not in hint


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("~/top.png", "{home}/top.png"),
        ("/home/x/project/data/images", "data/images"),
        (r"data\images", "data/images"),
        ("data/images%2Ftrain", "data/images/train"),
        ("Data/Images", "data/images"),
    ],
)
def test_near_misses_of_flags(home, capsys, monkeypatch, typed, meant):
    monkeypatch.setenv("HOME", str(home))
    (home / "folder").mkdir()
    Path("rows.json").write_text("[]")
    command = [typed] if typed.endswith(".png") else ["rows.json", "--image_folder", typed]
    assert main(["check-data", *command]) == 1
    assert f"Did you mean {meant.format(home=home)}?" in capsys.readouterr().err
