"""`vlft.metrics`: each metric against the package or the code that defines it, or against figures computed by hand."""

import importlib.util
import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from vlft.data.rows.coordinates import BoxText, split
from vlft.errors import ConfigError
from vlft.metrics import DEFAULT, NAMES, find
from vlft.metrics.bootstrap import figure, sums_by_row
from vlft.metrics.case import Case
from vlft.metrics.overlap import best_total, boxes
from vlft.metrics.registry import MODULES
from vlft.metrics.sequences import common_length, edit_distance

VOCABULARY = ["the", "a", "cat", "sat", "on", "mat", "Dogs", "run", "two,", "3.5", "don't", "red-blue", "end."]


def case(answer: str, *references: str, question: str = "") -> Case:
    return Case(answer=answer, references=references, question=question)


def of(name: str, *cases: Case) -> float:
    """The figure over all cases."""
    (metric,) = find([name])
    return figure(sums_by_row(metric, cases), metric.value)


def one(name: str, answer: str, *references: str, question: str = "") -> float:
    return of(name, case(answer, *references, question=question))


def sentences(count: int, *, seed: int = 0, least: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(VOCABULARY, k=draw.randint(least, 12))) for _ in range(count)]


# ---- names


STORY = (
    "".join(
        f"## Image {picture}\n### Characters\n| Character ID | Bounding Box |\n|---|---|\n| char1 | 1,2,30,40 |\n\n"
        for picture in (1, 2)
    )
    + "<gdo char1>Ann</gdo> walks."
)


def test_every_name_has_its_metric():
    assert set(MODULES) == set(NAMES)
    assert set(DEFAULT) <= set(NAMES)
    for name in NAMES:
        if name == "bleu" and importlib.util.find_spec("sacrebleu") is None:
            continue
        (metric,) = find([name])
        assert (metric.name, metric.text) == (name, NAMES[name])
        assert metric.higher is (name not in ("cer", "wer"))
        text = STORY if name.startswith("story_") else '{"bbox_2d": [1, 2, 3, 4]}'
        scored = metric.score(case(text, *[text] * 10))
        assert scored is not None
        assert len(scored) == metric.size
    assert [metric.name for metric in find(["anls", "exact_match", "anls"])] == ["anls", "exact_match"]


def test_names_do_not_import_numpy():
    code = "import sys, vlft.metrics as m; assert m.NAMES and m.DEFAULT; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("anlss", "there is no metric 'anlss'. Do you mean anls?"),
        ("ROUGE-L", "Do you mean rouge_l?"),
        ("em", "Do you mean exact_match?"),
        ("zzz", "The metrics: exact_match, accuracy"),
        ("CIDEr", "metric CIDEr is not supported. Its reference implementation needs Java"),
        ("meteor", "Use rouge_l and bleu"),
        ("spice", "Use rouge_l and bleu"),
    ],
)
def test_unknown_names_are_refused(word, says):
    with pytest.raises(ConfigError) as refused:
        find([word])
    assert says in str(refused.value)


def test_a_missing_package_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sacrebleu is not installed. Install it: pip install 'vlft\[eval\]'"):
        find(["bleu"])


# ---- sequences


def _distance_by_table(first, second) -> int:
    line = list(range(len(second) + 1))
    for i, x in enumerate(first, 1):
        above, line = line, [i]
        for j, y in enumerate(second, 1):
            line.append(min(above[j] + 1, line[-1] + 1, above[j - 1] + (x != y)))
    return line[-1]


def _common_by_table(first, second) -> int:
    line = [0] * (len(second) + 1)
    for x in first:
        above, line = line, [0]
        for j, y in enumerate(second, 1):
            line.append(above[j - 1] + 1 if x == y else max(above[j], line[-1]))
    return line[-1]


def test_sequences_agree_with_the_textbook_tables():
    draw = random.Random(1)
    for _ in range(1500):
        first, second = ("".join(draw.choices("abcd"[: draw.randint(1, 4)], k=draw.randint(0, 40))) for _ in range(2))
        assert edit_distance(first, second) == _distance_by_table(first, second)
        assert common_length(first, second) == _common_by_table(first, second)


@pytest.mark.parametrize("name", ["rouge_l", "cer", "wer", "exact_match", "accuracy", "json_fields", "iou"])
def test_very_long_texts_take_seconds(name):
    draw = random.Random(2)
    answer, reference = ("".join(draw.choices("abc é中 {[(1,", k=100_000)) for _ in range(2))
    began = time.process_time()
    find([name])[0].score(case(answer, reference))
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    "part",
    [
        " ",
        "<answer>",
        "The answer is ",
        "[1, ",
        "(1,2) ",
        "<|box_start|>(1,2)",
        "```",
        "a",
        "1",
        "A. ",
        "answer:",
        "B or ",
    ],
)
@pytest.mark.parametrize("start", ["", "```json\n[", "<|box_start|>(1,2)", "The answer is", "A."])
def test_no_text_makes_a_pattern_slow(start, part):
    answer = start + part * (30_000 // len(part)) + "x"
    one_of_all = case(answer, "B", "[0, 0, 1, 1]", *["B"] * 8, question=answer)
    began = time.process_time()
    for name in ("accuracy", "vqa_accuracy", "json_valid", "iou", "rouge_l", "exact_match"):
        find([name])[0].score(one_of_all)
    assert time.process_time() - began < 5


# ---- wording


def test_exact_match():
    assert one("exact_match", " a cat\n", "a cat") == 1
    assert one("exact_match", "A cat", "a cat") == 0
    assert one("exact_match", "a  cat", "a cat") == 0
    assert one("exact_match", "b", "a", "b") == 1
    assert one("exact_match", "", "a") == 0
    assert of("exact_match", case("a", "a"), case("b", "a")) == 0.5


@pytest.mark.parametrize(
    ("answer", "references", "wanted"),
    [
        ("Coca Cola", ["coca cola"], 1),
        ("cola", ["coca cola", "Cola"], 1),
        ("coca  colb", ["coca cola"], 1 - 1 / 9),
        ("abcd", ["abxy"], 0.5),  # as the challenge's code; "NL < 0.5" of the paper would give 0
        ("abc", ["xyc"], 0),
        ("", ["a"], 0),
        ("", [""], 1),
        ("a", [""], 0),
        ("the answer is Paris", ["Paris"], 0),
    ],
)
def test_anls(answer, references, wanted):
    assert one("anls", answer, *references) == pytest.approx(wanted)


def test_rouge_l_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for answer, reference in zip(sentences(300), sentences(300, seed=1, least=1), strict=True):
        wanted = scorer.score(reference, answer)["rougeL"].fmeasure
        assert one("rouge_l", answer, reference) == pytest.approx(wanted)
    several = ["the cat sat", "dogs run on the mat", "a red-blue end"]
    wanted = scorer.score_multi(several, "the dogs sat on a mat")["rougeL"].fmeasure
    assert one("rouge_l", "the dogs sat on a mat", *several) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("un café noir", "un café noir", 1),
        ("un cafe noir", "un café noir", 2 / 3),  # rouge_score compares "caf"
        ("cafe\u0301", "caf\u00e9", 1),
        ("猫在垫子上", "猫在桌子上", 4 / 5),
        ("これは猫です。", "これは犬です", 5 / 6),
        ("แมว", "แมว", 1),
        ("यह एक बिल्ली है", "यह एक कुत्ता है", 3 / 4),
        ("Кошка спит", "кошка сидит", 1 / 2),
        ("", "a cat", 0),
        ("the cat", "the cat sat", 4 / 5),
    ],
)
def test_rouge_l_of_any_script(answer, reference, wanted):
    assert one("rouge_l", answer, reference) == pytest.approx(wanted)


def test_rouge_l_does_not_apply_without_words():
    assert find(["rouge_l"])[0].score(case("!", "!!!")) is None


@pytest.mark.parametrize("name", ["wer", "cer"])
def test_error_rates_are_those_of_jiwer(name):
    theirs = getattr(pytest.importorskip("jiwer"), name)
    answers, references = sentences(200), sentences(200, seed=1, least=1)
    pairs = list(zip(answers, references, strict=True))
    assert of(name, *(case(answer, reference) for answer, reference in pairs)) == pytest.approx(
        theirs(references, answers)
    )
    for answer, reference in pairs[:40]:
        assert one(name, answer, reference) == pytest.approx(theirs(reference, answer))


def test_error_rates_of_special_rows():
    assert one("wer", "", "two words") == 1
    assert one("wer", "a b c d", "x") == 4
    assert one("wer", "a c", "x y z", "a b") == 0.5
    assert find(["cer"])[0].score(case("a", " ")) is None
    assert np.isnan(of("cer", case("a", " ")))


# ---- bleu


def test_bleu_is_that_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    answers, first, second = sentences(120), sentences(120, seed=1, least=1), sentences(120, seed=2, least=1)
    answers[:30] = first[:30]
    wanted = sacrebleu.corpus_bleu(answers, [first, second], force=True).score / 100
    pairs = [case(*texts) for texts in zip(answers, first, second, strict=True)]
    assert 0.1 < wanted < 0.9
    assert of("bleu", *pairs) == pytest.approx(wanted)
    for texts in zip(answers, first, strict=True):
        wanted = sacrebleu.corpus_bleu([texts[0]], [[texts[1]]], force=True).score / 100
        assert one("bleu", *texts) == pytest.approx(wanted, abs=1e-12)
    assert one("bleu", "", "a cat") == 0


# ---- accuracy

QUESTION = "<image>\nWhat is it?\nA. a cat\nB. A dog.\nC. two birds\nAnswer with the letter."


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        *(
            (answer, "B")
            for answer in ("B", "b", "(B)", "B.", "B)", "B: a dog", "B. a dog", "(b) a dog", "**B**", "[B]")
        ),
        *(
            (answer, "B")
            for answer in ("The answer is B", "The answer is B.", "the correct answer is (B).", "Answer: B")
        ),
        *(
            (answer, "B")
            for answer in ("The correct option is B because it barks.", "Final answer: **B**", r"\boxed{B}")
        ),
        *((answer, "B") for answer in ("a dog", "A dog", "A DOG.", "The answer is a dog.", "The answer is B. a dog")),
        *(
            (answer, "B")
            for answer in ("the answer is b", "Option B", "B because it barks", "B\n\nIt barks.", "答案是B。")
        ),
        *((answer, "B") for answer in ("It barks. <answer>B</answer>", "<answer>a dog</answer>")),
        ("A is not the answer. The answer is C", "C"),
        ("B", "B. A dog."),
        ("B", "a dog"),
        ("A cat", "A"),
    ],
)
def test_a_choice_is_read(answer, right):
    assert one("accuracy", answer, right, question=QUESTION) == 1
    for other in {"A", "B", "C"} - {right[0].upper() if right != "a dog" else "B"}:
        assert one("accuracy", answer, other, question=QUESTION) == 0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "A dog or a cat",
        "The answer is B or C",
        "B, C",
        "D",
        "I think so",
        "The answer is unclear",
        "dog",
        "Maybe a dog",
    ],
)
def test_what_is_no_choice_is_wrong(answer):
    assert [one("accuracy", answer, letter, question=QUESTION) for letter in "ABC"] == [0, 0, 0]


@pytest.mark.parametrize(
    ("answer", "right", "wanted"),
    [
        ("Yes", "yes", 1),
        ("Yes, there is a dog.", "Yes", 1),
        ("No.", "yes", 0),
        ("There is no dog", "No", 1),
        ("I cannot say yes or no", "no", 0),
        ("not yes", "yes", 0),
        ("The answer is not yes", "yes", 0),
        ("yes and no", "yes", 0),
        ("Yes/no", "yes", 0),
        ("Yes, but also no.", "yes", 0),
        ("Yes, there is no doubt", "yes", 1),
        ("It is not raining, so no", "no", 1),
        ("The answer is yes, because there is no car", "yes", 1),
        ("Nothing", "no", 0),
        ("**No**", "no", 1),
        ("", "no", 0),
        ("<answer>no</answer>", "no", 1),
        ("Tabby cat.", "tabby cat", 1),
        ("The answer is tabby", "tabby", 1),
        ("tabby", "tiger", 0),
        ("B", "B", 1),
        ("A dog", "A", 0),
        ("3", "3", 1),
        ("猫。", "猫", 1),
        ("e. coli", "E. coli", 1),
    ],
)
def test_yes_no_and_classes(answer, right, wanted):
    assert one("accuracy", answer, right) == wanted


@pytest.mark.parametrize(
    "question", ["Which? (A) a cat (B) a dog (C) two birds", "Which?\nA) a cat\nB) a dog", QUESTION]
)
def test_options_are_read_in_the_usual_layouts(question):
    assert one("accuracy", "a dog", "B", question=question) == 1
    assert one("accuracy", "a cat", "B", question=question) == 0


def test_yes_and_no_may_be_options():
    question = "Is it a dog?\nA. Yes\nB. No"
    assert one("accuracy", "No, it is a cat.", "B", question=question) == 1
    assert one("accuracy", "A", "yes", question=question) == 1
    assert one("accuracy", "Nobody knows", "B", question=question) == 0


# ---- vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "people", "wanted"),
    [
        # n people of 10 gave the answer: (n * min(1, (n - 1) / 3) + (10 - n) * min(1, n / 3)) / 10
        ("red", ["red"] * 10, 1),
        ("red", ["red"] * 4 + ["blue"] * 6, 1),
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9),
        ("red", ["red"] * 2 + ["blue"] * 8, 0.6),
        ("red", ["red"] + ["blue"] * 9, 0.3),
        ("red", ["blue"] * 10, 0),
        # the row's own answer is one of the ten, and comes first once more
        ("red", ["red", *["red"] * 3, *["blue"] * 7], 0.9),
        ("The Red.", ["red"] * 3 + ["blue"] * 7, 0.9),
        ("two dogs", ["2 dogs"] * 10, 1),
        ("None", ["0"] * 10, 1),
        ("dont know", ["don't know"] * 10, 1),
        ("1,000", ["1000"] * 10, 1),
        ("3.5", ["3.5"] * 10, 1),
        ("10:30", ["10:30"] * 10, 1),
        ("black/white", ["black white"] * 10, 1),
        ("", ["red"] * 10, 0),
    ],
)
def test_vqa_accuracy(answer, people, wanted):
    assert one("vqa_accuracy", answer, *people) == pytest.approx(wanted)


def test_vqa_accuracy_needs_people():
    (metric,) = find(["vqa_accuracy"])
    assert metric.score(case("red", "red")) is None
    assert metric.score(case("red", "red", "red", "red")) is None
    assert metric.score(case("red", *["red"] * 5)) == (1.0, 1.0)


# ---- boxes


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a<|box_start|>(1,2),(30,40)<|box_end|>b", [(1, 2, 30, 40)]),
        ("<|box_start|> ( 1 , 2.5 ) , (30, 40) <|box_end|>", [(1, 2.5, 30, 40)]),
        ("<|box_start|>(1,2)(3,4)<|box_end|><|box_start|>(5,6)<|box_end|>", [(1, 2, 3, 4)]),
        ("<|quad_start|>(1,2),(9,3),(8,7),(0,6)<|quad_end|>", [(0, 2, 9, 7)]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "x"}, {"point_2d": [-5,6]}]', [(1, 2, 3, 4)]),
        ("{'bbox_2d':[0.1,0.2,0.3,0.4]}", [(0.1, 0.2, 0.3, 0.4)]),
        ('{"bbox_2d": [x1, y1, x2, y2]}', []),
        ("[1, 2, 3, 4]", [(1, 2, 3, 4)]),
        ("[[1, 2, 3, 4], [5, 6, 7, 8]]", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("(1,2),(3,4) and (5,6)", [(1, 2, 3, 4)]),
        ('{"bbox_2d": [1, 2, 3', []),
        ("", []),
    ],
)
def test_boxes_are_read(text, wanted):
    assert boxes(text) == wanted
    marked = [piece.numbers for piece in split(text, lenient=True) if isinstance(piece, BoxText)]
    for numbers in marked:  # the reader of training rows agrees on every box that it knows
        assert len(numbers) != 4 or numbers in wanted


def box(*numbers: float) -> str:
    return json.dumps({"bbox_2d": list(numbers), "label": "cat"})


def test_iou_of_one_box():
    assert one("iou", box(0, 0, 10, 10), box(0, 0, 10, 10)) == 1
    assert one("iou", box(5, 0, 15, 10), box(0, 0, 10, 10)) == pytest.approx(50 / 150)
    assert one("iou", "<|box_start|>(0,5),(10,15)<|box_end|>", "[0, 0, 10, 10]") == pytest.approx(50 / 150)
    assert one("iou", box(20, 20, 30, 30), box(0, 0, 10, 10)) == 0
    assert one("iou", "there is none", box(0, 0, 10, 10)) == 0
    assert one("iou", box(10, 10, 0, 0), box(0, 0, 10, 10)) == 0
    assert one("iou", box(3, 3, 3, 3), box(3, 3, 3, 3)) == 1
    assert find(["iou"])[0].score(case(box(0, 0, 1, 1), "a cat")) is None


def test_boxes_without_a_partner_count_nothing():
    right = box(0, 0, 10, 10) + box(20, 20, 30, 30)
    assert one("iou", box(20, 20, 30, 30), right) == 0.5
    assert one("iou", right, box(0, 0, 10, 10)) == 0.5
    assert one("iou", right, box(20, 20, 30, 30) + box(0, 0, 10, 10)) == 1
    assert one("iou_hit_rate", right, box(0, 0, 10, 10)) == 1
    assert one("iou_hit_rate", box(0, 0, 10, 6), right) == 0.5
    assert one("iou_hit_rate", box(0, 0, 10, 4), right) == 0
    assert of("iou_hit_rate", case("", right), case(box(1, 1, 9, 9), box(1, 1, 9, 9))) == pytest.approx(1 / 3)


def test_matching_is_that_of_scipy():
    draw = np.random.default_rng(3)
    for _ in range(200):
        gains = draw.random(draw.integers(1, 9, size=2)) * (draw.random() < 0.5 or draw.integers(0, 2))
        gains[gains < 0.3] = 0
        rows, columns = linear_sum_assignment(gains, maximize=True)
        assert best_total(gains.tolist()) == pytest.approx(gains[rows, columns].sum())


def test_an_answer_with_thousands_of_boxes_takes_seconds():
    answer = "".join(box(i, i, i + 20, i + 20) for i in range(5000))
    began = time.process_time()
    assert 0 < one("iou", answer, box(0, 0, 20, 20) + box(50, 50, 70, 70)) < 0.001
    assert time.process_time() - began < 10


# ---- JSON

RIGHT = json.dumps({"total": 12.5, "items": [{"name": "tea", "count": 2}, {"name": "cake", "count": 1}], "paid": True})


@pytest.mark.parametrize(
    ("answer", "valid", "fields"),
    [
        (RIGHT, 1, 1),
        (f"```json\n{RIGHT}\n```", 1, 1),
        (f"```\n{RIGHT}```", 1, 1),
        (f"Here it is: {RIGHT}", 0, 0),
        (RIGHT[:-1], 0, 0),
        ("", 0, 0),
        ("{}", 1, 0),
        ('{"total": 12.50}', 1, 2 * 1 / (1 + 6)),
        ('{"total": "12.5"}', 1, 0),
        ('{"paid": 1}', 1, 0),
        ('{"total": NaN}', 0, 0),
        ("12.5", 0, 0),
        (RIGHT.replace("tea", " tea "), 1, 1),
        (RIGHT.replace("tea", "Tea"), 1, 5 / 6),
        (RIGHT[:-1] + ', "tax": 1, "tip": null}', 1, 2 * 6 / (8 + 6)),
        ("[" * 100_000, 0, 0),
    ],
)
def test_json(answer, valid, fields):
    assert one("json_valid", answer, RIGHT) == valid
    assert one("json_fields", answer, RIGHT) == pytest.approx(fields)


def test_json_applies_to_rows_with_json():
    for name in ("json_valid", "json_fields"):
        assert find([name])[0].score(case("{}", "a cat")) is None
        assert find([name])[0].score(case("[]", "42")) is None
    assert one("json_fields", "[]", "[]") == 1
    assert one("json_fields", "{}", "[]") == 0
    assert one("json_fields", "[1]", "[2]", "[1]") == 1
