"""The run report: page and answers of a real run, asking does not change training, and pages of odd and huge runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from html import unescape
from pathlib import Path

import pytest
from build import FAMILY
from conftest import MIXED_ROWS, row
from runs import arguments, assert_same, lines

from vlft.chat import open_model, question_of
from vlft.cli.main import main
from vlft.data.encode import Encoder

EVALUATED = ("--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "4", "--report_tokens", "8")


def answers(run: Path) -> list[dict]:
    return [json.loads(text) for text in (run / "answers.jsonl").read_text().splitlines()]


def texts(run: Path) -> dict[int, list[str]]:
    return {line["step"]: [a["answer"] for a in line["answers"]] for line in answers(run) if "answers" in line}


@pytest.fixture(scope="module")
def evaluated(base, mixed_json, media, tmp_path_factory):
    """A run with dropout, evaluations, checkpoints, a skipped row, and texts that contain markup."""
    folder = tmp_path_factory.mktemp("report")
    rows = [*MIXED_ROWS, row("", "Nothing?", id="<i>empty</i>")]
    rows[0] = row("</div><script>alert(1)</script>", "<image>\nWhat <b>is</b> it?", id="still", image="china.jpg")
    data = folder / "train.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    more = ("--eval_path", str(data), *EVALUATED, "--report_rows", "3", "--lora_dropout", "0.2", "--on_bad_row", "skip")
    argv = arguments(base, data, media, folder / "run", *more, "--save_strategy", "steps", "--save_steps", "3")
    assert main(argv) == 0
    return folder / "run", argv, data


def test_the_page_says_what_the_run_says(evaluated, capsys):
    run, _, data = evaluated
    html = (run / "report.html").read_text(encoding="utf-8")
    logged = [line for line in lines(run) if "loss" in line]
    curves = {
        one["name"]: one
        for text in re.findall(r'data-points="([^"]+)"', html)
        for one in json.loads(unescape(text))["series"]
    }
    assert curves["training"]["x"] == [1, 2, 3, 4]
    for name, key in (("training", "loss"), ("before clipping", "grad_norm"), ("step", "step_s")):
        assert curves[name]["y"] == pytest.approx([line[key] for line in logged], rel=1e-4)
    assert curves["language"]["y"] == pytest.approx([line["lr"]["language"] for line in logged], rel=1e-4)
    losses = [line["eval_loss"] for line in lines(run) if "eval_loss" in line]
    assert curves["evaluation"]["x"] == [2, 4]
    assert curves["evaluation"]["y"] == pytest.approx(losses, rel=1e-4)
    assert "finished after 4 steps" in html
    assert f"<td>{data}</td><td>8</td><td>7</td><td>1</td>" in html
    assert f"{data}[7] (id &lt;i&gt;empty&lt;/i&gt;) conversations[1].value: the answer is empty" in html
    assert "lora_dropout: 0.2" in html
    record = json.loads((run / "vlft.json").read_text())
    assert all(f"{name} {version}" in html for name, version in record["versions"].items())
    for one in texts(run)[4]:
        assert one.strip() == "" or one[:3] in unescape(html)
    assert html.count("data:image/jpeg;base64,") == 2
    assert html.count("video clip.mp4") == 2
    # The time for saving is counted, including the last checkpoint, which no logged line follows.
    saved = sum(line["save_s"] for line in logged) + record["training"]["unlogged"]["save_s"]
    assert 0 < saved < 5
    assert re.search(rf"saving checkpoints</span></td><td>{saved:.1f} s</td>", html)


def test_what_rows_say_cannot_act(evaluated):
    html = (evaluated[0] / "report.html").read_text(encoding="utf-8")
    assert html.count("<script>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "What &lt;b&gt;is&lt;/b&gt; it?" in html
    assert "http:" not in html
    assert "https:" not in html
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy
    assert policy[1].startswith("default-src 'none'; ")
    assert re.search("script-src 'sha256-[^']{44}'$", policy[1])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")
def test_a_browser_has_nothing_to_complain_of(evaluated, tmp_path):
    page = tmp_path / "page.html"
    html = (evaluated[0] / "report.html").read_text(encoding="utf-8")
    page.write_text(html, encoding="utf-8")

    def opened() -> subprocess.CompletedProcess:
        command = ["chromium", "--headless=new", "--no-sandbox", "--enable-logging=stderr", "--v=0", "--dump-dom"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        return subprocess.run([*command, profile, page.as_uri()], capture_output=True, text=True, timeout=60)

    assert "CONSOLE" not in opened().stderr
    page.write_text(html.replace("</body>", "<script>alert(1)</script></body>"), encoding="utf-8")
    assert "Content Security Policy" in opened().stderr  # a foreign script does not run, and is reported


def test_answers_are_those_of_the_finished_model(evaluated, samples):
    """The last evaluation used the weights that `vlft chat` loads from files into a separate model."""
    run, _, data = evaluated
    (described,) = (line["rows"] for line in answers(run) if "rows" in line)
    assert [one["index"] for one in described] == [0, 2, 4]
    assert [one["id"] for one in described] == ["still", "clip", "both"]
    chat = open_model(run)
    asked = [sample for sample in _parsed(data, run) if sample.index in (0, 2, 4)]
    assert texts(run)[4] == chat.answers([question_of(sample) for sample in asked], max_new_tokens=8, batch=1)
    assert set(texts(run)) == {2, 4}


def _parsed(data, run):
    from vlft.data.files.index import index_rows, parsed

    folder = re.search(r"^image_folder: (.*)$", (run / "config.yaml").read_text(), re.M)
    assert folder
    return parsed(index_rows([str(data)], image_folder=folder[1], family=FAMILY)).samples


def test_asking_changes_nothing_of_the_training(evaluated, base, media, tmp_path):
    run, argv, _ = evaluated
    assert main([*argv, "--output_dir", str(tmp_path / "unasked"), "--report_rows", "0"]) == 0
    assert_same(tmp_path / "unasked", run, tolerance=0)
    assert not (tmp_path / "unasked" / "answers.jsonl").exists()


def test_answers_after_a_checkpoint_are_cut_and_asked_again(evaluated, tmp_path):
    run, argv, _ = evaluated
    again = tmp_path / "again"
    shutil.copytree(run, again)
    record = json.loads((again / "vlft.json").read_text())
    record["training"]["finished"] = False
    (again / "vlft.json").write_text(json.dumps(record))
    shutil.rmtree(again / "checkpoint-4")
    assert main([*argv, "--output_dir", str(again)]) == 0
    assert [line["step"] for line in answers(again) if "answers" in line] == [2, 4]
    assert texts(again) == texts(run)
    assert_same(again, run, tolerance=0)
    html = (again / "report.html").read_text(encoding="utf-8")
    assert html.count("<section>") == 3  # the rows are now described twice, and are shown once


def test_a_page_that_cannot_be_written_ends_nothing(train, capsys, monkeypatch):
    def blocked(run: Path) -> None:
        (run / "report.html").mkdir(parents=True)

    import vlft.train.run as story

    real = story._claim

    def claim(started):
        found = real(started)
        blocked(started.folder.path)
        return found

    monkeypatch.setattr(story, "_claim", claim)
    run = train("--max_steps", "2")
    err = capsys.readouterr().err
    assert err.count("report.html cannot be written") == 1
    assert json.loads((run / "vlft.json").read_text())["training"]["finished"]


def test_a_row_that_cannot_be_asked_ends_nothing(train, mixed_json, capsys, monkeypatch):
    def broken(self, sample):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Encoder, "prompt", broken)
    run = train("--eval_path", str(mixed_json), *EVALUATED)
    assert capsys.readouterr().err.count("no more answers for the report") == 1
    assert texts(run) == {}
    assert len([line for line in lines(run) if "eval_loss" in line]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--report_rows", "3"], "--report_rows 3 has no effect without --eval_path"),
        (["--report_rows", "-1"], "--report_rows is -1, must not be negative"),
        (["--report_tokens", "0"], "--report_tokens is 0, must be at least 1"),
    ],
)
def test_flags_that_cannot_act(base, mixed_json, media, tmp_path, capsys, argv, message):
    assert main(arguments(base, mixed_json, media, tmp_path / "run", *argv)) == 1
    assert message in capsys.readouterr().err


# ---- vlft report


def test_the_verb_remakes_the_page(evaluated, tmp_path, capsys):
    run, *_ = evaluated
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"report: {page}\n"
    ours, theirs = (re.sub(r"Page of [^<]*", "", p.read_text()) for p in (page, run / "report.html"))
    assert ours == theirs
    assert main(["report", str(tmp_path)]) == 1
    assert "has no vlft.json, so it is no run folder" in capsys.readouterr().err
    assert main(["report", str(run), "--html", str(tmp_path / "no" / "page.html")]) == 1
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err


def _folder(run: Path, out: Path, metrics: list[str]) -> Path:
    out.mkdir()
    shutil.copy(run / "vlft.json", out)
    (out / "metrics.jsonl").write_text("".join(metrics), encoding="utf-8")
    return out


def test_a_hundred_thousand_steps(evaluated, tmp_path):
    run, *_ = evaluated
    line = next(line for line in lines(run) if "loss" in line)
    losses = [4 / (1 + step / 1000) + (step % 7) / 10 for step in range(1, 100_001)]
    metrics = [json.dumps({**line, "step": i, "loss": loss}) + "\n" for i, loss in enumerate(losses, 1)]
    folder = _folder(run, tmp_path / "long", metrics)
    start = time.process_time()
    assert main(["report", str(folder)]) == 0
    assert time.process_time() - start < 6  # 1 to 2 s on an idle machine
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert len(html) < 1_000_000
    assert "100,000 logged lines are shown as 500 points" in html
    training = next(
        one
        for text in re.findall(r'data-points="([^"]+)"', html)
        for one in json.loads(unescape(text))["series"]
        if one["name"] == "training"
    )
    assert training["x"][-1] == 100_000
    assert training["y"][0] == pytest.approx(sum(losses[:200]) / 200, rel=1e-3)
    assert training["y"][-1] == pytest.approx(sum(losses[-200:]) / 200, rel=1e-3)


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ([], "No step has been logged yet"),
        (['{"step": 1, "loss": NaN, "tokens": 5, "tokens_per_s": 2.5, "lr": {"language": 0.1}}\n'], "after 1 step."),
        (['{"step": 1, "loss": null, "tokens": 0, "step_s": 2}\n', '{"step": 2, "lo'], "after 1 step."),
        (
            ['{"step": 1, "loss": 2.0}\n', "broken\n", "[]\n", '{"step": "x"}\n'],
            "3 lines of its files could not be read",
        ),
        (['{"step": 5, "eval_loss": 3.0}\n'], "No step has been logged yet"),
    ],
)
def test_odd_metrics(evaluated, tmp_path, metrics, says):
    folder = _folder(evaluated[0], tmp_path / "odd", metrics)
    assert main(["report", str(folder)]) == 0
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert says in html
    assert "nan" not in re.sub(r"<script>.*</script>", "", html, flags=re.S).lower()


@pytest.mark.parametrize(("how", "most"), [("shrink", "180"), ("drop_media", "160")])
def test_rows_that_are_made_to_fit_are_asked_as_they_are_trained(train, mixed_json, capsys, how, most):
    run = train("--eval_path", str(mixed_json), *EVALUATED, "--max_length", most, "--over_length", how,
                "--report_rows", "7")  # fmt: skip
    assert "no more answers" not in capsys.readouterr().err
    assert set(texts(run)) == {2, 4}
    assert all(len(said) == 7 for said in texts(run).values())
