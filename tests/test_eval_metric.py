"""`--eval_metric`: metrics of the model's answers to all evaluation rows, during training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from build import row, write_json
from launch import vlft as vlft_process
from runs import arguments, lines

from vlft.cli.main import main
from vlft.report import write_report

EVERY = ("--eval_strategy", "steps", "--eval_steps", "2", "--report_rows", "0", "--max_steps", "4")
SAVED = ("--save_strategy", "steps", "--save_steps", "2")
#: Figures that differ from row to row also for a model that has learned nothing.
OWN = '''
def length(answer, reference, row):
    """Characters of an answer."""
    return len(answer) / 100 + (row["index"] == 3)

length.higher = False

def fails(answer):
    raise KeyError(answer)

def never(answer):
    return None

def not_said(answer, reference):
    """Applies to the right answers, and to no answer of the model."""
    return 1 if answer == reference else None
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return str(path)


def found(run: Path, name: str) -> list[float]:
    return [line[f"eval_{name}"] for line in lines(run) if "eval_loss" in line]


@pytest.fixture
def measured(train, mixed_json, own):
    def run(*more: str, name: str = "run", metrics: tuple[str, ...] = ("exact_match", "rouge_l")) -> Path:
        return train("--eval_path", str(mixed_json), *EVERY, "--eval_metric", *metrics, *more, name=name)

    return run


def test_a_metric_is_that_of_the_answers_of_the_checkpoint(measured, media, mixed_json, own, capsys, tmp_path):
    """The merged checkpoint answers each row by itself; the metric is computed by hand."""
    from vlft.answering import answers, question_of, speaker
    from vlft.model.generate import Sampling

    run = measured(*SAVED, metrics=("rouge_l", f"{own}:length"))
    merged = tmp_path / "merged"
    assert main(["merge", str(run / "checkpoint-4"), str(merged)]) == 0
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlft import load_rows, open_base

    base = open_base(merged, use_cpu=True)
    opened = base.opened
    rows = load_rows(base, mixed_json, image_folder=media, dataloader_num_workers=0).measured.rows.samples
    model = AutoModelForImageTextToText.from_pretrained(merged, dtype="float32")
    talker = speaker(model.eval(), AutoProcessor.from_pretrained(merged), opened.family)
    total = 0.0
    for sample in rows:
        most = 2 * opened.encoder.measure(sample).supervised + 16
        (said,) = answers([question_of(sample)], opened.encoder, talker, Sampling(max_new_tokens=most))
        total += len(said.text) / 100 + (sample.index == 3)
    assert found(run, f"{own}:length")[-1] == pytest.approx(total / 7, rel=1e-6)
    printed = capsys.readouterr().out
    assert f"{own}:length {found(run, f'{own}:length')[-1]:.4f}" in printed
    page = write_report(run).read_text()
    assert "rouge_l" in page
    assert "answers for --eval_metric" in page


@pytest.mark.distributed
def test_two_processes_measure_as_one(measured, base, mixed_json, media, own, tmp_path):
    metrics = ("rouge_l", "cer", f"{own}:length")
    one = measured(*("--gradient_accumulation_steps", "2"), metrics=metrics, name="one")
    argv = arguments(base, mixed_json, media, tmp_path / "two", "--eval_path", str(mixed_json), *EVERY)
    for rank in vlft_process([*argv, "--eval_metric", *metrics], world=2, out=tmp_path):
        assert rank.status == 0, rank.output[-3000:]
    for name in metrics:
        assert found(tmp_path / "two", name) == pytest.approx(found(one, name), rel=1e-6)


def test_the_best_checkpoint_is_that_of_the_metric_and_its_direction(measured, train, mixed_json, own, capsys):
    """The answers change neither the training nor, by their batches, the figures."""
    from runs import assert_same

    name = f"{own}:length"
    run = measured(*SAVED, "--metric_for_best_model", name, metrics=(name,))
    values = found(run, name)
    best = 2 * (values.index(min(values)) + 1)
    training = json.loads((run / "vlft.json").read_text())["training"]
    assert training["best_by"] == {"metric": f"eval_{name}", "higher": False}
    assert training["best"] == {
        "step": best, "metric": f"eval_{name}", "value": min(values), "checkpoint": f"checkpoint-{best}"
    }  # fmt: skip
    assert f"best:   step {best}, {name} {min(values):.4f}; {run}/checkpoint-{best}\n" in capsys.readouterr().out
    packed = measured("--per_device_eval_batch_size", "4", metrics=(name,), name="four")
    assert values == pytest.approx(found(packed, name), rel=1e-6)
    assert_same(packed, train("--eval_path", str(mixed_json), *EVERY, name="without"), 0)


def test_a_metric_without_a_value_chooses_no_checkpoint(measured, own, capsys):
    name = f"{own}:not_said"
    run = measured(*SAVED, "--metric_for_best_model", name, "--load_best_model_at_end", "true", metrics=(name,))
    assert found(run, name) == [None, None]
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    assert f"best:   no checkpoint was chosen, because no evaluation has a value of {name}" in capsys.readouterr().out
    assert "best" not in json.loads((run / "vlft.json").read_text())["training"]
    write_report(run)


@pytest.mark.parametrize(
    ("metrics", "more", "said"),
    [
        (["exact_mach"], [], "exact_match"),
        (["OWN:fails"], [], "KeyError"),
        (["OWN:never"], [], "no evaluation row has"),
        (["iou"], [], "no evaluation row has a box"),
        (["rouge_l"], ["--deepspeed", "zero3"], "ZeRO-3 splits them"),
        (["rouge_l"], ["--metric_for_best_model", "anls"], "Add --eval_metric anls."),
        (["cer"], ["--metric_for_best_model", "cer", "--greater_is_better", "true"], "a lower eval_cer is better"),
    ],
)
def test_what_cannot_be_measured(base, mixed_json, media, own, tmp_path, capsys, metrics, more, said):
    words = [word.replace("OWN", own) for word in metrics]
    argv = arguments(base, mixed_json, media, tmp_path / "run", "--eval_path", str(mixed_json), *EVERY, *more)
    assert main([*argv, "--eval_metric", *words]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_metrics_need_evaluations(base, mixed_json, media, tmp_path, capsys):
    assert main([*arguments(base, mixed_json, media, tmp_path / "run"), "--eval_metric", "rouge_l"]) == 1
    assert "--eval_metric rouge_l needs evaluations: --eval_path FILE or --eval_split 0.05" in capsys.readouterr().err


def test_thoughts_do_not_count(base, media, tmp_path, train):
    """A metric sees answers and references without their thoughts."""
    (tmp_path / "seen.py").write_text("def plain(answer, reference):\n    return reference == 'Yes.'\n")
    write_json(tmp_path / "rows.json", [row("Really?", "<think>\nHm.\n</think>\n\nYes.")])
    name = f"{tmp_path}/seen.py:plain"
    run = train("--eval_path", str(tmp_path / "rows.json"), *EVERY, "--eval_metric", name)
    assert found(run, name)[0] == 1
