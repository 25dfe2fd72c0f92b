"""The shell scripts: the arguments they pass to vlft, recorded by a stub of Python; examples/*.yaml equal them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import Trainer

from vlft.cli.main import main
from vlft.demo.pairs import write_pairs
from vlft.demo.rewarded import write_questions
from vlft.families import FAMILIES

ROOT = Path(__file__).parent.parent
EXAMPLE_OF = {
    "finetune.sh": "full.yaml",
    "finetune_dpo.sh": "dpo.yaml",
    "finetune_grpo.sh": "grpo.yaml",
    "finetune_lora.sh": "lora.yaml",
    "finetune_lora_vision.sh": "lora_vision.yaml",
    "finetune_qlora.sh": "qlora.yaml",
    "finetune_video.sh": "video.yaml",
}
NO_SCRIPT = ("story_reasoning.yaml",)  # it has its own guide: see tests/test_importing.py
#: Example -> the model type that it is for.
OF_FAMILY = {
    "qwen2_5_vl.yaml": "qwen2_5_vl",
    "qwen3_vl.yaml": "qwen3_vl",
    "qwen3_5.yaml": "qwen3_5",
    "moe.yaml": "qwen3_vl_moe",
}
RATES = ("learning_rate", "vision_lr", "merger_lr")
COMMON = {"MODEL": "m", "DATA": "d.json", "IMAGE_FOLDER": "pics", "OUTPUT": "out"}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is needed")


class Scripts:
    """A copy of scripts/ without .venv, in a folder with a blank; `python` on PATH prints its arguments."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        self.stub(folder / "bin" / "python")
        self.path = folder / "bin"

    @staticmethod
    def stub(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            f"#!{sys.executable} -IS\n"
            "import json, os, sys\n"
            "print(json.dumps([sys.argv, os.environ.get('CUDA_VISIBLE_DEVICES')]))\n"
        )
        file.chmod(0o755)

    def run(self, script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", self.root / "scripts" / script, *flags],
            env={"PATH": f"{self.path}{os.pathsep}{os.environ['PATH']}", **environment},
            cwd=self.root.parent,
            capture_output=True,
            text=True,
        )

    def argv(self, script: str, *flags: str, **environment: str) -> list[str]:
        """What follows `python` on the command line the script runs."""
        done = self.run(script, *flags, **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)[0][1:]


@pytest.fixture
def scripts(tmp_path):
    return Scripts(tmp_path)


def _flags(argv: list[str]) -> dict[str, list[str]]:
    """`--flag value ...` as argparse reads it: the last value wins."""
    flags: dict[str, list[str]] = {}
    for word in argv:
        if word.startswith("--"):
            flags[word.removeprefix("--")] = values = []
        else:
            values.append(word)
    return flags


def _value(text) -> float | str:
    try:
        return float(str(text))
    except ValueError:
        return str(text).lower()


@pytest.mark.parametrize(
    "file",
    [*sorted(ROOT.glob("scripts/*.sh")), *sorted(ROOT.glob("examples/*.sh")), ROOT / ".ci" / "run"],
    ids=lambda file: file.name,
)
def test_script_parses_and_may_be_run(file):
    subprocess.run(["bash", "-n", file], check=True)
    assert os.access(file, os.X_OK) or file.name == "common.sh"


@pytest.mark.parametrize("script", EXAMPLE_OF)
def test_script_and_example_agree(scripts, script):
    argv = scripts.argv(script, **COMMON)
    assert argv[:3] == ["-m", "vlft", "train"]
    flags = _flags(argv[3:])
    common = {name: flags.pop(name) for name in ("model_id", "data_path", "image_folder", "output_dir")}
    assert list(common.values()) == [["m"], ["d.json"], ["pics"], ["out"]]

    example = yaml.safe_load((ROOT / "examples" / EXAMPLE_OF[script]).read_text())
    assert all(not isinstance(value, dict | list) for value in example.values()), "flat flag: value only"
    assert {name: _value(value) for name, [value] in flags.items()} == {n: _value(v) for n, v in example.items()}


class Door(Exception):
    """Raised instead of the first step."""


@pytest.mark.parametrize("what", [*EXAMPLE_OF, *EXAMPLE_OF.values(), *NO_SCRIPT, *OF_FAMILY])
def test_to_the_door_of_training(scripts, what, base_of, tmp_path, monkeypatch, capsys):
    """Everything before the first step: flags, rows, folder, towers, optimizer groups."""
    seen, base = [], base_of(FAMILIES[OF_FAMILY.get(what, "qwen2_vl")])

    def stop(trainer, **_):
        trainer.create_optimizer_and_scheduler(num_training_steps=10)
        seen.append({group["initial_lr"] for group in trainer.optimizer.param_groups})
        raise Door

    monkeypatch.setattr(Trainer, "train", stop)
    data, media, out = ROOT / "data" / "demo.json", ROOT / "data" / "media", tmp_path / "out"
    if "dpo" in what:
        media = tmp_path / "pairs"
        data = write_pairs(media, "train", 13)
    if "grpo" in what:
        pytest.importorskip("trl")
        media = tmp_path / "rows"
        data = write_questions(media, "train", 13)
    if what in EXAMPLE_OF:
        where = {"MODEL": base, "DATA": data, "IMAGE_FOLDER": media, "OUTPUT": out}
        argv = scripts.argv(what, **{name: str(path) for name, path in where.items()})[2:]
    else:
        argv = ["train", "--config", str(ROOT / "examples" / what), "--model_id", str(base), "--data_path", str(data)]
        argv += ["--image_folder", str(media), "--output_dir", str(out)]
    with pytest.raises(Door):
        main(argv)
    printed = capsys.readouterr().out
    assert "13 rows, 13 to train" in printed
    assert re.search(r"(13 rows|15 samples) on average; 1 step an epoch|16 prompts with 8 comp.*; 1 step", printed), (
        printed
    )
    example = yaml.safe_load((ROOT / "examples" / EXAMPLE_OF.get(what, what)).read_text())
    assert seen == [{float(value) for name, value in example.items() if name in RATES}]
    assert (out / "config.yaml").exists()


def test_every_example_has_its_script():
    assert {file.name for file in (ROOT / "examples").glob("*.yaml")} == {*EXAMPLE_OF.values(), *NO_SCRIPT, *OF_FAMILY}


def test_presets(scripts):
    def towers(script):
        flags = _flags(scripts.argv(script, **COMMON)[3:])
        return [flags[tower][0] for tower in ("vision", "merger", "language")]

    assert towers("finetune.sh") == ["full", "full", "full"]
    assert towers("finetune_lora.sh") == ["frozen", "frozen", "lora"]
    assert towers("finetune_lora_vision.sh") == ["lora", "lora", "lora"]
    assert towers("finetune_qlora.sh") == ["frozen", "frozen", "lora"]
    assert towers("finetune_dpo.sh") == ["lora", "lora", "lora"]
    assert towers("finetune_grpo.sh") == ["lora", "lora", "lora"]


def test_an_adapter_to_start_from_decides_what_trains(scripts):
    flags = _flags(scripts.argv("finetune_dpo.sh", "--adapter", "output/sft", **COMMON)[3:])
    assert flags["adapter"] == ["output/sft"]
    assert flags["method"] == ["dpo"]
    assert not {"vision", "merger", "language", "lora_rank", "lora_alpha"} & set(flags)


@pytest.mark.parametrize("script", EXAMPLE_OF)
def test_a_flag_wins_over_preset_and_environment(scripts, script):
    mine = {"learning_rate": "3e-3", "model_id": "other", "image_folder": "x", "save_steps": "7", "output_dir": "o2"}
    flags = _flags(scripts.argv(script, *(word for name in mine for word in (f"--{name}", mine[name])), **COMMON)[3:])
    assert {name: flags[name] for name in mine} == {name: [value] for name, value in mine.items()}


def test_the_base_decides_how_many_pixels_a_token_has(base_of, tmp_path):
    """With the real Python of this test, up to the call of `vlft train`."""
    from vlft.cli.base_pixels import base_pixels

    assert base_pixels(str(base_of(FAMILIES["qwen2_5_vl"]))) == (28, "frame")
    third = str(base_of(FAMILIES["qwen3_5"]))
    assert base_pixels(third) == (32, "clip")
    scripts = Scripts(tmp_path)
    stub = scripts.path / "python"
    stub.write_text(stub.read_text().replace("import json, os, sys\n", (
        "import json, os, sys\n"
        "if sys.argv[2:3] == ['vlft.cli.base_pixels']:\n"
        f"    os.execve({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]], {{**os.environ, "
        f"'PYTHONPATH': {str(ROOT)!r}}})\n"
    )))  # fmt: skip
    flags = _flags(scripts.argv("finetune_lora_vision.sh", **{**COMMON, "MODEL": third})[3:])
    assert flags["image_min_pixels"] == [str(256 * 32 * 32)]
    assert flags["image_max_pixels"] == [str(1280 * 32 * 32)]
    assert "video_max_pixels" not in _flags(scripts.argv("finetune_video.sh", "--model_id", third, **COMMON)[3:])


def test_flags_stand_in_for_the_environment(scripts):
    argv = scripts.argv("finetune_lora.sh", "--model_id", "m", "--data_path=a.json", "--output_dir", "o")
    assert argv[-5:] == ["--model_id", "m", "--data_path=a.json", "--output_dir", "o"]
    assert argv.count("--model_id") == 1
    assert "--data_path" not in argv
    assert "--image_folder" not in argv


def test_a_frozen_tower_loses_its_rate(scripts):
    flags = _flags(scripts.argv("finetune.sh", "--vision", "frozen", **COMMON)[3:])
    assert flags["vision"] == ["frozen"]
    assert "vision_lr" not in flags
    assert flags["merger_lr"] == ["1e-5"]


def test_paths_with_blanks_and_quotes(scripts):
    data = scripts.root.parent / "my data $(exit 3).json"
    data.write_text("[]")
    odd = {"MODEL": "my models/qwen*", "DATA": str(data), "IMAGE_FOLDER": 'it\'s "here"', "OUTPUT": "out put"}
    flags = _flags(scripts.argv("finetune_lora.sh", "--run_name", "a b", **odd)[3:])
    assert flags["model_id"] == [odd["MODEL"]]
    assert flags["data_path"] == [odd["DATA"]]
    assert flags["image_folder"] == [odd["IMAGE_FOLDER"]]
    assert flags["output_dir"] == [odd["OUTPUT"]]
    assert flags["run_name"] == ["a b"]


def test_data_may_be_several_files(scripts):
    flags = _flags(scripts.argv("finetune_lora.sh", **{**COMMON, "DATA": "a.json  b*.jsonl\nc.json"})[3:])
    assert flags["data_path"] == ["a.json", "b*.jsonl", "c.json"]


def test_several_gpus_share_the_global_batch(scripts):
    argv = scripts.argv("finetune_lora.sh", "--seed", "1", GPUS="4", GLOBAL_BATCH="24", **COMMON)
    assert argv[:8] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4", "-m", "vlft", "train"]
    flags = _flags(argv[8:])
    assert flags["global_batch"] == ["24"]
    assert flags["seed"] == ["1"]


NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "GPUS": "8"}


def test_several_nodes(scripts):
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", "1", "--master_addr", "first"]
    argv = scripts.argv("finetune_lora_vision.sh", **COMMON, **NODES)
    assert argv[: argv.index("vlft")] == [*torchrun, "--master_port", "29500", "--nproc_per_node", "8", "-m"]
    argv = scripts.argv("finetune_lora_vision.sh", **COMMON, **{**NODES, "GPUS": "1", "MASTER_PORT": "31000"})
    assert argv[: argv.index("vlft")] == [*torchrun, "--master_port", "31000", "--nproc_per_node", "1", "-m"]
    # Variables that a cluster sets for all jobs do not disturb a run on one node.
    argv = scripts.argv("finetune_lora.sh", **COMMON, NNODES="1", NODE_RANK="0", MASTER_ADDR="first")
    assert argv[:3] == ["-m", "vlft", "train"]


@pytest.fixture
def cluster(tmp_path):
    """`srun` prints its command and ends with $SRUN_STATUS; `scontrol` prints its arguments."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, status in (("srun", "${SRUN_STATUS:-0}"), ("scontrol", "0")):
        tool = folder / name
        tool.write_text(f'#!/usr/bin/env bash\necho {name} "$@"\nexit {status}\n')
        tool.chmod(0o755)

    def run(*flags, **environment):
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", ROOT / "examples" / "slurm.sh", *flags],
            env={"PATH": path, "SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(tmp_path), **environment},
            capture_output=True,
            text=True,
        )

    return run


def test_the_slurm_example_goes_back_into_the_queue_when_asked_to_leave(cluster):
    done = cluster("--deepspeed", "zero2", DATA="d.json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "python -m vlft train --config examples/lora_vision.yaml" in line
    assert "--data_path d.json" in line
    assert line.endswith("--deepspeed zero2")

    left = cluster(SRUN_STATUS="75")
    assert left.returncode == 0
    assert left.stdout.splitlines()[1:] == ["scontrol requeue 17"]
    failed = cluster(SRUN_STATUS="1")
    assert failed.returncode == 1
    assert len(failed.stdout.splitlines()) == 1


def test_accumulation_stands_in_for_the_global_batch(scripts):
    flags = _flags(scripts.argv("finetune_lora.sh", "--gradient_accumulation_steps", "4", **COMMON)[3:])
    assert flags["gradient_accumulation_steps"] == ["4"]
    assert "global_batch" not in flags


def test_one_gpu_asked_for_is_one_gpu_seen(scripts):
    def seen(**environment):
        done = scripts.run("finetune_lora.sh", **COMMON, **environment)
        return json.loads(done.stdout)[1]

    assert seen() is None
    assert seen(GPUS="1") == "0"
    assert seen(GPUS="1", CUDA_VISIBLE_DEVICES="3") == "3"


@pytest.mark.parametrize(
    ("changed", "flags", "message"),
    [
        ({"MODEL": ""}, [], "MODEL or --model_id is missing"),
        ({"DATA": ""}, [], "DATA or --data_path is missing"),
        ({"OUTPUT": ""}, [], "OUTPUT or --output_dir is missing"),
        ({"GPUS": "two"}, [], "GPUS=two: a whole number"),
        ({**NODES, "NNODES": "many"}, [], "NNODES=many: a whole number"),
        ({**NODES, "NODE_RANK": ""}, [], "NNODES=2, but NODE_RANK is missing: 0 on the first node"),
        ({**NODES, "NODE_RANK": "2"}, [], "NODE_RANK=2: with NNODES=2, 0 to 1"),
        ({**NODES, "NODE_RANK": "-1"}, [], "NODE_RANK=-1: with NNODES=2, 0 to 1"),
        ({**NODES, "MASTER_ADDR": ""}, [], "NNODES=2, but MASTER_ADDR is missing"),
        ({**NODES, "MASTER_PORT": "99999"}, [], "MASTER_PORT=99999: a port is below 65536"),
        ({"NODE_RANK": "1"}, [], "NODE_RANK=1, but NNODES is missing"),
        ({"GLOBAL_BATCH": "0"}, [], "GLOBAL_BATCH=0: a whole number"),
        ({}, ["--config", "mine.yaml"], "the preset and --config exclude each other"),
    ],
)
def test_wrong_usage(scripts, changed, flags, message):
    done = scripts.run("finetune_video.sh", *flags, **{**COMMON, **changed})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"finetune_video.sh: {message}")
    assert "MODEL=Qwen/Qwen3-VL-4B-Instruct" in done.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize(
    ("script", "says"), [("finetune_grpo.sh", "(16) prompts make"), ("finetune_lora.sh", "(128) rows make")]
)
def test_help(scripts, script, flag, says):
    done = scripts.run(script, flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("  MODEL=Qwen/Qwen3-VL-4B-Instruct")
    assert f"GLOBAL_BATCH {says} an optimizer" in done.stdout


def test_merge(scripts):
    argv = scripts.argv("merge_lora.sh", "--dtype", "bf16", RUN="my run/checkpoint-2", OUTPUT="mer ged")
    assert argv == ["-m", "vlft", "merge", "my run/checkpoint-2", "mer ged", "--dtype", "bf16"]
    done = scripts.run("merge_lora.sh", RUN="r")
    assert done.returncode == 2
    assert done.stderr.startswith("merge_lora.sh: RUN and OUTPUT are needed")


def test_demo_sets_up_first(scripts):
    python = scripts.root / ".venv" / "bin" / "python"
    setup = scripts.root / "scripts" / "setup.sh"
    Scripts.stub(scripts.root.parent / "stub")
    setup.write_text(f"mkdir -p '{python.parent}' && cp '{scripts.root.parent}/stub' '{python}'\n")
    assert scripts.argv("demo.sh", "--quick", "--out", "my demo") == [
        "-m",
        "vlft",
        "demo",
        "--quick",
        "--out",
        "my demo",
    ]
    setup.write_text("exit 3\n")
    assert scripts.run("demo.sh").returncode == 3


def test_the_clones_own_environment_is_preferred(scripts):
    Scripts.stub(scripts.root / ".venv" / "bin" / "python")
    done = scripts.run("merge_lora.sh", RUN="r", OUTPUT="o")
    assert Path(json.loads(done.stdout)[0][0]).resolve() == (scripts.root / ".venv" / "bin" / "python").resolve()


def test_constraints_are_exact_pins():
    lines = [line for line in (ROOT / "scripts" / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert all(line.count("==") == 1 and not set(line) & set(" @/;*") for line in lines)


def test_setup_says_what_is_missing(tmp_path):
    """Without any Python, and with one that is too old, in one line each; a finished set-up is not repeated."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "scripts", clone / "scripts")
    shutil.copy(ROOT / "pyproject.toml", clone)

    def setup(**environment):
        path = os.pathsep.join([str(tmp_path / "bin"), str(tmp_path / "tools")])
        done = subprocess.run(
            [shutil.which("bash"), clone / "scripts" / "setup.sh"],
            env={"PATH": path, **environment},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr.splitlines()

    (tmp_path / "tools").mkdir()
    for tool in ("dirname", "cat", "cksum", "grep", "df", "awk", "mkdir", "rm", "tail"):
        (tmp_path / "tools" / tool).symlink_to(shutil.which(tool))
    status, [line] = setup()
    assert status == 1
    assert line.startswith("set-up: Python 3.11 or newer is needed; none was found as python3.13")

    status, [line] = setup(PYTHON="/no/such/python")
    assert status == 1
    assert "none was found as /no/such/python" in line

    (tmp_path / "bin").mkdir()
    old = tmp_path / "bin" / "python3"
    old.write_text(f"#!{shutil.which('bash')}\n[[ $2 == *version_info*3,* ]] && exit 1\necho 3.9.2\n")
    old.chmod(0o755)
    status, [line] = setup()
    assert status == 1
    assert "python3 is 3.9.2" in line

    old.write_text(f"#!{shutil.which('bash')}\n[[ $2 == *ensurepip* ]] && exit 1\necho 3.11.2\n")
    status, [line] = setup()
    assert status == 1
    assert "python3 3.11.2 has no venv module" in line
    assert "apt install python3-venv" in line
    assert not (clone / ".venv").exists()
