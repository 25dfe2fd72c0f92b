"""Small stories in coloured shapes: what the demo's base learns from, and what the demo teaches it.

Pure and seeded: the same arguments give the same rows and the same pictures, bit by bit. Stories of several pictures
and videos are held out by what they show (kind and sequence of looks), so none of them can occur in training, whatever
the seed and the counts. Of one picture there are too few stories: those held out are drawn anew, elsewhere and in
other sizes.
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

# First letters differ, so that the first byte of a word decides it.
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

# The base has read these words, and those of the chat template, but has been shown no fill.
WORDS = (
    *("system", "You", " are", " a", " helpful", " assistant", "user", "assistant", "Name", " each", "Say"),
    *("Tell", " the", " story", "First", " then", " finally", "What", " changed", " turned"),
    *(f" {word}" for word in (*COLOURS, *SHAPES, *FILLS)),
)

Subject = Literal["base", "lesson"]
Split = Literal["train", "held_out"]


@dataclass(frozen=True, kw_only=True, order=True)
class Drawing:
    """What one picture shows."""

    colour: str
    shape: str
    fill: str = "plain"


@dataclass(frozen=True, kw_only=True)
class Story:
    """One row before its pictures are drawn.

    Attributes:
        looks: one to three pictures in order; of a video the look before and after the change.
        numbered: each picture has its number before it, which is how the base finds out about order.
        is_video: FRAMES frames, the second half in the second look.
        question, answer: the texts, without tags.
        choices: answers that would fit the question, for someone who sees nothing.
    """

    looks: tuple[Drawing, ...]
    is_video: bool = False
    numbered: bool = False
    question: str
    answer: str
    choices: int

    def fits(self, split: Split) -> bool:
        """Whether it may be in this split: by what is shown alone; a story of less than two pictures in either."""
        if len(self.looks) < 2:
            return True
        shown = "/".join(f"{x.colour} {x.shape} {x.fill}" for x in self.looks)
        is_held_out = zlib.crc32(f"{self.is_video} {shown}".encode()) % HELD_OUT_ONE_IN == 0
        return is_held_out == (split == "held_out")


def stories(
    subject: Subject, split: Split, count: int, *, seed: int, most: int = 3, video_share: float = 0.4
) -> Iterator[Story]:
    """`count` stories.

    Args:
        subject: `base` names colours and shapes of plain pictures, and in its training repeats words; `lesson` asks in
            other words, for an answer in other words that also tells each fill, and has videos.
        split: which side of the split.
        count: how many.
        seed: of the draw.
        most: pictures a row may have, 1 to 3.
        video_share: of the rows of a lesson.
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
            continue  # the split below keeps one in ten of the others
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
    """A row of text alone: words to repeat. It teaches the base how words are written that it never sees pictured."""
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
    """Share of exact answers to expect of one who knows the wording and every word, and sees nothing."""
    return sum(1 / story.choices for story in rows) / len(rows)


def draw(look: Drawing, rng: random.Random, *, moved: tuple[int, int, int] | None = None) -> Image:
    """One picture, RGB, SIDE x SIDE; place, size and paper vary with `rng`, or are `moved` (x, y, radius)."""
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
            # A tint, not white, which the outline would be lost in.
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
    """Centre and radius of a shape, in pixels, wholly inside the picture."""
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
        folder: gets `NAME.json` and a folder `NAME` of PNG pictures.
        name: of both.
        seed: of places and sizes.
        blank: grey pictures instead, for the run that may see nothing.

    Returns:
        the data file, LLaVA JSON; its media paths start from `folder`.
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
    write_json(file, records, indent=1)  # last: the data file says that all its pictures are there
    return file


def _blank() -> Image:
    from PIL import Image

    return Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
