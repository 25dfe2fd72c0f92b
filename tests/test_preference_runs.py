"""Runs of `vlft train --method dpo`, orpo and simpo from the command line to the files they leave."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from runs import assert_same, lines, losses, split

from vlft.cli.main import main

SAVE = ("--save_strategy", "steps", "--save_steps", "1")
PACKED = ("--packing", "true", "--pack_tokens", "300")


def pair(number: int, *pictures: str, video: str | None = None) -> dict:
    """A preference row; answers and prompts of different rows have different lengths."""
    media = {"image": list(pictures)} if pictures else {}
    return {
        "id": f"pair-{number}",
        **media,
        **({"video": video} if video else {}),
        "prompt": "<image>" * len(pictures) + "<video>" * bool(video) + "What is it? " * (1 + number % 2),
        "chosen": f"It is thing number {number}." + " Sure." * (number % 3),
        "rejected": "No idea at all, sorry. " * (1 + number % 2),
    }


#: Seven rows: text alone, one picture, two, and a video.
PAIRS = [
    pair(0, "china.jpg"),
    pair(1),
    pair(2, "flower.jpg", "coffee.jpg"),
    pair(3, video="clip.mp4"),
    pair(4),
    pair(5, "astronaut.jpg"),
    pair(6),
]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.json"
    path.write_text(json.dumps(PAIRS))
    return path


@pytest.fixture
def command(base, pairs, media, tmp_path):
    """The words of a quick run of one epoch, LoRA of rank 4, unpacked, by default three steps of at most three rows."""

    def words(*more: str, name: str = "run", base: Path = base, data: Path = pairs) -> list[str]:
        # A flag that is given twice is refused, so those in `more` take the place of these.
        usual = {
            "--method": "dpo", "--learning_rate": "1e-3", "--lora_rank": "4", "--packing": "false",
            "--per_device_train_batch_size": "1", "--gradient_accumulation_steps": "3", "--save_strategy": "no",
            "--dataloader_num_workers": "0", "--report_rows": "0", "--logging_steps": "1",
        }  # fmt: skip
        if "--packing" in more:
            usual["--gradient_accumulation_steps"] = "1"
            del usual["--per_device_train_batch_size"]
        if "--eval_path" not in more:
            del usual["--report_rows"]
        if "full" in more and "lora" not in more:
            del usual["--lora_rank"]
        kept = [word for flag, value in usual.items() if flag not in more for word in (flag, value)]
        return ["train", "--model_id", str(base), "--data_path", str(data), "--image_folder", str(media),
                "--output_dir", str(tmp_path / name), *kept, *more]  # fmt: skip

    return words


@pytest.fixture
def trained(command, tmp_path, capsys):
    """Run it; returns the run folder and what it printed on stdout and stderr."""

    def run(*more: str, name: str = "run", status: int = 0, **kwargs) -> tuple[Path, str]:
        capsys.readouterr()
        assert main(command(*more, name=name, **kwargs)) == status
        printed = capsys.readouterr()
        return tmp_path / name, printed.out + printed.err

    return run


# ---- one loss per row


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_a_step_is_the_same_however_its_rows_are_split(trained, method):
    """Each row has the same weight in a step: rows one by one, beside each other, and all of them in one micro-batch."""
    how = ("--method", method, "--num_train_epochs", "2")
    one, printed = trained(*how, *split(1, 3), name="one")
    print(printed)
    for name, other in {"two": (2, 1)}.items():
        pass
    three, _ = trained(*how, *split(3, 1), name="three")
    assert_same(three, one, tolerance=1e-5)
