"""Files of answers that another program wrote: right answers come from the data, and each bad line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluated import evaluated, write_lines

ROWS = [{"id": f"r{i}", "question": f"What is {i}?", "answer": f"n{i}"} for i in range(4)]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Run `vlft eval` on a file of answers to rows; returns the document and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(said: list[dict[str, Any]], *more: Any, rows: Any = ROWS, status: int = 0) -> tuple[dict[str, Any], str]:
        Path("rows.json").write_text(json.dumps(rows))
        found, document, err = evaluated(write_lines(tmp_path / "said.jsonl", said), "rows.json", *more)
        assert found == status, err
        return document, err

    return run


def lines(*answers: str) -> list[dict[str, Any]]:
    return [{"index": i, "answer": answer} for i, answer in enumerate(answers)]


def notes(said: Path, *more: str) -> tuple[str, ...]:
    from vlft import evaluate

    return evaluate(said, "rows.json", metrics=["exact_match"], **dict(zip(more[::2], more[1::2], strict=True))).notes


def test_right_answers_come_from_the_data(asked):
    said = [{**one, "reference": f"n{i}", "references": [f"n{i}", "x"]} for i, one in enumerate(lines(*"xxxx"))]
    assert asked(said)[0]["metrics"]["exact_match"] == 0
    _, err = asked([{**said[0], "reference": "x"}, *said[1:]], status=1)
    assert "said.jsonl:1: the reference is 'x', that of rows.json[0] is 'n0'" in err


def test_boxes_of_a_line_are_taken_only_with_the_words_of_the_data(asked):
    rows = [{"question": "Where?", "answer": "A cat: <|box_start|>(1,2),(3,4)<|box_end|>", "references": ["no box"]}]
    box = '{"bbox_2d": [10, 20, 30, 40], "label": "A cat"}'
    line = {"index": 0, "answer": box, "reference": box}
    assert asked([{**line, "references": [box, "no box"]}], rows=rows)[0]["metrics"]["exact_match"] == 1
    assert asked([line], rows=rows)[0]["metrics"]["exact_match"] == 1
    _, err = asked([{**line, "reference": box.replace("cat", "dog")}], rows=rows, status=1)
    assert "Were the answers given to other data?" in err
    _, err = asked([{**line, "references": [box, box]}], rows=rows, status=1)
    assert '"references" are not those of rows.json[0]' in err


def test_a_text_is_one_reference_and_other_forms_are_counted(asked):
    rows = [{**one, "references": more} for one, more in zip(ROWS, ["x", ["x", None], [{"text": "x"}], 5], strict=True)]
    document, _ = asked(lines(*"xxxx"), rows=rows)
    assert document["metrics"]["exact_match"] == 0.25
    (note,) = notes(Path("said.jsonl"))
    assert note.startswith("3 rows with 'references' in a form that is not read")
    assert "such as rows.json[1]" in note


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"index": [0]}, 'said.jsonl:1: "index" is [0], must be a number'),
        ({"index": "0"}, '"index" is "0", must be a number'),
        ({"index": 1.5}, '"index" is 1.5'),
        ({"index": True}, '"index" is true'),
        ({"id": ["r0"]}, '"id" is ["r0"], must be a text or a number'),
        ({"index": 0, "file": 3}, '"file" is 3, must be a text'),
        ({"index": 0, "references": [1, 2]}, '"references" is [1, 2], must be a list of texts'),
        ({"index": 0, "reference": 1}, '"reference" is 1, must be a text'),
        ({"index": 0, "scores": [1]}, '"scores" is [1], must be an object'),
        ({"index": 0, "scores": {"a": None}}, '"scores" is {"a": null}'),
        ({"index": 0, "scores": {"a": "1"}}, '"scores" is {"a": "1"}'),
        ({"index": 0, "scores": {"a": float("-inf")}}, '"scores" is {"a": -Infinity}'),
        ({"index": 0, "id": "r1"}, "has the index 0 and the id 'r1', but rows.json[0] has the id 'r0'"),
        ({"index": 0, "file": "other.json"}, "its \"file\" is 'other.json', and the data is 'rows.json'"),
        ({"index": 9}, "index 9 is none of the 4 rows"),
    ],
)
def test_a_bad_line_is_named(asked, line, said):
    _, err = asked([{"answer": "n0", **line}, *lines(*"abcd")[1:]], status=1)
    assert said in err
    assert "Traceback" not in err


def test_the_answers_of_refused_rows_may_be_there_by_id(asked):
    rows = [*ROWS[:3], {"id": "r3", "question": "What?"}]
    said = [{"id": f"r{i}", "answer": f"n{i}"} for i in range(4)]
    document, _ = asked(said, "--on_bad_row", "skip", rows=rows)
    assert (document["rows"], document["skipped"], document["metrics"]["exact_match"]) == (3, 1, 1)


def test_the_most_likely_label_is_the_answer(asked, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("n0\nn1\nn2\nn3\n")
    scores = {f"n{i}": -float(i) for i in range(4)}
    said = [{**one, "scores": scores} for one in lines("n0", "n1", "n2", "n3")]
    document, _ = asked(said, "--labels", labels, "--metric", "exact_match", "accuracy")
    assert document["metrics"]["exact_match"] == document["metrics"]["accuracy"] == 0.25
    from vlft import evaluate

    found = evaluate("said.jsonl", "rows.json", labels=labels)
    assert set(found.figures) == set(asked(said, "--labels", labels)[0]["metrics"])
    assert [row.answers for row in found.rows] == [("n0",)] * 4
    assert any("3 of 4 answers are not the most likely label" in note for note in found.notes)


def test_an_answer_in_another_spelling_is_no_further_person(asked):
    people = [*["stop"] * 3, *["go"] * 7]
    rows = [{"question": "What?", "answer": "Stop.", "answers": people}]
    ten = asked(lines("stop"), "--metric", "vqa_accuracy", rows=rows)[0]["metrics"]["vqa_accuracy"]
    assert ten == pytest.approx((3 * 2 / 3 + 7) / 10)
    few = [{"question": "What?", "answer": "cat", "answers": ["cat", "cat", "dog", "dog", "dog"]}]
    five = asked(lines("cat"), "--metric", "vqa_accuracy", rows=few)[0]["metrics"]["vqa_accuracy"]
    assert five == pytest.approx((2 * 1 / 3 + 3 * 2 / 3) / 5)


def test_the_chosen_answer_of_a_preference_row_is_right(asked):
    turns = [{"from": "human", "value": "What?"}]
    rows = [
        {"prompt": "What?", "chosen": "a", "rejected": "b"},
        {"conversations": turns, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"question": "What?", "answer": "a"},
    ]
    document, _ = asked(lines("a", "a", "b"), rows=rows)
    assert document["metrics"]["exact_match"] == pytest.approx(2 / 3)
    _, err = asked(lines("a"), rows=[{"prompt": "What?", "chosen": "a", "rejected": "a"}], status=1)
    assert "is the same answer as" in err
