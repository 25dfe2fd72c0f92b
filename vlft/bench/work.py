"""Shared by both benchmarks: built-in bases and rows, the work folder, and processes for measured runs.

Everything is in a work folder, which is removed at the end unless the user named it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vlft
from vlft.bench.mixes import Mix, Scale, Unit, write_mix
from vlft.bench.sizes import SHAPES, TINY, is_whole, write_shape, write_weights
from vlft.errors import ConfigError, VlftError

TAIL = 25  # last lines of a failed process in its error message
Say = Callable[[str], None]


class Failed(VlftError):
    """A measured process failed. The message contains the end of its output."""


@dataclass(frozen=True, kw_only=True)
class BuiltIn:
    """The base and rows that are used if the flags name none.

    Attributes:
        shape: name of the shape of the base with random weights.
        mix: mix of the rows.
        processor: makes the stock processor of a built-in base, from its family and the maximum pixels of a picture.
        seed: seed of rows and weights.
    """

    shape: str
    mix: Mix
    processor: Callable[..., Any]
    seed: int = 0

    def base(self, work: Path, say: Say, *, timeout: float | None = None) -> Path:
        """Return the folder of the built-in base. It is written if it does not exist."""
        folder = work / f"base-{self.shape}"

        if not is_whole(folder):
            say(f"building {self.shape} with random weights in {folder}")
            family, _ = SHAPES[self.shape]
            write_shape(folder, self.shape, self.processor(family, max_pixels=family.pixels[1]))
            if torch.cuda.is_available():  # in its own process, which frees its GPU memory at the end
                words = ["vlft.bench.sizes", str(folder), self.shape]
                run_module(words, log=work / f"base-{self.shape}.log", say=say, timeout=timeout)
            else:
                write_weights(folder, self.shape)
        return folder

    def scale(self, *, own_base: bool) -> Scale:
        """Return the scale of rows to train on: `real`, unless the base is a built-in tiny one."""
        return "tiny" if self.shape in TINY and not own_base else "real"

    def rows(self, work: Path, count: int, say: Say, *, own_base: bool, scale: Scale) -> Path:
        """Return the data file of the built-in rows. It is written if it does not exist.

        Args:
            own_base: the user named a base, whose tokenizer has tokens for words.
        """
        unit: Unit = "word" if own_base else "byte"
        return write_mix(work / "rows", self.mix, count, seed=self.seed, scale=scale, unit=unit, say=say)


@contextmanager
def workplace(named: str | None) -> Iterator[Path]:
    """Yield the work folder: the one that the user named, which stays, or a temporary one.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if named is not None:
        try:
            Path(named).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--work {named}: cannot be written ({error.strerror}). Use another folder.") from error
        yield Path(named)
        return
    folder = Path(tempfile.mkdtemp(prefix="vlft-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_module(
    words: Sequence[str],
    *,
    log: Path,
    say: Say,
    timeout: float | None = None,
    shown: Callable[[str], bool] = lambda line: False,
) -> None:
    """Run `python -m WORDS` in its own process, and write its output to a log file.

    Args:
        log: file for both output streams.
        say: receives the lines that `shown` selects.
        timeout: seconds after which the process is killed; None for never.
        shown: selects lines of the output.

    Raises:
        Failed: the process ended with a status other than 0, or was killed.
    """
    path = os.pathsep.join(filter(None, [str(Path(vlft.__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    last: deque[str] = deque(maxlen=TAIL)
    late = threading.Event()
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, text=True, errors="replace",
    )  # fmt: skip

    def kill() -> None:
        late.set()
        process.kill()  # its loader workers notice that, and end

    timer = threading.Timer(timeout, kill) if timeout is not None else None
    try:
        if timer is not None:
            timer.start()
        with log.open("w", encoding="utf-8") as file:
            for line in process.stdout or ():
                file.write(line)
                last.append(line.rstrip("\n"))
                if shown(line):
                    say(f"  {line.rstrip()}")
        status = process.wait()
    finally:
        if timer is not None:
            timer.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()
    if late.is_set():
        raise Failed(f"{words[0]}: not finished after {timeout:.0f} s, so it was stopped")
    if status:
        raise Failed(f"{words[0]}: ended with status {status}. Its last lines:\n" + "\n".join(last))
