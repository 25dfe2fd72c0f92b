"""The run report: page and answers of a real run, asking does not change training, and pages of odd and huge runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from html import unescape
from pathlib import Path

import pytest
from build import FAMILY
from conftest import MIXED_ROWS, row
from runs import arguments, assert_same, lines, record_of

from vlft.chat import open_model, question_of
from vlft.cli.main import main
from vlft.data.encode import Encoder
from vlft.report import write_report
from vlft.train.reporting import Reporter

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
    ours, theirs = (re.sub(r"Written [^<]*", "", p.read_text()) for p in (page, run / "report.html"))
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
    assert len([json.loads(text) for text in metrics]) == 100_000
    parsed = time.process_time()
    assert main(["report", str(folder)]) == 0
    # Compared with parsing the lines, so that the limit is the same on a slow or busy machine; 1.4 to 1.9 were seen.
    assert time.process_time() - parsed < 4 * (parsed - start)
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


# ---- runs that are not over, and several runs


def test_a_page_needs_neither_torch_nor_transformers():
    code = "import sys, vlft.report; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_run_that_is_being_written(tmp_path):
    run = record_of(tmp_path / "run", steps=3, of=9)
    with (run / "metrics.jsonl").open("a") as out:
        out.write('{"step": 4, "lo')
    (run / "config.yaml").unlink()
    html = write_report(run).read_text()
    assert "not finished: step 3 of 9, 12 s left" in html
    assert "Missing in the folder: config.yaml." in html
    assert "could not be read" not in html
    assert 'id="live"' in html
    assert 'id="live"' not in write_report(run, tmp_path / "copy.html").read_text()  # nobody writes the copy again
    ended = write_report(run, ended=True).read_text()
    assert "step 3 of 9. The run has ended. The same command resumes it." in ended
    assert 'id="live"' not in ended


def test_a_run_that_was_killed_long_ago(tmp_path):
    run = record_of(tmp_path / "run", steps=3, of=9)
    os.utime(run / "metrics.jsonl", (0, time.time() - 3 * 3600))
    html = write_report(run).read_text()
    assert "The run has written nothing for 3 h 00 min." in html
    assert 'id="live"' not in html


def test_the_last_page_of_a_run_that_fails_says_so(tmp_path):
    run = record_of(tmp_path / "run", steps=3, of=9)
    with pytest.raises(OSError, match="disk"), Reporter(write_report, run):
        raise OSError("the disk is gone")
    assert "The run has ended." in (run / "report.html").read_text()


FOLDERS = {
    "no folder": (lambda tmp: tmp / "none", "none: no such folder"),
    "a file": (lambda tmp: tmp / "a.txt", "a.txt: is a file"),
    "a folder of something else": (lambda tmp: tmp / "empty", "empty: has no vlft.json, so it is no run folder"),
    "a checkpoint": (lambda tmp: tmp / "run" / "checkpoint-3", "is a checkpoint. Name the run: "),
    "a merged model": (lambda tmp: tmp / "merged", "merged: is a model that was merged from output/x"),
}


def test_each_folder_that_is_no_run_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record_of(tmp_path / "run", steps=3, of=9)
    record_of(tmp_path / "merged", steps=1, of=1, merged_from="output/x")
    (tmp_path / "run" / "checkpoint-3").mkdir()
    shutil.copy("run/vlft.json", "run/checkpoint-3")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    for wrong, says in FOLDERS.values():
        assert main(["report", "run", str(wrong(tmp_path))]) == 1
        assert says in (err := capsys.readouterr().err)
        assert err.count("error: ") == 1
    assert main(["report", *(str(wrong(tmp_path)) for wrong, _ in FOLDERS.values())]) == 1
    err = capsys.readouterr().err
    assert all(says in err for _, says in FOLDERS.values())
    assert main(["report", "run", "./run"]) == 1
    assert "./run: is the same run as run" in capsys.readouterr().err
    assert not Path("compare.html").exists()


def test_several_runs_in_one_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = {
        "file": "a/rows.json",
        "index": 3,
        "id": None,
        "turns": [{"role": "user", "text": "Which?"}],
        "right": "<b>",
    }
    said = {"file": "a/rows.json", "index": 3, "cut": False}
    for place, name in enumerate(("one/run", "two/run", "three/run")):
        run = tmp_path / name
        run.parent.mkdir()
        config = f"vision: {['lora', 'frozen', 'frozen'][place]}\nlearning_rate: {place + 1.0}\noutput_dir: {name}\n"
        record_of(
            run, steps=3 + place, of=5, finished=place == 2, config=config, loss=6.0 - place, seed=[1, 2, 2][place]
        )
        (run / "answers.jsonl").write_text(
            "".join(
                json.dumps(one) + "\n"
                for one in (
                    {"step": 1, "rows": [{**asked, "file": f"{name}/rows.json"}]},
                    {"step": 1, "answers": [{**said, "file": f"{name}/rows.json", "answer": "early"}]},
                    {"step": 2, "answers": [{**said, "file": f"{name}/rows.json", "answer": f"answer of {name}"}]},
                )[: 3 if place else 1]
            )
        )
    assert main(["report", "one/run", "two/run", "three/run"]) == 0
    assert capsys.readouterr().out == "report: compare.html\n"
    html = Path("compare.html").read_text()
    plain = unescape(re.sub(r"<[^>]+>", "|", html))
    charts = [json.loads(unescape(text))["series"] for text in re.findall(r'data-points="([^"]+)"', html)]
    keys = ["one/run: vision lora, learning_rate 1, seed 1", "two/run: vision frozen, learning_rate 2, seed 2"]
    assert [line["name"] for line in charts[0]][:2] == keys
    assert [line["y"] for line in charts[0]] == [[6, 3, 2], [5, 2.5, 1.6667, 1.25], [4, 2, 1.3333, 1, 0.8]]
    rows = [[cell for cell in re.split(r"\|+", unescape(re.sub(r"<[^>]+>", "|", row))) if cell]
            for row in re.findall(r"<tr>(.*?)</tr>", html, re.S)]  # fmt: skip
    assert ["one/run", "running: step 3 of 5", "2", "2 (step 3)", "-", "-", "300", "50", "6.0 s"] in rows
    assert ["three/run", "finished after 5 steps", "0.8", "0.8 (step 5)", "-", "-", "500", "50", "10 s"] in rows
    assert ["vision", "lora", "frozen", "frozen"] in rows
    assert ["learning_rate", "1", "2", "3"] in rows
    assert ["seed", "1", "2", "2"] in rows
    assert "output_dir" not in plain
    assert "lora rank" not in plain  # the same in all of them
    assert ["two/run", ", step 2", "answer of two/run"] in rows
    assert ["three/run", ", step 2", "answer of three/run"] in rows
    assert ["answer in the row", "<b>"] in rows
    assert "early" not in plain
    assert len(charts) == 4


def test_lines_that_no_run_writes(tmp_path):
    run = record_of(tmp_path / "run", steps=2, of=9)
    with (run / "metrics.jsonl").open("a") as out:
        out.write("[" * 100_000 + "\n" + '{"step": 3, "loss": 1' + "0" * 400 + "}\n")
    assert "1 lines of its files could not be read: metrics.jsonl (1)." in write_report(run).read_text()


def test_the_head_and_the_cards_of_a_grpo_run(tmp_path, capsys):
    run = record_of(tmp_path / "run", steps=2, of=2, method="grpo")
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line | {"kl": None, "frac_reward_zero_std": 0.5}) + "\n" for line in lines)
    )
    (run / "completions.jsonl").write_text("{}\n[\n")
    assert main(["report", str(run)]) == 0
    assert "run: 2 lines could not be read: completions.jsonl (2)" in capsys.readouterr().err
    html = (run / "report.html").read_text()
    assert "<p>GRPO: " in html
    assert "frac_<wbr>reward_<wbr>zero_<wbr>std, last line" in html
    assert "kl, last line" not in html
