"""`--metric FILE.py:FUNCTION`: functions of the user, and what is said when they fail."""

import pytest

from vlft.errors import ConfigError, VlftError
from vlft.metrics import find
from vlft.metrics.bootstrap import figure, sums_by_row
from vlft.metrics.case import Case

ROW = {"file": "held_out.json", "index": 7, "id": "a", "split": "test"}
CASE = Case(answer="yes please", references=("yes", "sure"), question="Tea?", row=ROW)

FILE = '''
from dataclasses import dataclass

import numpy as np


@dataclass
class Kept:
    value: int = 3


def words(answer):
    """Number of words.

    More text.
    """
    return len(answer.split())


words.higher = False


def all_of_them(answer, reference, references, question, row):
    return (answer, reference, references, question, row["index"], row["split"]) == (
        "yes please", "yes", ["yes", "sure"], "Tea?", 7, "test"
    )


def rest(**given):
    return len(given)


def keyword(*, reference, weight=0.5):
    return np.float32(len(reference) * weight)


def flag(answer):
    return np.bool_(True)


def never(answer):
    return None


def fails(answer):
    number = 1
    return helper(number)


def helper(number):
    raise KeyError("no such\\nword")


def nan(answer):
    return float("nan")


def text(answer):
    return "1"


def huge(answer):
    return 10**400


def wrong(answer, picture):
    return 1


def positional(answer, /):
    return 1


async def later(answer):
    return 1


limit = 3
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own metrics") / "tone.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("words", 2), ("all_of_them", 1), ("rest", 5), ("keyword", 1.5), ("flag", 1), ("Kept", None)],
)
def test_a_function_is_given_what_it_names(file, name, wanted):
    if wanted is None:
        with pytest.raises(VlftError, match="returned"):
            find([f"{file}:{name}"])[0].score(CASE)
        return
    (metric,) = find([f"{file}:{name}"])
    assert metric.name == f"{file}:{name}"
    assert metric.score(CASE) == (wanted, 1.0)


def test_the_figure_is_the_mean_of_the_rows_that_have_one(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    (metric,) = find(["tone.py:words"])
    assert (metric.name, metric.text, metric.higher) == ("tone.py:words", "Number of words.", False)
    cases = [Case(answer=answer, references=("a",)) for answer in ("a", "a b", "a b c d e f")]
    assert figure(sums_by_row(metric, cases), metric.value) == 3
    (metric,) = find(["tone.py:never"])
    assert metric.higher
    assert metric.score(CASE) is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fails", "held_out.json[7]: metric {file}:fails: tone.py:{line} raised KeyError: 'no such\\nword'"),
        (
            "nan",
            "held_out.json[7]: metric {file}:nan returned nan (float). Return a finite number, True, False or None",
        ),
        ("text", "held_out.json[7]: metric {file}:text returned '1' (str). Return"),
        ("huge", "(int). Return a finite number"),
    ],
)
def test_a_failure_names_the_row_and_the_line(file, name, says):
    line = FILE.splitlines().index('    raise KeyError("no such\\nword")') + 1
    with pytest.raises(VlftError) as failed:
        find([f"{file}:{name}"])[0].score(CASE)
    assert says.format(file=file, line=line) in str(failed.value)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("{file}:missing", "has no function 'missing'. Add `def missing(answer, reference):`"),
        ("{file}:limit", "has a int and no function 'limit'"),
        (
            "{file}:wrong",
            "has the argument 'picture'. It may have, by name: answer, reference, references, question, row",
        ),
        ("{file}:positional", "has the argument 'answer'"),
        ("{file}:later", "is declared with `async def`"),
        ("{file}", "name a function of a Python file: FILE.py:FUNCTION"),
        ("{file}:", "name a function of a Python file"),
        ("nowhere/tone.py:words", "nowhere/tone.py. Check the path"),
        ("{folder}/broken.py:f", "broken.py:2 raised SyntaxError"),
        ("{folder}/absent.py:f", "absent.py:3 raised ModuleNotFoundError: No module named 'not_there'"),
        ("{folder}/leaves.py:f", "leaves.py:1 raised SystemExit: 3"),
        ("{folder}/words.txt:f", "Its name must end with .py"),
    ],
)
def test_what_cannot_be_used_is_said_before_any_row(file, word, says):
    folder = file.parent
    (folder / "broken.py").write_text("x = 1\ndef f(:\n")
    (folder / "absent.py").write_text("\n\nimport not_there\n")
    (folder / "leaves.py").write_text("raise SystemExit(3)\n")
    (folder / "words.txt").write_text("def f(answer): return 1\n")
    with pytest.raises(ConfigError) as refused:
        find([word.format(file=file, folder=folder)])
    assert says in str(refused.value)
