"""DeepSpeed with every preset, on two CPU processes: equal to the run of one process for any mixture of rows.

The whole grid takes some minutes: pytest -m grid. By default what differs most from each other runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import row
from launch import call
from launch import vlft as vlft_process
from runs import FULL, VISION_LORA, arguments, assert_same, lines, losses, split, weights

from vlft.families import FAMILIES

pytestmark = pytest.mark.distributed

LANGUAGE_FULL = ("--vision", "frozen", "--merger", "frozen", "--language", "full")
TOWERS: dict[str, tuple[str, ...]] = {
    "full": FULL,
    "lora": (),
    "vision-lora": VISION_LORA,
    "merger": ("--merger", "full"),
    "language-full": LANGUAGE_FULL,
}
PRESETS = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def grid(*quick: tuple[str, str], towers: Sequence[str] = ("full", "lora", "vision-lora")) -> list:
    """{ddp, presets} x towers; all except the quick ones have the marker `grid`."""
    cells = [*quick, *((strategy, tower) for strategy in ("ddp", *PRESETS) for tower in towers)]
    return [
        pytest.param(*cell, id="-".join(cell), marks=() if cell in quick else pytest.mark.grid)
        for cell in dict.fromkeys(cells)
    ]


def strategy_flags(strategy: str) -> tuple[str, ...]:
    return () if strategy == "ddp" else ("--deepspeed", strategy)


class Runs:
    """Runs over the media folder, each in separate processes; runs of one process are cached for the session."""

    def __init__(self, folder: Path, base: Path, media: Path, mixed_json: Path) -> None:
        self.folder, self.base, self.media, self.mixed_json = folder, base, media, mixed_json
        self.kept: dict[tuple, Path] = {}

    def start(
        self,
        *more: str,
        world: int,
        name: str,
        rows: Path | None = None,
        inside: Callable[[], None] | None = None,
        **how,
    ):
        out = self.folder / name
        argv = arguments(self.base, rows or self.mixed_json, self.media, out, *more)
        return out, vlft_process(argv, world=world, out=self.folder, inside=inside, **how)

    def done(self, *more: str, **how) -> Path:
        out, ranks = self.start(*more, **how)
        for rank in ranks:
            assert rank.status == 0, rank.output[-3000:]
        return out

    def alone(self, *more: str, **how) -> Path:
        """The run of one process."""
        key = (more, *how.items())
        if key not in self.kept:
            self.kept[key] = self.done(*more, world=1, name=f"alone{len(self.kept)}", **how)
        return self.kept[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base, media, mixed_json) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), base, media, mixed_json)


# ---- the same as one process


def _load(words: list[str]) -> None:
    """Merge if there is an adapter, load with plain transformers, return the logits of a few tokens."""
    from transformers import AutoModelForImageTextToText

    from vlft.cli.main import main

    run, result = map(Path, words)
    if (run / "adapter_model.safetensors").exists():
        assert main(["merge", str(run), str(run) + "-merged"]) == 0
        run = Path(str(run) + "-merged")
    model, info = AutoModelForImageTextToText.from_pretrained(run, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(40)[None]).logits, result)


def loaded_logits(run: Path) -> torch.Tensor:
    result = run.parent / f"{run.name}.pt"
    if not result.exists():
        done = call(_load, [str(run), str(result)], log=run.parent / "load.log", timeout=100)
        assert done.status == 0, done.output[-3000:]
    return torch.load(result)


@pytest.mark.parametrize(
    ("strategy", "towers"),
    grid(
        ("zero3", "vision-lora"), towers=tuple(TOWERS)
    ),  # ZeRO-1 and 2 on two processes: `test_packed_training` and `test_train`
)
def test_two_processes_train_as_one_and_the_result_loads(runs, strategy, towers):
    flags = TOWERS[towers]
    whole = runs.alone(*flags, *split(4, 1))
    two = runs.done(*flags, *split(1, 2), *strategy_flags(strategy), world=2, name=f"{strategy}-{towers}")
    assert_same(two, whole)
    assert torch.allclose(loaded_logits(two), loaded_logits(whole), atol=1e-4)


@pytest.mark.parametrize("strategy", [pytest.param("zero2_offload", marks=pytest.mark.grid), "zero3"])
def test_bf16_keeps_float32_masters(runs, strategy):
    """Trained, saved and resumed in float32, over weights that compute in bf16."""
    flags = (*TOWERS["merger"], "--bf16", "true", *strategy_flags(strategy))
    run = runs.done(*flags, *split(1, 2), world=2, name=f"bf16-{strategy}")
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in weights(run).values())
    assert losses(run) == pytest.approx(losses(runs.alone(*TOWERS["merger"], *split(4, 1))), rel=0.02)


# ---- mixed modalities

STILLS = ("china", "flower", "astronaut", "coffee")
TEXT = [row(answer, question, id=question) for question, answer in (("2+2?", "4"), ("Hi.", "Hello."))]
STILL = [row(f"It is {name}.", "<image>\nWhat is it?", image=f"{name}.jpg") for name in STILLS]
CLIP = [row("It slides.", "<video>\nWhat happens?", video="clip.mp4")] * 2
#: Steps of four rows: rank 0 trains the first two, rank 1 the others.
MIXTURES = {
    "apart": [*TEXT, *STILL[:2], *TEXT, *STILL[2:], *TEXT, *CLIP],
    "alternating": [*TEXT, *STILL[:2], *STILL[2:], *TEXT, *CLIP, *TEXT, TEXT[0], STILL[0], CLIP[0], TEXT[1]],
}


def _in_file_order() -> None:
    from dataclasses import replace

    from vlft.train import run

    real = run.training_order
    run.training_order = lambda *args, **kwargs: replace(real(*args, **kwargs), shuffle=False)


class _Absent(torch.nn.Module):
    """Replaces a ViT that is not called."""

    def __init__(self, real: torch.nn.Module) -> None:
        super().__init__()
        self.dtype, self.width = real.dtype, real.config.hidden_size

    def forward(self, pixels: torch.Tensor, **_) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=pixels.new_zeros(1, self.width))


def _without_the_vision_call() -> None:
    from vlft.model import forward

    _in_file_order()
    real = forward._flat_forward

    def flat(self, scale, **batch):
        visual = self.model.visual
        if len(batch["vision_rows"]) == 0:
            self.model._modules["visual"] = _Absent(visual)
        try:
            return real(self, scale, **batch)
        finally:
            self.model._modules["visual"] = visual

    forward._flat_forward = flat


def mixture(runs: Runs, name: str) -> Path:
    path = runs.folder / f"{name}.json"
    path.write_text(json.dumps(MIXTURES[name]))
    return path


@pytest.mark.parametrize("rows", ["apart", pytest.param("alternating", marks=pytest.mark.grid)])
@pytest.mark.parametrize(
    ("strategy", "towers"),
    grid(("zero3", "lora")),
)
def test_no_mixture_of_modalities_hangs(runs, strategy, towers, rows):
    flags = (*TOWERS[towers], "--num_train_epochs", "1")
    how = {"rows": mixture(runs, rows), "inside": _in_file_order}
    whole = runs.alone(*flags, *split(4, 1), **how)
    name = f"{rows}-{strategy}-{towers}"
    two = runs.done(*flags, *split(1, 2), *strategy_flags(strategy), world=2, name=name, timeout=100, **how)
    assert_same(two, whole)
    assert losses(two) == pytest.approx(losses(whole), rel=1e-4)
    assert [line["samples"] for line in lines(two)] == [4] * (len(MIXTURES[rows]) // 4)


#: Where experts are, they stay whole and frozen.
IN_FAMILIES = {
    "qwen2_5_vl": ("full", "vision-lora"),
    "qwen3_vl": ("full", "merger", "vision-lora"),
    "qwen3_5": ("full", "vision-lora"),
    "qwen3_vl_moe": ("merger",),
    "qwen3_5_moe": ("vision-lora",),
}


@pytest.mark.grid
@pytest.mark.parametrize(
    ("model_type", "strategy", "towers"),
    [
        pytest.param(*cell, id="-".join(cell))
        for model_type, every in IN_FAMILIES.items()
        for strategy in ("ddp", "zero2", "zero3")
        for towers in every
        if (cell := (model_type, strategy, towers)) and not (strategy == "zero3" and model_type.endswith("moe"))
    ],
)
def test_no_mixture_hangs_in_any_family(tmp_path_factory, base_of, media, mixed_json, model_type, strategy, towers):
    """Steps in which one process has text alone and the other pictures; the same weights as of one process."""
    runs = Runs(tmp_path_factory.mktemp(f"{model_type}-{strategy}"), base_of(FAMILIES[model_type]), media, mixed_json)
    rows = runs.folder / "rows.json"
    rows.write_text(
        json.dumps([one for one in MIXTURES["apart"] if model_type == "qwen2_5_vl" or "video" not in one][:8])
    )
    flags = (*TOWERS[towers], "--num_train_epochs", "1")
    how = {"rows": rows, "inside": _in_file_order}
    whole = runs.alone(*flags, *split(4, 1), **how)
    two = runs.done(*flags, *split(1, 2), *strategy_flags(strategy), world=2, name="two", timeout=100, **how)
    assert_same(two, whole)
    # Adam divides by the size of a gradient, so single weights with a gradient of almost 0 move by its rounding.
    assert torch.allclose(loaded_logits(two), loaded_logits(whole), atol=1e-3)


@pytest.mark.parametrize(
    ("strategy", "towers"), [("ddp", "full"), pytest.param("zero3", "lora", marks=pytest.mark.grid)]
)
def test_without_the_vision_call_it_would_fail(runs, strategy, towers):
    """The test above can fail: if text rows do not run the ViT, ranks wait for each other or disagree."""
    flags = (*TOWERS[towers], "--num_train_epochs", "1", *split(1, 2), *strategy_flags(strategy))
    how = {"rows": mixture(runs, "apart"), "inside": _without_the_vision_call, "timeout": 15}
    _, ranks = runs.start(*flags, world=2, name=f"without-{strategy}-{towers}", **how)
    assert any(rank.status != 0 for rank in ranks)


# ---- rates and clipping


def _report_the_engine() -> None:
    """Print the values of the live optimizer and engine in the first step."""
    from vlft.train.trainer import VlftTrainer

    real = VlftTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 0:
            groups = {g["name"]: (g["lr"], g["weight_decay"]) for g in self.optimizer.param_groups}
            said = {"groups": groups}
            if self.is_deepspeed_enabled:
                engine = self.model_wrapped
                inner = engine.optimizer.optimizer.param_groups
                said["inner"] = {g["name"]: (g["lr"], g["weight_decay"]) for g in inner}
                said["clipping"] = engine.gradient_clipping()
                said["accumulation"] = engine.gradient_accumulation_steps()
                said["zero"] = engine.zero_optimization_stage()
            print("SAID", json.dumps(said), flush=True)
        return real(self, *args, **kwargs)

    VlftTrainer.training_step = training_step


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(name, marks=() if name in ("zero2", "zero3_offload") else pytest.mark.grid)
        for name in ("ddp", *PRESETS)
    ],
)
def test_rates_and_clipping_are_those_of_the_live_engine(runs, base, strategy):
    """Plain SGD moves each tower by its rate times its gradient, so the clipped norm can be read from the weights."""
    rates = {"vision": 0.5, "merger": 0.25, "language": 1.0}
    flags = (*FULL, *split(1, 3), "--optim", "sgd", "--max_steps", "1", "--lr_scheduler_type", "constant")
    flags += ("--learning_rate", "1", "--vision_lr", "0.5", "--merger_lr", "0.25", "--max_grad_norm", "0.05")
    out, ranks = runs.start(
        *flags, *strategy_flags(strategy), world=2, name=f"clip-{strategy}", inside=_report_the_engine
    )
    assert ranks[0].status == 0, ranks[0].output[-3000:]
    (said, *_) = [line for line in ranks[0].output.splitlines() if line.startswith("SAID ")]
    said = json.loads(said.removeprefix("SAID "))
    wanted = {name: [rate, 0.0] for tower, rate in rates.items() for name in (tower, f"{tower}_no_decay")}
    assert said["groups"] == wanted
    if strategy != "ddp":
        assert said["inner"] == wanted
        assert (said["clipping"], said["accumulation"], said["zero"]) == (0.05, 3, int(strategy[4]))

    before, after = weights(base), weights(out)
    moved = {
        name: (after[name] - before[name]).double()
        / rates["merger" if "merger" in name else "vision" if "visual" in name else "language"]
        for name in before
    }
    norm = torch.stack([step.norm() for step in moved.values()]).norm()
    assert lines(out)[0]["grad_norm"] > 0.1
    assert float(norm) == pytest.approx(0.05, rel=1e-3)


def test_weight_decay_reaches_matrices_only(runs, base):
    run = runs.done(
        *(*FULL, *split(1, 2), "--optim", "sgd", "--max_steps", "1", "--lr_scheduler_type", "constant"),
        *("--learning_rate", "0.5", "--weight_decay", "0.5", "--max_grad_norm", "1e-9", "--deepspeed", "zero3"),
        world=2,
        name="decay",
    )
    before, after = weights(base), weights(run)
    for name in before:
        kept = 0.75 if before[name].ndim > 1 else 1.0
        assert torch.allclose(after[name], kept * before[name], atol=1e-6), name


def test_a_file_without_gradient_clipping_leaves_it_to_the_flag(runs, tmp_path):
    """DeepSpeed by itself would clip at 1.0."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    flags = (*FULL, *split(1, 2), "--max_steps", "1", "--max_grad_norm", "0.25", "--deepspeed", str(path))
    _, ranks = runs.start(*flags, world=2, name="no-clipping", inside=_report_the_engine)
    assert ranks[0].status == 0, ranks[0].output[-3000:]
    assert '"clipping": 0.25' in ranks[0].output


# ---- resuming

#: Six steps in two epochs, killed in the fifth.
STEPS = ("--save_strategy", "steps", "--save_steps", "3", "--max_steps", "6")


@pytest.mark.parametrize(
    ("strategy", "towers"),
    [
        pytest.param(strategy, towers, marks=() if (strategy, towers) in quick else pytest.mark.grid)
        for quick in [{("zero3", "full")}]
        for strategy in PRESETS
        for towers in ("full", "lora", "vision-lora")
    ],
)
def test_two_processes_go_on_where_they_were_killed(runs, strategy, towers):
    more = (*TOWERS[towers], *split(1, 1), *strategy_flags(strategy), *STEPS)
    whole = runs.done(*more, world=2, name=f"whole-{strategy}-{towers}")
    _, ranks = runs.start(*more, world=2, name=f"killed-{strategy}-{towers}", kill_in_step=5)
    assert [rank.status for rank in ranks] == [-9, -9]
    again = runs.done(*more, world=2, name=f"killed-{strategy}-{towers}")
    a, b = weights(again), weights(whole)
    assert max(float((a[name] - b[name]).abs().max()) for name in b) <= 1e-6
    assert losses(again) == pytest.approx(losses(whole), rel=1e-6)


@pytest.mark.parametrize(
    ("strategy", "towers", "before", "after"),
    [
        ("zero3", "full", 2, 1),
        *(
            pytest.param(strategy, towers, *worlds, marks=pytest.mark.grid)
            for strategy in PRESETS
            for towers in ("full", "vision-lora")
            for worlds in ((2, 1), (1, 2))
            if (strategy, towers, *worlds) != ("zero3", "full", 2, 1)
        ),
    ],
)
def test_another_number_of_processes_goes_on_from_a_converted_state(runs, strategy, towers, before, after):
    name = f"converted-{strategy}-{towers}-{before}"
    rates = (*TOWERS[towers], "--vision_lr", "1e-4", "--weight_decay", "0.1")
    more = (*rates, *strategy_flags(strategy), *STEPS)
    _, ranks = runs.start(*more, *split(1, 2 // before), world=before, name=name, kill_in_step=5)
    assert {rank.status for rank in ranks} == {-9}
    _, [refused, *_] = runs.start(*more, *split(1, 2 // after), world=after, name=name)
    assert refused.status == 1
    assert f"state is of {before} processes, this run has {after}" in refused.output
    command = refused.output.split("start the run again:\n")[1].splitlines()[0].split()
    assert command[:2] == ["python", "-m"]
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, timeout=200)
    again = runs.done(*more, *split(1, 2 // after), world=after, name=name)
    assert_same(again, runs.alone(*rates, *split(2, 1), "--max_steps", "6"))


@pytest.mark.grid
def test_the_best_checkpoint_comes_back(runs):
    run = runs.done(
        *("--eval_path", str(runs.mixed_json), "--eval_strategy", "steps", "--eval_steps", "2", *split(1, 1)),
        *("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "6", "--learning_rate", "0.3"),
        *("--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss", "--optim", "sgd"),
        *("--lr_scheduler_type", "constant", "--deepspeed", "zero3"),
        world=2,
        name="best",
    )
    assert "under ZeRO-3 no process has the weights to answer with" in (run / "report.html").read_text()
    evaluated = {line["step"]: line["eval_loss"] for line in lines(run) if "eval_loss" in line}
    best = min(evaluated, key=evaluated.__getitem__)
    a, b = weights(run), weights(run / f"checkpoint-{best}")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_checkpoint_holds_what_was_trained_only(runs):
    few = ("--merger", "full", *split(1, 1), "--deepspeed", "zero3", *STEPS, "--max_steps", "3")
    run = runs.done(*few, world=2, name="few")
    names = set(weights(run / "checkpoint-3"))
    assert names == set(weights(run))
    assert all("lora_" in name or "merger" in name for name in names)
    states = (run / "checkpoint-3" / "global_step3").glob("*model_states.pt")
    held = {n for path in states for n in torch.load(path, weights_only=False)["module"]}  # we have written it
    assert not [name for name in held if "base_layer" in name or "embed_tokens" in name]

    # Another run does not read it, because it is a pickle.
    _, ranks = runs.start(*few, "--resume_from_checkpoint", str(run / "checkpoint-3"), world=2, name="other")
    assert ranks[0].status == 1
    assert "not of this run's own --output_dir" in ranks[0].output
    assert "pickle" in ranks[0].output


def test_a_base_is_described_on_meta_under_zero3(base):
    """transformers 5.23 fills partitioned weights with numbers even on meta; `vlft plan` only needs their shapes."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    from vlft.errors import CheckpointError
    from vlft.model.load import empty_model, load_config, loaded_whole

    config, family = load_config(base)
    settings = HfTrainerDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # transformers keeps a weak reference
    try:
        with pytest.raises(CheckpointError):  # here: it sees ZeRO-3, and asks for the rows of a micro-batch
            empty_model(config, family)
        with loaded_whole(SimpleNamespace(deepspeed=True, hf_deepspeed_config=settings)):
            assert next(empty_model(config, family).parameters()).is_meta
    finally:
        unset_hf_deepspeed_config()
