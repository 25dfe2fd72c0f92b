"""`vlft check-data`: it names every planted fault and nothing else; its exit status; its one JSON document."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import pytest
from conftest import MIXED_ROWS, row

from vlft.check.result import histogram
from vlft.cli.main import main
from vlft.data import dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory, media):
    """A copy of the `media` folder with a picture that ends early, which its header does not show."""
    folder = tmp_path_factory.mktemp("faulty")
    for file in media.iterdir():
        shutil.copy(file, folder)
    whole = (media / "coffee.jpg").read_bytes()
    (folder / "short.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Good rows 0 to 6, then a missing picture, a truncated picture, an extra tag, and a row with a warning."""
    unanswered = row("Yes.", "So?", id="unanswered")
    unanswered["conversations"].append({"from": "human", "value": "Sure?"})
    faults = [
        row("?", "<image>What?", id="missing", image="nowhere.jpg"),
        row("?", "<image>What?", image=["short.jpg"]),
        row("?", "<image><image>What?", id=9, image="china.jpg"),
        unanswered,
    ]
    path = tmp_path_factory.mktemp("data") / "faulty.json"
    path.write_text(json.dumps([*MIXED_ROWS, *faults]), encoding="utf-8")
    return path


def check(capsys, *argv) -> tuple[int, dict, str]:
    status = main(["check-data", *map(str, argv), "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out), err


def test_every_fault_is_named_and_nothing_else(capsys, base, faulty, folder):
    status, found, _ = check(capsys, faulty, "--image_folder", folder, "--model_id", base)
    assert status == 1
    assert (found["rows"], found["ok"]) == (11, 8)
    assert [(bad["index"], bad["id"], bad["field"]) for bad in found["bad"]] == [
        (7, "missing", "image"),
        (8, None, "image[0]"),
        (9, "9", "conversations[0]"),
    ]
    assert {bad["file"] for bad in found["bad"]} == {str(faulty)}
    assert "nowhere.jpg" in found["bad"][0]["reason"]
    assert "short.jpg: damaged or cut short" in found["bad"][1]["reason"]
    assert "2 <image> tags, 1 path" in found["bad"][2]["reason"]
    assert [(w["index"], w["id"], w["field"]) for w in found["warnings"]] == [(10, "unanswered", "conversations[2]")]
    assert set(found["warnings"][0]) >= {"file", "index", "id", "field", "reason"}
    assert (found["images"], found["videos"]) == (4, 3)


def test_headers_do_not_tell_that_a_picture_is_cut(capsys, base, faulty, folder):
    status, found, _ = check(capsys, faulty, "--image_folder", folder, "--model_id", base, "--headers_only")
    assert status == 1
    assert [bad["index"] for bad in found["bad"]] == [7, 9]
    assert found["decoded"] is False


def test_tokens_are_those_of_the_encoder(capsys, base, mixed_json, media, encoded):
    status, found, _ = check(capsys, mixed_json, "--image_folder", media, "--model_id", base)
    lengths = sorted(len(sample.input_ids_T) for sample in encoded.values())
    tokens = found["tokens"]
    assert status == 0
    assert (tokens["total"], tokens["min"], tokens["max"]) == (sum(lengths), lengths[0], lengths[-1])
    assert tokens["median"] == lengths[3]
    assert tokens["supervised"] == sum(int((sample.labels_T != -100).sum()) for sample in encoded.values())
    assert sum(bucket["rows"] for bucket in tokens["histogram"]) == 7


def test_without_a_base_structure_and_media_are_checked(capsys, faulty, folder):
    status, found, _ = check(capsys, faulty, "--image_folder", folder)
    assert status == 1
    assert [bad["index"] for bad in found["bad"]] == [7, 8, 9]
    assert found["tokens"] is None


def test_what_a_person_reads(capsys, base, faulty, folder):
    assert main(["check-data", str(faulty), "--image_folder", str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"{faulty}[7].image (id missing): " in out
    assert f"{faulty}[8].image[0]: " in out
    assert f"{faulty}[10].conversations[2] (id unanswered): a human turn comes last" in out
    assert f"{faulty}: 11 rows, 8 can be trained, 3 cannot, 1 with a warning" in out
    assert "4 pictures and 3 videos" in out
    assert "pass --model_id to count them" in out
    assert "3 rows of 11 would stop a run" in out


def test_a_good_file_ends_well_and_draws_its_lengths(capsys, base, mixed_json, media):
    argv = ["check-data", "--image_folder", str(media), str(mixed_json), "--model_id", str(base), "--headers_only"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "█" in out
    assert "tokens in all" in out
    assert "No row is refused. Only headers were read." in out


def test_max_length_refuses_as_training_does(capsys, base, mixed_json, media):
    flags = ["--image_folder", media, "--model_id", base, "--headers_only"]
    status, found, _ = check(capsys, mixed_json, *flags, "--max_length", 200)
    assert status == 1
    assert [bad["id"] for bad in found["bad"]] == ["two-turns", "both"]
    assert all("--max_length is 200" in bad["reason"] for bad in found["bad"])


def test_workers_find_the_same(capsys, tmp_path, media, monkeypatch):
    monkeypatch.setattr(dataset, "SHORT", 0)
    rows = [row("A.", "<image>Q?", image=name) for name in ["china.jpg", "gone.jpg", "flower.jpg"] * 8]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = [
        check(capsys, tmp_path / "many.jsonl", "--image_folder", media, "--workers", workers)[1] for workers in (0, 2)
    ]
    assert found[0] == found[1]
    assert [bad["index"] for bad in found[0]["bad"]] == list(range(1, 24, 3))


def test_evaluation_rows_are_checked_too(capsys, faulty, mixed_json, folder):
    flags = ["--image_folder", folder, "--headers_only"]
    _, found, _ = check(capsys, mixed_json, "--eval_path", faulty, *flags)
    assert found["files"] == {str(mixed_json): 7, str(faulty): 11}
    assert {bad["file"] for bad in found["bad"]} == {str(faulty)}
    _, found, _ = check(capsys, faulty, "--eval_path", faulty, *flags)
    assert found["rows"] == 11


def test_a_train_command_is_taken_as_it_stands(capsys, tmp_path, base, mixed_json, media):
    config = tmp_path / "run.yaml"
    config.write_text(f"learning_rate: 1e-5\nvision: lora\ndata_path: [{mixed_json}]\n", encoding="utf-8")
    flags = ["--image_folder", media, "--headers_only", "--model_id", base, "--output_dir", tmp_path / "out"]
    status, found, err = check(capsys, "--config", config, *flags)
    assert (status, found["rows"]) == (0, 7)
    assert "training only: --output_dir" in err  # not those of a file that serves training too
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ([], 2, "no data file"),
        (["a.json", "--data_path", "b.json"], 2, "named twice: a.json and --data_path"),
        (["a.json", "--workers", "-1"], 2, "--workers is -1, must not be negative"),
        (["a.json", "--hedaers_only"], 2, "did you mean --headers_only?"),
        (["a.json", "--bits", "5"], 2, "--bits"),
        (["nowhere.json"], 1, "nowhere.json: no such file"),
        (["a.json", "--image_folder", "nowhere"], 1, "--image_folder nowhere"),
        (["a.json", "--fps", "2", "--nframes", "4"], 1, "--fps 2.0 and --nframes 4"),
    ],
)
def test_wrong_commands(capsys, argv, status, message):
    assert main(["check-data", *argv]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_control_characters_of_a_row_do_not_reach_the_terminal(capsys, tmp_path):
    bad = row("", "Q?", id="\x1b[31mred\ud800")
    (tmp_path / "x.json").write_text(json.dumps([bad]), encoding="utf-8")
    assert main(["check-data", str(tmp_path / "x.json")]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "␛[31mred" in out


@pytest.mark.parametrize(
    "values", [[5], [5, 5, 7], [27, 30, 29000], [200, 333, 390], [1, 100000], list(range(90, 1400, 7))]
)
def test_histogram_holds_every_value_once(values):
    buckets = histogram(values)
    assert sum(bucket.rows for bucket in buckets) == len(values)
    assert len(buckets) <= 12
    assert all(one.end + 1 == two.start for one, two in pairwise(buckets))
    assert buckets[0].rows
    assert buckets[-1].rows


def test_faults_of_a_kind_are_printed_once_with_their_first_rows(capsys, tmp_path):
    rows = [row("A.", "<image>Q?", image=f"{i}.jpg") for i in range(40)]
    rows += [row("A.", "Q?", id=i, **{f"key{i}": "x.jpg"}) for i in range(3)] + [row("", "Q?"), row("A.", "<video>Q?")]
    (tmp_path / "x.json").write_text(json.dumps(rows), encoding="utf-8")
    assert main(["check-data", str(tmp_path / "x.json"), "--headers_only", "--workers", "0"]) == 1
    out = capsys.readouterr().out
    assert "cannot be trained (42):\n  40 rows: " in out
    assert f"{tmp_path}/x.json[4].image: {tmp_path}/4.jpg: no such file" in out
    assert "x.json[5].image" not in out
    assert "\n    and 35 more\n" in out
    assert "x.json[43]" in out
    assert "x.json[44]" in out
    assert main(["check-data", str(tmp_path / "x.json"), "--headers_only", "--workers", "0", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["bad"]) == 42
