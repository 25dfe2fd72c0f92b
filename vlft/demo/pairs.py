"""Draw preference rows for the demo's base: two wordings for the same pictures, and one of them is preferred.

    python -m vlft.demo.pairs pairs

writes `pairs/train.json` and `pairs/held_out.json`. Both answers name what the pictures show. The chosen one is a whole
sentence ("First a red circle, then a blue heart."); the rejected one is a list ("red circle, blue heart.") or has no
beginning ("red circle then a blue heart."), in turns. No held-out row of several pictures is in the training rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

from vlft.demo.story import ORDER, Split, Story, stories, write_rows
from vlft.files import write_json
from vlft.text import counted

ROWS: dict[Split, int] = {"train": 480, "held_out": 120}
SEED = 11
REJECTED = (", ", " then a ")  # what is between the pictures of a rejected answer


def answers(story: Story, index: int) -> tuple[str, str]:
    """The chosen and the rejected answer to a story of pictures, which is the row at `index`."""
    named = [f"{look.colour} {look.shape}" for look in story.looks]
    # `ORDER` has a word for each place that a story may have.
    told = ", ".join(f"{word} a {name}" for word, name in zip(ORDER, named, strict=False))
    return f"{told}.", REJECTED[index % len(REJECTED)].join(named) + "."


def write_pairs(folder: Path, split: Split, count: int, *, seed: int = SEED) -> Path:
    """Draw the pictures and write the preference rows.

    Args:
        folder: where to write `SPLIT.json` and a folder `SPLIT` of PNG pictures.
        split: training rows or held-out rows.
        count: number of rows.
        seed: of everything that is drawn.

    Returns:
        The data file, rows with `prompt`, `chosen` and `rejected`; its media paths are relative to `folder`.
    """
    # More are drawn than are needed: a row of words to repeat shows no picture.
    drawn = (story for story in stories("base", split, 2 * count, seed=seed) if story.looks)
    rows = [replace(story, numbered=False) for story in itertools.islice(drawn, count)]
    file = write_rows(rows, folder, name=split, seed=seed)
    records = json.loads(file.read_text(encoding="utf-8"))
    pairs = [
        {
            "id": record["id"],
            "image": record["image"],
            "prompt": record["conversations"][0]["value"],
            **dict(zip(("chosen", "rejected"), answers(story, index), strict=True)),
        }
        for index, (record, story) in enumerate(zip(records, rows, strict=True))
    ]
    write_json(file, pairs, indent=1)
    return file


def main(argv: list[str] | None = None) -> None:
    """Write the training rows and the held-out rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write train.json, held_out.json and their pictures")
    folder = parser.parse_args(argv).folder
    for split, count in ROWS.items():
        print(f"{write_pairs(folder, split, count)}: {counted(count, 'preference row')}")


if __name__ == "__main__":
    main()
