"""vlft bench: its documents, the rows it draws, and that the stock side gets the same rows with the same labels."""

from __future__ import annotations

import json
import re
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import launch
import pytest
import torch

from vlft.bench import report
from vlft.bench.figures import Epoch, Step, summary
from vlft.bench.mixes import MIXES, SIZES, draw_rows, mean_tokens, write_mix
from vlft.bench.sizes import SHAPES
from vlft.bench.stock import COUNTS, IGNORED, StockRows, stock_collator
from vlft.bench.work import Failed, run_module
from vlft.cli.main import main
from vlft.errors import ConfigError
from vlft.model.cards import peak_tflops
from vlft.model.flops import required_flops, total
from vlft.model.towers import Towers

DATA_KEYS = {"pictures_per_s", "samples_per_s", "tokens_per_s", "bytes_per_picture", "workers"}
TRAIN_KEYS = {
    "tokens_per_s", "supervised_tokens_per_s", "padding_fraction", "data_wait_s", "tflops", "mfu", "peak_gb"
}  # fmt: skip


# ---- drawn rows and built-in bases


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_are_deterministic(mix):
    rows = draw_rows(mix, 300, seed=1, scale="real")
    assert rows == draw_rows(mix, 300, seed=1, scale="real")
    assert rows[:100] == draw_rows(mix, 100, seed=1, scale="real"), "more rows begin with the same ones"
    assert rows != draw_rows(mix, 300, seed=2, scale="real")


def test_a_story_has_up_to_12_pictures_and_long_tailed_answers():
    rows = draw_rows("story", 2000, seed=0, scale="real")
    pictures, answers = [len(row.pictures) for row in rows], [row.answer for row in rows]
    assert (min(pictures), max(pictures)) == (1, 12)
    assert 20 <= min(answers) < 40
    assert 2000 < max(answers) <= 3000
    assert statistics.mean(answers) > 1.3 * statistics.median(answers)
    assert set(SIZES["real"]) == {picture[:2] for row in rows for picture in row.pictures}
    # a pack of 16,384 tokens takes any of them
    assert 1500 < mean_tokens(rows, "real", factor=28) < 4000
    assert max(mean_tokens([row], "real", factor=28) for row in rows) < 16000


def test_written_rows_are_equal_byte_by_byte(tmp_path):
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        file = write_mix(folder, "story", 3, seed=0, scale="tiny", unit="byte")
        assert file == write_mix(folder, "story", 3, seed=0, scale="tiny", unit="byte")
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    assert len(names[0]) > 3
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


# ---- the stock side sees what we see


def test_stock_rows_are_ours(samples, encoded, encoder):
    """Same tokens, same labels, for every kind of row; pixels are compared in test_media."""
    rows = StockRows(
        samples=list(samples.values()), processor=encoder.processor, recipe=encoder.recipe, family=encoder.family
    )
    items = [rows[i] for i in range(len(rows))]
    for item, (name, ours) in zip(items, encoded.items(), strict=True):
        if name != "frames":  # stock renders a list of frames in the same way, but may resize it differently
            assert item["input_ids"][0].tolist() == ours.input_ids_T.tolist(), name
            assert item["labels"][0].tolist() == ours.labels_T.tolist(), name


def test_padding_is_counted_and_ignored(samples, encoder):
    rows = StockRows(samples=[samples["still"], samples["text"]], processor=encoder.processor, recipe=encoder.recipe,
                     family=encoder.family)  # fmt: skip
    batch = stock_collator(encoder.processor)([rows[0], rows[1]])
    lengths = [rows[i]["input_ids"].shape[1] for i in range(2)]
    assert batch["input_ids"].shape == (2, max(lengths))
    assert batch[COUNTS]["tokens"] == sum(lengths)
    assert batch[COUNTS]["places"] == 2 * max(lengths)
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert batch[COUNTS]["pixel_bytes"] == batch["pixel_values"].nbytes


# ---- figures


def test_figures_of_steps():
    steps = [
        Step(seconds=9.0, wait=9.0, tokens=1, places=1, supervised=1, images=1, samples=1),
        Step(seconds=1.0, wait=0.5, tokens=300, places=400, supervised=30, images=2, samples=4),
        Step(seconds=3.0, wait=0.1, tokens=500, places=600, supervised=50, images=6, samples=4),
    ]
    found = summary(steps, skip=1, epoch=Epoch(tokens=2000, tflops=4000.0), device="NVIDIA H100 80GB HBM3", peak_gb=7.0)
    assert found["tokens_per_s"] == 200
    assert found["supervised_tokens_per_s"] == 20
    assert found["padding_fraction"] == pytest.approx(0.2)
    assert found["data_wait_s"] == pytest.approx(0.3)
    assert found["step_s"] == 2.0
    assert found["epoch_s"] == 10.0
    assert found["tflops"] == pytest.approx(400)
    assert found["mfu"] == pytest.approx(400 / 989.4)
    assert found["run_tokens"] == 801
    off_gpu = summary(steps, skip=1, epoch=Epoch(tokens=2000, tflops=4000.0), device=None, peak_gb=7.0)
    assert (off_gpu["tflops"], off_gpu["mfu"]) == (None, None)
    with pytest.raises(ConfigError, match="3 steps and the first 3 do not count"):
        summary(steps, skip=3, epoch=Epoch(tokens=1, tflops=None), device=None, peak_gb=0)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GB200", None),
        ("T4", None),
        (None, None),
    ],
)
def test_peaks(device, peak):
    assert peak_tflops(device) == peak


def test_operations_of_a_photo_on_the_2b():
    """One 1036x756 picture, 200 text tokens, 100 of them trained, language LoRA: 14.5 TFLOP by hand."""
    family, shape = SHAPES["2b"]
    sizes = family.sizes_of_shape(shape)
    parts = required_flops(sizes, Towers(), lengths=[999 + 200], vision_lengths=[54 * 74], supervised=100)
    found = total(parts) / 1e12
    assert found == pytest.approx(14.5, rel=0.05)


def test_a_run_that_fails_or_hangs_is_told(tmp_path):
    with pytest.raises(Failed, match=r"status 1.*\n.*No module named vlft.bench.nothing"):
        run_module(["vlft.bench.nothing"], log=tmp_path / "log", say=print)
    with pytest.raises(Failed, match="not finished after 0"):
        run_module(["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"], log=tmp_path / "log", say=print,
                   timeout=0.3)  # fmt: skip


# ---- the command line


def _json(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_bench_data(base, tmp_path, capsys):
    argv = ["bench", "data", "--baseline", "--json", "--mix", "photo", "--rows", "5", "--rounds", "2"]
    argv += ["--out", str(tmp_path / "out"), "--per_device_train_batch_size", "2", "--model_id", str(base)]
    assert main(argv) == 0
    found = _json(capsys)
    assert set(found) > DATA_KEYS | {"baseline"}
    assert set(found["baseline"]) >= DATA_KEYS
    for side in (found, found["baseline"]):
        assert side["workers"] == 1
        assert side["pictures"] == side["samples"] == 5
        assert side["tokens_per_s"] * side["seconds"] == pytest.approx(side["tokens"])
        assert side["samples_per_s"] * side["seconds"] == pytest.approx(5)
        assert len(side["seconds_of_passes"]) == 2
    assert found["tokens"] == found["baseline"]["tokens"], "both sides read the same rows"
    # ours: uint8, each frame once; stock: float32, each frame twice
    assert found["baseline"]["bytes_per_picture"] == 8 * found["bytes_per_picture"]
    pairs = zip(found["seconds_of_decode"], found["seconds_of_passes"], strict=True)
    assert found["of_decode"] == pytest.approx(sum(one / ours for one, ours in pairs) / 2, rel=0.05)
    [kept] = (tmp_path / "out").glob("data-*.json")
    assert json.loads(kept.read_text()) == found
    page = (tmp_path / "out" / "bench.md").read_text()
    assert page.startswith(report.MARKDOWN_HEAD)
    assert page.count("\n") == 3
    lines = report.table("data", found).splitlines()
    titles, pictures = (next(line for line in lines if word in line) for word in ("stock", "pictures/s"))
    assert titles.index("vlft") < titles.index("decode and resize alone") < titles.index("stock")
    assert f"{found['decode_only']:,.1f}" in pictures
    assert f"vlft reaches {found['of_decode']:.2f} of the pictures/s of decoding and resizing alone" in lines


def _module(words: list[str]) -> None:
    sys.argv = ["", *words[1:]]
    runpy.run_module(words[0], run_name="__main__")


def forked(words, *, log: Path, say, timeout=None, shown=None) -> None:
    """`run_module` in a process forked from one that has done the imports; the real one is tested below."""
    done = launch.call(_module, list(words), log=log, timeout=240)
    assert done.status == 0, done.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    """A benchmark of training on drawn rows, compared with stock transformers on batches of similar length."""
    out = tmp_path_factory.mktemp("bench")
    argv = ["bench", "train", "--shape", "tiny", "--preset", "lora_vision", "--steps", "4", "--skip_steps", "1"]
    argv += ["--baseline", "--baseline_order", "grouped", "--dataloader_num_workers", "0", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlft.bench.train.run_module", forked)
        assert main(argv) == 0
    [kept] = out.glob("train-tiny-lora_vision-story.json")
    return json.loads(kept.read_text())


def test_bench_train(trained):
    assert set(trained) > TRAIN_KEYS | {"baseline"}
    assert set(trained["baseline"]) > TRAIN_KEYS
    for side in (trained, trained["baseline"]):
        assert side["tokens_per_s"] * side["seconds"] == pytest.approx(side["tokens"])
        assert side["epoch_s"] * side["tokens_per_s"] == pytest.approx(trained["epoch_tokens"])
        assert 0 < side["supervised_tokens_per_s"] < side["tokens_per_s"]
        assert side["data_wait_s"] >= 0
        assert side["steps"] == side["run_steps"] - 1
        assert side["peak_gb"] > 0
        if not torch.cuda.is_available():
            assert (side["tflops"], side["mfu"]) == (None, None)
    assert trained["predicted"] is None, "no card's data sheet is about a CPU"
    assert trained["preset"] == "lora_vision"
    assert trained["ratio"]["tokens_per_s"] == pytest.approx(
        trained["tokens_per_s"] / trained["baseline"]["tokens_per_s"]
    )


def test_bench_train_with_the_tiny_base_of_another_family(tmp_path, capsys, monkeypatch):
    """Gated delta nets, experts and interpolated positions, on rows whose sizes fit a tiny base."""
    monkeypatch.setattr("vlft.bench.train.run_module", forked)
    argv = ["bench", "train", "--shape", "tiny-qwen3.5-moe", "--steps", "2", "--skip_steps", "0", "--json"]
    assert main([*argv, "--dataloader_num_workers", "0", "--out", str(tmp_path)]) == 0
    found = _json(capsys)
    assert found["base"] == "tiny-qwen3.5-moe (random weights)"
    assert found["run_tokens"] == found["epoch_tokens"] > 1000


def test_both_sides_train_on_every_row_once(trained):
    assert trained["run_tokens"] == trained["baseline"]["run_tokens"] == trained["epoch_tokens"]
    assert trained["run_samples"] == trained["baseline"]["run_samples"] > 8
    assert trained["packing"]
    assert trained["baseline"]["settings"]["order"] == "grouped"
    assert list(trained["baselines"]) == ["grouped"], "without CUDA there are no kernels to compare with"
    assert trained["padding_fraction"] == 0
    assert 0 < trained["baseline"]["padding_fraction"] < 1


def test_the_table_of_a_training(trained):
    text = report.table("train", trained)
    assert "stock, grouped" in text
    assert "MFU" not in text or torch.cuda.is_available(), "a row that nobody has a figure for is left out"
    failed = {"random": {"failed": "out of memory\nat length"}}
    text = report.table("train", trained | {"baselines": trained["baselines"] | failed})
    assert "stock, random failed: out of memory" in text
    assert "stock: stock transformers + peft; stock + kernels: stock transformers + peft with our kernels" in text
    assert "with our kernels: left out, because the kernels need a CUDA device" in text
    settings = trained["baseline"]["settings"] | {"side": "kernels", "kernels": "RMSNorm on 5 modules"}
    kernels = {"grouped + kernels": trained["baseline"] | {"settings": settings}}
    text = report.table("train", trained | {"baselines": trained["baselines"] | kernels})
    assert re.search(r"stock \+ kernels, grouped: 4 rows .*attention: sdpa \(cuDNN: .*kernels: RMSNorm on 5", text)
    assert report.markdown("train", trained | {"baseline": None, "ratio": None}).count("|") == 9


@pytest.mark.parametrize(
    "start", [pytest.param(forked, id="forked"), pytest.param(run_module, id="own process", marks=pytest.mark.grid)]
)
def test_bench_train_on_rows_of_the_user(base, media, mixed_json, tmp_path, capsys, monkeypatch, start):
    """The user's config is unchanged, except for flags that a benchmark does not measure; stdout is the document."""
    config = tmp_path / "my.yaml"
    config.write_text(f"output_dir: {tmp_path / 'mine'}\nsave_steps: 1\nlearning_rate: 1e-3\nnum_train_epochs: 9\n")
    monkeypatch.setattr("vlft.bench.train.run_module", start)
    monkeypatch.setattr("vlft.bench.train.device_name", lambda: "NVIDIA H100 80GB HBM3")
    argv = ["bench", "train", "--json", "--config", str(config), "--model_id", str(base), "--steps", "2"]
    argv += ["--data_path", str(mixed_json), "--image_folder", str(media), "--packing", "false"]
    argv += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--bf16", "true"]
    argv += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--dataloader_num_workers", "0"]
    assert main(argv) == 0
    found = _json(capsys)
    assert (found["run_steps"], found["run_samples"]) == (2, 4)
    assert found["baseline"] is None
    assert found["ratio"] is None
    assert not (tmp_path / "mine").exists()
    run = tmp_path / "work" / "runs" / "ours-0" / "run"
    assert "learning_rate: 0.001" in (run / "config.yaml").read_text()
    assert not list(run.glob("*.safetensors")), "weights of a benchmark are written nowhere"
    forecast = found["predicted"]
    assert (forecast["gpu"], forecast["micro_batches"]) == ("h100", 2)
    assert forecast["tokens_per_s"] * forecast["ms"] / 1e3 == pytest.approx(2 * forecast["micro_batch"]["tokens"])
    assert 0 < forecast["mfu"] < 1
    assert 0 < forecast["peak_gb"] < 1
    columns = re.split(
        r"\s{2,}", next(line for line in report.table("train", found).splitlines() if "predicted" in line)
    )
    assert columns[-2:] == ["vlft", "vlft, predicted"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["bench", "dta"], "the first word must be data or train, not 'dta'"),
        (["bench", "data", "--steps", "3"], "--steps is a flag of bench train, and has no effect on bench data"),
        (["bench", "train", "--rows", "3"], "--rows is a flag of bench data"),
        (["bench", "train", "--shape", "tiny", "--model_id", "x"], "--shape and --model_id exclude each other"),
        (["bench", "data", "--mix", "text", "--data_path", __file__], "--mix and --data_path exclude each other"),
        (["bench", "train", "--preset", "lora", "--vision", "full"], "--preset lora and --vision both set what trains"),
        (["bench", "train", "--baseline_side", "stock"], "--baseline_side has no effect without --baseline"),
        (["bench", "train", "--baseline_batch", "2"], "--baseline_batch has no effect without --baseline"),
        (["bench", "train", "--steps", "3", "--skip_steps", "3"], "--skip_steps 3 leaves none of 3 steps"),
        (["bench", "train", "--steps", "0"], "--steps is 0, must be at least 1"),
        (["bench", "train", "--timeout", "0"], "--timeout is 0, must be more than 0"),
        (["bench", "train", "--lora_renk", "8"], "did you mean --lora_rank?"),
        (["bench", "train", "--shape", "13b"], "invalid choice: '13b'"),
    ],
)
def test_wrong_usage(argv, says, capsys):
    assert main(argv) == 2
    assert says in capsys.readouterr().err


def test_the_script_is_clean():
    script = Path(__file__).parent.parent / "scripts" / "bench_gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_script_without_a_gpu(tmp_path):
    """`--quick`: the same items in the same order on the tiny shape; one that fails does not lose the others."""
    script = Path(__file__).parent.parent / "scripts" / "bench_gpu.sh"
    stub = tmp_path / "python"
    stub.write_text(
        f"#!{sys.executable} -IS\n"
        "import sys\n"
        "print('CALL', *sys.argv[1:])\n"
        "sys.exit(3 if 'lora_vision' in sys.argv else 0)\n"
    )
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", str(script), "--quick"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, "something failed, and it says so"
    summary_page = (tmp_path / "out" / "summary.md").read_text()
    assert "lora_vision | failed (exit 3)" in summary_page
    assert summary_page.count("| ok") >= 4
    called = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("CALL")]
    assert called[0][:2] == ["-m", "pytest"]
    assert all(words[:3] == ["-m", "vlft", "bench"] for words in called[1:])
    assert {words[3] for words in called[1:]} == {"data", "train"}


def test_the_first_look_at_a_machine_without_a_gpu(tmp_path):
    """`--quick`: every step in order, the profile is of the run that was just measured, and tables are collected."""
    script = Path(__file__).parent.parent / "scripts" / "first_contact.sh"
    stub = tmp_path / "python"
    stub.write_text(
        f"#!{sys.executable} -IS\n"
        "import pathlib, sys\n"
        "print('CALL', *sys.argv[1:])\n"
        "if 'vlft.bench.probe' in sys.argv:\n"
        "    pathlib.Path(sys.argv[-1]).write_text('| what | measured | assumed |\\n')\n"
        "sys.exit(3 if 'demo' in sys.argv else 0)\n"
    )
    stub.chmod(0o755)
    work = tmp_path / "work"
    done = subprocess.run(
        ["bash", str(script), "--quick"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "OUT": str(tmp_path / "out"), "WORK": str(work)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1  # since one failed
    calls = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("CALL")]
    modules = [next(word for word in call[1:] if not word.startswith("-")) for call in calls]
    assert modules == [
        *("vlft.bench.probe", "pytest", "vlft.bench.presets", "vlft"),
        *("vlft", "vlft.bench.profiled", "vlft", "vlft"),
    ]
    assert str(work / "runs" / "ours-0" / "flags.yaml") in calls[5]
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert re.findall(r"\| (\S+) \| ([^|]*) \|", summary)[2:] == [
        ("machine", "ok"), ("tests", "ok"), ("presets", "ok"), ("demo", "failed (exit 3)"),
        ("tiny-lora", "ok"), ("profile-tiny-lora", "ok"), ("tiny-lora-baseline", "ok"), ("tiny-full", "ok"),
        ("what", "measured"),
    ]  # fmt: skip


def test_the_first_look_ends_in_time(tmp_path):
    """Steps for which no time is left are listed."""
    script = Path(__file__).parent.parent / "scripts" / "first_contact.sh"
    done = subprocess.run(
        ["bash", str(script)],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHON": "/bin/true",
            "OUT": str(tmp_path),
            "WORK": str(tmp_path),
            "LIMIT_S": "30",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    summary = (tmp_path / "summary.md").read_text()
    assert "| machine | ok |" in summary
    assert re.search(r"\| 7b-lora \| left out: only \d+ of 30 s are left \| - \|", summary)
