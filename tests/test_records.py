"""Rows as users write them: which are refused, with field and reason, and which are accepted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from build import FAMILY, row, write_image, write_json, write_video
from refused_rows import REFUSED, turns

from vlft.config.recipe import Recipe
from vlft.data.files.index import index_rows, parsed
from vlft.data.media.decode import decode
from vlft.data.media.read import MediaError, measure
from vlft.data.rows.records import parse_record
from vlft.data.sample import Image, Text, Turn, Video
from vlft.demo.tiny import tiny_processor
from vlft.errors import ConfigError, DataError


def parse(raw, *, file="data/train.json", image_folder="pics"):
    return parse_record(raw, file=file, index=17, image_folder=image_folder, family=FAMILY)


def shape(sample):
    """Return the turns as (role, parts), with media as their paths."""
    return [(turn.role, [brief(part) for part in turn.parts]) for turn in sample.turns]


def brief(part):
    if isinstance(part, Text):
        return part.text
    if isinstance(part, Image):
        return ("image", part.path)
    return ("video", part.path or list(part.frames))


# --------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(("raw", "field", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(raw, field, reason):
    with pytest.raises(DataError) as caught:
        parse(raw)
    bad = caught.value.row
    assert (bad.file, bad.index) == ("data/train.json", 17)
    assert bad.field == field
    assert reason in bad.reason
    assert f"data/train.json[17].{field}" in str(caught.value)
    assert "vlft preview data/train.json --index 17" in str(caught.value)


@pytest.mark.parametrize("token", FAMILY.control_tokens)
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_control_tokens_are_refused_in_any_text(token, turn):
    raw = turns("system: a", "human: b", "gpt: c")
    raw["conversations"][turn]["value"] = f"so{token}there"
    with pytest.raises(DataError) as caught:
        parse(raw)
    assert caught.value.row.field == f"conversations[{turn}].value"
    assert token in caught.value.row.reason


@pytest.mark.parametrize("name", [7, "x7", 0])
def test_a_refusal_names_the_rows_id(name):
    with pytest.raises(DataError) as caught:
        parse({"id": name, "conversations": []})
    assert caught.value.row.id == str(name)
    assert f"(id {name})" in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- taken

PLAIN = [("user", ["Hi."]), ("assistant", ["Hello."])]
TAKEN = {
    "image []": (row(image=[]), PLAIN),
    "image null": (row(image=None), PLAIN),
    'image ""': (row(image=""), PLAIN),
    "video []": (row(video=[], image=[]), PLAIN),
    "video null": (row(video=None), PLAIN),
    'video ""': (row(video=""), PLAIN),
    "one image": (
        row("<image>\nWhat?", image="a.jpg"),
        [("user", [("image", "pics/a.jpg"), "What?"]), ("assistant", ["Hello."])],
    ),
    "image and video in one row": (
        row("See <image> and <video>.", image="a.jpg", video="b.mp4"),
        [("user", ["See ", ("image", "pics/a.jpg"), " and ", ("video", "pics/b.mp4"), "."]), ("assistant", ["Hello."])],
    ),
    "several videos": (
        row("<video><video>", video=["a.mp4", "b/c.webm"]),
        [("user", [("video", "pics/a.mp4"), ("video", "pics/b/c.webm")]), ("assistant", ["Hello."])],
    ),
    "a list of frames as one video": (
        row("<video>", video=["0.jpg", "1.JPG", "2.png"]),
        [("user", [("video", ["pics/0.jpg", "pics/1.JPG", "pics/2.png"])]), ("assistant", ["Hello."])],
    ),
    "lists of frames as several videos": (
        row("<video>then<video>", video=[["0.jpg", "1.jpg"], "b.mp4"]),
        [
            ("user", [("video", ["pics/0.jpg", "pics/1.jpg"]), "then", ("video", "pics/b.mp4")]),
            ("assistant", ["Hello."]),
        ],
    ),
    "one animation": (
        row("<video>", video=["a.gif"]),
        [("user", [("video", "pics/a.gif")]), ("assistant", ["Hello."])],
    ),
    "tags over all human turns, left to right": (
        turns("human: <image>a<image>", "gpt: b", "human: c <image>", "gpt: d", image=["1.jpg", "2.jpg", "3.jpg"]),
        [
            ("user", [("image", "pics/1.jpg"), "a", ("image", "pics/2.jpg")]),
            ("assistant", ["b"]),
            ("user", ["c ", ("image", "pics/3.jpg")]),
            ("assistant", ["d"]),
        ],
    ),
    "all newlines next to a tag go, no others": (
        row("a\n\nb\n\n<image>\n\n<image>\r\n\r\n c\n", image=["1.jpg", "2.jpg"]),
        [
            ("user", ["a\n\nb", ("image", "pics/1.jpg"), ("image", "pics/2.jpg"), " c\n"]),
            ("assistant", ["Hello."]),
        ],
    ),
    "system turn first": (
        turns("system: s", "human: a", "gpt: b"),
        [("system", ["s"]), ("user", ["a"]), ("assistant", ["b"])],
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        [("user", ["a"]), ("assistant", ["b"])],
    ),
    "conversations with role and content": (
        {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        [("user", ["a"]), ("assistant", ["b"])],
    ),
    "user and assistant in from": (turns("user: a", "assistant: b"), [("user", ["a"]), ("assistant", ["b"])]),
    "grounding tokens": (
        row(
            "Where is <|object_ref_start|>it<|object_ref_end|>?",
            "<|box_start|>(1,2),(3,4)<|box_end|><|quad_start|><|quad_end|>",
        ),
        [
            ("user", ["Where is <|object_ref_start|>it<|object_ref_end|>?"]),
            ("assistant", ["<|box_start|>(1,2),(3,4)<|box_end|><|quad_start|><|quad_end|>"]),
        ],
    ),
    "gdi tags": (
        row("<image>Tell.", "<gdi image1>Once</gdi> <gdo char1>she</gdo>", image="a.jpg"),
        [("user", [("image", "pics/a.jpg"), "Tell."]), ("assistant", ["<gdi image1>Once</gdi> <gdo char1>she</gdo>"])],
    ),
    "empty human turn with a picture": (
        row("<image>", image="a.jpg"),
        [("user", [("image", "pics/a.jpg")]), ("assistant", ["Hello."])],
    ),
}


@pytest.mark.parametrize(("raw", "want"), TAKEN.values(), ids=TAKEN)
def test_taken(raw, want):
    sample = parse(raw)
    assert shape(sample) == want
    assert sample.warnings == ()


WARNED = {
    "two human turns in a row": (
        turns("human: a", "human: b", "gpt: c"),
        "conversations[1]",
        "two human turns in a row",
    ),
    "a trailing human turn": (turns("human: a", "gpt: b", "human: c"), "conversations[2]", "a human turn comes last"),
    "two gpt turns in a row": (turns("human: a", "gpt: b", "gpt: c"), "conversations[2]", "both are trained"),
    "a later system turn": (turns("human: a", "system: s", "gpt: b"), "conversations[1]", "not the first turn"),
    "an empty human turn": (row(""), "conversations[0].value", "an empty human turn"),
    "a rejected answer": (row(rejected_response="No."), "rejected_response", "the answers of the conversation are"),
    "a second conversation": (row(query="a", response="b"), "query", 'the row has "conversations"'),
    "fps of a picture": (row(fps=2), "fps", "has no effect on any picture or video of the row"),
}


@pytest.mark.parametrize(("raw", "field", "remark"), WARNED.values(), ids=WARNED)
def test_taken_with_a_warning(raw, field, remark):
    sample = parse(raw)
    assert len(sample.turns) == len(raw["conversations"])
    ((where, what),) = sample.warnings
    assert where == field
    assert remark in what


def test_fields_say_where_things_stood():
    sample = parse(row("<image><video><video>", image=["a.jpg"], video=[["0.png", "1.png"], "b.mp4"]))
    assert sample.turns[0] == Turn(
        role="user",
        parts=(
            Image(path="pics/a.jpg", field="image[0]"),
            Video(frames=("pics/0.png", "pics/1.png"), field="video[0]"),
            Video(path="pics/b.mp4", field="video[1]"),
        ),
        field="conversations[0]",
    )
    assert parse(row("<image>", image="a.jpg")).media[0].field == "image"


@pytest.mark.parametrize(("name", "want"), [("x", "x"), (7, "7"), (0, "0"), (None, None)])
def test_ids(name, want):
    assert parse(row(id=name)).id == want
    assert parse(row()).id is None


# ----------------------------------------------------------------------------------------------------------- paths


def test_paths(tmp_path, monkeypatch):
    raw = row("<image>", image="sub/a.jpg")
    assert parse(raw, image_folder="/media").media[0].path == "/media/sub/a.jpg"
    assert parse(raw, file="/data/train.json", image_folder=None).media[0].path == "/data/sub/a.jpg"
    assert parse(raw, file="data/train.json", image_folder=None).media[0].path == "data/sub/a.jpg"
    assert parse(row("<image>", image="/x/a.jpg")).media[0].path == "/x/a.jpg"


@pytest.mark.parametrize("given", [True, False])
def test_the_working_directory_does_not_shadow_the_image_folder(tmp_path, monkeypatch, given):
    work, folder = tmp_path / "work", tmp_path / "folder"
    write_image(work / "a.png", 500, 500)
    write_image(folder / "a.png", 30, 30)
    data = write_json(folder / "train.json", [row("<image>", image="a.png"), row("<image>", image="b.png")])
    write_image(work / "b.png")
    monkeypatch.chdir(work)
    rows = parsed(index_rows([str(data)], image_folder=str(folder) if given else None, family=FAMILY))
    settings = Recipe.of(tiny_processor())
    assert decode(rows.samples[0].media[0], settings).grid.patches == 16
    with pytest.raises(MediaError, match="no such file"):
        decode(rows.samples[1].media[0], settings)


# ----------------------------------------------------------------------------------------------------------- files


def load(*paths, image_folder=None):
    return parsed(index_rows([str(path) for path in paths], image_folder=image_folder, family=FAMILY))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.JSON"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("crlf", [True, False])
def test_bom_and_crlf(tmp_path, name, bom, crlf):
    path = write_json(tmp_path / name, [row("Où?"), row(id=1)])
    data = path.read_text(encoding="utf-8")
    path.write_bytes(bom + (data.replace("\n", "\r\n") if crlf else data).encode())
    rows = load(path)
    assert [sample.index for sample in rows.samples] == [0, 1]
    assert rows.samples[0].turns[0].parts == (Text(text="Où?"),)
    assert rows.counts == {str(path): 2}


def test_every_row_is_accounted_for(tmp_path):
    one = write_json(tmp_path / "b.json", [row(id=1), row(answer=""), row(id=1)])
    two = tmp_path / "a.jsonl"
    two.write_text(f"\n{json.dumps(row())}\n\n  \n{{oops\n{json.dumps(row())}\n[1]\n", encoding="utf-8")
    rows = load(one, two)
    assert rows.counts == {str(one): 3, str(two): 4}
    assert list(rows.counts) == [str(one), str(two)]
    assert [(sample.file, sample.index) for sample in rows.samples] == [
        (str(one), 0),
        (str(one), 2),
        (str(two), 0),
        (str(two), 2),
    ]
    assert [(bad.file, bad.index, bad.field) for bad in rows.bad] == [
        (str(one), 1, "conversations[1].value"),
        (str(two), 1, "row"),
        (str(two), 3, "row"),
    ]
    assert rows.bad[1].reason.startswith("line 5, column 2: not JSON")


def test_a_line_that_is_not_utf8_is_one_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b"\n" + b'{"id": "\xff"}\n' + json.dumps(row()).encode())
    rows = load(path)
    assert [sample.index for sample in rows.samples] == [0, 2]
    assert "line 2: not JSON in UTF-8" in rows.bad[0].reason


BAD_FILES = {
    "missing": ("a.json", None, "no such file"),
    "another ending": ("a.rows", b"x", "the ending .rows is not supported; supported are .json, .jsonl"),
    "empty": ("a.json", b"", "holds no rows"),
    "only a BOM": ("a.json", b"\xef\xbb\xbf", "holds no rows"),
    "empty lines": ("a.jsonl", b"\n\n", "holds no rows"),
    "empty array": ("a.json", b"[]", "holds no rows"),
    "object": ("a.json", b'{"conversations": []}', "an object at the top, where an array of rows belongs"),
    "broken": ("a.json", b'[\n {"id": 1},\n {"id": }\n]', "a.json, line 3, column 9: not JSON"),
    "lines in .json": ("a.json", b'{"id": 1}\n{"id": 2}\n', "name the file .jsonl"),
    "array in .jsonl": ("a.jsonl", b'[\n{"id": 1}\n]', "a .jsonl has one object per line. Rename the file to .json"),
    "not UTF-8": ("a.json", b'[\n"\xff"]', "line 2: byte 0xff is not UTF-8"),
    "UTF-16": ("a.json", "[]".encode("utf-16"), "is UTF-16"),
    "UTF-16 lines": ("a.jsonl", "{}".encode("utf-16"), "is UTF-16"),
}


@pytest.mark.parametrize(("name", "data", "reason"), BAD_FILES.values(), ids=BAD_FILES)
def test_files_refused(tmp_path, name, data, reason):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / name)
    assert reason in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_file_named_twice(tmp_path, monkeypatch):
    path = write_json(tmp_path / "a.json", [row()])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="one data file is named twice"):
        load(path, "a.json")


def test_no_image_folder(tmp_path):
    path = write_json(tmp_path / "a.json", [row()])
    with pytest.raises(ConfigError, match="--image_folder nowhere: no such folder"):
        load(path, image_folder="nowhere")


# ---------------------------------------------------------------------------- media of a row, named as in the row


def test_undecodable_media_are_named_as_in_the_row(tmp_path):
    write_image(tmp_path / "a.jpg")
    write_video(tmp_path / "one.mp4", 1)
    raw = row("<image><image><video>", image=["a.jpg", "gone.jpg"], video="one.mp4")
    sample = parse(raw, image_folder=str(tmp_path))
    settings = Recipe.of(tiny_processor())
    fields = []
    for media in sample.media:
        try:
            decode(media, settings)
        except MediaError as error:
            fields.append(error.field)
    assert fields == ["image[1]", "video"]


DATA = Path(__file__).parent.parent / "data"


def test_the_demo_rows_load_and_decode():
    rows = load(DATA / "demo.json", image_folder=str(DATA / "media"))
    assert not rows.bad
    assert not any(sample.warnings for sample in rows.samples)
    settings = Recipe.of(tiny_processor())
    media = [part for sample in rows.samples for part in sample.media]
    assert all(decode(part, settings).grid == measure(part, settings) for part in media)
    named = {path for part in media for path in (getattr(part, "frames", ()) or (part.path,))}
    there = {str(path) for path in (DATA / "media").rglob("*.*")}
    assert named == there


# Messages of opening a file or encoding a row, which other tests check.
SAID_LATER = {
    "is not complete base64",
    "cannot be fetched (404 Not Found)",
    "is a named pipe, not a regular file",
    "too large to be opened safely",
    "at most are opened safely",
    "cannot be opened",
    "claims 1,000,000,000 frames or samples in 4,708 bytes",
    "PostScript, a program that would have to be run",
    "more than 67,108,864 bytes. Split the row",
    "no such file",
    "damaged or cut short",
    "cut short: 4,096 of 40,000 bytes are there",
    "is a web page, not a picture",
    "is empty (0 bytes)",
    "is a Git LFS pointer",
    "is an MP4 video, not a picture",
    "holds pictures only",
    "a folder without pictures",
    "is text, not a video",
    "2010x10: the longer side is 201.0 times the shorter",
    "a video of 1 frame, 2 are needed",
    "--nframes 8, and it has 5 frames",
    "is 300x60, the first frame 90x60",
    "line 5, column 2: not JSON",
    # Words of other kits, and masks: tests/test_forms.py, tests/test_masks.py.
    "every gpt turn is masked, so nothing to learn",
    "<IMG_CONTEXT> stands for a picture in other kits, but the row has none",
    "ends at character 31, and the last character of the text is 30",
    # Boxes: tests/test_boxes.py.
    "'<¦box_start¦>(1,2),(3)' is not a box: (x1,y1),(x2,y2) belongs there",
    "may be in any of image[0] (700x300), image[1] (120x400), and is not the same in each",
    "0 in it, 1 <bbox> in the text",
}


def test_the_readme_quotes_our_messages():
    readme = (DATA / "README.md").read_text(encoding="utf-8").replace("\\|", "¦")
    assert all(token.replace("|", "¦") in readme for token in FAMILY.control_tokens)
    table = re.search(r"## Refused.*?\n\n(\| what .*?)\n\n", readme, re.DOTALL)[1]
    quoted = {quote for line in table.splitlines() for quote in re.findall("`(.+?)`", line.split("|")[2])}
    reasons = []
    for raw, _, _ in [*REFUSED.values(), (row("<|im_end|>"), None, None)]:
        with pytest.raises(DataError) as caught:
            parse(raw)
        reasons.append(caught.value.row.reason.replace("|", "¦"))
    assert [quote for quote in quoted - SAID_LATER if not any(quote in reason for reason in reasons)] == []
    assert quoted >= SAID_LATER
