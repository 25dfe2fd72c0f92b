"""`--eval_split`: rows held out of the training data, by seed, with whole groups of rows on one side."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from build import row, write_image, write_json
from mishaps import before_each_loss
from runs import arguments, lines

from vlft import evaluate
from vlft.cli.main import main
from vlft.data import dataset
from vlft.errors import UsageError
from vlft.train.trainer import VlftTrainer

EVALUATED = ("--eval_strategy", "epoch", "--report_rows", "0", "--num_train_epochs", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """rows.json: 12 rows with 6 pictures, each in two rows, and 6 rows of text; more.json: 4 rows of text."""
    folder = tmp_path_factory.mktemp("held")
    for i in range(6):
        write_image(folder / f"{i}.png", 30 + i, 40)
    rows = [row(f"<image>What is {i}?", f"Number {i}.", image=f"{i % 6}.png") for i in range(12)]
    rows += [row(f"What is {i}?", f"Number {i}.") for i in range(12, 18)]
    write_json(folder / "rows.json", rows)
    write_json(folder / "more.json", [row(f"What is {i}?", f"Number {i}.") for i in range(18, 22)])
    return folder


class Seen:
    """The rows that runs trained and evaluated, as index -> how often."""

    def __init__(self) -> None:
        self.trained: Counter[int] = Counter()
        self.evaluated: Counter[int] = Counter()


@pytest.fixture
def held(base, folder, tmp_path, monkeypatch):
    """Run `vlft train` on rows.json; returns the run folder, and the rows that it saw."""
    seen = Seen()
    before_each_loss(monkeypatch, lambda _, batch: seen.trained.update(index for _, index in batch["rows"]))
    real = VlftTrainer.without_gradients

    def spy(trainer, rows, order, **more):
        for batch in real(trainer, rows, order, **more):
            seen.evaluated.update(index for _, index in batch["rows"])
            yield batch

    monkeypatch.setattr(VlftTrainer, "without_gradients", spy)

    def run(*more: str, name: str = "run", status: int = 0, data: Path = folder / "rows.json") -> tuple[Path, Seen]:
        seen.__init__()  # type: ignore[misc]
        assert main(arguments(base, data, data.parent, tmp_path / name, *EVALUATED, *more)) == status
        return tmp_path / name, seen

    return run


def pictures(rows) -> set[int]:
    return {index % 6 for index in rows if index < 12}


def test_held_out_rows_are_evaluated_and_never_trained(held, folder, base, tmp_path, monkeypatch, capsys):
    run, seen = held("--eval_split", "0.25")
    assert sorted([*seen.trained, *seen.evaluated]) == list(range(18))
    assert len(seen.evaluated) == 4  # of 4.5
    assert set((seen.trained + seen.evaluated).values()) == {1}
    assert not pictures(seen.trained) & pictures(seen.evaluated)
    said = capsys.readouterr().out
    assert "rows.json: 18 rows, 14 to train, 4 held out\n" in said
    assert "rows.json: 4 rows held out to evaluate on (--eval_split 0.25, --seed 42)\n" in said
    record = json.loads((run / "vlft.json").read_text())
    assert record["training"]["eval_split"] == {"share": 0.25, "rows": 4, "seed": 42}
    (entry,) = record["data"]
    assert (entry["rows"], entry["trained"], entry["held_out"], entry["skipped"]) == (18, 14, 4, [])
    assert [line["step"] for line in lines(run) if "eval_loss" in line] == [14]
    # The same rows can be evaluated afterwards, without naming the data again.
    monkeypatch.chdir(tmp_path)
    argv = ["eval", str(run), "--max_new_tokens", "1"]
    assert main([*argv, "--held_out"]) == 0
    found = [json.loads(text) for text in Path("eval/run-held_out.jsonl").read_text().splitlines()]
    assert [line["index"] for line in found] == sorted(seen.evaluated)
    assert "was trained on" not in capsys.readouterr().out
    assert main([*argv, str(folder / "rows.json")]) == 0
    said = capsys.readouterr().out
    assert f"note: {run} was trained on 14 of 18 rows ({folder}/rows.json)" in said
    assert f"vlft eval {run} --held_out" in said
    assert main([*argv, "--held_out", "rows.json"]) == 2
    assert main(["eval", str(base), "--held_out"]) == 1
    assert "has no held_out.jsonl. A run with --eval_split writes it" in capsys.readouterr().err
    in_python = evaluate(run, held_out=True, max_new_tokens=1)
    assert {(row.file, row.index) for row in in_python.rows} == {(found[0]["file"], i) for i in seen.evaluated}
    assert {name: one.value for name, (one,) in in_python.figures.items()} == {"exact_match": 0.0, "rouge_l": 0.0}
    with pytest.raises(UsageError, match="set held_out for the rows that a run holds out"):
        evaluate(run, folder / "rows.json", held_out=True)


def test_copies_and_hard_links_of_a_picture_stay_on_its_side(held, folder, tmp_path):
    for i in range(6):
        shutil.copy(folder / f"{i}.png", tmp_path / f"{i}.png")
        shutil.copy(folder / f"{i}.png", tmp_path / f"copy_{i}.png")
        (tmp_path / f"link_{i}.png").hardlink_to(tmp_path / f"{i}.png")
    names = [f"{form}{i}.png" for form in ("", "copy_", "link_") for i in range(6)]
    write_json(tmp_path / "rows.json", [row(f"<image>{i}?", image=name) for i, name in enumerate(names)])
    _, seen = held("--eval_split", "6", data=tmp_path / "rows.json")
    assert len(seen.evaluated) == 6
    assert not {index % 6 for index in seen.trained} & {index % 6 for index in seen.evaluated}


def test_the_same_rows_are_held_out_wherever_they_are_and_in_any_order(held, folder, tmp_path):
    rows = json.loads((folder / "rows.json").read_text())
    _, seen = held("--eval_split", "3", name="one")
    first = {rows[index]["conversations"][1]["value"] for index in seen.evaluated}
    assert len(first) == 3
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    write_json(moved / "rows.json", rows[::-1])
    _, seen = held("--eval_split", "3", name="two", data=moved / "rows.json")
    assert {rows[::-1][index]["conversations"][1]["value"] for index in seen.evaluated} == first
    _, seen = held("--eval_split", "3", "--seed", "7", name="three")
    assert {rows[index]["conversations"][1]["value"] for index in seen.evaluated} != first


def test_another_split_is_another_run(held, folder, tmp_path, capsys):
    held("--eval_split", "0.25")
    capsys.readouterr()
    held("--eval_split", "0.2", status=1)
    assert "its held-out rows (--eval_split) are share 0.25, this run's are share 0.2." in (capsys.readouterr().err)
    held("--eval_split", "0.25")
    assert "this run is finished" in capsys.readouterr().out


def test_a_row_that_cannot_be_decoded_is_counted_on_its_side(held, folder, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for i in range(6):  # the headers are whole, the pixels are not there
        (copy / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes()[:60])
    monkeypatch.setattr(dataset, "PAUSES", ())  # it would read the pictures again
    run, seen = held("--eval_split", "0.5", "--on_bad_row", "skip", data=copy / "rows.json")
    (entry,) = json.loads((run / "vlft.json").read_text())["data"]
    assert entry["held_out"] == 9
    assert entry["trained"] == len(seen.trained) == 9 - len(entry["skipped"])
    assert 0 < len(entry["skipped"]) < 9  # the others are rows to evaluate
    assert capsys.readouterr().err.count("skipped ") == 12
    assert not {row["index"] for row in entry["skipped"]} & {*seen.trained, *seen.evaluated}


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (["--eval_split", "0.1", "--eval_path", "rows.json"], 1, "--eval_path rows.json and --eval_split 0.1 both"),
        (["--eval_split", "0.1", "--eval_strategy", "no"], 1, "--eval_split is given, but --eval_strategy is no"),
        (["--eval_split", "18"], 1, "--eval_split 18: of 18 rows none would be left to train"),
        (["--eval_split", "1.5"], 1, "--eval_split is 1.5, must be a whole number of rows, or a share below 1"),
        (["--eval_split", "0"], 1, "must be more than 0"),
        (["--eval_split", "some"], 2, "must be a number"),
    ],
)
def test_what_cannot_be_held_out(held, folder, monkeypatch, capsys, more, status, said):
    monkeypatch.chdir(folder)
    held(*more, status=status)
    found = capsys.readouterr().err
    assert said in found
    assert "--eval_path FILE" not in found


def test_rows_of_one_picture_cannot_be_divided(held, folder, tmp_path, capsys):
    write_json(tmp_path / "one.json", [row(f"<image>{i}?", image=str(folder / "0.png")) for i in range(3)])
    held("--eval_split", "0.5", status=1, data=tmp_path / "one.json")
    assert "--eval_split 0.5: 3 rows cannot be divided, because all share a picture" in capsys.readouterr().err


def test_rows_are_held_out_before_a_mix_draws_them(held, folder, base, tmp_path, capsys):
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"- {{path: {folder}/rows.json, repeat: 2}}\n- {{path: {folder}/more.json, cap: 2}}\n")
    run = tmp_path / "mixed"
    argv = ["train", "--model_id", str(base), "--data_mix", str(mix), "--output_dir", str(run), "--eval_split", "6"]
    assert main([*argv, *EVALUATED, "--dataloader_num_workers", "0", "--save_strategy", "no"]) == 0
    entries = json.loads((run / "vlft.json").read_text())["data"]
    assert sum(entry["held_out"] for entry in entries) == 6
    assert [entry["rows"] for entry in entries] == [18, 4]
    assert entries[0]["draws_an_epoch"] == 2 * (18 - entries[0]["held_out"])
    for entry in entries:
        assert entry["rows"] == entry["trained"] + entry["held_out"] + entry["not_drawn"]


def test_plan_counts_the_rows_that_are_held_out(base, folder, capsys):
    argv = ["plan", "--model_id", str(base), "--data_path", str(folder / "rows.json"), "--eval_split", "0.25"]
    assert main([*argv, "--eval_strategy", "epoch", "--dataloader_num_workers", "0", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["rows"], planned["files"][0]["held_out"], planned["files"][0]["trained"]) == (14, 4, 14)
    assert planned["eval_files"][0]["rows"] == 4
    assert main([*argv, "--eval_strategy", "epoch", "--dataloader_num_workers", "0", "--eval_metric", "iou"]) == 1
    assert "--eval_metric iou: no evaluation row has a box in its answer. Drop it" in capsys.readouterr().err


def test_check_data_counts_them_too(folder, base, capsys):
    argv = ["check-data", str(folder / "rows.json"), "--eval_split", "0.25", "--seed", "42", "--headers_only"]
    assert main([*argv, "--workers", "0"]) == 0
    assert "--eval_split 0.25, --seed 42 holds out 4 of 18 rows to evaluate on" in capsys.readouterr().out
