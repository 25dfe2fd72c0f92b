"""Metrics of grounded stories: are the right people and things found, kept apart, and named by the tags?

Stories are those of StoryReasoning (Oliveira and Matos, arXiv 2505.10292; github.com/daniel3303/StoryReasoning at
c7c5906). An answer first lists, in thoughts, who and what is in each picture, in tables with an id and a box for each
row (an appearance). The story after it refers to the ids in tags, such as `<gdo char1>Ann</gdo>`.

`story_grounding`, with its precision and recall, is their F1: appearances of the answer are matched with those of the
right answer, greedily from the largest IoU, at least 0.5, characters with characters and the rest with the rest. Each
story has a figure, and the mean is over stories. Two defects of their code are fixed here:
- Their matching (`_match_detections`) does not look at the picture, so that a box of picture 1 can match one of picture
  3. Here both must be in the same picture.
- There a story in which no box is found has precision 1, and so has one whose tables name a picture that does not
  exist or whose tables cannot be read, since all its boxes are dropped. Here such a story has precision 0, and
  appearances whose box cannot be read, or whose picture does not exist, are wrong ones.
Three smaller ones: their reader stops at the first picture without a section; a story that was not generated is left
out of the mean; and a table at the very end loses its last row.

Their mAP is left out. It sorts boxes by confidence, but a text gives none (each has 1.0 there), so that it depends on
the order of the tables' rows. Their paper measures consistency by counting; `story_consistency` and `story_tags` are
ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from vlft.metrics.case import Case, Metric, mean
from vlft.metrics.names import NAMES

Box = tuple[float, float, float, float]  # x1, y1, x2, y2

MATCH = 0.5  # least IoU of a match, as in StoryReasoning

_SECTION = re.compile(r"\s*(#+)\s*(.*)")
_PICTURE = re.compile(r"image\s*(\d+)\b.*", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_TAG = re.compile(r"<gd[ioal]\s+([^<>]+)>", re.IGNORECASE)
_IMAGE_ID = re.compile(r"image0*(\d{1,9})")


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """A row of a story's tables: someone or something in a picture.

    Attributes:
        picture: from 1.
        id: `char1`, `obj2`, `bg1` or `lm1`, in small letters.
        character: whether it stands in a table of characters.
        box: in the numbers that the model writes; None if it cannot be read or has no area.
    """

    picture: int
    id: str
    character: bool
    box: Box | None


def appearances(text: str) -> list[Appearance]:
    """Read the tables of characters and objects below the headings `## Image 1`, `## Image 2` and so on.

    Other tables (setting, narrative structure) and other text are left out. Columns are found by their names.
    """
    found: list[Appearance] = []
    picture: int | None = None
    level = 0  # of the picture's heading
    character: bool | None = None
    columns: list[str] = []
    for line in text.splitlines():
        if section := _SECTION.fullmatch(line):
            title = section[2].lower()
            number = _PICTURE.fullmatch(title)
            columns, character = [], None
            if number:
                picture, level = int(number[1]), len(section[1])
            elif title.startswith(("character", "object")):
                character = title.startswith("character")
            elif not title.startswith("setting") and len(section[1]) <= level:
                picture = None  # such as "## Narrative Structure" after the last picture
            continue
        if picture is None or character is None or "|" not in line:
            continue
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if not columns:
            columns = [cell.lower() for cell in cells]
        elif any(cell.strip("-: ") for cell in cells):
            found += _appearance(cells, columns, picture=picture, character=character)
    return found


def _appearance(cells: list[str], columns: list[str], *, picture: int, character: bool) -> list[Appearance]:
    """The appearance of a table's row, or nothing if the row has no id."""
    at = next((place for place, name in enumerate(columns) if name == "id" or name.endswith(" id")), 0)
    name = cells[at].lower() if at < len(cells) else ""
    if not name:
        return []
    # A bar inside a description makes more cells, so a place is counted from the nearer end.
    from_end = next((len(columns) - place for place, title in enumerate(columns) if "box" in title), None)
    text = cells[-from_end] if from_end is not None and len(cells) >= len(columns) else ""
    return [Appearance(picture=picture, id=name, character=character, box=_box(text))]


def _box(text: str) -> Box | None:
    numbers = [float(number) for number in _NUMBER.findall(text)]
    if len(numbers) != 4:
        return None
    x1, y1, x2, y2 = numbers
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def matched(right: Sequence[Appearance], answer: Sequence[Appearance]) -> dict[int, int]:
    """Match the appearances of an answer with the right ones, one to one: place in `answer` -> place in `right`."""
    pairs = [
        (_iou(one.box, other.box), place, mine)
        for place, one in enumerate(right)
        for mine, other in enumerate(answer)
        if one.box and other.box and one.picture == other.picture and one.character == other.character
    ]
    found: dict[int, int] = {}
    taken: set[int] = set()
    for overlap, place, mine in sorted(pairs, key=lambda pair: -pair[0]):
        if overlap >= MATCH and mine not in found and place not in taken:
            found[mine] = place
            taken.add(place)
    return found


def _iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes that have an area. It is the same in pixels and in shares of a picture."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one, other)]
    return shared / (sum(areas) - shared)


def _best(
    score: Callable[[list[Appearance], list[Appearance]], float | None],
) -> Callable[[Case], tuple[float, ...] | None]:
    """The `score` of the right answer with the highest figure, of those to which it applies."""

    def of(case: Case) -> tuple[float, ...] | None:
        answer = appearances(_full_answer(case))
        figures = [score(appearances(text), answer) for text in case.full_references or case.references]
        known = [figure for figure in figures if figure is not None]
        return (max(known), 1.0) if known else None

    return of


def _full_answer(case: Case) -> str:
    return case.answer if case.full_answer is None else case.full_answer


def _counts(right: Sequence[Appearance], answer: Sequence[Appearance]) -> tuple[int, int, int]:
    """Matches, right appearances with a box, and appearances of the answer."""
    return len(matched(right, answer)), sum(one.box is not None for one in right), len(answer)


def _grounding(right: list[Appearance], answer: list[Appearance]) -> float | None:
    hits, wanted, said = _counts(right, answer)
    return 2 * hits / (wanted + said) if wanted else None


def _precision(right: list[Appearance], answer: list[Appearance]) -> float | None:
    hits, wanted, said = _counts(right, answer)
    return hits / max(said, 1) if wanted else None


def _recall(right: list[Appearance], answer: list[Appearance]) -> float | None:
    hits, wanted, _ = _counts(right, answer)
    return hits / wanted if wanted else None


def _consistency(right: list[Appearance], answer: list[Appearance]) -> float | None:
    """F1 of pairs of appearances of one character in two pictures.

    A pair of the answer is right if its appearances match two right ones that have one id. Which id it is does not
    count. So a character that changes its id, two that share one, and one that is not found all cost.
    """
    wanted, said = _pairs(right), _pairs(answer)
    if not wanted:
        return None
    place = matched(right, answer)
    known = set(wanted)
    hits = sum(
        one in place and other in place and tuple(sorted((place[one], place[other]))) in known for one, other in said
    )
    return 2 * hits / (len(wanted) + len(said))


def _pairs(some: Sequence[Appearance]) -> list[tuple[int, int]]:
    """Places of two appearances of one character id in different pictures, the smaller place first."""
    people: dict[str, list[int]] = {}
    for place, one in enumerate(some):
        if one.character:
            people.setdefault(one.id, []).append(place)
    return [
        (one, other)
        for places in people.values()
        for one, other in combinations(places, 2)
        if some[one].picture != some[other].picture
    ]


def _tags(case: Case) -> tuple[float, ...] | None:
    """Share of the ids in the tags of a story that exist. Of `<gdo char1 char2>They</gdo>` each id counts.

    Ids of entities exist if they are in the tables of the answer or of the question, `image3` if the question has at
    least three pictures. If the question has none, the pictures are those of the right answer. A story without tags
    has 0. The metric applies where the right answer has tags, and it or the question has tables.
    """
    full_references = case.full_references or case.references
    if not any(_ids(text) for text in case.references):
        return None
    asked = {one.id for one in appearances(case.question)}
    if not asked and not any(appearances(text) for text in full_references):
        return None
    ids = _ids(case.answer)
    if not ids:
        return 0.0, 1.0
    known = asked | {one.id for one in appearances(_full_answer(case))}
    pictures = case.question.count("<image>") or _pictures(full_references)
    right = [_of_picture(name, pictures) if _IMAGE_ID.fullmatch(name) else name in known for name in ids]
    return sum(right) / len(right), 1.0


def _ids(text: str) -> list[str]:
    """Every id in the tags of a text, in small letters, as often as it occurs."""
    return [name for tag in _TAG.findall(text) for name in re.split(r"[\s,]+", tag.lower()) if name]


def _of_picture(name: str, pictures: int) -> bool:
    number = _IMAGE_ID.fullmatch(name)
    return number is not None and 1 <= int(number[1]) <= pictures


def _pictures(texts: Sequence[str]) -> int:
    """The largest number of a picture in tags and tables; 0 if there is none."""
    tagged = [int(number[1]) for text in texts for name in _ids(text) if (number := _IMAGE_ID.fullmatch(name))]
    return max([0, *tagged, *(one.picture for text in texts for one in appearances(text))])


_BOXES = "tables of characters and objects with boxes in its answer, as in StoryReasoning"
METRICS: tuple[Metric, ...] = (
    Metric(name="story_grounding", text=NAMES["story_grounding"], score=_best(_grounding), value=mean, needs=_BOXES),
    Metric(
        name="story_grounding_precision",
        text=NAMES["story_grounding_precision"],
        score=_best(_precision),
        value=mean,
        needs=_BOXES,
    ),
    Metric(
        name="story_grounding_recall",
        text=NAMES["story_grounding_recall"],
        score=_best(_recall),
        value=mean,
        needs=_BOXES,
    ),
    Metric(
        name="story_consistency",
        text=NAMES["story_consistency"],
        score=_best(_consistency),
        value=mean,
        needs="a table of characters in its answer with one of them in two pictures, as in StoryReasoning",
    ),
    Metric(
        name="story_tags",
        text=NAMES["story_tags"],
        score=_tags,
        value=mean,
        needs="tags such as <gdo char1> and tables of these ids in its answer, as in StoryReasoning",
    ),
)
