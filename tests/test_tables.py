"""CSV, WebDataset tars and folders of pictures give the same rows as JSON with the same data; `--columns`."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shlex
import tarfile

import pyarrow as pa
import pytest
import yaml
from build import FAMILY, row, write_image, write_json, write_video
from pyarrow import parquet

from vlft.cli.main import main
from vlft.config.columns import read_columns
from vlft.data.files import read as reading
from vlft.data.files.index import index_rows, parsed
from vlft.errors import ConfigError

CHECK = ["check-data", "--workers", "0"]
DESCRIBE = "question:=Describe the picture."


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLFT_MEDIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path):
    """A folder `data` with three pictures and a clip."""
    for i, name in enumerate(("china", "flower", "coffee")):
        write_image(tmp_path / "data" / f"{i}.jpg", name=name)
    write_video(tmp_path / "data" / "v.mp4")
    return tmp_path / "data"


def rows_of(path, columns=None, folder=None):
    read = None if columns is None else read_columns(columns)
    return parsed(
        index_rows([str(path)], image_folder=None if folder is None else str(folder), family=FAMILY, columns=read)
    )


def shown(path, columns=None, folder=None):
    """Return role and texts of the turns of each row, with pictures as bytes; all rows can be trained."""
    rows = rows_of(path, columns, folder)
    assert rows.bad == ()
    return [
        [
            (turn.role, [part.text if hasattr(part, "text") else _bytes(part) for part in turn.parts])
            for turn in sample.turns
        ]
        for sample in rows.samples
    ]


def _bytes(part):
    with open(part.path, "rb") as file:
        return file.read()


def refused(path, columns=None) -> str:
    with pytest.raises(ConfigError) as caught:
        rows_of(path, columns)
    assert str(path) in str(caught.value)
    return str(caught.value)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- csv


WORDS = ['He said "no", then\nleft; ünder\ta roof', "1,5", "x" * 200_000, " spaces "]


def as_csv(path, rows, *, newline="\r\n", start=b"", **how):
    names = list(dict.fromkeys(name for one in rows for name in one))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, names, lineterminator=newline, **how)
    table.writeheader()
    table.writerows(rows)
    content = start + text.getvalue().encode()
    return write(path, gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.csv", {}),
        ("a.CSV", {"newline": "\n", "start": b"\xef\xbb\xbf"}),
        ("a.csv", {"delimiter": ";", "quoting": csv.QUOTE_ALL}),
        ("a.csv", {"delimiter": "|"}),
        ("a.tsv", {"delimiter": "\t", "newline": "\n"}),
        ("a.csv.gz", {}),
    ],
)
def test_csv_is_read_as_it_was_written(name, how, photos):
    rows = [{"image": "0.jpg", "question": "What?", "answer": word, "note": ""} for word in WORDS]
    rows[1]["image"] = ""
    path = as_csv(photos / name, rows, **how)
    picture = (photos / "0.jpg").read_bytes()
    got = shown(path, "question=question,answer=answer")
    assert [turns[1] for turns in got] == [("assistant", [word]) for word in WORDS]
    assert [turns[0][1] for turns in got] == [["What?"] if i == 1 else [picture, "What?"] for i in range(4)]


def test_csv_by_the_names_of_its_columns_keeps_tags_where_they_stand(photos):
    path = as_csv(photos / "a.csv", [{"image": "0.jpg", "query": "Look <image> what?", "response": "A temple."}])
    [[(_, parts), _]] = shown(path)
    assert parts == ["Look ", (photos / "0.jpg").read_bytes(), " what?"]


def test_cells_that_are_lists(photos):
    """Lists in JSON, and in the syntax of pandas."""
    turns = row("<image><image>Which?", "The first.")["conversations"]
    names = ["0.jpg", "1.jpg"]
    path = as_csv(
        photos / "a.csv", [{"images": dump(names), "conversations": dump(turns)} for dump in (json.dumps, str)]
    )
    expected = shown(write_json(photos / "a.json", [{"images": names, "conversations": turns}] * 2))
    assert shown(path) == expected
    assert shown(path, "conversations=conversations,image=images") == expected


def test_a_row_of_a_csv_keeps_its_number(photos, capsys):
    text = 'image,query,response\n0.jpg,<image>a,b\n\n0.jpg,"<image>\nc",d,e\n0.jpg,<image>f\ngone.jpg,<image>g,h\n'
    path = write(photos / "a.csv", text)
    assert main([*CHECK, str(path), "--json"]) == 1
    bad = json.loads(capsys.readouterr().out)["bad"]
    assert [(one["index"], one["field"]) for one in bad] == [(1, "row"), (2, "row"), (3, "image")]
    assert [one["reason"][:8] for one in bad[:2]] == ["line 5: ", "line 6: "]
    assert "4 cells, and the header has 3" in bad[0]["reason"]


BAD_TABLES = {
    "latin-1": ("a.csv", "question,answer\na,b\nc,gr\xfcn\n".encode("latin-1"), "line 3: byte 0xfc is not UTF-8"),
    "UTF-16": ("a.csv", "question,answer\na,b\n".encode("utf-16"), "is UTF-16"),
    "an open quote": ("a.csv", 'question,answer\na,"b\n', "line 2: unexpected end of data"),
    "a quote in a cell": ("a.csv", 'question,answer\n"a "b" c",d\n', "line 2: ',' expected after '\"'"),
    "no header": ("a.csv", "a.jpg,a.jpg\n", "the name 'a.jpg' occurs twice"),
    "only a header": ("a.csv", "question,answer\n", "holds no rows"),
    "nothing": ("a.csv", "", "holds no rows"),
    "cut gzip": ("a.csv.gz", gzip.compress(b"question,answer\na,b\n" * 9)[:-9], "damaged or cut short"),
    "no gzip": ("a.csv.gz", "question,answer\na,b\n", "is not compressed, although its name says otherwise"),
    "gzip without its ending": (
        "a.csv",
        gzip.compress(b"question,answer\n"),
        "is compressed, although its name says otherwise",
    ),
    "no tar": ("a.tar", "no tar", "damaged or cut short, or not a tar"),
    "Excel": ("a.xlsx", b"PK", "is a spreadsheet. Save it as CSV UTF-8"),
    "text": ("a.txt", "a", "a data file is a list of rows. Write each row as a line of a .jsonl"),
    "pickle": ("a.pkl", b"\x80", "may run code when it is read"),
    "zstd": ("a.tar.zst", b"", "is compressed. Unpack it"),
    "zip": ("a.zip", b"", "is compressed. Unpack it"),
    "TensorFlow": ("a.tfrecord", b"", "Read it with tensorflow_datasets"),
    "HDF5": ("a.h5", b"", "holds arrays"),
    "a database": ("a.db", b"", "is a database"),
    "YAML": ("a.yaml", b"", "--data_mix FILE"),
    "a picture": ("a.jpg", b"", "Name a data file whose rows name it"),
    "unknown": ("a.rows", b"", "the ending .rows is not supported; supported are .json, .jsonl, .csv"),
    "no ending": ("rows", b"", "has no ending"),
    "an array in lines": ("a.ndjson", b"[1]", "a .jsonl has one object per line"),
    "a pattern": ("{a,b}.tar", None, "a.tar and 1 more of its 2 files do not exist"),
    "a pattern of JSON": ("*.jsonl", None, "let the shell expand it"),
    "from the hub": ("org/name", None, "no such file"),
}


@pytest.mark.parametrize(("name", "content", "reason"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_tables_that_are_refused(name, content, reason, tmp_path, cache):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    said = refused(path)
    assert reason in said
    assert "Rename it" not in said
    assert list(cache.rglob("rows.jsonl")) == []


def test_a_name_of_the_hub_says_how_to_fetch_it():
    with pytest.raises(ConfigError, match="hf download org/name --repo-type dataset"):
        rows_of("org/name")


# ---- tars


def as_tar(path, members, mode="w"):
    """Write a tar of (name, content) members; a `TarInfo` as content is written unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if info is content else content
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, photos, picture=0, /, **row):
    return [(f"{key}.jpg", (photos / f"{picture}.jpg").read_bytes()), (f"{key}.json", json.dumps(row).encode())]


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz")]
)
def test_a_tar_gives_the_rows_of_the_json(name, mode, photos, tmp_path, cache):
    rows = [row("<image>What?", "A."), {"messages": row("<image>B?", "B.")["conversations"], "image": "x/001.jpg"}]
    rows.append({"id": "third", "image": ["in/2.10.png", "in/2.9.png"], **row("<image><image>C?", "C.")})
    members = [*sample("000", photos, **rows[0]), *sample("001", photos, 1, **rows[1])]
    for i in (9, 10):
        members.append((f"2.{i}.png", (photos / f"{i - 8}.jpg").read_bytes()))
    members += [("2.json", json.dumps(rows[2]).encode()), ("._2.jpg", b"of macOS")]
    members += [("d/3.mp4", (photos / "v.mp4").read_bytes()), ("d/3.json", json.dumps(row("<video>D?", "D.")).encode())]
    path = as_tar(tmp_path / "sets" / name, members, mode)
    plain = [row("<image>What?", "A.", image="0.jpg"), row("<image>B?", "B.", image="1.jpg")]
    plain += [row("<image><image>C?", "C.", image=["2.jpg", "1.jpg"]), row("<video>D?", "D.", video="v.mp4")]
    assert shown(path) == shown(write_json(photos / "a.json", plain))
    assert [one.id for one in rows_of(path).samples] == ["000", "001", "third", "d/3"]
    kept = sorted(file.read_bytes() for file in cache.rglob("media/*/*"))
    assert kept == sorted((photos / name).read_bytes() for name in ("0.jpg", "1.jpg", "2.jpg", "v.mp4"))


def test_pictures_of_a_row_stand_in_the_order_of_their_numbers(photos, tmp_path):
    files = {"10": "0.jpg", "9": "1.jpg"}
    members = [(f"k.{i}.jpg", (photos / name).read_bytes()) for i, name in files.items()]
    members.append(("k.json", json.dumps(row("<image><image>?", "A.")).encode()))
    [[(_, parts), _]] = shown(as_tar(tmp_path / "a.tar", members))
    assert parts[:2] == [(photos / "1.jpg").read_bytes(), (photos / "0.jpg").read_bytes()]


def test_addresses_in_the_json_of_a_tar_name_no_member(photos, tmp_path):
    """img2dataset stores the address of a picture, which may end with the name of the member."""
    told = {"url": "http://x.y/0.jpg", "key": "0", **row("<image>?", "A.")}
    members = sample("0", photos, **told, meta={"url": "http://x.y/0.jpg"})
    [[(_, parts), _]] = shown(as_tar(tmp_path / "a.tar", members))
    assert parts == [(photos / "0.jpg").read_bytes(), "?"]


def test_parts_in_a_tar_name_its_members(photos, tmp_path):
    content = [{"type": "image", "image": f"0.{i}.jpg"} for i in (1, 0)]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A."}]
    members = [(f"0.{i}.jpg", (photos / f"{i}.jpg").read_bytes()) for i in (0, 1)]
    members.append(("0.json", json.dumps({"messages": turns}).encode()))
    [[(_, parts), _]] = shown(as_tar(tmp_path / "a.tar", members))
    assert parts == [(photos / "1.jpg").read_bytes(), (photos / "0.jpg").read_bytes()]


def test_captions_of_a_tar_need_a_question(photos, tmp_path, capsys):
    members = [("0.jpg", (photos / "0.jpg").read_bytes()), ("0.txt", b"A temple.\n"), ("0.cls", b"7")]
    path = as_tar(tmp_path / "a.tar", members)
    assert main([*CHECK, str(path)]) == 1
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if line.strip().startswith("--columns"))
    assert DESCRIBE in line
    assert main([*CHECK, str(path), *shlex.split(line)]) == 0
    picture = (photos / "0.jpg").read_bytes()
    [[(_, asked), (_, answer)]] = shown(path, shlex.split(line)[1])
    assert (asked, answer) == ([picture, "Describe the picture."], ["A temple."])


def test_several_tars_are_one_table(photos, tmp_path):
    for i in range(9, 12):
        as_tar(tmp_path / f"s-{i:03}.tar", sample(f"{i}", photos, **row("<image>?", f"{i}")))
    for pattern in ("s-{009..011}.tar", "s-*.tar", "s-{009,010,011}.tar", ""):
        assert [turns[1][1] for turns in shown(tmp_path / pattern)] == [["9"], ["10"], ["11"]]
    paths = [str(tmp_path / "s-{009..010}.tar"), str(tmp_path / "s-010.tar")]
    with pytest.raises(ConfigError, match="named twice"):
        index_rows(paths, image_folder=None, family=FAMILY)


def _link(kind, target):
    info = tarfile.TarInfo("000.jpg")
    info.type, info.linkname = kind, target
    return [("", info)]


def _long_header():
    info = tarfile.TarInfo("x" * (2 << 20))
    return [("", info)]


BAD_TARS = {
    "a link": (_link(tarfile.SYMTYPE, "/etc/passwd"), "its member 000.jpg is a link"),
    "a hard link": (_link(tarfile.LNKTYPE, "../x"), "its member 000.jpg is a link"),
    "a device": (_link(tarfile.CHRTYPE, ""), "its member 000.jpg is a device"),
    "a pickle": ([("000.pyd", b"cos\nsystem\n")], "its member 000.pyd is not read: pickles run code"),
    "an array": ([("000.npy", b"\x93NUMPY")], "its member 000.npy is not read"),
    "no key": ([("README", b"a")], "its member README has no key and ending"),
    "apart": ([("0.txt", b"a"), ("1.txt", b"b"), ("0.cls", b"c")], "the members of 0 are not next to each other"),
    "twice": ([("0.txt", b"a"), ("0.txt", b"b")], "holds 0.txt twice"),
    "a long header": (_long_header(), "a header of 2,0"),
    "nothing": ([], "holds no rows"),
}


@pytest.mark.parametrize(("members", "reason"), BAD_TARS.values(), ids=BAD_TARS)
def test_tars_that_are_refused(members, reason, tmp_path):
    assert reason in refused(as_tar(tmp_path / "a.tar", members))


def test_a_tar_that_was_cut_or_glued_is_refused(photos, tmp_path):
    path = as_tar(tmp_path / "a.tar", [*sample("0", photos, **row("<image>?", "a")), *sample("1", photos, **row())])
    whole = path.read_bytes()
    ends = whole.index(b"1.jpg")  # where the header of the second row begins
    for cut in (100, ends, ends + 700):
        assert "cut short" in refused(write(tmp_path / "b.tar", whole[:cut]))
    assert "has data after its end" in refused(write(tmp_path / "b.tar", whole + whole))


def test_names_of_members_lead_nowhere(photos, tmp_path, cache):
    for key in ("../../../evil", str(tmp_path / "evil")):
        path = as_tar(tmp_path / "a.tar", sample(key, photos, **row("<image>?", "a")))
        assert len(shown(path)) == 1
    assert not list(tmp_path.rglob("*evil*"))
    assert not list(tmp_path.parent.glob("evil*"))


def test_a_row_of_a_tar_that_cannot_be_read_is_one_bad_row(photos, tmp_path):
    members = [*sample("0", photos, **row("<image>?", "a")), ("1.json", b"{"), ("2.jpg", b"")]
    members += [("3.jpg", b"\xff\xd8\xff"), ("3.1.jpg", b"\xff\xd8\xff"), ("3.json", b'{"image": "3.jpg"}')]
    members += [("4.jpg", b"\xff\xd8\xff"), ("4.json", json.dumps(row("<image>?", "a", image=["a", "b"])).encode())]
    members += [
        ("5.wav", b"RIFF"),
        ("5.json", json.dumps(row()).encode()),
        ("6.json", json.dumps(row()["conversations"]).encode()),
    ]
    rows = rows_of(as_tar(tmp_path / "a.tar", members))
    assert [one.index for one in rows.samples] == [0, 6]
    said = [
        "1.json is not JSON",
        "2.jpg is empty",
        "names 3.jpg and not 3.1.jpg",
        '2 in "image" of its .json, and 1',
        "sound",
    ]
    assert [one.index for one in rows.bad] == [1, 2, 3, 4, 5]
    assert all(why in one.reason for why, one in zip(said, rows.bad, strict=True))


# ---- folders


METADATA = {
    "csv": lambda at, rows: as_csv(at / "metadata.csv", rows),
    "jsonl": lambda at, rows: write_json(at / "metadata.jsonl", rows),
    "parquet": lambda at, rows: parquet.write_table(pa.Table.from_pylist(rows), at / "metadata.parquet"),
}


@pytest.mark.parametrize("kind", METADATA)
def test_a_folder_with_metadata(kind, photos):
    rows = [{"file_name": f"{i}.jpg", "text": f"Picture {i}."} for i in range(3)]
    METADATA[kind](photos, rows)
    said = refused(photos)
    assert DESCRIBE in said
    plain = [row("<image>Describe the picture.", one["text"], image=one["file_name"]) for one in rows]
    columns = next(line for line in said.splitlines() if line.startswith("  --columns"))
    assert shown(photos, shlex.split(columns)[1]) == shown(write_json(photos.parent / "a.json", plain), None, photos)


def test_other_names_of_files_in_metadata(photos):
    ask = {"query": "<image><image>?", "response": "a"}
    plain = [row("<image><image>?", "a", image=["0.jpg", "1.jpg"]), row("<video>?", "b", video="v.mp4")]
    rows = [{"file_names": ["0.jpg", "1.jpg"], **ask}, {"file_name": "v.mp4", "query": "<video>?", "response": "b"}]
    write_json(photos / "metadata.jsonl", rows)
    expected = shown(write_json(photos.parent / "a.json", plain), None, photos)
    assert shown(photos) == expected
    pairs = [{"left_file_name": "0.jpg", "right_file_name": "1.jpg", "question": "?", "answer": "a"}]
    write_json(photos / "metadata.jsonl", pairs)
    assert shown(photos, "question=question,answer=answer,image=left,image=right") == expected[:1]
    write_json(photos / "metadata.jsonl", [{"image_file_name": "0.jpg", "file_name": "1.jpg", **ask}])
    assert "name its image" in rows_of(photos).bad[0].reason


def test_a_folder_for_each_class(tmp_path, photos, capsys):
    for i, name in enumerate(("temple", "flower")):
        (tmp_path / "set" / name / "deep").mkdir(parents=True)
        (photos / f"{i}.jpg").rename(tmp_path / "set" / name / "deep" / f"{i}.jpg")
    path = tmp_path / "set"
    said = refused(path)
    assert "'answer=label,image=image,question:=What is in the picture?'" in said
    got = shown(path, "answer=label,question:=Which, a, or b?")
    assert [(turns[0][1][1], turns[1][1]) for turns in got] == [
        ("Which, a, or b?", [name]) for name in ("flower", "temple")
    ]
    (path / "flower").rename(path / "train")
    assert f"Name one: {path / 'train'}" in refused(path)


def test_folders_without_rows(tmp_path, photos):
    assert "a folder of 4 pictures or videos (0.jpg) without text" in refused(photos)
    write_json(photos / "rows.jsonl", [row()])
    assert f"Name the data file itself: {photos / 'rows.jsonl'}" in refused(photos)
    as_tar(tmp_path / "w" / "a.tar", sample("0", photos, **row("<image>?", "a")))
    parquet.write_table(pa.table({"key": ["0"]}), tmp_path / "w" / "a.parquet")
    assert "Name those that are the data" in refused(tmp_path / "w")


def test_arrow_files_and_classes_of_datasets(tmp_path, photos):
    """`datasets` writes class numbers into the file, and their names into its schema."""
    features = {"label": {"names": ["flower", "temple"], "_type": "ClassLabel"}, "picture": {"_type": "Image"}}
    meta = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    content = {"bytes": (photos / "0.jpg").read_bytes(), "path": "0.jpg"}
    table = pa.Table.from_pylist([{"picture": content, "label": 1}]).replace_schema_metadata(meta)
    for name, make in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / name), "wb") as out, make(out, table.schema) as stream:
            stream.write_table(table)
    parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("stream.arrow", "file.arrow", "a.parquet"):
        [[(_, asked), (_, answer)]] = shown(tmp_path / name, "image=picture,answer=label,question:=What?")
        assert (asked, answer) == ([content["bytes"], "What?"], ["temple"])


# ---- --columns


def test_columns_of_json(tmp_path, photos):
    raw = [
        {
            "q": "Which?",
            "qa": {"answer": 4},
            "pics": ["0.jpg", "1.jpg"],
            "who": "Be brief.",
            "n": 7,
            "max_pixels": 50000,
        },
        {"q": "And <image>?", "qa": {"answer": "b"}, "pics": "2.jpg"},
        {"q": "And?", "qa": {"answer": "b"}, "pics": [], "messages": [{"role": "user", "content": "other"}]},
    ]
    turns = row("<image>\n<image>\nWhich?", "4", image=["0.jpg", "1.jpg"])["conversations"]
    system = {"from": "system", "value": "Be brief."}
    plain = [{"image": ["0.jpg", "1.jpg"], "max_pixels": 50000, "conversations": [system, *turns]}]
    plain += [row("And <image>?", "b", image="2.jpg"), row("And?", "b")]
    columns = "question=q,answer=qa.answer,image=pics,system=who,id=n"
    expected = rows_of(write_json(tmp_path / "p.json", plain), None, photos)
    for name in ("a.json", "a.jsonl"):
        got = rows_of(write_json(tmp_path / name, raw), columns, photos)
        assert got.bad == ()
        assert shown(tmp_path / name, columns, photos) == shown(tmp_path / "p.json", None, photos)
        assert [one.id for one in got.samples] == ["7", None, None]
        media = [[part.overrides for part in one.media] for one in got.samples]
        assert media == [[part.overrides for part in one.media] for one in expected.samples]


def test_several_columns_make_a_question(tmp_path, photos):
    rows = [{"q": ["Which?", "A. b"], "hint": "Look.", "a": "A."}, {"q": "Who?", "a": "B."}]
    path = write_json(tmp_path / "a.json", rows)
    got = shown(path, "question=hint,question=q,question:=In a word.,answer=a", photos)
    assert [turns[0][1] for turns in got] == [["Look.\nWhich?\nA. b\nIn a word."], ["Who?\nIn a word."]]


def test_frames_of_one_video_have_one_tag(tmp_path, photos):
    path = write_json(tmp_path / "a.json", [{"q": "?", "a": "A.", "f": ["0.jpg", "1.jpg"]}])
    [one] = rows_of(path, "question=q,answer=a,video=f", photos).samples
    assert [len(part.frames) for part in one.media] == [2]


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({"q": "a"}, "a, the answer by --columns, is empty"),
        ({"q": "", "a": "b"}, "q, the question by --columns, is empty"),
        ({"q": {"x": "a"}, "a": "b"}, "q, the question by --columns, is an object, not text"),
        ({"q": "a", "a": ["b"]}, "a, the answer by --columns, is a list, not text"),
        ({"q": "a", "a": 0.5}, "a, the answer by --columns, is a number, not text"),
        ({"q": "a", "a": True}, "a, the answer by --columns, is true, not text"),
        ([], "is a list, not an object"),
    ],
)
def test_rows_that_columns_do_not_fit(raw, why, tmp_path):
    rows = rows_of(write_json(tmp_path / "a.json", [{"q": "a", "a": "b"}, raw]), "question=q,answer=a")
    assert [one.index for one in rows.samples] == [0]
    assert why in rows.bad[0].reason


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("question=q,answr=a", "'answr' is not a part of a row. Parts are question, answer, system, image"),
        ("question", "is not part=column"),
        ("", "names no column"),
        ("question=q", "question without answer. Add answer=COLUMN"),
        ("answer=a", "or a text: 'question:=Describe the picture.'"),
        ("question=q,answer=", "answer is empty"),
        ("question=q,answer=a,answer=b", "answer is given twice"),
        ("question=q,answer=a,image:=b.jpg", "only question, answer, system may be a text"),
        ("question:=q,answer:=a", "reads no column"),
        ("conversations=c,question=q,answer=a", "both name the conversation"),
        ({"question": 3, "answer": "a"}, "--columns.question: is 3"),
        ('{"question": ', "not JSON"),
        (["question"], "is ['question'], not a mapping"),
    ],
)
def test_columns_that_are_refused(given, why):
    with pytest.raises(ConfigError) as caught:
        read_columns(given)
    assert why in str(caught.value)


def test_a_wrong_flag_is_refused_before_data_are_opened(capsys):
    assert main([*CHECK, "gone.csv", "--columns", "foo=a"]) == 1
    assert "'foo' is not a part of a row" in capsys.readouterr().err


def test_a_column_that_no_row_has(tmp_path):
    rows = [{"q": "a", "a": "b"}, {"q": "a", "a": "b", "late": "c"}]
    for path in (write_json(tmp_path / "a.jsonl", rows), as_csv(tmp_path / "a.csv", rows)):
        assert "no row has 'ask'. Its columns are q, a, late. For a text that is the same" in refused(
            path, "question=ask,answer=a"
        )
        assert len(rows_of(path, "question=q,answer=a,system=late").samples) == 2


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("query,response", None),
        ("question,answer", None),
        ("prompt,completion", None),
        ("question,choices,answer", "choices may belong to the question"),
        ("question,answer,query,response", "several columns may be the conversation"),
        ("query,label", "no column is a conversation"),
        ("picture,words", "--columns 'answer=words,image=picture,question:=Describe the picture.'"),
        ("image,frage,antwort", "--columns answer=antwort,image=image,question=frage"),
    ],
)
def test_what_names_of_columns_tell(names, said, tmp_path):
    path = write(tmp_path / "a.csv", f"{names}\n{','.join('abcd'[: names.count(',') + 1])}\n")
    if said is None:
        assert shown(path) == [[("user", ["a"]), ("assistant", ["b"])]]
        return
    text = refused(path)
    assert said in text
    line = next(line for line in text.splitlines() if line.startswith("  --columns"))
    read_columns(shlex.split(line)[1])


# ---- through the command line


def test_fixed_rows_train_the_same_without_the_flag(tmp_path, photos, base, capsys):
    rows = [{"pic": f"{i}.jpg", "q": f"What is {i}?", "a": f"Picture {i}."} for i in range(3)] + [{"q": "No answer."}]
    path = as_csv(photos / "a.csv", rows)
    flags = ["--columns", "question=q,answer=a,image=pic", "--image_folder", str(photos)]
    assert main([*CHECK, str(path), *flags, "--fix", str(tmp_path / "clean.jsonl")]) == 1
    refused_rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [one["row"] for one in refused_rows] == [{"q": "No answer."}]
    fixed = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    assert fixed[0] == row("<image>\nWhat is 0?", "Picture 0.", image="0.jpg")
    capsys.readouterr()
    model = ["--model_id", str(base), "--image_folder", str(photos), "--json", "--index", "0-2"]
    seen = []
    for words in ([str(path), *flags[:2]], [str(tmp_path / "clean.jsonl")]):
        assert main(["preview", *words, *model]) == 0
        seen.append(json.loads(capsys.readouterr().out)["rows"])
    for with_flag, without in zip(*seen, strict=True):
        for key in ("input_ids", "labels", "image_grid_thw", "text"):
            assert with_flag[key] == without[key]
    assert seen[0][0]["image_grid_thw"]


def test_a_mix_has_columns_of_its_own_and_a_run_remembers_them(tmp_path, photos, base, capsys, monkeypatch):
    """A run trains two steps on a CSV with pictures. With another mapping it cannot be resumed."""
    as_csv(photos / "a.csv", [{"pic": f"{i}.jpg", "q": "What?", "a": f"It is {i}.", "b": "Else."} for i in range(3)])
    write_json(photos / "b.json", [row("<image>Hm?", "Yes.", image="0.jpg")])
    mix = [{"path": str(photos / "a.csv"), "columns": {"question": "q", "answer": "a", "image": "pic"}}]
    mix.append({"path": str(photos / "b.json")})
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    out = tmp_path / "out"
    flags = [
        "--model_id",
        str(base),
        "--data_mix",
        str(tmp_path / "mix.yaml"),
        "--output_dir",
        str(out),
        "--use_cpu",
        "true",
    ]
    flags += [
        "--max_steps",
        "2",
        "--gradient_accumulation_steps",
        "1",
        "--save_strategy",
        "no",
        "--dataloader_num_workers",
        "0",
    ]
    looked: list[str] = []
    unpacked = reading.unpacked
    monkeypatch.setattr(reading, "unpacked", lambda path, *a, **k: looked.append(path) or unpacked(path, *a, **k))
    assert main(["train", *flags, "--lora_rank", "2", "--report_to", "none"]) == 0
    assert looked == [str(photos / "a.csv")]  # once, for its rows and for their print
    record = json.loads((out / "vlft.json").read_text())
    assert record["training"]["columns"] == ["question=q,answer=a,image=pic", "none"]
    assert [entry["trained"] for entry in record["data"]] == [3, 1]
    again = ["--config", str(out / "config.yaml")]
    mix[0]["columns"] = dict(reversed(mix[0]["columns"].items()))
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix, sort_keys=False))
    assert main(["train", *again]) == 0  # finished, and the same in another order
    mix[0]["columns"]["answer"] = "b"
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mix))
    capsys.readouterr()
    assert main(["train", *flags, "--lora_rank", "2", "--report_to", "none"]) == 1
    said = capsys.readouterr().err
    assert "its columns of data files are question=q,answer=a,image=pic, none" in said
    assert "question=q,answer=b,image=pic" in said


def test_columns_in_yaml_are_those_of_the_command_line(tmp_path, photos, capsys):
    path = as_csv(photos / "a.csv", [{"cap": "A temple.", "image": "0.jpg"}])
    config = {"columns": {"answer": "cap", "question": {"text": "What, exactly?"}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main([*CHECK, str(path), "--config", str(tmp_path / "c.yaml")]) == 0
    assert str(read_columns(config["columns"])) == "question:=What, exactly?,answer=cap"
    assert read_columns(str(read_columns(config["columns"]))) == read_columns(config["columns"])
