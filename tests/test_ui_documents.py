"""The screens of `vlft ui` show what the verbs really print with `--json`, so no key can vanish unseen."""

from __future__ import annotations

import json
import os

import pytest
from adapters import LANGUAGE, record_of, save_adapter
from build import row, write_image, write_json

from vlft.checkpoint import write_record
from vlft.cli.main import main
from vlft.ui import commands
from vlft.ui.commands import Form
from vlft.ui.desk import Desk
from vlft.ui.jobs import Jobs
from vlft.ui.runs import Runs
from vlft.ui.screens import check, compare, look, merge, plan


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A finished run on the tiny base."""
    folder = save_adapter(base, tmp_path_factory.mktemp("run"), target_modules=LANGUAGE)
    write_record(folder, record_of(base, ("frozen", "frozen", "lora")))
    return folder


@pytest.fixture
def form(base, run, tmp_path) -> Form:
    write_image(tmp_path / "a.jpg")
    good = row("<image>What?", "A.", image="a.jpg")
    data = write_json(tmp_path / "train.json", [good, row("Hi.", "Hello."), row("<image>x", "y", image="gone.jpg")])
    return Form(
        folder=str(tmp_path), data=(str(data),), model=str(base), run=str(run), merged=str(tmp_path / "merged"),
        index="0-1", rate="1e-4", card="4090", batch="2", question="Hi?", more="--on_bad_row skip",
    )  # fmt: skip


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(jobs=Jobs(tmp_path / "jobs"), runs=Runs(), folder=str(tmp_path))


def done(desk: Desk, words: list[str], capsys, **files: str):
    """Run a verb in this process and put what it printed where a job puts it; returns its document."""
    folder = desk.jobs.root / desk.jobs.key(words[0], words[1:])
    folder.mkdir(parents=True)
    place = words.index("--") if "--" in words else len(words)
    asked = [word for flag, file in files.items() for word in (f"--{flag}", str(folder / file))]
    capsys.readouterr()
    status = main([*words[:place], *asked, "--json", *words[place:]])
    printed = capsys.readouterr()
    (folder / "stdout").write_text(printed.out)
    (folder / "stderr").write_text(printed.err)
    (folder / "job.json").write_text(json.dumps({"words": words, "argv": [], "document": True, "time": 1.0}))
    (folder / "ended.json").write_text(json.dumps({"status": status, "time": 3.0}))
    assert status in (0, 1), printed.err
    return json.loads(printed.out)


def test_a_merge_shows_the_lines_that_serve_it(form, desk, capsys):
    found = done(desk, commands.merge(form), capsys)
    _, html = merge.view(form, desk)
    assert f"vlft chat {form.merged}" in html
    assert {"vllm"} <= found["serve"].keys()
    for line in (*found["serve"].values(), *found["serve_notes"], *found["warnings"]):
        assert line in html.replace("&#39;", "'").replace("&#34;", '"').replace("&gt;", ">").replace("&amp;", "&")


def test_a_check_shows_the_refused_rows(form, desk, capsys):
    found = done(desk, commands.check(form), capsys, report="look")
    _, html = check.view(form, desk)
    assert "1 row of 3 cannot be trained" in html
    assert found["bad"][0]["field"] in html
    assert "iframe" in html


def test_a_plan_shows_what_is_trained_and_what_fits(form, desk, capsys):
    found = done(desk, commands.plan(form), capsys)
    _, html = plan.view(form, desk)
    assert f">{plan.group_name(found['groups'][0]['name'])}<" in html
    assert "GB" in html


def test_a_chat_shows_both_answers(form, desk, capsys):
    base, tuned = compare.commands(form)[1:]
    for words in (base, tuned):
        found = done(desk, words, capsys)
    _, html = compare.view(form, desk)
    assert f"{found['tokens']} tokens in 2.0 s" in html
    assert os.path.basename(form.run) in html


def test_a_preview_shows_its_page(form, desk, capsys):
    done(desk, commands.look(form), capsys, html=look.PAGE)
    assert "/look?" in look.view(form, desk)[1]
