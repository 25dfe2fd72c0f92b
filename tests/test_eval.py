"""`vlft eval`: answers equal those of stock transformers in any batch, survive a kill, and become the right figures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from evaluated import BASE, evaluated, lines, story_rows, write_lines

from vlft.cli.main import main
from vlft.demo.score import answers as demo_answers
from vlft.errors import UsageError

ROWS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return story_rows(tmp_path_factory.mktemp("eval"), ROWS)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch) -> None:
    """A working directory of its own: pages go there where no answers file is written."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> dict:
    """The document of an evaluation of the demo's base, and its answers file."""
    out = tmp_path_factory.mktemp("made") / "answers.jsonl"
    status, document, err = evaluated(BASE, data, "--out", out, "--max_new_tokens", 64)
    assert status == 0, err
    return {"document": document, "out": out, "lines": lines(out)}


def test_the_document_has_the_promised_keys(made):
    document = made["document"]
    assert document["rows"] == ROWS
    assert document["skipped"] == 0
    assert document["out"] == str(made["out"])
    assert set(document["metrics"]) == set(document["intervals"]) == {"exact_match", "rouge_l"}
    for name, value in document["metrics"].items():
        low, high = document["intervals"][name]
        assert 0 <= low <= value <= high <= 1


def test_a_line_has_the_row_its_question_and_both_answers(made, data):
    rows = json.loads(data.read_text())
    for index, (line, row) in enumerate(zip(made["lines"], rows, strict=True)):
        asked, right = row["conversations"]
        assert line["file"] == str(data)
        assert (line["index"], line["id"]) == (index, row["id"])
        shown = asked["value"].replace("<image>\n", "<image>")  # as the model sees it
        assert (line["question"], line["reference"]) == (shown, right["value"])


def test_answers_and_figure_are_those_of_the_demo(made, data):
    said = demo_answers(BASE, data)
    assert [line["answer"] for line in made["lines"]] == said
    right = [line["reference"] == answer for line, answer in zip(made["lines"], said, strict=True)]
    assert made["document"]["metrics"]["exact_match"] == sum(right) / ROWS


def test_answers_are_those_of_stock_transformers(made, data):
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(BASE)
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    for row, line in list(zip(json.loads(data.read_text()), made["lines"], strict=True))[:4]:
        content = []
        texts = row["conversations"][0]["value"].replace("<image>\n", "<image>").split("<image>")
        for place, text in enumerate(texts):
            content += [{"type": "text", "text": text}] if text else []
            content += [{"type": "image"}] if place < len(texts) - 1 else []
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pictures = [Image.open(data.parent / name).convert("RGB") for name in row["image"]]
        inputs = processor(text=[prompt], images=pictures, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert line["answer"] == processor.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_the_batch_changes_no_byte(made, data, tmp_path, batch):
    out = tmp_path / "answers.jsonl"
    assert evaluated(BASE, data, "--out", out, "--max_new_tokens", 64, "--batch", batch)[0] == 0
    assert out.read_bytes() == made["out"].read_bytes()


#: The command line in a process of its own that is killed after some answers.
KILLED = """
import os, signal, sys
from vlft.cli.main import main
from vlft.evaluation.answers_file import AnswersFile

real, left = AnswersFile.add, [4]

def add(self, line):
    real(self, line)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

AnswersFile.add = add
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_evaluation_continues_to_the_same_bytes(made, data, tmp_path):
    out = tmp_path / "answers.jsonl"
    words = (BASE, data, "--out", out, "--max_new_tokens", 64, "--batch", 1)
    command = [sys.executable, "-c", KILLED, "eval", *map(str, words)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    part = out.with_name("answers.jsonl.part")
    assert len(lines(part)) == 1 + 4  # the key, and the answers
    assert not out.exists()
    with open(part, "ab") as file:
        file.write(b'{"file": "half a li')
    status, document, err = evaluated(*words)
    assert status == 0, err
    assert "4 rows of 12 were answered before" in err
    assert out.read_bytes() == made["out"].read_bytes()
    assert document["metrics"] == made["document"]["metrics"]
    assert not part.exists()


def test_the_same_command_again_loads_no_torch(made, data):
    words = [str(BASE), str(data), "--out", str(made["out"]), "--max_new_tokens", "64", "--json"]
    code = (
        "import sys\nfrom vlft.cli.main import main\n"
        f"status = main(['eval', *{words!r}])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == made["document"]


def test_other_spellings_of_the_same_folder_and_data_are_the_same(made, data, tmp_path, monkeypatch):
    monkeypatch.chdir(data.parent)
    base = os.path.relpath(BASE)
    words = ("--out", made["out"], "--max_new_tokens", 64)
    status, document, err = evaluated(f"./{base}", f"./{data.name}", *words)
    assert status == 0, err
    assert "rows to answer" not in err
    assert document["metrics"] == made["document"]["metrics"]


def test_compared_models_are_found_again_in_any_order(made, data, tmp_path):
    for folder in ("b", "c"):
        (tmp_path / folder).mkdir()
        shutil.copytree(BASE, tmp_path / folder / "copy")
    one, other = (tmp_path / folder / "copy" for folder in ("b", "c"))
    words = (BASE, data, "--out", tmp_path / "answers.jsonl", "--max_new_tokens", 4, "--limit", 2)
    _, document, _ = evaluated(*words, "--compare", one, other)
    assert [Path(found["out"]).name for found in document["models"].values()] == [
        "answers.jsonl", "answers.copy.jsonl", "answers.copy-2.jsonl"
    ]  # fmt: skip
    status, document, err = evaluated(*words, "--compare", other)
    assert status == 0, err
    assert "rows to answer" not in err
    assert document["models"][str(other)]["out"].endswith("answers.copy-2.jsonl")


def test_other_settings_at_the_same_place_are_refused_with_both_values(made, data):
    status, _, err = evaluated(BASE, data, "--out", made["out"], "--max_new_tokens", 32)
    assert status == 1
    assert "--max_new_tokens is 64 there and 32 here" in err


def test_other_rows_at_the_same_place_are_refused(made, data, tmp_path):
    other = story_rows(tmp_path, 3, name="other")
    status, _, err = evaluated(BASE, other, "--out", made["out"], "--max_new_tokens", 64)
    assert status == 1
    assert "depend on something else" in err


def test_a_changed_file_is_not_taken_for_the_models_answers(made, data, tmp_path):
    out = tmp_path / "answers.jsonl"
    for ending in ("", ".key"):
        out.with_name(out.name + ending).write_bytes(made["out"].with_name(made["out"].name + ending).read_bytes())
    out.write_bytes(out.read_bytes().replace(b"square", b"circle", 1))
    status, _, err = evaluated(BASE, data, "--out", out, "--max_new_tokens", 64)
    assert status == 1
    assert "was changed after vlft wrote it" in err


def test_more_rows_later_keep_the_first_answers(made, data, tmp_path):
    out = tmp_path / "answers.jsonl"
    words = (BASE, data, "--out", out, "--max_new_tokens", 64)
    assert evaluated(*words, "--limit", 3)[1]["rows"] == 3
    assert len(lines(out)) == 3
    status, _, err = evaluated(*words)
    assert status == 0
    assert "3 rows of 12 were answered before" in err
    assert out.read_bytes() == made["out"].read_bytes()


def test_a_file_of_answers_needs_no_model(made, data, tmp_path):
    said = [{"id": line["id"], "answer": line["answer"]} for line in reversed(made["lines"])]
    said[0]["answer"] = "wrong"
    status, document, err = evaluated(write_lines(tmp_path / "theirs.jsonl", said), data)
    assert status == 0, err
    assert document["metrics"]["exact_match"] == (ROWS - 1) / ROWS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said[:-1], "has no answer in"),
        (lambda said: [*said, {"index": 99, "answer": "x"}], "index 99 is none of the 12 rows"),
        (lambda said: [*said, said[0]], "both answer"),
        (lambda said: [{**said[0], "reference": "other"}, *said[1:]], "Were the answers given to other data"),
        (lambda said: [{"index": 0}], 'has no text under "answer"'),
        (lambda said: [{"answer": "x"}], 'has neither "index" nor "id"'),
    ],
)
def test_answers_that_do_not_fit_are_refused(made, data, tmp_path, change, message):
    said = [{"index": line["index"], "answer": line["answer"]} for line in made["lines"]]
    status, _, err = evaluated(write_lines(tmp_path / "theirs.jsonl", change(said)), data)
    assert status == 1
    assert message in err


def test_models_are_compared_on_the_same_rows(made, data, tmp_path):
    said = [
        {"index": line["index"], "answer": "wrong" if i < 6 else line["answer"]} for i, line in enumerate(made["lines"])
    ]
    theirs = write_lines(tmp_path / "theirs.jsonl", said)
    status, document, err = evaluated(made["out"], data, "--compare", theirs)
    assert status == 0, err
    assert list(document["models"]) == [str(made["out"]), str(theirs)]
    difference, low, high = document["models"][str(theirs)]["differences"]["exact_match"]
    assert difference == pytest.approx(-0.5)
    assert low <= difference <= high < 0
    assert document["models"][str(made["out"])]["differences"] == {}


def test_several_right_answers(data, tmp_path):
    rows = [
        {"question": "What?", "answer": "a cat", "references": ["cat", "kitten"]},
        {"question": "What?", "answer": "a dog", "answers": [{"answer": "a dog"}, {"answer": "dog"}]},
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    said = write_lines(tmp_path / "said.jsonl", [{"index": 0, "answer": "kitten"}, {"index": 1, "answer": "dog"}])
    status, document, err = evaluated(said, file)
    assert status == 0, err
    assert document["metrics"]["exact_match"] == 1


def test_a_metric_that_applies_to_no_row_is_refused_before_a_model_is_loaded(data, tmp_path):
    out = tmp_path / "answers.jsonl"
    status, _, err = evaluated(BASE, data, "--metric", "iou", "--out", out)
    assert status == 1
    assert "--metric iou cannot be computed" in err
    assert "rows to answer" not in err


def test_rows_that_cannot_be_evaluated(data, tmp_path):
    rows = json.loads(data.read_text())[:3]
    rows[1]["conversations"] = rows[1]["conversations"][:1]
    rows[2]["image"] = ["missing.png"] * len(rows[2]["image"])
    file = data.parent / "some.json"
    file.write_text(json.dumps(rows))
    out = tmp_path / "answers.jsonl"
    status, _, err = evaluated(BASE, file, "--out", out)
    assert status == 1
    assert "no gpt turn" in err
    status, document, err = evaluated(BASE, file, "--out", out, "--on_bad_row", "skip")
    assert status == 0, err
    assert (document["rows"], document["skipped"]) == (1, 2)
    assert document == evaluated(BASE, file, "--out", out, "--on_bad_row", "skip")[1]


def test_the_terminal_shows_figures_worst_rows_and_paths(made, data, capsys):
    said = [
        {"index": line["index"], "answer": "" if i == 4 else line["answer"]} for i, line in enumerate(made["lines"])
    ]
    theirs = write_lines(made["out"].parent / "theirs.jsonl", said)
    assert main(["eval", str(theirs), str(data), "--compare", str(made["out"])]) == 0
    shown = capsys.readouterr().out
    assert "exact_match" in shown
    assert "difference to" in shown
    assert f"{data}[4]: 0" in shown
    assert "answer (empty)" in shown
    assert f"answers: {theirs}" in shown


def test_ctrl_c_says_that_the_same_command_continues(data, tmp_path, monkeypatch):
    from vlft.evaluation.answers_file import AnswersFile

    real, left = AnswersFile.add, [4]

    def add(self, line):
        real(self, line)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(AnswersFile, "add", add)
    out = tmp_path / "answers.jsonl"
    status, _, err = evaluated(BASE, data, "--out", out, "--max_new_tokens", 64, "--batch", 1)
    assert status == 130, err
    assert "Run the same command again to continue" in err
    assert len(lines(out.with_name("answers.jsonl.part"))) == 1 + 4


@pytest.mark.parametrize(
    "words", [["--out", "a.html"], ["--batch", "0"], ["--limit", "0"], ["--max_new_tokens", "-1"], ["--nonsense"]]
)
def test_wrong_usage_exits_2(data, words):
    assert main(["eval", str(BASE), str(data), *words]) == 2


def test_a_metric_before_the_model_is_explained(data, capsys):
    assert main(["eval", "--metric", "anls", str(BASE), str(data)]) == 2
    assert "Write MODEL and DATA first" in capsys.readouterr().err


def test_labels_are_scored_instead_of_generated(made, data, tmp_path):
    labels = list(dict.fromkeys(line["reference"] for line in made["lines"]))
    file = tmp_path / "labels.txt"
    file.write_text("\n".join(labels), encoding="utf-8")
    out = tmp_path / "answers.jsonl"
    words = (BASE, data, "--labels", file, "--out", out)
    status, document, err = evaluated(*words)
    assert status == 0, err
    assert document["confusion"]["labels"] == labels
    assert sum(map(sum, document["confusion"]["counts"])) == ROWS
    right = 0
    for line in lines(out):
        assert list(line["scores"]) == labels
        assert line["answer"] == max(labels, key=line["scores"].__getitem__)
        right += line["answer"] == line["reference"]
    assert document["metrics"]["accuracy"] == right / ROWS
    assert evaluated(*words)[1] == document
    status, _, err = evaluated(BASE, data, "--out", out)
    assert status == 1
    assert "--labels" in err


def test_a_page_is_written_beside_the_answers(made):
    page = Path(made["document"]["page"])
    assert page == made["out"].with_suffix(".html")
    assert "<html" in page.read_text(encoding="utf-8")


def test_the_python_function_gives_the_same_figures(made, data):
    from vlft import evaluate

    found = evaluate(BASE, data, out=made["out"], max_new_tokens=64)
    assert {name: each[0].value for name, each in found.figures.items()} == made["document"]["metrics"]
    assert [row.answers for row in found.rows] == [(line["answer"],) for line in made["lines"]]
    with pytest.raises(UsageError, match="batch is 0, must be a number from 1"):
        evaluate(BASE, data, batch=0)


def test_thoughts_are_kept_in_the_file_and_not_scored(tmp_path):
    rows = [{"question": "1+1?", "answer": "<think>easy</think>2"}, {"question": "2?", "answer": "2"}]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    said = [{"index": 0, "answer": "<think>hm\nhm</think>\n\n2"}, {"index": 1, "answer": "<think>2"}]
    status, document, err = evaluated(write_lines(tmp_path / "said.jsonl", said), file, "--metric", "exact_match")
    assert status == 0, err
    assert document["metrics"]["exact_match"] == 0.5


def test_boxes_are_compared_as_the_model_writes_them(tmp_path):
    from PIL import Image

    Image.new("RGB", (120, 90)).save(tmp_path / "a.png")
    box, other = "<|box_start|>(12,9),(60,45)<|box_end|>", "<|box_start|>(0,0),(120,90)<|box_end|>"
    rows = [{"image": "a.png", "question": "<image>Where?", "answer": f"Here: {box}", "references": [other]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out = tmp_path / "answers.jsonl"
    words = ("--box_format", "pixels", "--out", out, "--max_new_tokens", 2, "--metric", "iou")
    status, document, err = evaluated(BASE, tmp_path / "rows.json", *words)
    assert status == 0, err
    [line] = lines(out)
    assert line["reference"] == "Here: <|box_start|>(100,100),(500,500)<|box_end|>"
    assert line["references"][1] == "<|box_start|>(0,0),(1000,1000)<|box_end|>"
    assert document["metrics"]["iou"] == 0
    said = write_lines(tmp_path / "said.jsonl", [{**line, "answer": "<|box_start|>(100,100),(500,300)<|box_end|>"}])
    assert evaluated(said, tmp_path / "rows.json", "--metric", "iou")[1]["metrics"]["iou"] == pytest.approx(0.5)


def test_the_first_of_a_column_of_answers_and_all_of_them(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_lines(file, [{"q": "What?", "answers": ["stop", "STOP sign"]}])
    said = write_lines(tmp_path / "said.jsonl", [{"index": 0, "answer": "STOP sign"}])
    status, document, err = evaluated(said, file, "--columns", "question=q,answer=answers.0")
    assert status == 0, err
    assert document["metrics"]["exact_match"] == 1


def test_a_damaged_picture_is_named_or_skipped(data, tmp_path):
    rows = json.loads(data.read_text())[:4]
    damaged = data.parent / "damaged.png"
    content = (data.parent / rows[1]["image"][0]).read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    rows[1]["image"][0] = "damaged.png"
    file = data.parent / "damaged.json"
    file.write_text(json.dumps(rows))
    words = (BASE, file, "--out", tmp_path / "answers.jsonl", "--max_new_tokens", 64)
    status, _, err = evaluated(*words)
    assert status == 1
    assert "damaged.json[1]" in err
    status, document, err = evaluated(*words, "--on_bad_row", "skip")
    assert status == 0, err
    assert (document["rows"], document["skipped"]) == (3, 1)
    assert document["metrics"]["exact_match"] == 1
    (tmp_path / "same").symlink_to(BASE)
    _, document, _ = evaluated(*words, "--on_bad_row", "skip", "--compare", tmp_path / "same")
    assert (document["rows"], document["skipped"]) == (3, 1)


def test_a_batch_that_does_not_fit_is_halved(made, data, tmp_path, monkeypatch):
    import torch

    from vlft.model.generate import Speaker

    real, sizes = Speaker.generate, []

    def generate(self, prompts, sampling, **kwargs):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("too large")
        return real(self, prompts, sampling, **kwargs)

    monkeypatch.setattr(Speaker, "generate", generate)
    out = tmp_path / "answers.jsonl"
    status, _, err = evaluated(BASE, data, "--out", out, "--max_new_tokens", 64, "--batch", 8)
    assert status == 0, err
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2]
    assert "2 rows are answered together from now on" in err
    assert out.read_bytes() == made["out"].read_bytes()


def test_two_evaluations_do_not_write_one_file(tmp_path):
    from vlft.errors import ConfigError
    from vlft.evaluation.answers_file import AnswersFile, Line

    line = Line(file="a.json", index=0, id=None, question="q", answer="a\u2028b", references=("a",))
    one, other = (AnswersFile(tmp_path / "out.jsonl", {"model": "x"}) for _ in range(2))
    one.add(line)
    with pytest.raises(ConfigError, match="another process writes it"):
        other.add(line)
    one.finish([line])
    assert other.kept() == {("a.json", 0): line}
