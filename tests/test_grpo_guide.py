"""examples/guides/grpo.md: its rows, its reward file, its commands and its figures."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from vlft.cli.main import main
from vlft.config.rewards import read_rewards
from vlft.demo import rewarded
from vlft.demo.build_base import STORED
from vlft.train.grpo.rewards import Rewards

ROOT = Path(__file__).parent.parent
STATE = {"global_step": 0, "max_steps": 9, "epoch": 0.0}
PAGE = (ROOT / "examples" / "guides" / "grpo.md").read_text(encoding="utf-8")


def answers_to_several(folder: Path, name: str) -> set[str]:
    """The answers of a file's rows of several pictures, which say what is drawn."""
    rows = json.loads(rewarded.write_questions(folder, name).read_text())
    return {row["conversations"][-1]["value"] for row in rows if len(row["image"]) > 1}


def test_rows_are_the_same_again_and_held_out(tmp_path):
    made = [rewarded.write_questions(tmp_path / name, "train", 30) for name in ("once", "again")]
    assert made[0].read_text() == made[1].read_text()
    held_out = rewarded.write_questions(tmp_path / "once", "held_out", 30)
    answers = [row["conversations"][-1]["value"] for row in json.loads(made[0].read_text())]
    assert all(re.fullmatch(r"1 \w+ \w+(, 2 \w+ \w+(, 3 \w+ \w+)?)?\.", answer) for answer in answers)
    assert len(json.loads(held_out.read_text())) == 30
    shown = {name: answers_to_several(tmp_path / "all", name) for name in rewarded.FILES}
    assert shown["held_out"].isdisjoint(shown["train"] | shown["selection"])


def test_the_function_of_the_page_is_a_reward(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    (tmp_path / "rewards.py").write_text(code)
    with Rewards(read_rewards([f"{tmp_path / 'rewards.py'}:short"]), timeout=20) as rewards:
        completions = [[{"role": "assistant", "content": text}] for text in ("short", "long" * 60)]
        said = rewards.score(0, {"completions": completions}, rows=("a[0]", "a[1]"), state=STATE)
    assert said["scores"] == [1.0, 0.0]


@pytest.mark.grid
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_the_commands_reach_the_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("vlft/demo").mkdir(parents=True)
    Path("vlft/demo/base").symlink_to(STORED)
    (block,) = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S)
    said = ""
    for words in (shlex.split(line) for line in block.replace("\\\n", " ").splitlines()):
        if words[0] == "python":
            assert words[:3] == ["python", "-m", "vlft.demo.rewarded"]
            rewarded.main(words[3:])
        else:
            assert main(words[1:]) == 0, (words, capsys.readouterr().err)
        said = capsys.readouterr().out
    (more, low) = re.findall(r"; ([+-][\d.]+) \(95%: ([+-][\d.]+)", said)[0]
    assert float(more) > 0.2
    assert float(low) > 0
