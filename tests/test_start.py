"""`vlft train --adapter DIR`: a new run starts from a trained adapter, or is refused before anything is loaded."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from adapters import Shelf
from build import FAMILY
from runs import arguments, assert_same, lines, weights
from safetensors.torch import load_file, save_file

import vlft
from vlft.checkpoint.start import load_start, read_start
from vlft.cli.main import main
from vlft.errors import ConfigError
from vlft.families import FAMILIES
from vlft.merge import merge
from vlft.model.apply import apply_towers
from vlft.model.load import load_base
from vlft.model.towers import Towers
from vlft.train.folder import RunFolder

SAVE = ("--save_strategy", "steps", "--save_steps", "1")
MODES = {"vision": "lora", "merger": "full", "language": "lora"}
TOWERS = tuple(word for tower, mode in MODES.items() for word in (f"--{tower}", mode))
PLAIN = {"use_dora": False, "use_rslora": False}
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def ran(argv: list[str]) -> str:
    """What a command that succeeds prints on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(argv) == 0
    return out.getvalue()


def record(run: Path) -> dict:
    return json.loads((run / "vlft.json").read_text())


def evaluated(mixed_json) -> tuple[str, ...]:
    return ("--eval_path", str(mixed_json), "--eval_strategy", "steps", "--eval_steps", "2", "--report_rows", "0")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    return Shelf(root=tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="module")
def parent(tmp_path_factory, base, mixed_json, media) -> Path:
    """A run of two steps: LoRA on vision and language, the merger in full."""
    out = tmp_path_factory.mktemp("parent") / "sft"
    ran(arguments(base, mixed_json, media, out, *TOWERS, "--max_steps", "2", *SAVE, *evaluated(mixed_json)))
    return out


@pytest.fixture
def command(base, mixed_json, media, tmp_path, parent):
    """The words of `vlft train` from an adapter, by default the parent's; without towers, and into `tmp_path`."""

    def words(*more: str, start: Path | str = parent, name: str = "run", base: Path = base) -> list[str]:
        argv = arguments(base, mixed_json, media, tmp_path / name, "--adapter", str(start), *more)
        rank = argv.index("--lora_rank")
        return argv[:rank] + argv[rank + 2 :]

    return words


@pytest.fixture
def refused(command, capsys):
    """The message of `vlft train` that refuses to start."""

    def message(*more: str, status: int = 1, **kwargs) -> str:
        assert main(command(*more, **kwargs)) == status
        return capsys.readouterr().err

    return message


# ---- where a run starts


def test_a_run_starts_with_the_loss_and_the_weights_of_the_adapter(command, parent, mixed_json, tmp_path):
    """The evaluation before the first step is that after the parent's last; a step of rate 0 moves nothing."""
    argv = command("--max_steps", "1", "--learning_rate", "0", "--eval_on_start", "true", *evaluated(mixed_json))
    printed = ran(argv)
    (before,), (after,) = ([line["eval_loss"] for line in lines(run) if "eval_loss" in line and line["step"] in (0, 2)]
                           for run in (tmp_path / "run", parent))  # fmt: skip
    assert before == pytest.approx(after, abs=1e-6)
    found, wanted = weights(tmp_path / "run"), weights(parent)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "vision lora, merger full, language lora, rank 4, alpha 64, target all; it decides --vision" in printed
    assert f"loaded {len(wanted)} tensors of the adapter {parent}" in printed
    assert "is the one the run recorded" in printed
    written = record(tmp_path / "run")
    assert written["towers"] == MODES
    lineage = written["training"]["adapter"]
    assert (lineage["path"], lineage["parent"]) == (str(parent), None)
    assert re.fullmatch("[0-9a-f]{16}", lineage["fingerprint"])
    ran(command("--max_steps", "1", start=tmp_path / "run", name="next"))  # one generation later
    child = record(tmp_path / "next")["training"]["adapter"]
    assert child == {"path": str(tmp_path / "run"), "fingerprint": lineage["fingerprint"], "parent": lineage}


def test_a_trained_run_is_merged_as_peft_merges_it(command, base, tmp_path):
    from peft import PeftModel
    from transformers import Qwen2VLForConditionalGeneration

    ran(command("--max_steps", "2", "--lora_rank", "4", "--merger", "full"))
    report = merge(tmp_path / "run", tmp_path / "merged")
    assert report.max_logit_diff < 1e-4
    stock = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(stock, tmp_path / "run").merge_and_unload()
    ours = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_a_killed_run_resumes_bit_equal_without_the_adapter(command, parent, tmp_path, monkeypatch, capsys):
    start = Path(shutil.copytree(parent, tmp_path / "start"))
    argv = {name: command("--max_steps", "2", *SAVE, start=start, name=name) for name in ("whole", "killed")}
    ran(argv["whole"])
    commit = RunFolder.commit_checkpoint

    def once(folder, name, skipped):
        commit(folder, name, skipped)
        raise KeyError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "commit_checkpoint", once)
        with pytest.raises(KeyError, match="killed"):
            ran(argv["killed"])
    shutil.rmtree(start)
    printed = ran(argv["killed"])
    assert "resuming from" in printed
    assert "tensors of the adapter" not in printed
    assert_same(tmp_path / "killed", tmp_path / "whole", tolerance=0)
    written = record(tmp_path / "killed")
    assert written["training"]["adapter"] == record(tmp_path / "whole")["training"]["adapter"]
    # The start is a setting of the run: it cannot change.
    capsys.readouterr()
    for other in (("--adapter", str(parent / "checkpoint-1")), TOWERS):
        argv = command("--max_steps", "2", *SAVE, *other, "--lora_rank", "4", name="killed", start=start)
        if other is TOWERS:
            del argv[argv.index("--adapter") : argv.index("--adapter") + 2]
        assert main(argv) == 1
        fingerprint = written["training"]["adapter"]["fingerprint"]
        assert f"its starting adapter (fingerprint) is {fingerprint}, this run's is " in capsys.readouterr().err
    # A copy of the same adapter is the same start, and the verbs that only read rows need none.
    shutil.copytree(parent, tmp_path / "moved")
    argv = command("--max_steps", "2", *SAVE, "--adapter", str(tmp_path / "moved"), name="killed", start=start)
    assert "this run is finished" in ran(argv)
    ran(["check-data", "--config", str(tmp_path / "whole" / "config.yaml"), "--workers", "0"])


# ---- adapters of plain peft, and of every family


@pytest.mark.parametrize(
    ("kind", "modes"),
    [
        ("full_merger", ("frozen", "full", "lora")),
        pytest.param("everywhere", ("lora", "lora", "lora"), marks=pytest.mark.grid),
    ],
)
def test_an_adapter_of_plain_peft_is_a_start(shelf, command, kind, modes, tmp_path):
    """With names of transformers before 4.52, which are read under today's."""
    start = Path(shutil.copytree(shelf.adapter("fp32", kind), tmp_path / "old"))
    new = load_file(start / FILE)
    olds = {name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): name for name in new}
    save_file({old: new[name] for old, name in olds.items()}, start / FILE, metadata={"format": "pt"})
    argv = command("--max_steps", "1", "--learning_rate", "0", start=start, base=shelf.base("fp32"))
    assert "no vlft.json in" in ran(argv)
    found = weights(tmp_path / "run")
    assert record(tmp_path / "run")["towers"] == dict(zip(MODES, modes, strict=True))
    assert found.keys() == new.keys()
    assert all(torch.equal(found[name], new[name]) for name in new)


@pytest.mark.parametrize(
    ("model_type", "target"),
    [
        *((model_type, "all") for model_type in FAMILIES if model_type != "qwen3_vl_moe"),
        pytest.param("qwen3_vl_moe", "all", marks=pytest.mark.grid),
        ("qwen3_5", "attention"),
        *(pytest.param(t, "attention", marks=pytest.mark.grid) for t in FAMILIES if t != "qwen3_5"),
    ],
)
def test_the_adapter_of_any_family_decides_towers_and_targets(base_of, tmp_path, model_type, target):
    family = FAMILIES[model_type]
    base = base_of(family)
    modes = {"vision": "lora", "merger": "full" if target == "all" else "frozen", "language": "lora"}
    towers = Towers(**modes, lora_rank=3, lora_alpha=5, lora_target=target)

    def adapted(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return apply_towers(load_base(base, family), family, towers, masters=True)

    saved = adapted(0)
    with torch.no_grad():
        for parameter in saved.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    saved.save_pretrained(tmp_path, save_embedding_layers=False)
    start = read_start(str(tmp_path), str(base), base, family)
    assert start.settings == {**modes, "lora_rank": 3, "lora_alpha": 5, "lora_target": target, **PLAIN}
    live = adapted(1)
    assert load_start(live, start) == len(load_file(tmp_path / FILE))
    wanted = dict(saved.named_parameters())
    for name, parameter in live.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, wanted[name]), name


def test_plan_and_python_start_from_it_too(command, parent, base, capsys):
    words = [word for word in command() if word not in ("train", "--output_dir", str(parent.parent))]
    out = words.index(next(word for word in words if word.endswith("/run")))
    flags = [*words[:out], *words[out + 1 :]]
    assert main(["plan", *flags, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["adapter"]["path"] == str(parent)
    assert planned["towers"] == MODES
    text = ran(["plan", *flags])
    assert f"\nstarts from the adapter {parent} (fingerprint {planned['adapter']['fingerprint']}): " in text
    opened = vlft.open_base(base, use_cpu=True)
    model = vlft.load_model(opened, **MODES, adapter=parent, lora_dropout=0)
    saved = load_file(parent / FILE)
    found = {name.replace(".default", "").replace("modules_to_save.", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    with pytest.raises(ConfigError, match=r"load_model\(\): vision is frozen, but the adapter .* has lora"):
        vlft.load_model(opened, adapter=parent)


# ---- refusals


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--lora_rank 8", "--lora_rank is 8, but the adapter {parent} has 4. The .*use --lora_rank 4, or drop"),
        ("--lora_alpha 8", "--lora_alpha is 8, but the adapter {parent} has 64"),
        ("--lora_target attention", "--lora_target is attention, but the adapter {parent} has all"),
        ("--merger lora", "--merger is lora, but the adapter {parent} has full.*vlft merge {parent} OUT"),
        ("--vision frozen", "--vision is frozen, but the adapter {parent} has lora"),
        ("--language full", "--language full with --adapter {parent} is refused.*vlft merge {parent} OUT"),
        ("--cache_vision_features true", "--vision is lora and --merger is full.*The adapter {parent} sets --vision"),
    ],
)
def test_flags_that_differ_from_the_adapter_are_refused(refused, parent, flags, says):
    assert re.search(says.replace("{parent}", re.escape(str(parent))), refused(*flags.split()), re.DOTALL)


def test_a_rate_of_a_tower_that_the_adapter_leaves_frozen_is_refused(refused, shelf):
    said = refused("--vision_lr", "1e-5", start=shelf.adapter("fp32", "language"), base=shelf.base("fp32"))
    assert "--vision_lr 1e-05 has no effect: --vision is frozen" in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, r"needs a lora_magnitude_vector \[\d+\].*found none"),
        ({"use_qalora": True}, "use_qalora=true; vlft trains LoRA, DoRA and rsLoRA. Merge it first"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': .*no run can start from it. Merge it first"),
        ({"bias": "lora_only"}, "bias='lora_only': .*no run can start"),
        ({"alpha_pattern": {"q_proj": 2}}, "several alphas"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": 8}, r"has rank 4, adapter_config.json says r 8"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused(refused, shelf, tmp_path, changes, says):
    start = Path(shutil.copytree(shelf.adapter("fp32", "language"), tmp_path / "odd"))
    settings = json.loads((start / CONFIG).read_text())
    (start / CONFIG).write_text(json.dumps(settings | changes))
    said = refused(start=start, base=shelf.base("fp32"))
    assert re.search(rf"--adapter {start}.*{says}", said), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("patterns", "its modules have several alphas"),
    ],
)
def test_adapters_that_train_what_no_flags_train_are_refused(refused, shelf, kind, says):
    assert re.search(says, refused(start=shelf.adapter("fp32", kind), base=shelf.base("fp32")))


def test_a_block_in_full_must_be_whole(refused, shelf, tmp_path):
    start = Path(shutil.copytree(shelf.adapter("fp32", "one_block"), tmp_path / "odd"))
    rewritten(start, lambda found: {k: v for k, v in found.items() if "norm1" not in k})
    said = refused(start=start, base=shelf.base("fp32"))
    assert re.search(r"vision trained in part: \d+ of \d+ parameters are not in the adapter", said)


def rewritten(start: Path, change) -> None:
    save_file(change(load_file(start / FILE)), start / FILE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: {k: v for k, v in found.items() if "layers.1.mlp" not in k},
         r"it adapts 11 of 14 linear layers of the language tower.*--lora_target is all or attention"),
        (lambda found: {k: v for k, v in found.items() if "layers.1.mlp.up_proj.lora_A" not in k},
         r"1 tensors belong neither to LoRA matrices nor to a tower in full"),
        (lambda found: {k: v[:, :8].clone() if "q_proj.lora_A" in k else v for k, v in found.items()},
         r"q_proj is of a weight \[64, 8\], the base's is \[64, 64\].*--model_id"),
        (lambda found: {"base_model.model.encoder.lora_A.weight": torch.ones(4, 4)}, "no part of Qwen2-VL"),
        (lambda found: {}, "holds no LoRA matrices"),
    ],
)  # fmt: skip
def test_tensors_that_are_missing_or_do_not_fit_are_refused(refused, shelf, tmp_path, change, says):
    start = Path(shutil.copytree(shelf.adapter("fp32", "language"), tmp_path / "odd"))
    rewritten(start, change)
    assert re.search(says, refused(start=start, base=shelf.base("fp32")))


def test_folders_without_an_adapter_are_refused(refused, base, parent, tmp_path):
    assert f"--adapter {parent}x: no such folder. Did you mean {parent}?" in refused(start=f"{parent}x")
    assert "is a whole model, not an adapter. To start from it, use --model_id" in refused(start=base)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(parent / "checkpoint-1", unfinished / "checkpoint-1")
    assert f"use its newest checkpoint, {unfinished / 'checkpoint-1'}" in refused(start=unfinished)
    beside = Path(shutil.copytree(parent, tmp_path / "beside"))
    save_file({"visual.merger.ln_q.weight": torch.ones(32)}, beside / "vit.safetensors")
    assert "beside the adapter, vit.safetensors holds weights that were trained in full" in refused(start=beside)


def test_the_adapter_of_another_base_is_refused(refused, base, base_of, tmp_path):
    other = Path(shutil.copytree(base, tmp_path / "base"))
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file(tensors | {name: tensors[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    said = refused(base=other)
    assert "with fingerprint" in said
    assert said.rstrip().endswith("Pass the right one as --model_id.")
    second = next(family for family in FAMILIES.values() if family is not FAMILY)
    assert f"is a {second.label}" in refused(base=base_of(second))


def test_a_benchmark_starts_from_no_adapter(base, parent, capsys):
    assert main(["bench", "train", "--model_id", str(base), "--adapter", str(parent)]) == 1
    assert "a trained adapter is as fast as a new one" in capsys.readouterr().err
