"""`vlft ui` speaks in the names of its fields, and says only what is so: saving, resuming, old results, permissions."""

from __future__ import annotations

import json
import os
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest
from build import row, write_image, write_json

from vlft.errors import ConfigError
from vlft.ui import commands, words
from vlft.ui.commands import Form
from vlft.ui.desk import Desk
from vlft.ui.jobs import Jobs, read
from vlft.ui.runs import Runs, saved_step
from vlft.ui.screens import check, compare, data, look, merge, plan, train


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(jobs=Jobs(tmp_path / "jobs"), runs=Runs(), folder=str(tmp_path))


def ended(desk: Desk, job, *, seconds: float = 60):
    """Wait for a job."""
    end = time.time() + seconds
    while (found := read(job.folder)).word == "running" and time.time() < end:
        time.sleep(0.05)
    return found


def put(desk: Desk, command: list[str], *, status: int | None, err: str = "", out: str = "", about=None, began=None):
    """Write a job that has ended; returns its folder."""
    folder = desk.jobs.root / desk.jobs.key(command[0], command[1:] if about is None else about)
    folder.mkdir(parents=True)
    began = time.time() - 100 if began is None else began
    (folder / "job.json").write_text(json.dumps({"words": command, "argv": [], "document": True, "time": began}))
    (folder / "ended.json").write_text(json.dumps({"status": status, "time": began + 10}))
    (folder / "stdout").write_text(out)
    (folder / "stderr").write_text(err)
    return folder


# ---- the page's words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: no such file. Put it there, or correct the path or --image_folder",
         'a: no such file. Put it there, or correct the path or "Folder of the pictures" (step 1)'),
        ("pass --image_folder /x/pics or, if only", 'set "Folder of the pictures" (step 1) to /x/pics or, if only'),
        ("pass --image_folder '/my x/pics' or", 'set "Folder of the pictures" (step 1) to /my x/pics or'),
        ("raise --num_train_epochs.", 'raise "Epochs" (step 4).'),
        ("See it, with the same flags: vlft preview '/my x/a.json' --index 85",
         "See it, with the same flags: vlft preview '/my x/a.json' --index 85"),
        ("Fix them: vlft check-data FILE --fix OUT. Or raise --num_train_epochs.",
         'Fix them: vlft check-data FILE --fix OUT. Or raise "Epochs" (step 4).'),
        ("vlft train --output_dir '/a b' --learning_rate 1e-4", "vlft train --output_dir '/a b' --learning_rate 1e-4"),
        ("vlft plan: raise --num_train_epochs.", 'vlft plan: raise "Epochs" (step 4).'),
        ("or train on the rest: --on_bad_row skip", "or train on the rest: --on_bad_row skip"),
    ],
)  # fmt: skip
def test_flags_of_messages_become_fields(text, said):
    assert words.spoken(text) == said


def test_the_page_of_a_check_speaks_in_fields_too():
    page = (
        "<style>a--b</style><h2>x</h2><a title='--index'>pass --image_folder &#39;/my x/a &amp; b&#39;</a> --fix"
        '<p class="words">--index 3</p><p class="words">--fix <b>--fix</b></p>'
    )
    said = (
        "<style>a--b</style><h2>x</h2><a title='--index'>"
        'set "Folder of the pictures" (step 1) to /my x/a &amp; b</a>'
        ' "File for these rows" (step 2)<p class="words">--index 3</p><p class="words">--fix <b>--fix</b></p>'
    )
    assert words.spoken_page(page).replace("</b></p>", "") == said.replace("</b></p>", "")


def test_the_folder_that_a_check_finds_can_be_used(desk, tmp_path):
    here = tmp_path / "my photos"
    (here / "pics").mkdir(parents=True)
    write_image(here / "pics" / "a.jpg")
    file = write_json(here / "train.json", [row("<image>What?", "A.", image="a.jpg")])
    form = Form(folder=str(here), data=(str(file),), headers_only=True)
    check.start(form, desk)
    ended(desk, check.job_of(form, desk))
    html = check.view(form, desk)[1]
    assert f"Folder of the pictures&#34; (step 1) to {here / 'pics'}" in html
    assert "--image_folder" not in html.partition("<details>")[0]
    new = check.advised(form, desk)
    assert new == {"images": str(here / "pics")}
    form = replace(form, **new)
    check.start(form, desk)
    ended(desk, check.job_of(form, desk))
    assert "All 1 rows can be trained" in check.view(form, desk)[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--learning_rate 1e-3", r'"Learning rate" \(step 4\)'),
        ("--output-dir=/x", r'"Folder of the run" \(step 5\)'),
        ("--json", "set by the page"),
        ("--learnin_rate 1", "learning_rate"),
        ("--lr 1", r'"Learning rate" \(step 4\)'),
        ("--epochs 4", r'"Epochs" \(step 4\)'),
        ("--model_name_or_path x", r'"Base model" \(step 1\)'),
        ("--dataset x", r'"Data files to train on" \(step 1\)'),
        ("--images x", r'"Folder of the pictures" \(step 1\)'),
        ("--lora_r 8", r'"LoRA rank" \(step 4\)'),
        ("--max_seq_len 64", "--max_length 64"),
        ("max_length 4096", "belongs to no flag"),
        ("-o x", "belongs to no flag"),
        ("--max_length", "a value is missing"),
        ("--max_length x", "whole number"),
        ("-h", "Drop it"),
    ],
)
def test_a_wrong_flag_is_said_below_its_field(more, said):
    form = Form(data=("a.json",), model="m", run="r", more=more)
    with pytest.raises(ConfigError, match=said):
        commands.train(form)
    assert "More flags" in data.of_more(form)
    form = replace(form, more="--max_length 64 --on_bad_row skip --save_strategy no")
    assert data.of_more(form) == data.of_more(Form())


def test_a_config_in_the_open_folder_counts_as_soon_as_it_exists(tmp_path):
    form = Form(folder=str(tmp_path), data=("/a.json",), more="--config x.yaml")
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        commands.check(form)
    (tmp_path / "x.yaml").write_text("max_length: 64\n")
    assert commands.check(form)[-2:] == ["--config", str(tmp_path / "x.yaml")]
    assert commands.check(replace(form, more="--config=x.yaml"))[-1] == f"--config={tmp_path / 'x.yaml'}"


def test_fields_that_replace_a_default_of_the_method_are_named():
    form = Form(data=("a.json",), model="m", rate="1e-4", more="--method grpo --reward exact_match")
    html = data.of_more(form)
    assert "Learning rate&#34; (step 4) is 1e-4; the default of --method grpo is 1e-05" in html
    assert "Epochs&#34; (step 4) is 3; the default of --method grpo is 1." in html
    assert data.of_more(replace(form, rate="", epochs="1")) == data.of_more(Form())


@pytest.mark.parametrize(
    ("field", "value"),
    [("save", "0"), ("save", "often"), ("rate", "fast"), ("cards", "0"), ("rank", "0"), ("epochs", "x")],
)
def test_a_wrong_value_is_said_at_once(field, value):
    with pytest.raises(ConfigError, match=r'"[A-Z][^"]*" \(step 4\) is .*, must be '):
        commands.plan(replace(Form(data=("a.json",), model="m"), **{field: value}))


def test_rows_that_all_cannot_be_trained_leave_none_to_write(desk):
    form = Form(data=("/a.json",))
    bad = [{"file": "a.json", "index": 0, "id": None, "field": "image", "reason": "no"}]
    put(desk, commands.check(form), status=1, out=json.dumps({"rows": 1, "ok": 0, "bad": bad}))
    html = check.view(form, desk)[1]
    assert "1 row of 1 cannot be trained." in html
    assert "other rows" not in html


def test_refused_rows_that_are_not_listed_are_counted(desk, tmp_path):
    form = Form(data=("/a.json",))
    bad = [{"file": "a.json", "index": i, "id": None, "field": "image", "reason": "no"} for i in range(8)]
    put(desk, commands.check(form), status=1, out=json.dumps({"rows": 9, "ok": 1, "bad": bad}))
    html = check.view(form, desk)[1]
    assert "and 3 more" in html
    assert "iframe" not in html  # the page of the rows was not written


def test_groups_have_names():
    assert plan.group_name("vision_frozen") == "vision tower, frozen"
    assert plan.group_name("language") == "language model"


def test_a_folder_that_was_found_and_is_gone_is_said(desk):
    with pytest.raises(ConfigError, match="is gone"):
        check.advised(Form(data=("/a.json",)), desk)


# ---- saving and resuming


def test_a_run_saves_on_the_way():
    form = Form(data=("a.json",), model="m", run="r", save="0.1")
    line = " ".join(commands.train(form))
    assert "--save_steps 0.1 --save_total_limit 2" in line
    line = " ".join(commands.train(replace(form, more="--save_strategy epoch --save_total_limit 5")))
    assert "--save_steps" not in line
    assert line.count("--save_total_limit") == 1


@pytest.mark.parametrize(("status", "said"), [(-9, "was killed"), (1, "ended with an error"), (75, "before it saved")])
def test_a_run_without_a_checkpoint_begins_again_and_says_so(desk, tmp_path, status, said):
    run = tmp_path / "run"
    (run / "checkpoint-9").mkdir(parents=True)  # incomplete
    (run / "vlft.json").write_text('{"base_model": "m", "training": {}}')
    form = Form(folder=str(tmp_path), run=str(run), data=("a.json",), model="m")
    put(desk, ["train"], status=status, about=[str(run)])
    html = train.view(form, desk)[1]
    assert said in html
    assert "begins at step 1" in html
    (run / "checkpoint-9" / "trainer_state.json").write_text("{}")
    (run / "checkpoint-10").mkdir()
    assert saved_step(run) == 9
    assert "resumes it from its checkpoint of step 9" in train.view(form, desk)[1]


def test_a_failed_run_shows_its_error_and_not_the_beginning_of_its_log(desk, tmp_path):
    form = Form(folder=str(tmp_path), run="run", data=("a.json",), model="m")
    log = "".join(f"line {i}\n" for i in range(40))
    folder = put(desk, ["train"], status=1, about=[str(tmp_path / "run")], err=f"{log}error: no room.\n  Free some.")
    box = train.view(form, desk)[1].partition("<details>")
    assert '<pre class="log bad">error: no room.\n  Free some.</pre>' in box[0]
    assert "line 39" in box[2]
    (folder / "ended.json").write_text('{"status": -9, "time": 1}')
    (folder / "stderr").write_text(log)
    box = train.view(form, desk)[1].partition("<details>")[0]
    assert "line 39" in box
    assert "line 20" not in box


def logged(run: Path, seconds: list[float], most: int = 10) -> None:
    lines = [{"step": i, "loss": 1.0, "step_s": one, "max_steps": most} for i, one in enumerate(seconds, start=1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_the_time_left_is_that_of_most_steps(tmp_path):
    logged(tmp_path, [60.0])
    assert Runs().watch(tmp_path).left is None
    logged(tmp_path, [60.0, 2.0, 2.0, 2.0])
    assert Runs().watch(tmp_path).left == 12.0
    logged(tmp_path, [2.0] * 10)
    assert Runs().watch(tmp_path).left is None


def test_a_resumed_run_is_starting_until_it_logs(desk, tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "checkpoint-3").mkdir(parents=True)
    (run / "checkpoint-3" / "trainer_state.json").write_text("{}")
    (run / "vlft.json").write_text('{"base_model": "m", "training": {}}')
    logged(run, [1.0] * 3)
    os.utime(run / "metrics.jsonl", (1, 1))
    form = Form(folder=str(tmp_path), run=str(run), data=("a.json",), model="m")
    folder = put(desk, commands.train(train.there(form)), status=None, about=[str(run)], began=time.time())
    (folder / "ended.json").unlink()
    html = train.view(form, desk)[1]
    assert "Resuming from the checkpoint of step 3" in html
    assert "Stopped before" not in html
    assert train.start(form, desk) == {}  # a second click
    logged(run, [1.0] * 4)
    assert "Resuming" not in train.view(form, desk)[1]


# ---- jobs


def test_an_old_error_is_not_red_when_its_run_exists(desk, tmp_path):
    form = Form(folder=str(tmp_path), run="run", merged="merged")
    put(desk, commands.merge(merge._there(form)), status=1, err="error: no such folder")
    assert "ended with an error" in merge.view(form, desk)[1]
    (tmp_path / "run").mkdir()
    html = merge.view(form, desk)[1]
    assert "state bad" not in html
    assert "has changed since" in html
    assert str(tmp_path / "run") in html


def test_a_result_of_a_changed_file_is_called_old(desk, tmp_path):
    file = write_json(tmp_path / "train.json", [row("Hi.", "A.")])
    os.utime(file, (1, 1))
    form = Form(data=(str(file),))
    put(desk, commands.check(form), status=0, out=json.dumps({"rows": 1, "ok": 1, "bad": []}))
    assert "old" not in check.view(form, desk)[1]
    write_json(file, [row("Hi.", "B.")])
    assert "This result is old" in check.view(form, desk)[1]


def test_jobs_are_stopped_and_a_new_plan_ends_the_one_before(desk, tmp_path):
    file = write_json(tmp_path / "train.json", [row("Hi.", str(i)) for i in range(20_000)])
    forms = [Form(data=(str(file),), more=f"--seed {i}") for i in range(2)]
    first, second = (desk.jobs.start(commands.check(form), instead="check") for form in forms)
    assert desk.jobs.start(commands.check(forms[1]), instead="check").folder == second.folder
    assert ended(desk, first).word == "stopped"
    desk.stopping("button", lambda form: (check.job_of(form, desk),), "message", None)
    desk.act(desk.actions[-1], forms[1])
    assert ended(desk, second).word == "stopped"
    assert "Stopped after" in check.view(forms[1], desk)[1]


def test_files_of_commands_have_the_permissions_of_the_user(desk, tmp_path):
    file = write_json(tmp_path / "train.json", [row("Hi.", "A.")])
    form = Form(folder=str(tmp_path), data=(str(file),), fix_out="clean.jsonl")
    before = os.umask(0o022)
    try:
        check.start_fix(form, desk)
        ended(desk, check.fix_of(form, desk))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "clean.jsonl").stat().st_mode) == 0o644
    private = [desk.jobs.root, check.fix_of(form, desk).folder]
    assert [stat.S_IMODE(path.stat().st_mode) for path in private] == [0o700, 0o700]


def test_a_second_click_keeps_a_finished_result(desk, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").touch()
    (tmp_path / "clean.jsonl").touch()
    form = Form(folder=str(tmp_path), run="run", merged="merged", data=("/a.json",), fix_out="clean.jsonl")
    for start in (merge.start, check.start_fix):
        with pytest.raises(ConfigError, match="already exists"):
            start(form, desk)
    assert not desk.jobs.root.exists()


def test_a_file_that_cannot_be_written_is_an_error(desk, tmp_path):
    file = write_json(tmp_path / "train.json", [row("Hi.", "A.")])
    (tmp_path / "clean.jsonl").mkdir()
    form = Form(folder=str(tmp_path), data=(str(file),), fix_out="clean.jsonl")
    check.start_fix(form, desk)
    ended(desk, check.fix_of(form, desk))
    html = check.fix_view(form, desk)[1]
    assert "state bad" in html
    assert "Done" not in html


# ---- compare


def test_compare_says_what_is_missing_and_which_run_it_asks(desk, tmp_path):
    form = Form(folder=str(tmp_path), run="run")
    assert "No run is in" in compare.view(form, desk)[1]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vlft.json").write_text('{"base_model": "m"}')
    assert all(said in compare.view(form, desk)[1] for said in (compare.IDLE, str(tmp_path / "run")))
    form = replace(form, question="Hi?", picture="/jobs/uploads/0a1b/coffee.jpg")
    line, html = compare.view(form, desk)
    assert "--image coffee.jpg " in line
    assert "uploads" not in line
    assert str(tmp_path / "run") in html


def test_a_row_that_is_not_there_names_the_field_of_its_screen(desk, tmp_path):
    file = write_json(tmp_path / "train.json", [row("Hi.", "A.")])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vlft.json").write_text('{"base_model": "m"}')
    form = Form(folder=str(tmp_path), run="run", source="row", data=(str(file),), row_index="9999")
    html = compare.view(form, desk)[1]
    assert "Row, from 0&#34; (step 6)" in html
    assert "step 3" not in html


def test_later_is_shown_from_the_job_before_unless_the_file_changed(desk, tmp_path, monkeypatch):
    file = write_json(tmp_path / "train.json", [row("Hi.", str(i)) for i in range(6)])
    os.utime(file, (1, 1))
    form = Form(folder=str(tmp_path), data=(str(file),), index="2-3")
    put(desk, commands.look(replace(form, index="4-5")), status=0)
    started = []
    monkeypatch.setattr(desk.jobs, "start", lambda *given, **_: started.append(given))
    look.turned(form, 1, desk)
    assert not started
    write_json(file, [row("Hi.", str(i)) for i in range(6)])
    look.turned(form, 1, desk)
    assert started
