"""examples/guides/preference.md: its rows, its commands and its figures."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from vlft.cli.main import main
from vlft.demo import pairs
from vlft.demo.build_base import STORED

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "examples" / "guides" / "preference.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def accuracies(folder: str) -> list[float]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [line["eval_rewards/accuracies"] for line in lines if "eval_loss" in line]


def test_rows_are_the_same_again_and_held_out(tmp_path, capsys):
    """Also taken by check-data as they are."""
    made = [pairs.write_pairs(tmp_path / name, "train", 40) for name in ("once", "again")]
    assert made[0].read_text() == made[1].read_text()
    rows = json.loads(made[0].read_text())
    held_out = json.loads(pairs.write_pairs(tmp_path / "once", "held_out", 40).read_text())
    several = [{row["chosen"] for row in some if len(row["image"]) > 1} for some in (rows, held_out)]
    assert not several[0] & several[1]
    told = r"First a \w+ \w+(, then a \w+ \w+(, finally a \w+ \w+)?)?\."
    assert all(re.fullmatch(told, row["chosen"]) for row in rows)
    assert {row["rejected"].replace(" then a ", ", ") for row in rows} == {
        re.sub(r"(First|then|finally) a ", "", row["chosen"]) for row in rows
    }
    argv = ["check-data", str(made[0]), "--method", "dpo", "--model_id", str(STORED), "--workers", "0"]
    assert main(argv) == 0, capsys.readouterr()
    assert "40 rows" in capsys.readouterr().out


@pytest.mark.grid
def test_the_commands_reach_the_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("vlft/demo").mkdir(parents=True)
    Path("vlft/demo/base").symlink_to(STORED)
    said = []
    for words in commands():
        if words[0] == "python":
            assert words[:3] == ["python", "-m", "vlft.demo.pairs"]
            pairs.main(words[3:])
        else:
            assert main(words[1:]) == 0, (words, capsys.readouterr().err)
        said.append(capsys.readouterr().out)
    before, after = accuracies("output/dpo-before")[0], accuracies("output/dpo-after")[0]
    assert before == pytest.approx(0.517, abs=0.03)
    assert f"{before:.1%} of the held-out rows" in PAGE
    assert after >= 0.95
    first, *trained = accuracies("output/dpo")
    assert first == 0
    assert min(trained) >= 0.95
    assert "First a green heart, then a blue square." in said[-2].splitlines()
