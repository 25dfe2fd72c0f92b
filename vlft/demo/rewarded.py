"""Rows for GRPO on the demo's base: a question that it has not learned, whose answers a reward teaches. Scores models.

    python -m vlft.demo.rewarded rows
    python -m vlft.demo.rewarded rows --score vlft/demo/base output/grpo

The base has learned to name colour and shape of each picture when it is asked "Name each." ("1 red circle, 2 blue
heart."). These rows ask it to "Describe the pictures.": it skips some, repeats others, or does not stop. The first
command writes `rows/train.json`, `rows/selection.json` (to choose settings) and `rows/held_out.json`. No held-out row
of several pictures is in the other files. The second command prints the mean edit ratio of greedy answers to the
held-out rows, and how much higher it is than that of the first model.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlft.demo.story import Split, stories, write_rows
from vlft.metrics.sequences import edit_distance
from vlft.text import counted

QUESTION = "Describe the pictures."
#: File -> its rows, from which drawings they are, and the seed of what is drawn. Settings are chosen with `selection`.
FILES: dict[str, tuple[int, Split, int]] = {
    "train": (400, "train", 21),
    "selection": (100, "train", 22),
    "held_out": (100, "held_out", 21),
}


def write_questions(folder: Path, name: str, count: int | None = None) -> Path:
    """Draw the pictures and write the rows.

    Args:
        folder: where to write `NAME.json` and a folder `NAME` of PNG pictures.
        name: one of `FILES`.
        count: number of rows, if it differs.

    Returns:
        The data file, LLaVA JSON; its media paths are relative to `folder`.
    """
    # More are drawn than are needed: a row of words to repeat shows no picture.
    rows_of_file, split, seed = FILES[name]
    count = rows_of_file if count is None else count
    drawn = (story for story in stories("base", split, 4 * count, seed=seed) if story.looks)
    rows = [replace(story, numbered=True, question=QUESTION) for story in itertools.islice(drawn, count)]
    return write_rows(rows, folder, name=name, seed=seed)


def edit_ratios(model: str, file: Path) -> list[float]:
    """The reward `edit_ratio` of a model's greedy answer to each row of a file."""
    from vlft.demo.score import answers

    right = [row["conversations"][-1]["value"] for row in json.loads(file.read_text(encoding="utf-8"))]
    said = answers(model, file)
    return [1 - edit_distance(a, b) / max(len(a), len(b), 1) for a, b in zip(said, right, strict=True)]


def score(models: Sequence[str], file: Path) -> None:
    """Print the mean edit ratio of each model, and its difference to the first one with a 95% interval."""
    import numpy as np

    from vlft.metrics.bootstrap import differences
    from vlft.metrics.case import mean

    first_R2: np.ndarray | None = None
    for model in models:
        sums_R2 = np.array([(ratio, 1.0) for ratio in edit_ratios(model, file)])
        rows = counted(len(sums_R2), "row")
        line = f"{model}: mean edit ratio {sums_R2[:, 0].mean():.3f} over {rows} of {file.name}"
        if first_R2 is None:
            first_R2 = sums_R2
        else:
            more, low, high = differences(first_R2, sums_R2, mean)
            line += f"; {more:+.3f} (95%: {low:+.3f} to {high:+.3f})"
        print(line)


def main(argv: list[str] | None = None) -> None:
    """Write the training rows and the held-out rows, or score models."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of train.json, held_out.json and their pictures")
    parser.add_argument("--score", nargs="+", metavar="MODEL", help="score these instead of writing the rows")
    parser.add_argument(
        "--rows", choices=FILES, default="held_out", help="the rows to score them on (default: held_out)"
    )
    flags = parser.parse_args(argv)
    if flags.score:
        score(flags.score, flags.folder / f"{flags.rows}.json")
        return
    for name, (count, _, _) in FILES.items():
        print(f"{write_questions(flags.folder, name)}: {counted(count, 'row')}")


if __name__ == "__main__":
    main()
