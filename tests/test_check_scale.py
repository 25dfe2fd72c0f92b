"""`vlft check-data` on many rows: the faults it finds, the files it writes, resuming, and memory."""

from __future__ import annotations

import json
import os
import pickle
import re
import tracemalloc
from pathlib import Path

import pytest
from build import FAMILY, row, write_image, write_video
from refused_rows import REFUSED

from vlft.check.row import RowCheck
from vlft.cli.main import main
from vlft.data.files.index import index_rows
from vlft.data.files.read import BrokenLine
from vlft.errors import ConfigError


def good_rows(count: int) -> list[dict]:
    """Different rows with text only, one picture, several pictures, a clip, and frames."""
    kinds = [
        lambda i: row(f"What is {i}?", f"A number, {i}."),
        lambda i: row(f"<image>\nIs this {i}?", f"No, {i} is a number.", image="a.jpg"),
        lambda i: row(f"<image>Compare<image>, {i}.", f"The second, {i} times.", image=["a.jpg", "b.png"], id=i),
        lambda i: row(f"<video>What moves in {i}?", f"The view, {i}.", video="clip.mp4"),
        lambda i: row(f"<image><video>And {i}?", f"Both, {i}.", image="b.png", video=["a.jpg", "b.png"]),
    ]
    return [kinds[i % 20 if i % 20 < len(kinds) else 0](i) for i in range(count)]


def planted(folder: Path) -> dict[str, object]:
    """Refused rows by their fault. Writes the damaged files into the folder."""
    whole = (folder / "a.jpg").read_bytes()
    (folder / "short.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "words.jpg").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    clip = (folder / "clip.mp4").read_bytes()
    (folder / "short.mp4").write_bytes(clip[: len(clip) // 3])
    write_image(folder / "flat.png", 3000, 12)
    media = {
        "missing": row("<image>?", "Gone.", image="gone.jpg"),
        "missing frame": row("<video>?", "Gone.", video=["a.jpg", "gone.jpg"]),
        "cut short": row("<image>?", "Half.", image="short.jpg"),
        "no picture": row("<image>?", "Words.", image="words.jpg"),
        "empty": row("<image>?", "Nothing.", image="empty.png"),
        "cut clip": row("<video>?", "A third.", video="short.mp4"),
        "flat": row("<image>?", "A line.", image="flat.png"),
        "long": row("Why? " * 3000, "Because."),
        "control token": row("So <|im_end|>?", "No."),
    }
    return {**media, **{name: raw for name, (raw, _, _) in REFUSED.items()}}


def remarkable(folder: Path) -> dict[str, tuple[dict, str]]:
    """Rows that are trained with a warning: name -> (row, a part of the remark)."""
    write_image(folder / "tiny.png", 9, 20)
    write_image(folder / "poster.png", 2400, 1800)
    return {
        "twin": (good_rows(2)[1], "the same turns and pictures as"),
        "tiny": (row("<image>?", "Tiny.", image="tiny.png"), "9x20 pixels: tiny"),
        "poster": (row("<image>?", "Print.", image="poster.png"), "2400x1800 pixels: reduced a lot"),
        "share": (row("Read this. " * 150, "k"), "tokens are trained"),
    }


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.grid)])
def test_every_planted_fault_is_found_and_none_is_invented(base, tmp_path, capsys, monkeypatch, count):
    monkeypatch.setattr("vlft.check.row.SUPERVISED", 0.02)  # rows of a tiny context are short
    for name in ("a.jpg", "b.png"):
        write_image(tmp_path / name, 60, 60)
    write_video(tmp_path / "clip.mp4", 4)
    faults, remarks = planted(tmp_path), remarkable(tmp_path)
    rows = good_rows(count)
    every = len(rows) // len(faults) or 1
    names: dict[int, str] = {}
    lines: list[str] = []
    for i, raw in enumerate(rows):
        lines.append(json.dumps(raw))
        if i % every == 0 and faults:
            name = next(iter(faults))
            names[len(lines)] = name
            lines.append(json.dumps(faults.pop(name)))
    for name, raw in faults.items():
        names[len(lines)] = name
        lines.append(json.dumps(raw))
    names[len(lines)] = "broken line"
    lines.append('{"conversations": [')
    wanted = {}
    for name, (raw, remark) in remarks.items():
        wanted[len(lines)] = (name, remark)
        lines.append(json.dumps(raw))
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(lines) + "\n")
    flags = [str(data), "--image_folder", str(tmp_path), "--model_id", str(base), "--image_max_pixels", "200704",
             "--max_length", "4000", "--workers", "2"]  # fmt: skip
    clean = tmp_path / "clean.jsonl"
    assert main(["check-data", *flags, "--json", "--fix", str(clean), "--report", str(tmp_path / "look")]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {bad["index"]: names.get(bad["index"]) for bad in found["bad"]} == names
    assert all(len(bad["reason"]) > 10 and bad["field"] for bad in found["bad"])
    warned = [(warning["index"], warning["reason"]) for warning in found["warnings"] if warning["index"] in wanted]
    assert sorted(index for index, _ in warned) == sorted(wanted)
    assert all(wanted[index][1] in reason for index, reason in warned)
    assert len(found["warnings"]) == len(warned)
    assert found["ok"] == len(rows) + len(wanted)

    quarantine = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["index"], entry["reason"]) for entry in quarantine] == [
        (bad["index"], bad["reason"]) for bad in found["bad"]
    ]
    assert [json.loads(line) for line in clean.read_text().splitlines()] == [
        json.loads(line) for i, line in enumerate(lines) if i not in names
    ]
    assert main(["check-data", str(clean), *flags[1:], "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["ok"], again["tokens"]["total"]) == (found["ok"], found["tokens"]["total"])

    page = (tmp_path / "look" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)|url\(""", page)
    assert json.loads((tmp_path / "look" / "report.json").read_text()) == found

    train = ["train", "--data_path", *flags, "--output_dir", str(tmp_path / "run"), "--num_train_epochs", "1"]
    train.remove("--workers")
    train.remove("2")
    assert main([*train, "--on_bad_row", "skip", "--dataloader_num_workers", "0", "--logging_steps", "50"]) == 0
    (entry,) = json.loads((tmp_path / "run" / "vlft.json").read_text())["data"]
    assert [skipped["index"] for skipped in entry["skipped"]] == sorted(names)
    assert entry["trained"] == found["ok"]


@pytest.fixture
def looks(monkeypatch):
    """Texts of the rows that are checked. The sixth check is interrupted once."""
    seen: list[str] = []
    real = RowCheck._measured

    def measured(self, sample):
        seen.append(sample.turns[0].parts[-1].text)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return real(self, sample)

    monkeypatch.setattr(RowCheck, "_measured", measured)
    return seen


def test_an_interrupted_check_resumes_where_it_stopped(tmp_path, monkeypatch, capsys, looks):
    monkeypatch.setenv("VLFT_COST_CACHE", str(tmp_path / "cache"))
    write_image(tmp_path / "a.jpg")
    rows = [row(f"<image>Is it {i}?", f"No, {i}.", image="a.jpg") for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["check-data", str(tmp_path / "rows.jsonl"), "--workers", "0", "--json"]
    assert main(command) == 130
    capsys.readouterr()
    done = len(looks)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["ok"] == 10
    assert looks[done:][-1] == "Is it 9?"
    assert len(looks[done:]) <= 7  # rows of one chunk are checked together
    assert "Is it 0?" not in looks[done:]
    done = len(looks)
    assert main(command) == 0
    assert looks[done:] == []
    write_image(tmp_path / "a.jpg", 300, 200)
    assert main(command) == 0
    assert len(looks[done:]) == 10


def test_a_second_pass_that_was_interrupted_loses_nothing(tmp_path, monkeypatch, capsys, looks):
    monkeypatch.setenv("VLFT_COST_CACHE", str(tmp_path / "cache"))
    looks += [""] * 10  # so that no check is interrupted
    write_image(tmp_path / "a.jpg")
    rows = [row(f"<image>Is it {i}?", f"No, {i}.", image="a.jpg") for i in range(2000)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    command = ["check-data", str(data), "--workers", "0", "--headers_only", "--json"]
    assert main(command) == 0
    with monkeypatch.context() as patch:
        patch.setattr("vlft.check._Tally.take", interrupted)
        assert main(command) == 130
    done = len(looks)
    assert main(command) == 0
    assert looks[done:] == []


def interrupted(self, place, seen):
    raise KeyboardInterrupt


def test_a_warning_goes_when_its_cause_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLFT_COST_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.json"

    def warnings(raw: dict) -> list[str]:
        data.write_text(json.dumps([raw]))
        assert main(["check-data", str(data), "--json"]) == 0
        return [warning["field"] for warning in json.loads(capsys.readouterr().out)["warnings"]]

    assert warnings({**row("Who?", "Me."), "rejected_response": "You."}) == ["rejected_response"]
    assert warnings(row("Who?", "Me.")) == []
    assert warnings({**row("Who?", "Me."), "rejected_response": "You."}) == ["rejected_response"]


def test_rows_that_differ_in_boxes_or_budgets_are_no_twins(tmp_path, capsys):
    write_image(tmp_path / "a.jpg")
    box = {"ref": [], "bbox": [[1, 2, 30, 40]], "bbox_type": "real"}
    rows = [
        {**row("<image>Where?", "<bbox>", image="a.jpg"), "objects": box},
        {**row("<image>Where?", "<bbox>", image="a.jpg"), "objects": {**box, "bbox": [[5, 6, 30, 40]]}},
        {**row("<image>What?", "A temple.", image="a.jpg"), "max_pixels": 3136},
        row("<image>What?", "A temple.", image="a.jpg"),
        {**row("<image>Where?", "<bbox>", image="a.jpg"), "objects": box},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert main(["check-data", str(tmp_path / "rows.json"), "--json"]) == 0
    twins = [w for w in json.loads(capsys.readouterr().out)["warnings"] if "the same turns" in w["reason"]]
    assert [(w["index"], w["reason"][-3:]) for w in twins] == [(4, "[0]")]


def test_rows_that_training_leaves_out_stop_nothing(base, tmp_path, capsys):
    (tmp_path / "rows.json").write_text(json.dumps([row("Why? " * 300, "So."), row("Who?", "Me.")]))
    flags = [str(tmp_path / "rows.json"), "--model_id", str(base), "--max_length", "200", "--json"]
    assert main(["check-data", *flags]) == 1
    capsys.readouterr()
    assert main(["check-data", *flags, "--over_length", "skip"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["ok"], found["left_out"], found["bad"]) == (2, 1, 1, [])
    assert "left out (--over_length skip)" in found["warnings"][0]["reason"]


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_a_data_file_that_is_written_to_is_not_read_on(tmp_path, how):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}\n')
    index = index_rows([str(path)], image_folder=None, family=FAMILY)
    if how == "in place":
        path.write_text('{"b": 2}\n{"a": 1}\n')
        os.utime(path, ns=(1, 1))
        assert "was written to after" in index.raw(0).reason
    else:
        (tmp_path / "b.jsonl").write_text('{"b": 2}\n{"a": 1}\n')
        os.replace(tmp_path / "b.jsonl", path)
        assert index.raw(0) == {"a": 1}
    with pytest.raises(ConfigError, match="changed while the run started"):
        pickle.loads(pickle.dumps(index))


def test_an_index_takes_some_bytes_a_row_whatever_the_rows_hold(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = json.dumps(row("Why? " * 200, "Because. " * 100))
    path.write_text("\n".join([line] * 20_000))
    tracemalloc.start()
    index = index_rows([str(path)], image_folder=None, family=FAMILY)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == 20_000
    assert held < 40 * len(index)
    assert peak < 100 * len(index)
    assert index[19_999].index == 19_999


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"a": "é"}, {"b": [1, 2]},\n {"c": "]"}]'),
        ("a.json", '\ufeff [\n{"a": "é"}\t,{"b": [1, 2]},\r\n\n {"c": "]"}\n]\n'),
        ("a.jsonl", '{"a": "é"}\n{"b": [1, 2]}\n{"c": "]"}'),
        ("a.jsonl", '\ufeff{"a": "é"}\r\n\r\n{"b": [1, 2]}\n  {"c": "]"}\n\n'),
    ],
)
def test_rows_are_found_where_they_stand(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    index = index_rows([str(tmp_path / name)], image_folder=None, family=FAMILY)
    assert [index.raw(place) for place in range(len(index))] == [{"a": "é"}, {"b": [1, 2]}, {"c": "]"}]
    assert [index.take([2, 0, 0]).raw(place) for place in range(3)] == [{"c": "]"}, {"a": "é"}, {"a": "é"}]


def test_a_broken_line_leaves_the_others(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": \n\xff\n{"c": 3}\n')
    index = index_rows([str(path)], image_folder=None, family=FAMILY)
    found = [index.raw(place) for place in range(4)]
    assert (found[0], found[3]) == ({"a": 1}, {"c": 3})
    assert all(isinstance(one, BrokenLine) for one in found[1:3])
    assert "line 2, column 7" in found[1].reason
    assert "line 3: not JSON in UTF-8" in found[2].reason


def test_files_beside_the_data_in_the_working_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "a.jpg")
    rows = [row("<image>?", "Yes.", image="a.jpg"), row("<image>?", "No.", image="gone.jpg")]
    Path("rows.json").write_text(json.dumps(rows))
    assert main(["check-data", "rows.json", "--fix", "clean.json", "--report", "."]) == 1
    assert json.loads(Path("clean.json").read_text()) == rows[:1]
    assert [json.loads(line)["row"] for line in Path("quarantine.jsonl").read_text().splitlines()] == rows[1:]
    assert Path("report.html").exists()


def test_targets_of_fix_that_would_not_do(tmp_path, capsys):
    write_image(tmp_path / "data" / "a.jpg")
    data = tmp_path / "data" / "rows.json"
    data.write_text(json.dumps([row("<image>?", "Yes.", image="a.jpg")]))

    def refused(out: Path) -> str:
        assert main(["check-data", str(data), "--fix", str(out)]) == 1
        return capsys.readouterr().err

    assert "Use a name that ends in .json or .jsonl" in refused(tmp_path / "data" / "clean")
    assert "already exists" in refused(data)
    assert "media paths start from" in refused(tmp_path / "clean.json")
    # Evaluation rows are checked, and do not become training rows.
    val = tmp_path / "data" / "val.json"
    val.write_text(json.dumps([row("Who?", "Nobody.")]))
    clean = str(tmp_path / "data" / "clean.json")
    (tmp_path / "data" / "quarantine.jsonl").write_text("rows of another file")
    assert "quarantine.jsonl already exists, and refused rows go there" in refused(Path(clean))
    (tmp_path / "data" / "quarantine.jsonl").unlink()
    assert main(["check-data", str(data), "--eval_path", str(val), "--fix", clean]) == 0
    assert json.loads((tmp_path / "data" / "clean.json").read_text()) == json.loads(data.read_text())
