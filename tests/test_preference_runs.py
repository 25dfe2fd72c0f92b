"""Runs of `vlft train --method dpo`, orpo and simpo from the command line to the files they leave."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import mishaps
import pytest
import torch
from adapters import base_plus_adapter, reloaded
from launch import vlft as vlft_process
from PIL import Image, ImageOps
from runs import FULL, VISION_LORA, assert_same, lines, losses, record_of, split

from vlft.checkpoint import read_record
from vlft.cli.main import main
from vlft.data import dataset
from vlft.errors import CheckpointError
from vlft.families import FAMILIES
from vlft.objectives.preference import Preference
from vlft.report.read import read_run
from vlft.train.reference import ReferencePass, key_of, read_references, write_references

SAVE = ("--save_strategy", "steps", "--save_steps", "1")
PACKED = ("--packing", "true", "--pack_tokens", "300")


def pair(number: int, *pictures: str, video: str | None = None) -> dict:
    """A preference row; answers and prompts of different rows have different lengths."""
    media = {"image": list(pictures)} if pictures else {}
    return {
        "id": f"pair-{number}",
        **media,
        **({"video": video} if video else {}),
        "prompt": "<image>" * len(pictures) + "<video>" * bool(video) + "What is it? " * (1 + number % 2),
        "chosen": f"It is thing number {number}." + " Sure." * (number % 3),
        "rejected": "No idea at all, sorry. " * (1 + number % 2),
    }


#: Seven rows: text alone, one picture, two, and a video.
PAIRS = [
    pair(0, "china.jpg"),
    pair(1),
    pair(2, "flower.jpg", "coffee.jpg"),
    pair(3, video="clip.mp4"),
    pair(4),
    pair(5, "astronaut.jpg"),
    pair(6),
]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.json"
    path.write_text(json.dumps(PAIRS))
    return path


def words_of(base: Path, data: Path, media: Path, out: Path, *more: str) -> list[str]:
    """The words of a quick run of one epoch, LoRA of rank 4, unpacked, by default three steps of at most three rows.

    A flag that is given twice is refused, so those in `more` take the place of the usual ones.
    """
    usual = {
        "--method": "dpo", "--learning_rate": "1e-3", "--lora_rank": "4", "--packing": "false",
        "--per_device_train_batch_size": "1", "--gradient_accumulation_steps": "3", "--save_strategy": "no",
        "--dataloader_num_workers": "0", "--image_folder": str(media),
    }  # fmt: skip
    if "--packing" in more:
        del usual["--per_device_train_batch_size"]
    if "--global_batch" in more:
        del usual["--gradient_accumulation_steps"]
    if ("full" in more and "lora" not in more) or "--adapter" in more:
        del usual["--lora_rank"]
    kept = [word for flag, value in usual.items() if flag not in more for word in (flag, value)]
    return ["train", "--model_id", str(base), "--data_path", str(data), "--output_dir", str(out), *kept, *more]


@pytest.fixture
def command(base, pairs, media, tmp_path):
    """`words_of` a run in `tmp_path`."""

    def words(*more: str, name: str = "run", base: Path = base, data: Path = pairs) -> list[str]:
        return words_of(base, data, media, tmp_path / name, *more)

    return words


@pytest.fixture
def trained(command, tmp_path, capfd):
    """Run it; returns the run folder and what it printed on stdout and stderr."""

    def run(*more: str, name: str = "run", status: int = 0, **kwargs) -> tuple[Path, str]:
        capfd.readouterr()
        assert main(command(*more, name=name, **kwargs)) == status
        printed = capfd.readouterr()
        return tmp_path / name, printed.out + printed.err

    return run


# ---- one loss per row


@pytest.mark.parametrize(
    "method", ["dpo", *(pytest.param(other, marks=pytest.mark.grid) for other in ("orpo", "simpo"))]
)
def test_a_step_is_the_same_however_its_rows_are_split(trained, method):
    """All rows in each step: one by one, beside each other, and in packs. Each row has the same weight."""
    how = ("--method", method, "--num_train_epochs", "2")
    alone, printed = trained(*how, *split(1, 7), name="alone")
    # SimPO and ORPO have no reference.
    assert ("reference: computed for 7 rows" in printed) == (method == "dpo")
    assert (alone / "reference.parquet").exists() == (method == "dpo")
    others = [(*PACKED, "--gradient_accumulation_steps", "20"), split(3, 3)]
    for place, other in enumerate(others):
        run, _ = trained(*how, *other, name=str(place))
        assert_same(run, alone, tolerance=1e-5)
        for line, theirs in zip(lines(run), lines(alone), strict=True):
            for name in (*Preference.statistics, "grad_norm"):
                assert line[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    assert [line["samples"] for line in lines(alone)] == [7, 7]
    first, second = lines(alone)
    if method == "dpo":  # the model is the reference
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert [first[f"rewards/{name}"] for name in ("chosen", "rejected", "margins")] == [0, 0, 0]
    assert second["loss"] < first["loss"]
    assert second["rewards/margins"] > first["rewards/margins"]
    assert first["logps/chosen"] < 0


DISTRIBUTED = [
    pytest.param((), id="ddp"),
    pytest.param(("--deepspeed", "zero2"), id="zero2", marks=pytest.mark.grid),
    pytest.param(("--deepspeed", "zero3"), id="zero3", marks=pytest.mark.grid),
    pytest.param((*VISION_LORA, "--cache_vision_features", "false"), id="ddp-vision", marks=pytest.mark.grid),
    pytest.param((*FULL, "--deepspeed", "zero3"), id="zero3-full", marks=pytest.mark.grid),
    pytest.param(("--reference", "live"), id="ddp-live", marks=pytest.mark.grid),
    pytest.param(("--reference", "live", "--deepspeed", "zero2"), id="zero2-live", marks=pytest.mark.grid),
]


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", DISTRIBUTED)
def test_two_processes_are_one(trained, command, tmp_path, pairs, strategy):
    """Also where one rank has rows of text alone while the other has pictures, and in a step of three rows."""
    how = ("--num_train_epochs", "2", "--global_batch", "4", "--eval_strategy", "epoch", "--report_rows", "0")
    towers = tuple(word for word in strategy if word not in ("--deepspeed", "zero2", "zero3"))
    argv = command(*how, *strategy, "--eval_path", str(pairs), name="two")
    ranks = vlft_process(argv, world=2, out=tmp_path, during=[mishaps.count_rows])
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].output[-3000:]
    one, _ = trained(*how, *towers, "--eval_path", str(pairs), name="one")
    assert_same(tmp_path / "two", one, tolerance=1e-4)
    sides = [[_has_pictures(line) for line in re.findall(r"^ROWS (.*)$", rank.output, re.M)] for rank in ranks]
    assert {(True, False), (False, True)} & set(zip(*sides, strict=True))
    for line, theirs in zip(lines(tmp_path / "two"), lines(one), strict=True):
        for name in line.keys() & {f"{kind}{name}" for kind in ("", "eval_") for name in Preference.statistics}:
            assert line[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    assert "reference: computed" not in ranks[1].output
    assert ranks[0].output.count("reference: computed for 7 rows") == ("live" not in strategy)


def _has_pictures(line: str) -> bool:
    """Whether a micro-batch has pictures, from a line that `mishaps.count_rows` prints."""
    _, *rows = map(int, line.split())
    return any(PAIRS[row].keys() & {"image", "video"} for row in rows)


# ---- a run that ends early


@pytest.mark.distributed
def test_a_run_that_is_killed_resumes_bit_for_bit(trained, command, tmp_path):
    """Killed while the reference is computed: it starts over. Killed in the second step: it resumes."""
    whole, _ = trained(*SAVE, name="whole")
    argv = command(*SAVE)
    run = tmp_path / "run"
    (rank,) = vlft_process(argv, out=tmp_path, inside=_kill_in_the_reference)
    assert rank.status == -signal.SIGKILL, rank.output[-3000:]
    assert not (run / "reference.parquet").exists()
    (rank,) = vlft_process(argv, out=tmp_path, kill_in_step=2)
    assert rank.status == -signal.SIGKILL
    assert "starting over" in rank.output
    assert "reference: computed for 7 rows" in rank.output
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    _, printed = trained(*SAVE)
    assert f"reference: 7 rows from {run / 'reference.parquet'}" in printed
    assert_same(run, whole, tolerance=0)
    for line, theirs in zip(lines(run), lines(whole), strict=True):
        assert {name: line[name] for name in Preference.statistics} == {
            name: theirs[name] for name in Preference.statistics
        }


def _kill_in_the_reference() -> None:
    _in_the_reference(signal.SIGKILL)


def _in_the_reference(number: int, patch=setattr) -> None:
    """A signal to this process while the third micro-batch of the reference is computed."""
    real, seen = ReferencePass._of_rows, []

    def act(self, model, batch):
        seen.append(batch)
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return real(self, model, batch)

    patch(ReferencePass, "_of_rows", act)


def test_a_notice_while_the_reference_is_computed(trained, monkeypatch, handlers):
    with monkeypatch.context() as patch:
        _in_the_reference(signal.SIGTERM, patch.setattr)
        run, printed = trained(*SAVE, status=75)
    assert "SIGTERM: stopping before the first step\n" in printed
    assert "stopped: SIGTERM before the first step, so there is nothing to save. There is no checkpoint yet" in printed
    assert not (run / "reference.parquet").exists()
    handlers()
    run, printed = trained("--max_steps", "1")
    assert "starting over" in printed
    assert "reference: computed for 7 rows" in printed
    assert losses(run) == pytest.approx([math.log(2)], abs=1e-6)


@pytest.fixture
def handlers():
    """Restores the signal handlers: a run that was stopped leaves its process ignoring further signals."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    yield restore
    restore()


# ---- the file of the reference


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, base, pairs, media):
    """A function: a fresh copy of a run that ended in its second step, and the command that it had."""
    whole = tmp_path_factory.mktemp("stopped") / "run"
    argv = words_of(base, pairs, media, whole, *SAVE)
    with pytest.MonkeyPatch.context() as patch:
        mishaps.before_each_loss(patch, functools.partial(mishaps.fail, 2))
        with pytest.raises(ZeroDivisionError):
            main(argv)

    def copied(out: Path) -> list[str]:
        shutil.copytree(whole, out)
        return [str(out) if word == str(whole) else word for word in argv]

    return copied


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-300])


def _of_another_run(file: Path) -> None:
    write_references(file, {("a.json", 0): (-1.0, -2.0)}, key="b" * 64, files=["a.json"])


BROKEN = [
    pytest.param(Path.unlink, "is missing", id="missing"),
    pytest.param(_truncate, "cannot be read", id="truncated"),
    pytest.param(_of_another_run, "is the reference of another run: another base", id="other"),
]


def test_a_resumed_run_has_no_reference_of_other_rows_to_evaluate_on(stopped, tmp_path, capsys, pairs):
    argv = stopped(tmp_path / "run")
    capsys.readouterr()
    assert main([*argv, "--eval_path", str(pairs), "--eval_strategy", "epoch", "--report_rows", "0"]) == 1
    said = capsys.readouterr().err
    assert "is the reference of another run: another base, starting adapter, --data_path, --eval_path" in said
    assert "Pass the flags of that run" in said


def test_a_reference_belongs_to_a_base_a_start_rows_and_settings(tmp_path):
    record = read_record(record_of(tmp_path / "run", steps=0, of=1, data="d", rows=3, drawn="e"))
    others = [
        replace(record, base_fingerprint="4567"),
        *(replace(record, training={**record.training, **change}) for change in (
            {"data": "f"}, {"rows": 4}, {"drawn": "f"}, {"adapter": {"fingerprint": "89"}},
        )),
    ]  # fmt: skip
    made = [key_of(one, {}, evaluated=None, dtype=torch.float32) for one in (record, *others)]
    made += [key_of(record, {"fps": 2}, evaluated=None, dtype=torch.float32)]
    made += [key_of(record, {}, evaluated=None, dtype=torch.bfloat16)]
    assert len(set(made)) == len(made) == 8
    moved = replace(record, base_model="elsewhere", training={**record.training, "finished": True, "processes": 4})
    assert key_of(moved, {}, evaluated=None, dtype=torch.float32) == made[0]


def test_a_changed_byte_never_gives_another_reference(tmp_path):
    file, files = tmp_path / "reference.parquet", ["a.json", "b.json"]
    values = {(name, row): (-100.5 - row, -7.25 * row) for name in files for row in range(5)}
    write_references(file, values, key="k", files=files)
    assert read_references(file, key="k", files=files) == values
    whole = file.read_bytes()
    refused = 0
    for place in range(0, len(whole), 5):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        reason = None
        try:
            found = read_references(file, key="k", files=files)
        except CheckpointError as error:
            reason = str(error)
        assert found == values if reason is None else reason.startswith(f"{file}: ")
        refused += reason is not None
    assert refused > len(whole) / 5 / 2


@pytest.mark.parametrize(("spoil", "reason"), BROKEN)
def test_a_run_does_not_resume_without_its_reference(stopped, tmp_path, capsys, spoil, reason):
    argv = stopped(tmp_path / "run")
    file = tmp_path / "run" / "reference.parquet"
    spoil(file)
    capsys.readouterr()
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert f"{file}: {reason}" in said
    assert "the weights have moved since. Pass the flags of that run, copy its file back, or start again with" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("changed", ["pictures", pytest.param("rows", marks=pytest.mark.grid)])
def test_a_new_run_computes_its_reference_again(stopped, tmp_path, capsys, media, changed):
    """A run that ended before its first checkpoint leaves its reference; rows and pictures may change afterwards."""
    argv = stopped(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    if changed == "rows":
        place = argv.index("--data_path") + 1
        rows = [{**row, "chosen": f"{row['chosen']} Yes."} for row in PAIRS]
        argv[place] = str(tmp_path / "other.json")
        Path(argv[place]).write_text(json.dumps(rows))
    else:
        place = argv.index("--image_folder") + 1
        argv[place] = str(shutil.copytree(media, tmp_path / "media"))
        for picture in Path(argv[place]).glob("*.jpg"):
            with Image.open(picture) as image:
                inverted = ImageOps.invert(image.convert("RGB"))
            inverted.save(picture)
    capsys.readouterr()
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "starting over" in printed
    assert "reference: computed for 7 rows" in printed
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "both"),
    [
        (("--beta", "0.2"), ("settings of --method dpo are beta 0.1, this", "are beta 0.2. ")),
        (("--method", "simpo"), ("is dpo", "is simpo")),
        (("--method", "orpo"), ("is dpo", "is orpo")),
        (("--dpo_loss", "ipo"), ("sigmoid", "ipo")),
        (("--reference", "live"), ("cached", "live")),
        (("--rpo_alpha", "1"), ("rpo_alpha 0", "rpo_alpha 1")),
    ],
    ids=lambda value: "-".join(value).strip("-") if str(value[0]).startswith("--") else "",
)
def test_a_run_resumes_only_with_its_own_settings(stopped, tmp_path, capsys, change, both):
    argv = stopped(tmp_path / "run")
    for flag, value in zip(change[::2], change[1::2], strict=True):
        if flag in argv:
            argv[argv.index(flag) + 1] = value
        else:
            argv += [flag, value]
    capsys.readouterr()
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "belongs to another run" in said
    for value in both:
        assert value in said


def test_config_yaml_resumes_a_run_with_other_paths_of_its_files(stopped, tmp_path, capsys, pairs):
    """A row is found in the reference whatever the path of its file is."""
    stopped(tmp_path / "run")
    other = shutil.copy(pairs, tmp_path / "moved.json")
    capsys.readouterr()
    assert main(["train", "--config", str(tmp_path / "run" / "config.yaml"), "--output_dir", str(tmp_path / "run"),
                 "--data_path", str(other)]) == 0  # fmt: skip
    assert "resuming from" in capsys.readouterr().out
    first, second, _ = losses(tmp_path / "run")
    assert second < first == pytest.approx(math.log(2), abs=1e-6)


# ---- cached, live or none


@pytest.mark.parametrize(
    "towers",
    [
        pytest.param((), id="language"),
        pytest.param(("--use_dora", "true", "--loraplus_ratio", "4"), id="dora"),
        pytest.param(("--vision", "lora", "--merger", "full"), id="merger-full", marks=pytest.mark.grid),
        pytest.param(
            ("--vision", "full", "--gradient_checkpointing", "true"), id="full-vision", marks=pytest.mark.grid
        ),
    ],
)
def test_a_live_reference_is_the_cached_one(trained, pairs, towers):
    """Three steps, in which the adapter moves the model away from its start; rows are loaded by another process."""
    evaluation = ("--eval_path", str(pairs), "--eval_strategy", "epoch", "--report_rows", "0") if towers else ()
    how = (*towers, *evaluation)
    cached, _ = trained(*how, "--dataloader_num_workers", "1", name="cached")
    live, printed = trained(*how, "--reference", "live", name="live")
    assert "reference: computed" not in printed
    assert not (live / "reference.parquet").exists()
    assert len(losses(live)) == 3
    assert losses(live) == pytest.approx(losses(cached), abs=1e-6)
    evaluated = [lines(run)[-1] for run in (live, cached)]
    for name in ("eval_loss", "eval_rewards/margins") if towers else ():
        assert evaluated[0][name] == pytest.approx(evaluated[1][name], abs=1e-5)
    assert losses(live)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(live)[2] != pytest.approx(math.log(2), abs=1e-4)


def test_without_a_reference_rewards_are_log_probabilities(trained):
    run, printed = trained("--reference", "none", "--beta", "0.5", "--max_steps", "1")
    assert "reference: computed" not in printed
    (line,) = lines(run)
    for name in ("chosen", "rejected"):
        assert line[f"rewards/{name}"] == pytest.approx(0.5 * line[f"logps/{name}"], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--reference", "live", *FULL), "--reference live needs an adapter that can be switched off"),
        (("--reference", "live", "--deepspeed", "zero3"), "--reference live with ZeRO-3"),
        (("--reference", "live", "--adapter", "."), "the model is the base and not the start of the run"),
        (("--method", "sft", "--beta", "0.2"), "--beta 0.2 has no effect with --method sft"),
        (("--orpo_lambda", "0.2"), "--orpo_lambda 0.2 has no effect with --method dpo: it belongs to --method orpo"),
        (("--dpo_loss", "ipo", "--label_smoothing", "0.1"), "--label_smoothing 0.1 has no effect with --dpo_loss ipo"),
        (("--lora_dropout", "0.1"), "--lora_dropout 0.1 with --method dpo"),
        (("--beta", "0"), "--beta"),
        (("--beta", "-1"), "--beta"),
        (("--label_smoothing", "0.6"), "--label_smoothing"),
        (("--dpo_loss", "kto"), "--dpo_loss"),
        (("--method", "kto"), "--method"),
        ((*PACKED[:2], "--pack_tokens", "20"), "pack_tokens"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_flags_that_cannot_act(trained, flags, message):
    _, printed = trained(*flags, status=2 if "kto" in flags else 1)
    assert message in printed
    assert "Traceback" not in printed


# ---- evaluation, reports, lines


def test_evaluations_and_pages_show_rewards(trained, pairs, tmp_path):
    how = ("--eval_path", str(pairs), "--eval_strategy", "steps", "--eval_steps", "1", "--eval_on_start", "true",
           "--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss", "--report_rows", "1",
           "--report_tokens", "2", "--per_device_eval_batch_size", "3", *SAVE)  # fmt: skip
    run, printed = trained(*how)
    *_, last = evaluated = [line for line in lines(run) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [0, 1, 2, 3]
    first = evaluated[0]
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval_rewards/margins"] == 0
    assert {f"eval_{name}" for name in Preference.statistics} < last.keys()
    assert (last["eval_rows"], "eval_tokens" in last) == (7, False)
    assert last["eval_rewards/accuracies"] == 1
    margin = last["eval_rewards/chosen"] - last["eval_rewards/rejected"]
    assert last["eval_rewards/margins"] == pytest.approx(margin, abs=1e-5) != 0
    assert f"  evaluation after step 3: loss {last['eval_loss']:.4f}, accuracy 1, margin" in printed
    step = [line for line in lines(run) if "loss" in line][-1]
    assert f"step 3/3  loss {step['loss']:.4f}  accuracy {step['rewards/accuracies']:.3g}  margin" in printed
    assert "reference: computed for 7 rows" in printed
    best = min(evaluated, key=lambda line: line["eval_loss"])
    assert f"best:   step {best['step']}, evaluation loss {best['eval_loss']:.4f}" in printed
    assert "done:   3 steps in" in printed
    assert "; 7 rows, " in printed

    page = (run / "report.html").read_text()
    for title in ("reward margin", "reward accuracy", "rewards", "log-probability of an answer"):
        assert f"<b>{title}</b>" in page
    found = read_run(run)
    assert found.statistics["rewards/margins"].tolist() == [
        line["rewards/margins"] for line in lines(run) if "loss" in line
    ]
    assert found.evaluations["eval_rewards/margins"].tolist() == [line["eval_rewards/margins"] for line in evaluated]
    shutil.copytree(run, tmp_path / "other")
    assert main(["report", str(run), str(tmp_path / "other"), "--html", str(tmp_path / "both.html")]) == 0
    assert "<b>rewards/margins</b>" in (tmp_path / "both.html").read_text()


def test_a_row_that_cannot_be_decoded_is_skipped_in_the_reference_too(trained, media, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "PAUSES", ())
    folder = Path(shutil.copytree(media, tmp_path / "media"))
    whole = (folder / "coffee.jpg").read_bytes()
    (folder / "coffee.jpg").write_bytes(whole[: len(whole) // 2])  # its header can be read
    data = tmp_path / "pairs.json"
    data.write_text(json.dumps(PAIRS))
    flags = ("--image_folder", str(folder), "--num_train_epochs", "2")
    _, printed = trained(*flags, data=data, status=1)
    assert "pairs.json[2]" in printed
    assert "Traceback" not in printed
    run, printed = trained(*flags, "--on_bad_row", "skip", data=data)
    assert printed.count("skipped ") == 1
    assert "reference: computed for 6 rows" in printed
    record = json.loads((run / "vlft.json").read_text())
    assert [row["index"] for row in record["data"][0]["skipped"]] == [2]
    assert sum(line["samples"] for line in lines(run)) == 2 * 6


# ---- towers, starts and families


@pytest.mark.parametrize(
    "towers",
    [
        pytest.param(("--vision", "lora", "--merger", "lora"), id="vision-lora"),
        pytest.param(("--merger", "full"), id="merger-full", marks=pytest.mark.grid),
        pytest.param(FULL, id="full"),
    ],
)
def test_an_adapter_is_the_reference_of_the_run_that_starts_from_it(trained, towers):
    """The start of a full run is its base."""
    more = ("--num_train_epochs", "2")
    if towers is FULL:
        run, printed = trained(*towers, *more)
    else:
        start, _ = trained(*towers, "--max_steps", "2", name="start")
        run, printed = trained("--adapter", str(start), *more)
        assert "starts from the adapter" in printed
        assert lines(run)[0]["logps/chosen"] != pytest.approx(lines(start)[0]["logps/chosen"], abs=1e-3)
    first, *_, last = lines(run)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] < 0.5
    # No other file in the folder may be taken for weights.
    assert [file.name for file in run.glob("*.safetensors")] == [
        "model.safetensors" if towers is FULL else "adapter_model.safetensors"
    ]


def test_cached_features_change_no_loss(trained, tmp_path, monkeypatch):
    """Those that the pass for the reference stores are read from the first epoch on."""
    how = ("--num_train_epochs", "2")
    plain, _ = trained(*how, name="plain")
    cache = ("--cache_vision_features", "true", "--vision_cache", str(tmp_path / "cache"))
    computed = []
    mishaps.before_each_loss(monkeypatch, lambda trainer, batch: computed.append(len(batch.get("feature_keys", ()))))
    first, printed = trained(*how, *cache, name="first")
    assert "features of 10 pictures and videos were taken from it, 5 were computed, and 5 of them stored" in printed
    assert sum(computed) == 0
    assert losses(first) == pytest.approx(losses(plain), abs=1e-6)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=name, marks=() if name == "qwen3_5" else pytest.mark.grid)
        for name, family in FAMILIES.items()
    ],
)
def test_every_family_trains_pairs(family, base_of, trained):
    """Pictures and a video, in packs; the second epoch is better than the first."""
    more = ("--num_train_epochs", "2", *PACKED[:3], "400", "--gradient_accumulation_steps", "20")
    run, printed = trained(*more, base=base_of(family))
    first, second = lines(run)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (first["samples"], first["images"], first["videos"]) == (7, 4, 1)
    assert second["loss"] < first["loss"] - 0.01
    assert second["rewards/margins"] > 0.01
    shared = "recurrent" not in family.features
    assert ("answers: the answers of a row share its prompt" in printed) == shared
    assert ("answers: each answer has a copy of its prompt, because gated delta nets" in printed) != shared


# ---- what comes after


def test_a_trained_run_is_merged_and_asked(trained, base, media, tmp_path, capfd):
    run, _ = trained("--vision", "lora", "--merger", "full", "--learning_rate", "1e-2")
    capfd.readouterr()
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    printed = capfd.readouterr()
    assert "not used" not in printed.out + printed.err
    for want, got in zip(base_plus_adapter(base, run), reloaded(tmp_path / "merged"), strict=True):
        assert (want - got).abs().max() < 1e-4
    answers = []
    for model in (run, tmp_path / "merged"):
        asked = ("What is it?", "--image", str(media / "china.jpg"), "--max_new_tokens", "6")
        assert main(["chat", str(model), *asked]) == 0
        answers.append(capfd.readouterr().out.splitlines()[-1])
    assert answers[0] == answers[1]


@pytest.mark.grid
def test_config_yaml_of_a_finished_run_is_that_run(trained):
    run, _ = trained("--max_steps", "1", "--dpo_loss", "ipo", "--beta", "0.3", "--rpo_alpha", "0.5")
    assert main(["train", "--config", str(run / "config.yaml"), "--output_dir", str(run)]) == 0
    again = run.parent / "again"
    assert main(["train", "--config", str(run / "config.yaml"), "--output_dir", str(again)]) == 0
    assert_same(again, run, tolerance=0)
