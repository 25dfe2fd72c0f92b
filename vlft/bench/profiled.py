"""One run of vlft's own training under torch's profiler: `python -m vlft.bench.profiled FLAGS.yaml OUT`.

Writes OUT/kernels.txt, the operations of two steps by time on the device and on the host, and OUT/waits.txt, the code
lines where the host waits for the device in a later step.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vlft.bench.ours import run
from vlft.train.trainer import VlftTrainer

FIRST, MANY = 4, 2  # first profiled step, after those that compile and tune, and number of profiled steps
SHOWN = 30


class _Profiled:
    """Replaces `VlftTrainer.training_step`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.real = VlftTrainer.training_step
        self._open = contextlib.ExitStack()
        self._profile: Any = None

    def step(self, trainer: VlftTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        done = trainer.state.global_step
        if done == FIRST and self._profile is None:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = self._open.enter_context(profile(activities=kinds))
        if done == FIRST + MANY and self._profile is not None:
            self._open.close()
            self._write()
        with self._waits() if done == FIRST + MANY + 1 else contextlib.nullcontext():
            return self.real(trainer, *args, **kwargs)

    def _write(self) -> None:
        found, self._profile = self._profile.key_averages(), None
        on = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        tables = [found.table(sort_by=by, row_limit=SHOWN) for by in dict.fromkeys((on, "self_cpu_time_total"))]
        (self.out / "kernels.txt").write_text("\n".join(tables), encoding="utf-8")

    @contextlib.contextmanager
    def _waits(self) -> Iterator[None]:
        """Record torch's warnings about waits in this micro-batch."""
        if not torch.cuda.is_available():
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


def main(flags: str, out: str) -> None:
    """Train with the flags of the file, under the profiler."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    profiled = _Profiled(folder)
    step: Any = lambda trainer, *args, **kwargs: profiled.step(trainer, *args, **kwargs)  # noqa: E731 - binds `self`
    VlftTrainer.training_step = step  # type: ignore[method-assign]
    run(["--config", flags, "--output_dir", str(folder / "run")])


if __name__ == "__main__":
    main(*sys.argv[1:])
