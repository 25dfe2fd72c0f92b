"""Metrics of grounded stories: figures computed by hand, in the form in which StoryReasoning writes its stories."""

from __future__ import annotations

import pytest

from vlft.metrics.case import Case
from vlft.metrics.names import NAMES
from vlft.metrics.story import METRICS, appearances

BY_NAME = {metric.name: metric for metric in METRICS}
CHARACTERS = (
    "### Characters\n"
    "| Character ID | Name | Description | Emotions | Actions | Narrative Function | Bounding Box |\n"
    "|--------------|------|-------------|----------|---------|-------------------|--------------|\n"
)
OBJECTS = (
    "### Objects\n"
    "| Object ID | Description | Function | Interaction | Narrative Function | Bounding Box |\n"
    "|-----------|-------------|----------|------------|-------------------|--------------|\n"
)
SETTING = (
    "### Setting\n| Setting Element | Description | Mood | Time | Narrative Function |\n"
    "|-----------------|-------------|------|------|-------------------|\n| Location | char9 | calm | day | 1,2,3,4 |\n"
)
END = (
    "## Narrative Structure\n\n| Narrative Phase | Description | Key Events | Images |\n|---|---|---|---|\n"
    "| Introduction | They meet. | char8 | 1,2,3,4 |\n"
)


def picture(number, people=(), things=()) -> str:
    rows = [f"| {name} | Ann | tall | glad | walks | lead | {box} |\n" for name, box in people]
    more = [f"| {name} | a thing | to hold | held | prop | {box} |\n" for name, box in things]
    parts = [CHARACTERS, *rows, "\n"] if rows else []
    return "".join([f"## Image {number}\n\n", *parts, *([OBJECTS, *more, "\n"] if more else []), SETTING, "\n"])


def tables(*pictures: str) -> str:
    return "".join([*pictures, END])


def case(right: str, said: str, *, story="", right_story="", question="<image><image><image>\nTell.") -> Case:
    return Case(
        answer=story,
        references=(right_story,),
        question=question,
        full_answer=f"<think>\n{said}\n</think>\n{story}",
        full_references=(f"<think>\n{right}\n</think>\n{right_story}",),
    )


def figure(name: str, one: Case) -> float | None:
    sums = BY_NAME[name].score(one)
    return None if sums is None else sums[0] / sums[1]


def grounding(one: Case) -> list[float | None]:
    return [figure(f"story_grounding{end}", one) for end in ("_precision", "_recall", "")]


RIGHT = tables(
    picture(1, [("char1", "0,0,10,10"), ("char2", "20,0,30,10")], [("obj1", "50,50,60,60")]),
    picture(2, [("char1", "5,0,15,10")], [("lm1", "0,0,100,40")]),
    picture(3, [("char1", "0,0,10,10"), ("char2", "20,0,30,10")]),
)


def test_tables_are_read():
    found = appearances(RIGHT)
    assert [(one.picture, one.id, one.character) for one in found] == [
        (1, "char1", True), (1, "char2", True), (1, "obj1", False), (2, "char1", True), (2, "lm1", False),
        (3, "char1", True), (3, "char2", True),
    ]  # fmt: skip
    assert found[4].box == (0, 0, 100, 40)


def test_tables_as_models_write_them():
    text = (
        "# Image 2: the beach\n## Objects\n|Object ID|Description|Bounding Box|\n|:--|:-:|--:|\n"
        "| OBJ1 | red | blue | (1, 2), (3.5, 4) |\n| obj2 | cut\n| obj3 | no box | - |\n"
        "| obj4 | upside down | 9,9,1,1 |"
    )
    found = appearances(text)
    assert [(one.picture, one.id, one.box) for one in found] == [
        (2, "obj1", (1, 2, 3.5, 4)), (2, "obj2", None), (2, "obj3", None), (2, "obj4", None)
    ]  # fmt: skip


def test_the_right_tables_have_full_marks():
    same = case(RIGHT, RIGHT)
    assert grounding(same) == [1, 1, 1]
    assert figure("story_consistency", same) == 1


def test_boxes_count_as_in_story_reasoning():
    said = tables(
        # IoU 10 * 5 / (100 + 50 - 50) = 0.5 is a match; 40 / 160 = 0.25 is none; a character is no object.
        picture(1, [("char1", "0,0,10,5"), ("char2", "26,0,36,10"), ("char3", "50,50,60,60")]),
        picture(2, [("char1", "5,0,15,10")], [("lm1", "unreadable")]),
    )
    assert grounding(case(RIGHT, said)) == pytest.approx([2 / 5, 2 / 7, 2 * 2 / (5 + 7)])


def test_each_box_has_one_partner_and_the_largest_overlap_is_first():
    right = tables(picture(1, [("char1", "0,0,10,10"), ("char2", "0,0,10,8")]))
    said = tables(picture(1, [("char1", "0,0,10,8"), ("char2", "0,0,10,8"), ("char3", "0,0,10,8")]))
    assert grounding(case(right, said)) == pytest.approx([2 / 3, 1, 4 / 5])


def test_a_box_of_another_picture_is_no_match():
    """The first defect of StoryReasoning's code, which has 1 here."""
    right, said = (tables(picture(number, [("char1", "0,0,10,10")])) for number in (1, 3))
    assert grounding(case(right, said)) == [0, 0, 0]


@pytest.mark.parametrize(
    "said", ["", "no tables", picture(1, [("char1", "everywhere")]), picture(40, [("c", "1,1,2,2")])]
)
def test_a_story_without_a_box_has_no_precision(said):
    """The second defect of StoryReasoning's code, whose precision is 1 here."""
    assert grounding(case(RIGHT, said)) == [0, 0, 0]


def test_a_picture_without_a_section_does_not_hide_the_next():
    right = tables(picture(1, [("char1", "0,0,10,10")]), picture(3, [("char1", "0,0,10,10")]))
    assert grounding(case(right, right)) == [1, 1, 1]
    assert figure("story_consistency", case(right, right)) == 1


# ---- consistency


def people(*ids_of_pictures: dict[str, str]) -> str:
    return tables(*(picture(number, list(ids.items())) for number, ids in enumerate(ids_of_pictures, start=1)))


A, B = "0,0,10,10", "20,0,30,10"  # two people who stand still
TWO = people({"char1": A, "char2": B}, {"char1": A, "char2": B}, {"char1": A})  # pairs: 3 of char1, 1 of char2


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (people({"x": A, "y": B}, {"x": A, "y": B}, {"x": A}), 1),  # other names, same people
        (people({"char1": A, "char2": B}, {"char2": A, "char1": B}, {"char1": A}), 2 * 1 / (4 + 4)),  # swapped
        (people({"char1": A, "char2": B}, {"char3": A, "char4": B}, {"char5": A}), 0),  # a new id each time
        (people({"char1": A}, {"char1": A}, {"char1": A}), 2 * 3 / (4 + 3)),  # one of them is not seen
        (people({"char1": A, "char2": B}, {"char1": A}, {"char1": A, "char2": B}), 2 * 3 / (4 + 4)),
        (tables(), 0),
    ],
)
def test_a_character_keeps_its_id(said, wanted):
    assert figure("story_consistency", case(TWO, said)) == pytest.approx(wanted)


def test_two_characters_under_one_id_cost():
    right = people({"char1": A}, {"char1": A, "char2": B})
    said = tables(picture(1, [("char1", A)]), picture(2, [("char1", A), ("char1", B)]))
    assert figure("story_consistency", case(right, said)) == pytest.approx(2 * 1 / (1 + 2))


# ---- tags

STORY = "<gdi image1>\n<gdo char1>Ann</gdo> <gda char1>walks</gda>.\n</gdi>"


def tags(story: str, said: str = RIGHT, **more) -> float | None:
    return figure("story_tags", case(RIGHT, said, story=story, right_story=STORY, **more))


def test_tags_name_what_the_tables_and_the_row_have():
    assert tags(STORY) == 1
    # image4 and char7 do not exist; of six ids four do
    told = "<gdi image4><gdo char1 char7>They</gdo> see <gdl lm1>it</gdl>.</gdi> <gdi image3><gdo OBJ1>It</gdo></gdi>"
    assert tags(told) == pytest.approx(4 / 6)
    assert tags("<gdo char1>Ann</gdo>", said="no tables") == 0
    assert tags("<gdo char9>Ann</gdo> and <gdo char8>Bo</gdo>") == 0  # stand in other tables only


def test_a_story_without_tags_names_nothing():
    assert tags("Ann walks.") == tags("") == 0


def test_pictures_and_tables_may_come_from_elsewhere():
    assert tags("<gdi image3></gdi>", question="Tell.") == 1  # of the right answer
    assert tags("<gdi image4></gdi>", question="Tell.") == 0
    # Tables in the question, none in the answers.
    asked = f"<image>{RIGHT}"
    one = Case(answer="<gdo char2>Bo</gdo> <gdo char3>Cy</gdo>", references=(STORY,), question=asked)
    assert figure("story_tags", one) == 0.5


def test_rows_that_are_no_stories_are_left_out():
    plain = Case(answer=STORY, references=("A cat.",), question="<image>What?", full_answer=RIGHT + STORY)
    assert all(metric.score(plain) is None for metric in METRICS)
    untabled = Case(answer=STORY, references=(STORY,), question="<image>Tell.")
    assert all(metric.score(untabled) is None for metric in METRICS)


def test_the_best_of_several_right_answers_counts():
    wrong = people({"char1": "70,70,80,80"}, {"char1": "70,70,80,80"})
    one = Case(answer=TWO, references=(wrong, TWO))
    assert grounding(one) == [1, 1, 1]
    assert figure("story_consistency", one) == 1


def test_every_metric_has_its_line():
    assert list(BY_NAME) == [name for name in NAMES if name.startswith("story_")]
    assert all(metric.text == NAMES[metric.name] and metric.higher and metric.size == 2 for metric in METRICS)
