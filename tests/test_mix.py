"""Several data sets in one run: how often each row is trained, the same each time, and reported."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from build import row, write_image, write_json
from mishaps import before_each_loss
from runs import FULL, lines

from vlft.cli.main import main
from vlft.config import flags
from vlft.data.costs.mix import Share, draws, places


def test_shares_of_an_epoch():
    assert draws([Share(rows=10), Share(rows=4, repeat=2.5), Share(rows=100, cap=7), Share(rows=3, cap=9)]) == [
        10, 10, 7, 3,
    ]  # fmt: skip
    # 30 rows, in shares of two to one.
    assert draws([Share(rows=10, weight=1), Share(rows=20, weight=0.5)]) == [20, 10]
    assert draws([Share(rows=1000, weight=1, cap=10), Share(rows=20, weight=2)]) == [10, 20]
    assert draws([Share(rows=10, weight=1e9), Share(rows=20, weight=1e-9)]) == [30, 1]


@pytest.mark.parametrize(("share", "count"), [(Share(rows=10), 10), (Share(rows=10), 25), (Share(rows=50, cap=7), 17)])
def test_each_row_is_drawn_as_often_as_the_others_or_once_more(share, count):
    found = places(share, count, seed="0/10")
    assert len(found) == count
    often = Counter(found.tolist())
    assert len(often) == share.taken
    assert set(often.values()) <= {count // share.taken, count // share.taken + 1}
    assert found.tolist() == places(share, count, seed="0/10").tolist()
    if count % share.taken or share.cap:
        assert found.tolist() != places(share, count, seed="1/10").tolist()


@pytest.fixture
def sets(tmp_path) -> Path:
    """pictures/rows.json (6 rows, with their pictures), words.json (4 rows, one is refused), and a mix of both."""
    for i in range(6):
        write_image(tmp_path / "pictures" / "img" / f"{i}.jpg")
    write_json(
        tmp_path / "pictures" / "rows.json",
        [row(f"<image>Is it {i}?", f"It is {i}.", image=f"{i}.jpg") for i in range(6)],
    )
    write_json(tmp_path / "words.json", [row(f"Say {i}.", f"{i}." if i else "") for i in range(4)])
    return tmp_path


def mix(sets: Path, text: str) -> Path:
    path = sets / "mix.yaml"
    path.write_text(text.replace("AT", str(sets)))
    return path


MIX = """
- path: AT/pictures/rows.json
  image_folder: AT/pictures/img
  cap: 4
- path: AT/words.json
  repeat: 2.5
"""


def test_a_mix_is_trained_as_it_says(sets, base, monkeypatch, capsys):
    trained: Counter[tuple[str, int]] = Counter()
    before_each_loss(monkeypatch, lambda _, batch: trained.update((Path(file).name, i) for file, i in batch["rows"]))
    read: list[str] = []
    monkeypatch.setattr(flags, "read_mix", lambda path, read_mix=flags.read_mix: read.append(path) or read_mix(path))
    argv = ["--data_mix", str(mix(sets, MIX)), "--model_id", str(base), "--on_bad_row", "skip"]
    run = sets / "run"
    train = ["train", *argv, *FULL, "--output_dir", str(run), "--dataloader_num_workers", "0", "--use_cpu", "true",
             "--num_train_epochs", "1", "--packing", "false"]  # fmt: skip
    assert main(train) == 0
    assert len(read) == 1
    words = {name: often for name, often in trained.items() if name[0] == "words.json"}
    pictures = {name: often for name, often in trained.items() if name[0] == "rows.json"}
    assert sum(words.values()) == 8  # 3 rows, 2.5 times: 7.5
    assert set(words) == {("words.json", i) for i in (1, 2, 3)}
    assert set(words.values()) == {2, 3}
    assert list(pictures.values()) == [1] * 4
    assert sum(line["samples"] for line in lines(run)) == 12
    record = json.loads((run / "vlft.json").read_text())
    entries = {Path(entry["file"]).name: entry for entry in record["data"]}
    assert {key: entries["rows.json"][key] for key in ("rows", "trained", "not_drawn", "draws_an_epoch")} == {
        "rows": 6, "trained": 4, "not_drawn": 2, "draws_an_epoch": 4,
    }  # fmt: skip
    assert {key: entries["words.json"][key] for key in ("rows", "trained", "not_drawn", "draws_an_epoch")} == {
        "rows": 4, "trained": 3, "not_drawn": 0, "draws_an_epoch": 8,
    }  # fmt: skip
    assert [skipped["index"] for skipped in entries["words.json"]["skipped"]] == [0]
    out = capsys.readouterr().out
    assert "--data_mix: 8 draws an epoch, from 3 of them" in out

    assert main(["plan", *argv, "--use_cpu", "true", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["rows"] == 12
    assert main(["check-data", *argv, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["ok"], [bad["index"] for bad in found["bad"]]) == (10, 9, [0])

    (sets / "pictures" / "img" / "0.jpg").rename(sets / "gone.jpg")  # equally many rows, but different ones
    assert main(train) == 1
    assert "its fingerprint of the rows it trains is" in capsys.readouterr().err
    (sets / "gone.jpg").rename(sets / "pictures" / "img" / "0.jpg")
    mix(sets, MIX.replace("2.5", "1"))
    assert main(train) == 1
    assert "its data mix (weight, repeat, cap) is (none, none, 4), (none, 2.5, none)" in capsys.readouterr().err


BAD = {
    "nothing": ("", "found nothing, not a list"),
    "a mapping": ("path: a.json", "found dict, not a list"),
    "an empty list": ("[]", "lists no data set"),
    "no YAML": ("- path: [", "not valid YAML"),
    "no path": ("- weight: 2", "[0].path: is None, not a path"),
    "a number": ("- 7", "[0]: 7 is not a data set"),
    "an unknown key": ("- path: a.json\n  wieght: 2", "unknown key 'wieght'"),
    "a weight of zero": ("- path: a.json\n  weight: 0", "[0].weight: is 0, not a number above 0"),
    "a negative weight": ("- path: a.json\n  weight: -1", "[0].weight: is -1"),
    "a weight that is none": ("- path: a.json\n  weight: .nan", "[0].weight: is nan"),
    "a cap that is no whole number": ("- path: a.json\n  cap: 2.5", "[0].cap: is 2.5, not a whole number above 0"),
    "true": ("- path: a.json\n  repeat: true", "[0].repeat: is True"),
    "a weight and a repeat": ("- path: a.json\n  repeat: 2\n  weight: 1", "weight 1 and repeat 2 both"),
    "some with a weight": ("- path: a.json\n  weight: 1\n- path: b.json", "[0] has a weight and [1] has none"),
    "one twice": ("- a.json\n- a.json", "a.json is already listed as [0]"),
    "a folder that is none": ("- path: AT/words.json\n  image_folder: AT/none", "no such folder"),
    "a file that is none": ("- path: AT/none.json", "no such file"),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD)
def test_a_mix_that_cannot_be_carried_out(sets, base, capsys, text, says):
    argv = ["plan", "--data_mix", str(mix(sets, text)), "--model_id", str(base), "--use_cpu", "true"]
    assert main(argv) == 1
    assert says in capsys.readouterr().err


def test_a_mix_beside_data_files(sets, base, capsys):
    path = str(mix(sets, MIX))
    words = str(sets / "words.json")
    other = str(write_json(sets / "other.json", [row("Say.", "So.")]))
    assert main(["plan", "--data_mix", path, "--data_path", words, "--model_id", str(base), "--use_cpu", "true"]) == 1
    assert "both name the training data" in capsys.readouterr().err
    assert main(["check-data", other, "--data_mix", path]) == 2
    assert "other.json is none of the data files of --data_mix" in capsys.readouterr().err
    pictures = str(sets / "pictures" / "rows.json")
    assert main(["preview", pictures, "--data_mix", path, "--model_id", str(base), "--index", "2"]) == 0
    assert "Is it 2?" in capsys.readouterr().out
    assert main(["check-data", "--data_mix", path, "--fix", str(sets / "clean.jsonl")]) == 1
    assert "but the data sets use several" in capsys.readouterr().err
    write_json(sets / "words.json", [row("Say.", "")])
    assert main(["plan", "--data_mix", path, "--model_id", str(base), "--use_cpu", "true", "--on_bad_row", "skip"]) == 1
    assert "none of its rows can be trained" in capsys.readouterr().err
