"""Compute rewards in a process of its own: a reward that hangs, dies or returns nonsense ends the run with a message.

`vlft.train.grpo.worker` is that process. `vlft.config.rewards` reads `--reward`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import vlft
from vlft.config.rewards import Reward
from vlft.errors import ConfigError, RunFault, VlftError

SEARCH = 10.0  # most seconds in which the row that a reward raises for is searched
STARTING = 60.0  # seconds that a file may take to import, at least; a package such as torch takes some


class Rewards:
    """The rewards of a run, in one process. Use it as a context, which ends the process.

    Args:
        rewards: of `read_rewards`.
        timeout: `--reward_timeout`.

    Raises:
        ConfigError: a file cannot be imported, has no such function, or takes too long.
    """

    def __init__(self, rewards: Sequence[Reward], *, timeout: float) -> None:
        self.rewards = tuple(rewards)
        self.timeout = timeout
        package = str(Path(vlft.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vlft.train.grpo.worker"],  # -P: not from the current folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},  # it may be killed right after it prints
            start_new_session=True,  # Ctrl-C reaches the run, which ends the process
        )
        self._unread = b""
        try:
            for one in self.rewards:
                said = self._ask(
                    {"load": {"kind": one.kind, "what": one.what, "file": one.file}},
                    seconds=max(STARTING, timeout),
                    doing=f"--reward {one.word}: importing it",
                )
                if "refused" in said:
                    raise ConfigError(f"--reward {one.word}: {said['refused']}")
        except RunFault as fault:
            raise ConfigError(str(fault)) from fault
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the rewards, in order."""
        return tuple(one.name for one in self.rewards)

    def __enter__(self) -> Rewards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def score(
        self,
        place: int,
        asked: Mapping[str, Sequence[Any]],
        *,
        rows: Sequence[str],
        state: Mapping[str, Any],
        own: bool = False,
    ) -> dict[str, Any]:
        """Compute one reward of some completions.

        Args:
            place: of the reward in `rewards`.
            asked: prompts, completions, completion_ids and the columns of the rows, lists of the same length.
            rows: the row of each completion as file[index], for messages.
            state: of the trainer: global_step, max_steps and epoch.
            own: whether the completions are the rows' own answers, which are scored before the first step.

        Returns:
            `scores`, a finite number for each completion; `metrics` and `extra`, what the reward logged.

        Raises:
            RunFault: the reward takes longer than `--reward_timeout`, dies, raises, or returns something else.
        """
        one = self.rewards[place]
        when = "the rows' own answers" if own else f"step {state['global_step'] + 1}"
        where = f"--reward {one.word}, {when}"
        message = {
            "reward": place,
            "asked": {name: list(values) for name, values in asked.items()},
            "state": dict(state),
        }
        begun = time.monotonic()
        said = self._ask(message, seconds=self.timeout, doing=f"{where}: scoring {_shown(rows)}")
        if said.get("searches"):
            left = min(SEARCH, self.timeout - (time.monotonic() - begun))
            with contextlib.suppress(RunFault):  # the first error is what the user must know
                said = self._read(seconds=left, doing=where)
        if "refused" in said:
            bad = said["place"]
            row = _shown(rows) if bad is None else rows[bad]
            completion = "" if bad is None else f"\n  the completion: {_short(asked['completions'][bad])}"
            raise RunFault(f"{where}: {row}: {said['refused']}.{completion}")
        return said

    def _ask(self, message: Mapping[str, Any], *, seconds: float, doing: str) -> dict[str, Any]:
        stdin = self._process.stdin
        if stdin is None:
            raise VlftError("the process of the rewards has no pipes")
        line = json.dumps(message).encode() + b"\n"
        try:
            stdin.write(line)
            stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self._died(doing) from error
        return self._read(seconds=seconds, doing=doing)

    def _read(self, *, seconds: float, doing: str) -> dict[str, Any]:
        """Wait for an answer. The process is ended if there is none."""
        stdout = self._process.stdout
        if stdout is None:
            raise VlftError("the process of the rewards has no pipes")
        end = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = end - time.monotonic()
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                self.close()
                raise RunFault(
                    f"{doing} took longer than {seconds:g} s (--reward_timeout), so it was ended. Make the reward "
                    "faster, or raise --reward_timeout."
                )
            more = os.read(stdout.fileno(), 1 << 16)
            if not more:
                raise self._died(doing)
            self._unread += more
        answer, _, self._unread = self._unread.partition(b"\n")
        return json.loads(answer)

    def _died(self, doing: str) -> RunFault:
        self.close()
        code = self._process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return RunFault(f"{doing}: the process of the rewards ended ({how}). What it printed stands above.")


def _shown(rows: Sequence[str]) -> str:
    some = list(dict.fromkeys(rows))
    return ", ".join(some[:4]) + (f" and {len(some) - 4} more" if len(some) > 4 else "")


def _short(completion: Any) -> str:
    from vlft.train.grpo.worker import text_of

    text = text_of(completion)
    return repr(text[:200]) + (f" and {len(text) - 200:,} more characters" if len(text) > 200 else "")
