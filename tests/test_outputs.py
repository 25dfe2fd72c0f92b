"""Files of the user are never overwritten: which output folders and files are accepted, and which are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from build import row, write_image, write_json
from mishaps import before_each_loss
from runs import arguments, lines

from vlft.cli.main import main

ONE_STEP = ("--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_image(folder / "a.png")
    return write_json(folder / "rows.json", [row("<image>\nWhat?", "That.", image="a.png"), row()])


@pytest.fixture(scope="module")
def finished(base, rows, tmp_path_factory) -> Path:
    """A finished run with a checkpoint; never written into."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments(base, rows, rows.parent, run, *ONE_STEP)) == 0
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(base, rows, finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    Path(shutil.copytree(base, tmp_path / "base"))
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, tmp_path / "adapter")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"a")
    (tmp_path / "file").write_bytes(b"mine")
    before = contents(tmp_path)
    for name, says in {
        "merged": f"holds weights that were merged from {run}",
        "run/checkpoint-1": f"is a checkpoint of a run.*--output_dir {run}",
        "run/checkpoint-7": "is a checkpoint of a run",
        "base": "holds a model",
        "adapter": "holds an adapter that no run of vlft wrote",
        "photos": r"is not empty and holds no run of vlft \(it has a\.png\)",
        "file": "is a file",
    }.items():
        capsys.readouterr()
        assert main(arguments(base, rows, rows.parent, tmp_path / name, *ONE_STEP)) == 1
        printed = capsys.readouterr()
        assert re.search(says, printed.err), printed.err
        assert "to train" not in printed.out  # the error comes before rows are read
    assert contents(tmp_path) == before


def test_a_checkpoint_that_was_moved_out_of_its_run_is_refused_too(base, rows, finished, tmp_path, capsys):
    moved = Path(shutil.copytree(finished / "checkpoint-1", tmp_path / "moved"))
    before = contents(moved)
    assert main(arguments(base, rows, rows.parent, moved, *ONE_STEP)) == 1
    assert "is a checkpoint of a run" in capsys.readouterr().err
    assert contents(moved) == before


def test_after_a_run_that_left_nothing_the_corrected_command_starts_over(base, rows, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as broken:
        before_each_loss(broken, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments(base, rows, rows.parent, out, *ONE_STEP))
    assert (out / "vlft.json").is_file()
    (out / "answers.jsonl").write_text("{}\n")  # from its evaluation
    (out / "notes.txt").write_text("mine")
    capsys.readouterr()
    corrected = arguments(base, rows, rows.parent, out, *ONE_STEP, "--seed", "7", "--learning_rate", "2e-4")
    assert main(corrected) == 0
    assert f"{out}: a run ended here before its first checkpoint and saved nothing: starting over." in (
        capsys.readouterr().out
    )
    assert [line["step"] for line in lines(out) if "loss" in line] == [1]
    assert not (out / "answers.jsonl").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert json.loads((out / "vlft.json").read_text())["training"]["seed"] == 7


def test_weights_without_a_finished_record_are_not_started_over(base, rows, finished, tmp_path, capsys):
    """A kill leaves this state if it comes after the last weights and before the finished record."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    record = json.loads((run / "vlft.json").read_text())
    record["training"]["finished"] = False
    (run / "vlft.json").write_text(json.dumps(record))
    shutil.rmtree(run / "checkpoint-1")
    assert main(arguments(base, rows, rows.parent, run, *ONE_STEP, "--seed", "7")) == 1
    assert "belongs to another run: its seed is 42, this run's is 7" in capsys.readouterr().err


def test_reports_of_a_check_replace_earlier_ones_only(rows, finished, tmp_path, capsys):
    check = ["check-data", str(rows), "--image_folder", str(rows.parent), "--report"]
    for _ in range(2):
        assert main([*check, str(tmp_path / "look")]) == 0
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "quarantine.jsonl").write_text("{}")
    for folder, name in ((run, "report.html"), (tmp_path / "mine", "quarantine.jsonl"), (rows, "is a file")):
        before = contents(tmp_path)
        capsys.readouterr()
        assert main([*check, str(folder)]) == 1
        assert name in capsys.readouterr().err
        assert contents(tmp_path) == before


def test_a_page_replaces_a_page_only(base, rows, finished, tmp_path, capsys):
    data = Path(shutil.copy(rows, tmp_path / "rows.json"))
    look = ["preview", str(rows), "--index", "1", "--image_folder", str(rows.parent), "--model_id", str(base), "--html"]
    for verb in (look, ["report", str(finished), "--html"]):
        for _ in range(2):
            assert main([*verb, str(tmp_path / "page.html")]) == 0
        capsys.readouterr()
        assert main([*verb, str(data)]) == 1
        assert "already exists and is not an HTML page" in capsys.readouterr().err
    assert data.read_bytes() == rows.read_bytes()
