"""One run of vlft's own training under torch's profiler: `python -m vlft.bench.profiled FLAGS.yaml OUT`.

Writes into OUT: kernels.txt, the operations of two steps by time on the device and on the host; waits.txt, the code
lines where the host waits for the device in a later step; and forecast.md, the time of those two steps in matmuls,
attention and everything else, beside the forecast of the same micro-batches.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.profiler import ProfilerActivity, profile

from vlft.bench.ours import carry_out
from vlft.bench.predicted import of_step, step_that_ran
from vlft.config.parse import FlagParser
from vlft.model.forecast import Forecast
from vlft.model.tracing import Load
from vlft.setup import open_base
from vlft.train.trainer import VlftTrainer

FIRST, MANY = 4, 2  # first profiled step, after those that compile and tune, and number of profiled steps
SHOWN = 30

Kind = Literal["matmul", "attention", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: Names of kernels (FlashAttention 2 to 4, cuDNN, torch's memory-efficient attention, fla's delta rule; cuBLAS, CUTLASS
#: and cuDNN's convolutions) and of torch's operations, which are profiled on a CPU. Attention is looked for first,
#: since kernels of FlashAttention name CUTLASS too.
_ATTENTION = re.compile(
    "flash|fmha|sdpa|scaled_dot_product|attention|delta_rule|^chunk_|_chunk_|solve_tril|recompute_w_u"
)
_MATMUL = re.compile(
    "gemm|gemv|nvjet|cublas|cutlass|xmma|splitk|conv[23]d|convolution|implicit_con|"
    "::(mm|addmm|bmm|baddbmm|_grouped_mm)$"
)


def kind_of(name: str) -> Kind:
    """What a kernel or an operation does, by its name."""
    word = name.lower()
    return "attention" if _ATTENTION.search(word) else "matmul" if _MATMUL.search(word) else "other"


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """What was profiled.

    Attributes:
        ms: kind -> time of a step on the device (on a CPU: in torch's operations).
        kernels: of a step.
        seconds: of a step.
        peak_gb: of tensors.
    """

    ms: Mapping[Kind, float]
    kernels: float
    seconds: float
    peak_gb: float | None


def by_kind(events: Iterable[Any], *, on_device: bool) -> tuple[dict[Kind, float], int]:
    """Sum profiled times.

    Args:
        events: of `profile.key_averages()`.
        on_device: sum kernels on the GPU, or torch's operations on the CPU.

    Returns:
        kind -> milliseconds; number of kernels or operations.
    """
    total: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    count = 0
    for event in events:
        # A kernel is an event of its own, and its time is also listed with the operation that started it.
        kernel = event.device_type != torch.autograd.DeviceType.CPU
        if kernel != on_device or event.is_user_annotation:
            continue
        total[kind_of(event.key)] += (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e3
        count += event.count
    return total, count


class _Profiler:
    """Replaces `VlftTrainer.training_step`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.real = VlftTrainer.training_step
        self.loads: list[Load] = []
        self.found: Profiled | None = None
        self._open = contextlib.ExitStack()
        self._profile: Any = None
        self._began = 0.0
        self._cuda = torch.cuda.is_available()

    def step(self, trainer: VlftTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        done = trainer.state.global_step
        if done == FIRST and self._profile is None and self.found is None:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            self._wait()
            if self._cuda:
                torch.cuda.reset_peak_memory_stats()
            self._profile = self._open.enter_context(profile(activities=kinds))
            self._began = time.perf_counter()
        if done == FIRST + MANY and self._profile is not None:
            self._close()
        if self._profile is not None:
            self.loads.append(_load(next(one for one in (*args, *kwargs.values()) if isinstance(one, Mapping))))
        with self._waits() if done == FIRST + MANY + 1 else contextlib.nullcontext():
            return self.real(trainer, *args, **kwargs)

    def _close(self) -> None:
        self._wait()
        seconds = time.perf_counter() - self._began
        peak = torch.cuda.max_memory_allocated() / 1e9 if self._cuda else None
        self._open.close()
        events, self._profile = self._profile.key_averages(), None
        on = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        tables = [events.table(sort_by=by, row_limit=SHOWN) for by in dict.fromkeys((on, "self_cpu_time_total"))]
        (self.out / "kernels.txt").write_text("\n".join(tables), encoding="utf-8")
        ms, kernels = by_kind(events, on_device=self._cuda)
        self.found = Profiled(
            ms={kind: one / MANY for kind, one in ms.items()},
            kernels=kernels / MANY,
            seconds=seconds / MANY,
            peak_gb=peak,
        )

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def _waits(self) -> Iterator[None]:
        """Record torch's warnings about waits in this micro-batch."""
        if not self._cuda:
            yield
            return
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        lines = [f"{one.filename}:{one.lineno}: {one.message}" for one in seen]
        (self.out / "waits.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _load(batch: Mapping[str, Any]) -> Load:
    """The shapes of a micro-batch of the trainer."""
    return Load(
        lengths=tuple(batch["lengths"]),
        vision_lengths=tuple(batch["vision_lengths"]),
        supervised=len(batch["supervised_rows"]),
        key_lengths=tuple(batch["branches"]["key_lengths"]) if "branches" in batch else (),
    )


def beside(found: Profiled, forecasts: list[Forecast], *, micro_batches: int) -> list[tuple[str, str, str]]:
    """Rows of a table: what, measured, predicted.

    Args:
        found: what was profiled.
        forecasts: of each micro-batch of the profiled steps; empty where the speed of the card is not known.
        micro_batches: in a step.
    """

    def mean(values: Iterable[float]) -> str:
        listed = list(values)
        return f"{sum(listed) / MANY:,.1f}" if listed else "-"

    predicted: dict[Kind, str] = {
        "matmul": mean(
            1e3 * (one.whole.kind_seconds["matmul"] + one.whole.kind_seconds["adapter"]) for one in forecasts
        ),
        "attention": mean(1e3 * one.whole.kind_seconds["attention"] for one in forecasts),
        "other": mean(1e3 * one.whole.kind_seconds["elementwise"] for one in forecasts),
    }
    rows = [(f"ms of a step in {kind}", f"{found.ms[kind]:,.1f}", predicted[kind]) for kind in KINDS]
    whole = mean(of_step(one, micro_batches=micro_batches)["ms"] / micro_batches for one in forecasts)
    rows.append(("ms of a step, under the profiler", f"{1e3 * found.seconds:,.1f}", whole))
    rows.append(("kernels of a step", f"{found.kernels:,.0f}", mean(one.whole.kernels for one in forecasts)))
    peak = max((one.peak for one in forecasts if one.peak is not None), default=None)
    rows.append((
        "peak memory, GB of tensors",
        "-" if found.peak_gb is None else f"{found.peak_gb:.2f}",
        "-" if peak is None else f"{peak / 1e9:.2f}",
    ))  # fmt: skip
    return rows


def main(flags: str, out: str) -> None:
    """Train with the flags of the file, under the profiler."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    profiler = _Profiler(folder)
    step: Any = lambda trainer, *args, **kwargs: profiler.step(trainer, *args, **kwargs)  # noqa: E731 - binds `self`
    VlftTrainer.training_step = step  # type: ignore[method-assign]
    parsed = FlagParser("train").parse(["--config", flags, "--output_dir", str(folder / "run")])
    carry_out(parsed)
    if profiler.found is None:
        print(f"the run has fewer than {FIRST + MANY + 1} steps, so no step was profiled")
        return
    data, model, args = parsed.flags
    base = open_base(data, model, given=parsed.given)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    steps = [step_that_ran(folder, base, args, load, device) for load in profiler.loads]
    largest = max(profiler.loads, key=lambda load: load.tokens + load.patches)
    forecasts = [
        one.whole() if one.load is largest else one.quick()  # only that of the whole model has a peak
        for one in steps
        if one is not None
    ]
    rows = beside(profiler.found, forecasts, micro_batches=max(1, len(profiler.loads) // MANY))
    lines = ["| what | measured | predicted |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    text = "\n".join(lines) + "\n"
    (folder / "forecast.md").write_text(text, encoding="utf-8")
    print(text + f"\nthe operations are in {folder / 'kernels.txt'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
