"""`vlft bench train`: the speed of training steps, of vlft and of stock transformers, on the same rows in one call.

Each run has its own process, so that memory peaks are separate. vlft's run calls the same function as `vlft train`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vlft.bench.baseline import Spec
from vlft.bench.choices import PRESETS, SIDES, Preset, column
from vlft.bench.figures import Epoch, Step, epoch_of, summary
from vlft.bench.mixes import Scale, draw_rows, mean_tokens
from vlft.bench.ours import RAN
from vlft.bench.predicted import predicted
from vlft.bench.sizes import SHAPES
from vlft.bench.work import BuiltIn, Failed, Say, run_module, workplace
from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.parse import Parsed
from vlft.config.repeat import write_yaml
from vlft.config.training import TrainFlags
from vlft.model_files import read_json
from vlft.setup import open_base, trainable_rows

#: Flags of a user's config that the benchmark sets itself, or that have no effect on a step.
NOT_MEASURED = (
    "output_dir", "resume_from_checkpoint", "num_train_epochs", "max_steps", "logging_steps", "logging_strategy",
    "logging_first_step", "report_to", "run_name", "save_strategy", "save_steps", "save_total_limit", "save_only_model",
    "eval_path", "eval_split", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "early_stopping_patience", "early_stopping_threshold",
    "eval_metric", "push_to_hub",
)  # fmt: skip
PACK_TOKENS = 16384  # the default of vlft train
TINY_PACK_TOKENS = 1024  # a few tiny rows
FILLED = 0.95  # approximate share of a pack that rows fill
#: Rows of a step without packing if no flag sets them. Real rows are trained one by one: several may be too long.
UNPACKED: dict[Scale, dict[str, int]] = {
    "tiny": {"per_device_train_batch_size": 4},
    "real": {"gradient_accumulation_steps": 4},
}


@dataclass(frozen=True, kw_only=True)
class TrainBench:
    """Settings of the benchmark.

    Attributes:
        steps: optimizer steps of a run. With built-in rows the number is approximate, since a run is one pass.
        skip: number of first steps that do not count.
        rounds: number of runs of each side; the sides alternate, and the median run counts.
        preset: towers to train; None leaves them to the flags.
        orders: orders of rows in the baseline; empty for no baseline.
        sides: sides of the baseline, of `vlft.bench.choices.SIDES`. Without CUDA there are no kernels, so that side is
            left out unless it is the only one.
        baseline_batch: rows of a micro-batch of the baseline; None for the fastest that fits.
        baseline_checkpointing: gradient checkpointing of the baseline; None for the fastest that fits.
        timeout: maximum seconds of a run; None for no limit.
        work: folder that built-in bases and rows stay in; None for a temporary one.
    """

    steps: int
    skip: int
    rounds: int = 1
    preset: Preset | None = None
    orders: tuple[str, ...] = ()
    sides: tuple[str, ...] = tuple(SIDES)
    baseline_batch: int | None = None
    baseline_checkpointing: bool | None = None
    timeout: float | None = None
    work: str | None = None


def bench_train(parsed: Parsed, plan: TrainBench, built_in: BuiltIn, say: Say) -> dict[str, Any]:
    """Measure training.

    Args:
        parsed: parsed flags, with `DataFlags`, `ModelFlags` and `TrainFlags` in this order.
        plan: settings of the benchmark.
        built_in: base and rows that are used if the flags name none.
        say: receives lines about progress.

    Returns:
        the document of `vlft bench train --json`.

    Raises:
        VlftError: the flags cannot be carried out, or vlft's own run failed. A failed baseline is reported in the
            document.
    """
    data, model, args = parsed.flags
    with workplace(plan.work) as work:
        own_base, own_rows = model.model_id is not None, bool(data.data_path)
        flags = {name: parsed.effective[name] for name in parsed.given if name not in NOT_MEASURED}
        flags |= PRESETS[plan.preset] if plan.preset else {}
        if not own_base:
            flags["model_id"] = str(built_in.base(work, say, timeout=plan.timeout))
        if not own_rows:
            scale = built_in.scale(own_base=own_base)
            if not data.packing and "global_batch" not in flags:
                flags = UNPACKED[scale] | flags
            if data.packing and scale == "tiny":
                flags.setdefault("pack_tokens", TINY_PACK_TOKENS)
            count = _rows_for(plan, built_in, args, flags, scale, packing=data.packing)
            flags["data_path"] = [str(built_in.rows(work, count, say, own_base=own_base, scale=scale))]
        flags |= {"save_strategy": "no", "report_to": "none", "logging_steps": 1, "resume_from_checkpoint": "none"}
        flags |= {"max_steps": plan.steps} if own_rows else {"num_train_epochs": 1}
        epoch, modes = _epoch(parsed, flags)
        bench = _Bench(flags=flags, plan=plan, epoch=epoch, work=work, say=say, own_rows=own_rows)
        return bench.run() | {
            "base": model.model_id if own_base else f"{built_in.shape} (random weights)",
            "data": data.data_path if own_rows else f"{built_in.mix} mix, seed {built_in.seed}",
            "preset": next((name for name, towers in PRESETS.items() if towers == modes), "/".join(modes.values())),
            "packing": bool(data.packing),
            "epoch_tokens": epoch.tokens,
        }


def _rows_for(
    plan: TrainBench, built_in: BuiltIn, args: TrainFlags, flags: dict[str, Any], scale: Scale, *, packing: bool
) -> int:
    """Return the number of built-in rows for about the wanted number of steps."""
    if "global_batch" in flags:
        return plan.steps * int(flags["global_batch"])
    micro = plan.steps * int(flags.get("gradient_accumulation_steps", args.gradient_accumulation_steps))
    if not packing:
        return micro * int(flags.get("per_device_train_batch_size", args.per_device_train_batch_size))
    factor = SHAPES[built_in.shape][0].factor
    mean = mean_tokens(draw_rows(built_in.mix, 500, seed=built_in.seed, scale=scale), scale, factor=factor)
    return math.ceil(micro * FILLED * int(flags.get("pack_tokens", PACK_TOKENS)) / mean)


def _epoch(parsed: Parsed, flags: dict[str, Any]) -> tuple[Epoch, dict[str, str]]:
    """Count the tokens and operations of all rows, and read the modes of the towers, under the flags of the run."""
    data, model, args = parsed.flags
    names: dict[type, set[str]] = {cls: set(cls.__dataclass_fields__) for cls in (DataFlags, ModelFlags)}
    data = replace(data, **{k: v for k, v in flags.items() if k in names[DataFlags]}, eval_path=[], eval_split=None)
    model = replace(model, **{k: v for k, v in flags.items() if k in names[ModelFlags]})
    base = open_base(data, model, given=frozenset(flags))
    measured = trainable_rows(data.data_path, data, base, workers=args.dataloader_num_workers)
    return epoch_of(base, measured), dict(base.towers.modes)


@dataclass(kw_only=True)
class _Bench:
    """The alternating runs of both sides."""

    flags: dict[str, Any]
    plan: TrainBench
    epoch: Epoch
    work: Path
    say: Say
    own_rows: bool
    device: str | None = None
    settled: dict[str, dict[str, Any]] = field(default_factory=dict)  # column -> settings that its first run chose

    def run(self) -> dict[str, Any]:
        self.device = device_name()
        ours: list[dict[str, Any]] = []
        columns, left_out = self._columns()
        others: dict[str, list[dict[str, Any]]] = {name: [] for name in columns}
        failed: dict[str, str] = {}
        for turn in range(self.plan.rounds):
            try:
                ours.append(self._ours(turn))
            except Failed as error:
                # Out of memory: run again with gradient checkpointing, unless the flags set it.
                if "out of memory" not in str(error).lower() or "gradient_checkpointing" in self.flags:
                    raise
                self.say("  out of memory: running again with --gradient_checkpointing true")
                self.flags["gradient_checkpointing"] = True
                ours.append(self._ours(turn))
            rows_per_step = ours[0]["run_samples"] / ours[0]["run_steps"]
            for name, (side, order) in columns.items():
                if name not in failed:
                    try:
                        others[name].append(self._baseline(side, order, turn, rows_per_step))
                    except Failed as error:
                        failed[name] = str(error)
                        self.say(f"baseline, {name}: failed\n{error}")
        mine = _median_run(ours)
        baselines: dict[str, Any] = {name: _median_run(runs) for name, runs in others.items() if runs}
        baselines |= {name: {"failed": reason} for name, reason in failed.items()}
        done = [one for one in baselines.values() if "failed" not in one]
        best = max(done, key=lambda one: one["tokens_per_s"], default=None)
        return {
            **mine,
            "baseline": best,
            "baselines": baselines,
            "baselines_left_out": left_out,
            "ratio": _ratio(mine, best) if best else None,
            "predicted": self._predicted(),
            "gradient_checkpointing": bool(read_json(self.work / "runs" / "ours-0" / RAN)["checkpointed"]),
            "rounds": self.plan.rounds,
            "skipped_steps": self.plan.skip,
            "device": self.device or "cpu",
            "torch": torch.__version__,
        }

    def _predicted(self) -> dict[str, Any] | None:
        """The forecast of the same run. If it fails, the figures that were measured are not lost."""
        try:
            return predicted(self.work / "runs" / "ours-0", self.device)
        except Exception as error:  # noqa: BLE001 - it runs the model on tensors without contents, a rare use of torch
            self.say(f"there is no forecast beside the figures, because it failed: {error!r}")
            return None

    def _columns(self) -> tuple[dict[str, tuple[str, str]], str | None]:
        """Column -> its side and order; and why a side is left out, or None."""
        sides, reason = list(self.plan.sides), None
        if self.device is None and self.plan.orders and len(sides) > 1:
            sides.remove("kernels")
            reason = f"{SIDES['kernels']}: left out, because the kernels need a CUDA device"
            self.say(reason)
        return {column(side, order): (side, order) for side in sides for order in self.plan.orders}, reason

    def _ours(self, turn: int) -> dict[str, Any]:
        folder = self._folder(f"ours-{turn}")
        flags = folder / "flags.yaml"
        write_yaml(flags, self.flags | {"output_dir": str(folder / "run")})
        self.say(f"vlft, run {turn + 1} of {self.plan.rounds}")
        self._module(["vlft.bench.ours", str(flags)], folder)
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        logged = [json.loads(line) for line in lines]
        steps = [_step(line) for line in logged if "step_s" in line]
        return self._summary(steps, logged[-1]["peak_gb"])

    def _baseline(self, side: str, order: str, turn: int, rows_per_step: float) -> dict[str, Any]:
        name = column(side, order)
        folder = self._folder(f"{side}-{order}-{turn}")
        flags, found = folder / "flags.yaml", folder / "found.json"
        write_yaml(flags, self.flags | {"output_dir": str(folder / "run")})
        spec = Spec(
            flags=str(flags),
            side=side,
            order=order,
            rows_per_step=rows_per_step,
            max_steps=self.plan.steps if self.own_rows else -1,
            batch=self.plan.baseline_batch,
            checkpointing=self.plan.baseline_checkpointing,
            out=str(found),
        )
        if name in self.settled:
            spec = replace(spec, **self.settled[name])
        (folder / "spec.json").write_text(json.dumps(asdict(spec)), encoding="utf-8")
        self.say(f"{SIDES[side]}, {order} order, run {turn + 1} of {self.plan.rounds}")
        self._module(["vlft.bench.baseline", str(folder / "spec.json")], folder)
        document = json.loads(found.read_text(encoding="utf-8"))
        settings = document["settings"]
        self.settled[name] = {key: settings[key] for key in ("batch", "checkpointing", "cudnn")}
        steps = [Step(**step) for step in document["steps"]]
        return self._summary(steps, document["peak_gb"]) | {"settings": settings}

    def _summary(self, steps: list[Step], peak_gb: float) -> dict[str, Any]:
        figures = summary(steps, skip=self.plan.skip, epoch=self.epoch, device=self.device, peak_gb=peak_gb)
        self.say(f"  {figures['tokens_per_s']:,.0f} tokens/s over {figures['steps']} steps")
        return figures | {"run_steps": len(steps)}

    def _folder(self, name: str) -> Path:
        """Create an empty folder. A work folder that stays may hold the files of an earlier run."""
        import shutil

        folder = self.work / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _module(self, words: list[str], folder: Path) -> None:
        shown = _every_so_often()
        run_module(words, log=folder / "log.txt", say=self.say, timeout=self.plan.timeout, shown=shown)


def device_name() -> str | None:
    """The name of the GPU that runs are measured on; None without one."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _every_so_often(seconds: float = 10) -> Callable[[str], bool]:
    """Build a filter for the lines of a run's output: settings that were tried, and a step every few seconds."""
    import time

    last = time.monotonic()

    def shown(line: str) -> bool:
        nonlocal last
        if line.startswith("tried "):
            return True
        if line.startswith("step ") and time.monotonic() - last > seconds:
            last = time.monotonic()
            return True
        return False

    return shown


def _step(line: dict[str, Any]) -> Step:
    """Convert a line of metrics.jsonl, which has one for every step."""
    return Step(
        seconds=line["step_s"],
        wait=line["data_wait_s"],
        tokens=line["tokens"],
        places=round(line["tokens"] / (1 - line["padding_fraction"])),
        supervised=line["supervised_tokens"],
        images=line["images"],
        samples=line["samples"],
    )


def _median_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run of median speed; of an even number of runs, the slower of the two in the middle."""
    ordered = sorted(runs, key=lambda run: run["tokens_per_s"])
    return ordered[(len(ordered) - 1) // 2] | {"tokens_per_s_of_runs": [round(run["tokens_per_s"], 1) for run in runs]}


def _ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float | None]:
    """Divide our figures by those of the best baseline."""
    names = ("tokens_per_s", "supervised_tokens_per_s", "epoch_s", "peak_gb")
    return {name: ours[name] / theirs[name] if theirs[name] else None for name in names}
