"""Small stories in coloured shapes: the training rows of the demo's base and of the demo's lesson.

Pure and seeded: the same arguments return the same rows and the same pictures, bit by bit. Stories of several pictures
and videos are held out by what they show (kind and sequence of drawings), so none of them occurs in training, whatever
the seed and the counts are. There are too few stories of one picture: held-out ones may show the same drawing as a
training row, at another place and in another size.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlft.files import write_json

if TYPE_CHECKING:
    from PIL.Image import Image

# First letters differ, so that the first byte identifies a word.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (34, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (236, 190, 20),
    "purple": (140, 50, 170),
}
SHAPES = ("circle", "square", "triangle", "heart")
FILLS = ("plain", "striped", "dotted")

SIDE = 84  # pixels: 6 x 6 patches, 9 tokens
FRAMES = 4  # of a video: two time steps of the model
HELD_OUT_ONE_IN = 10
ECHO_SHARE = 0.15
ORDER = ("First", "then", "finally")

# The base's training texts contain these words and those of the chat template, but its pictures show no fill.
WORDS = (
    *("system", "You", " are", " a", " helpful", " assistant", "user", "assistant", "Name", " each", "Say"),
    *("Tell", " the", " story", "First", " then", " finally", "What", " changed", " turned"),
    *(f" {word}" for word in (*COLOURS, *SHAPES, *FILLS)),
)

Subject = Literal["base", "lesson"]
Split = Literal["train", "held_out"]


@dataclass(frozen=True, kw_only=True, order=True)
class Drawing:
    """The drawing of one picture: a coloured shape with a fill."""

    colour: str
    shape: str
    fill: str = "plain"


@dataclass(frozen=True, kw_only=True)
class Story:
    """One row before its pictures are drawn.

    Attributes:
        looks: one to three drawings in order; of a video the drawings before and after the change.
        numbered: whether each picture has its number before it, which teaches the base the order.
        is_video: whether it is a video of FRAMES frames, the second half with the second drawing.
        question: the text, without tags.
        answer: the text.
        choices: number of answers that fit the question if the pictures are unknown.
    """

    looks: tuple[Drawing, ...]
    is_video: bool = False
    numbered: bool = False
    question: str
    answer: str
    choices: int

    def fits(self, split: Split) -> bool:
        """Whether the story may be in this split. Only its drawings decide; one of fewer than two fits in both."""
        if len(self.looks) < 2:
            return True
        shown = "/".join(f"{x.colour} {x.shape} {x.fill}" for x in self.looks)
        is_held_out = zlib.crc32(f"{self.is_video} {shown}".encode()) % HELD_OUT_ONE_IN == 0
        return is_held_out == (split == "held_out")


def stories(
    subject: Subject, split: Split, count: int, *, seed: int, most: int = 3, video_share: float = 0.4
) -> Iterator[Story]:
    """Draw `count` stories.

    Args:
        subject: `base`: name colours and shapes of plain pictures, and in its training split also repeat words.
            `lesson`: other questions and answers, which also name each fill, and videos.
        split: training rows or held-out rows.
        count: number of stories.
        seed: of the random draw.
        most: largest number of pictures of a row, 1 to 3.
        video_share: share of videos among the rows of a lesson.
    """
    rng = random.Random(f"{subject}/{split}/{seed}")
    made = 0
    while made < count:
        count_of = rng.randint(1, most)
        if subject == "lesson" and rng.random() < video_share:
            story = _video(rng)
        elif subject == "base" and split == "train" and rng.random() < ECHO_SHARE:
            story = _echo(rng)
        elif count_of == 1 and split == "held_out" and rng.random() * HELD_OUT_ONE_IN >= 1:
            continue  # keeps one in ten, the share that `fits` keeps of stories with more pictures
        else:
            story = _pictures(rng, subject, count_of)
        if story.fits(split):
            made += 1
            yield story


def _look(rng: random.Random, fills: Sequence[str]) -> Drawing:
    return Drawing(colour=rng.choice(list(COLOURS)), shape=rng.choice(SHAPES), fill=rng.choice(fills))


def _pictures(rng: random.Random, subject: Subject, count: int) -> Story:
    fills = FILLS if subject == "lesson" else FILLS[:1]
    looks = tuple(_look(rng, fills) for _ in range(count))
    if subject == "base":
        question = "Name each."
        answer = ", ".join(f"{i} {look.colour} {look.shape}" for i, look in enumerate(looks, 1)) + "."
    else:
        question = "Tell the story."
        told = zip(ORDER[:count], looks, strict=True)
        answer = ", ".join(f"{word} a {look.fill} {look.colour} {look.shape}" for word, look in told) + "."
    choices = (len(COLOURS) * len(SHAPES) * len(fills)) ** count
    numbered = subject == "base" and rng.random() < 0.5
    return Story(looks=looks, numbered=numbered, question=question, answer=answer, choices=choices)


def _echo(rng: random.Random) -> Story:
    """A row of text alone: words to repeat. It teaches the base to write words that no picture shows."""
    words = "".join(rng.choice(WORDS) for _ in range(rng.randint(2, 6))).strip() + "."
    return Story(looks=(), question=f"Say: {words}", answer=words, choices=1)


def _video(rng: random.Random) -> Story:
    before = _look(rng, FILLS)
    colour = rng.choice([c for c in COLOURS if c != before.colour])
    after = Drawing(colour=colour, shape=before.shape, fill=before.fill)
    return Story(
        looks=(before, after),
        is_video=True,
        question="What changed?",
        answer=f"A {before.fill} {before.colour} {before.shape} turned {colour}.",
        choices=len(COLOURS) * len(SHAPES) * len(FILLS) * (len(COLOURS) - 1),
    )


def chance(rows: Sequence[Story]) -> float:
    """The share of exact answers expected from guessing with the known wording and words, without the pictures."""
    return sum(1 / story.choices for story in rows) / len(rows)


def draw(look: Drawing, rng: random.Random, *, moved: tuple[int, int, int] | None = None) -> Image:
    """Draw one RGB picture of SIDE x SIDE pixels.

    Args:
        look: the drawing.
        rng: decides the grey of the paper, and the place and size of the shape.
        moved: x, y and radius of the shape in pixels, instead of random ones.
    """
    from PIL import Image, ImageDraw

    scale = 2  # drawn larger and shrunk, for smooth edges
    side = SIDE * scale
    x, y, radius = (v * scale for v in (moved or place(rng)))
    mask = Image.new("L", (side, side))
    _outline(ImageDraw.Draw(mask), look.shape, x, y, radius)
    paint = Image.new("RGB", (side, side), COLOURS[look.colour])
    pen = ImageDraw.Draw(paint)
    step = 10 * scale
    if look.fill == "striped":
        for top in range(0, side, step):
            # A tint instead of white, in which the outline would be lost.
            pen.rectangle((0, top, side, top + step * 2 // 5), fill=_tint(COLOURS[look.colour]))
    elif look.fill == "dotted":
        for i in range(0, side, step):
            for j in range(0, side, step):
                pen.ellipse((i, j, i + step // 2, j + step // 2), fill="black")
    grey = rng.randint(215, 250)
    paper = Image.new("RGB", (side, side), (grey, grey, grey))
    paper.paste(paint, mask=mask)
    return paper.resize((SIDE, SIDE), Image.Resampling.BOX)


def _tint(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Two thirds of the way to white."""
    red, green, blue = (c + (255 - c) * 2 // 3 for c in colour)
    return red, green, blue


def place(rng: random.Random) -> tuple[int, int, int]:
    """Centre (x, y) and radius of a shape in pixels, completely inside the picture."""
    radius = rng.randint(24, 34)
    return rng.randint(radius + 3, SIDE - radius - 3), rng.randint(radius + 3, SIDE - radius - 3), radius


def _outline(pen: Any, shape: str, x: int, y: int, r: int) -> None:
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        s = int(r * 0.88)
        pen.rectangle((x - s, y - s, x + s, y + s), fill=255)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + int(0.8 * r)), (x + r, y + int(0.8 * r))], fill=255)
    else:
        turns = [i * math.tau / 60 for i in range(60)]
        pen.polygon(
            [
                (x + r * math.sin(t) ** 3, y - r / 16 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)))
                for t in turns
            ],
            fill=255,
        )


def write_rows(rows: Sequence[Story], folder: Path, *, name: str, seed: int, blank: bool = False) -> Path:
    """Draw the pictures and write the data file.

    Args:
        rows: stories.
        folder: where to write `NAME.json` and a folder `NAME` of PNG pictures.
        name: of the file and of the folder of pictures.
        seed: of places and sizes.
        blank: whether to write grey pictures instead, for the run without information from pictures.

    Returns:
        The data file, LLaVA JSON; its media paths are relative to `folder`.
    """
    media = folder / name
    media.mkdir(parents=True, exist_ok=True)
    records = []
    for index, story in enumerate(rows):
        rng = random.Random(f"{seed}/{name.removesuffix('_blank')}/{index}")
        frames = story.looks
        moved = None
        if story.is_video:
            frames = tuple(story.looks[i >= FRAMES // 2] for i in range(FRAMES))
            moved = place(rng)
        paths = []
        for i, look in enumerate(frames):
            path = media / f"{index:05}-{i}.png"
            (_blank() if blank else draw(look, rng, moved=moved)).save(path)
            paths.append(f"{name}/{path.name}")
        marks = [f"{i} " if story.numbered else "" for i in range(1, len(paths) + 1)]
        tags = "<video>\n" if story.is_video else "".join(f"{mark}<image>\n" for mark in marks)
        records.append(
            {
                "id": f"{name}-{index}",
                **({"video": [paths]} if story.is_video else {"image": paths} if paths else {}),
                "conversations": [
                    {"from": "human", "value": tags + story.question},
                    {"from": "gpt", "value": story.answer},
                ],
            }
        )
    file = folder / f"{name}.json"
    write_json(file, records, indent=1)  # last, so that an existing data file means that all its pictures exist
    return file


def _blank() -> Image:
    from PIL import Image

    return Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
