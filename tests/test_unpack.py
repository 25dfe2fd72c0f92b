"""Parquet files and folders of data sets are unpacked once, completely, to the same rows; and which are refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
from build import FAMILY, row, write_json
from kit_rows import LLAVA, MS_SWIFT, openai, parse_row, same
from pyarrow import parquet

from vlft.cli.main import main
from vlft.data.files import unpack
from vlft.data.files.index import DataFile, index_rows, parsed
from vlft.data.rows.access import Access
from vlft.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLFT_MEDIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def raw_rows(path) -> list[tuple[int, object]]:
    index = index_rows([str(path)], image_folder=None, family=FAMILY)
    return [(place, index.raw(place)) for place in range(len(index))]


def embedded(media, name):
    return {"bytes": (media / name).read_bytes(), "path": name}


def llava_table(media, how):
    """`LLAVA` with its media in the cells, as on the Hugging Face hub."""
    rows = []
    for raw in LLAVA:
        files = {"images": raw.get("image") or [], "videos": raw.get("video") or []}
        files = {key: [names] if isinstance(names, str) else names for key, names in files.items()}
        shown = {key: [how(media, name) for name in names] for key, names in files.items()}
        rows.append({"id": raw["id"], "conversations": raw["conversations"], **shown, "embedding": [0.5, 1.0]})
    return pa.Table.from_pylist(rows)


def parts_table(media):
    """The rows with OpenAI's parts, and the pictures in the parts."""
    rows = openai(
        media, lambda name: {"type": "video" if name.endswith("4") else "image", "image": None, "video": None}
    )
    for made, raw in zip(rows, LLAVA, strict=True):
        names = [*_listed(raw.get("image")), *_listed(raw.get("video"))]
        for turn in made["messages"]:
            if isinstance(turn["content"], str):
                turn["content"] = [{"type": "text", "text": turn["content"]}]
            for part in turn["content"]:
                if part["type"] != "text":
                    part[part["type"]] = embedded(media, names.pop(0))
    return pa.Table.from_pylist(rows)


def _listed(value):
    return value if isinstance(value, list) else [value] if value else []


def swift_table(media):
    rows = [
        {**raw, "images": [embedded(media, _name(item)) for item in raw.get("images", [])]} for raw in MS_SWIFT[1:2]
    ]
    return pa.Table.from_pylist([{key: value for key, value in raw.items() if value != []} for raw in rows])


def _name(item):
    return item["path"] if isinstance(item, dict) else item


def save_to_disk(table, folder, shards=2):
    """Write a folder as `datasets.Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    size, files = -(-len(table) // shards), []
    for i in range(shards):
        files.append({"filename": f"data-{i:05}-of-{shards:05}.arrow"})
        part = table.slice(i * size, size)
        with pa.OSFile(str(folder / files[-1]["filename"]), "wb") as out, pa.ipc.new_stream(out, part.schema) as stream:
            stream.write_table(part, max_chunksize=1)
    state = {
        "_data_files": files,
        "_fingerprint": "0",
        "_format_type": None,
        "_indices_data_files": None,
        "_split": "train",
    }
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def as_parquet(table, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, **options)
    return path


def _shards(table, folder):
    as_parquet(table.slice(0, 2), folder / "data" / "train-00000-of-00002.parquet")
    as_parquet(table.slice(2), folder / "data" / "train-00001-of-00002.parquet")
    return folder


TABLES = {
    "structs in parquet": lambda media, at: as_parquet(llava_table(media, embedded), at / "a.parquet"),
    "bytes in parquet": lambda media, at: as_parquet(
        llava_table(media, lambda media, name: (media / name).read_bytes()), at / "a.parquet", row_group_size=1
    ),
    "paths in parquet": lambda media, at: as_parquet(llava_table(media, lambda _, name: name), at / "a.PARQUET"),
    "paths in structs": lambda media, at: as_parquet(
        llava_table(media, lambda _, name: {"bytes": None, "path": name}), at / "a.parquet"
    ),
    "parts in parquet": lambda media, at: as_parquet(parts_table(media), at / "a.parquet"),
    "a folder of shards": lambda media, at: _shards(llava_table(media, embedded), at / "set"),
    "a saved data set": lambda media, at: save_to_disk(llava_table(media, embedded), at / "set"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_give_the_rows_of_the_json(name, tmp_path, media, encoder, cache):
    path = TABLES[name](media, tmp_path)
    rows = parsed(index_rows([str(path)], image_folder=str(media), family=FAMILY, access=Access()))
    assert rows.bad == ()
    assert rows.counts == {str(path): 3}
    assert [(sample.file, sample.index, sample.id) for sample in rows.samples] == [
        (str(path), i, name) for i, name in enumerate(("two", "system", "text"))
    ]
    for sample, raw in zip(rows.samples, LLAVA, strict=True):
        same(encoder.encode(sample), encoder.encode(parse_row(raw, media)))
    kept = sorted(file.read_bytes() for file in cache.rglob("media/*/*"))
    names = ["flower.jpg", "astronaut.jpg", "china.jpg", "clip.mp4"]
    assert kept == ([] if name.startswith("paths") else sorted((media / name).read_bytes() for name in names))


def test_preview_of_a_parquet_row_is_that_of_the_json(capsys, tmp_path, media, base):
    flags = ["--model_id", str(base), "--image_folder", str(media), "--index", "1", "--json"]
    shown = []
    for path in (
        as_parquet(llava_table(media, embedded), tmp_path / "a.parquet"),
        write_json(tmp_path / "a.json", LLAVA),
        save_to_disk(llava_table(media, embedded), tmp_path / "set"),
    ):
        assert main(["preview", str(path), *flags]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    for key in ("input_ids", "labels", "position_ids", "image_grid_thw", "video_grid_thw", "text", "id", "index"):
        assert shown[0][key] == shown[1][key] == shown[2][key]


def test_the_old_form_of_ms_swift_in_parquet(tmp_path, media, encoder):
    path = as_parquet(swift_table(media), tmp_path / "a.parquet")
    (sample,) = parsed(index_rows([str(path)], image_folder=str(media), family=FAMILY)).samples
    same(encoder.encode(sample), encoder.encode(parse_row(LLAVA[1], media)))


def test_an_object_of_lists_is_a_list_of_objects(tmp_path):
    turns = {"from": ["human", "gpt"], "value": ["a", "b"]}
    path = as_parquet(pa.Table.from_pylist([{"conversations": turns}]), tmp_path / "a.parquet")
    assert raw_rows(path) == [(0, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})]


def test_it_is_unpacked_once_and_again_where_it_changed(tmp_path, media, cache):
    path = as_parquet(llava_table(media, embedded), tmp_path / "a.parquet")
    first = unpack.unpacked(str(path))
    stamp = os.stat(first.rows).st_mtime_ns
    assert unpack.unpacked(str(path)) == first
    assert os.stat(first.rows).st_mtime_ns == stamp
    with open(first.rows, "a") as file:
        file.write("{}\n")  # someone changed the file
    assert unpack.unpacked(str(path)) == first
    assert len(raw_rows(path)) == 3
    as_parquet(llava_table(media, embedded).slice(1), path)
    assert [raw["id"] for _, raw in raw_rows(path)] == ["system", "text"]


def test_the_print_of_the_rows_does_not_hang_on_the_cache(tmp_path, monkeypatch, media):
    path = str(as_parquet(llava_table(media, embedded), tmp_path / "a.parquet"))
    first = DataFile(path, image_folder=None).print()
    monkeypatch.setenv("VLFT_MEDIA_CACHE", str(tmp_path / "elsewhere"))
    assert DataFile(path, image_folder=None).print() == first
    as_parquet(llava_table(media, embedded).slice(1), tmp_path / "a.parquet")
    assert DataFile(path, image_folder=None).print() != first


def test_several_at_once_unpack_it_once(tmp_path, monkeypatch, media):
    path = str(as_parquet(llava_table(media, embedded), tmp_path / "a.parquet"))
    made, make = [], unpack._make
    monkeypatch.setattr(unpack, "_make", lambda *a, **k: (made.append(1), time.sleep(0.2), make(*a, **k)))
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: unpack.unpacked(path), range(4)))
    assert len(found) == len(made) == 1


def _unpack_slowly(path, started):
    line = unpack._Writer.line

    def slow(self, row):
        if self.rows == 2:
            started.set()
            time.sleep(60)
        return line(self, row)

    unpack._Writer.line = slow
    unpack.unpacked(path)


def test_one_that_was_killed_is_done_again(tmp_path, media, cache):
    path = str(as_parquet(llava_table(media, embedded), tmp_path / "a.parquet"))
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_unpack_slowly, args=(path, started))
    process.start()
    assert started.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = [item.name for item in (cache / "unpacked").iterdir()]
    assert any(name.endswith(".tmp") for name in left)
    assert len(raw_rows(path)) == 3
    left = [item.name for item in (cache / "unpacked").iterdir()]
    assert not any(name.endswith(".tmp") for name in left)
    assert len(left) == 2  # the folder and its lock


def _text(count=2, **keys):
    return pa.Table.from_pylist([{**row(), **keys}] * count)


def _cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    return path


def _damaged(path):
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    return path


def _encrypted(path):
    path.write_bytes(path.read_bytes()[:-4] + b"PARE")
    return path


def _saved_without(folder, name):
    (folder / name).unlink()
    return folder


def _files(folder, *names):
    for name in names:
        as_parquet(_text(), folder / name)
    return folder


def _write(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


BAD = {
    "no such file": (lambda at: at / "gone.parquet", "no such file"),
    "no parquet": (
        lambda at: _write(at / "a.parquet", "id,text\n"),
        "is not a parquet file, although its name says so",
    ),
    "empty file": (lambda at: _write(at / "a.parquet"), "is not a parquet file"),
    "cut short": (lambda at: _cut(as_parquet(_text(), at / "a.parquet"), -100), "is cut short"),
    "damaged": (lambda at: _damaged(as_parquet(_text(), at / "a.parquet")), "damaged or cut short"),
    "encrypted": (lambda at: _encrypted(as_parquet(_text(), at / "a.parquet")), "is encrypted"),
    "no rows": (lambda at: as_parquet(_text().slice(0, 0), at / "a.parquet"), "holds no rows"),
    "no conversation": (
        lambda at: as_parquet(pa.table({"text": ["a"], "image": ["b"]}), at / "a.parquet"),
        "no column is a conversation. Its columns are text, image",
    ),
    "a conversation of numbers": (
        lambda at: as_parquet(pa.table({"messages": [3]}), at / "a.parquet"),
        "its column messages is int64, where a list of turns belongs",
    ),
    "pictures of numbers": (
        lambda at: as_parquet(_text(image=3), at / "a.parquet"),
        "its column image is int64, where paths",
    ),
    "an answer of numbers": (
        lambda at: as_parquet(pa.table({"query": ["a"], "response": [3]}), at / "a.parquet"),
        "its column response is int64, where text belongs",
    ),
    "an empty folder": (lambda at: at, "a folder without data. It holds nothing"),
    "two splits": (lambda at: _files(at, "train-0.parquet", "test-0.parquet"), "several splits (test-0, train-0)"),
    "a set of splits": (lambda at: _write(at / "dataset_dict.json").parent, "holds several splits"),
    "other columns": (
        lambda at: as_parquet(_text(extra=1), _files(at, "a.parquet") / "b.parquet").parent,
        "b.parquet: its columns are not those of",
    ),
    "a shard is missing": (
        lambda at: _saved_without(save_to_disk(_text(), at / "s"), "data-00001-of-00002.arrow"),
        "data-00001-of-00002.arrow is missing",
    ),
    "a shard is cut": (
        lambda at: _cut(save_to_disk(_text(), at / "s") / "data-00001-of-00002.arrow", -200).parent,
        "damaged or cut short",
    ),
    "a state of nothing": (lambda at: _write(at / "s" / "state.json", "{").parent, "was not written by save_to_disk"),
}


@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=BAD)
def test_refused(make, reason, tmp_path, cache):
    (tmp_path / "at").mkdir()
    path = make(tmp_path / "at")
    with pytest.raises(ConfigError) as caught:
        raw_rows(path)
    assert reason in str(caught.value)
    assert str(tmp_path / "at") in str(caught.value)
    assert list(cache.rglob("rows.jsonl")) == []


def test_nowhere_to_unpack_to(tmp_path, monkeypatch):
    monkeypatch.setenv("VLFT_MEDIA_CACHE", "0")
    with pytest.raises(ConfigError, match="no folder to unpack it to"):
        raw_rows(as_parquet(_text(), tmp_path / "a.parquet"))


def test_check_data_names_the_table_and_its_row(capsys, tmp_path, media):
    table = pa.Table.from_pylist([row("<image>", images=[{"bytes": b"none", "path": None}]), row("<image>", images=[])])
    path = as_parquet(table, tmp_path / "a.parquet")
    assert main(["check-data", str(path), "--json"]) == 1
    bad = json.loads(capsys.readouterr().out)["bad"]
    assert [(one["file"], one["index"], one["field"]) for one in bad] == [
        (str(path), 0, "images[0]"),
        (str(path), 1, "conversations[0]"),
    ]


def test_turns_of_unequal_length_and_text_that_is_none_name_their_row(tmp_path):
    turns = {"from": ["human", "gpt"], "value": ["a"]}
    path = as_parquet(pa.Table.from_pylist([{"conversations": turns}]), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet\[0\]: its turns are lists of different lengths"):
        raw_rows(path)
    text = pa.array([b"\xff\xfe"], type=pa.binary()).view(pa.string())
    said = pa.array([[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]])
    path = as_parquet(pa.table({"conversations": said, "id": text}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"b\.parquet: .*cannot be read"):
        raw_rows(path)
