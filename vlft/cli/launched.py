"""Translate the variables of launchers into the ones of torchrun: RANK, WORLD_SIZE and so on.

torchrun sets them itself. The `deepspeed` launcher adds a flag, and SLURM's `srun` has its own variables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence

from vlft.errors import ConfigError


def without_local_rank(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Return argv without the `--local_rank=N` that the deepspeed launcher puts before the verb.

    LOCAL_RANK in the environment has the same value and is used instead.
    """
    started = "LOCAL_RANK" in environ and bool(argv) and argv[0].startswith("--local_rank=")
    return list(argv[1:] if started else argv)


def rank(environ: Mapping[str, str]) -> str:
    """Return the rank of this process, also before `join`; "0" if it runs alone."""
    several = environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    return environ.get("RANK") or (environ.get("SLURM_PROCID", "0") if several else "0")


def join(environ: MutableMapping[str, str]) -> None:
    """Add torchrun's variables to the environment of a launched process. Call before torch or DeepSpeed read it.

    SLURM's variables are used only in steps of several tasks: a job's own script also has a rank, but runs alone.

    Raises:
        ConfigError: SLURM's variables are missing or cannot be read.
    """
    if "RANK" not in environ and environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        environ.update(_of_slurm(environ) | {name: environ[name] for name in _GIVEN if name in environ})
    if "LOCAL_SIZE" in environ:  # set by the deepspeed launcher
        environ.setdefault("LOCAL_WORLD_SIZE", environ["LOCAL_SIZE"])


_GIVEN = ("MASTER_ADDR", "MASTER_PORT")


def _of_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for a task of `srun` (man srun, output environment variables)."""
    alone = environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    try:
        return {
            "RANK": environ["SLURM_PROCID"],
            # With --gpus-per-task each task sees only its own GPU, which is then number 0.
            "LOCAL_RANK": "0" if alone else environ["SLURM_LOCALID"],
            "WORLD_SIZE": str(int(environ["SLURM_STEP_NUM_TASKS"])),
            "LOCAL_WORLD_SIZE": _tasks_on_node(
                environ["SLURM_STEP_TASKS_PER_NODE"], int(environ.get("SLURM_NODEID", "0"))
            ),
            "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
            # Jobs on the same node need different ports, so the port is derived from the job's number.
            "MASTER_PORT": str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 10000),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"srun started {environ['SLURM_STEP_NUM_TASKS']} tasks, but its environment cannot be read ({error!r}). "
            "Set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each task, or use "
            "torchrun."
        ) from error


def first_host(nodes: str) -> str:
    """Return the first name of a list of nodes: `gpu[03-06,9],login1` -> `gpu03`.

    Raises:
        ValueError: the list has no name.
    """
    found = re.match(r"([^,\[]|\[\w[^\]]*\])+", nodes)  # up to the first comma outside of brackets
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes}")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found[0])


def _tasks_on_node(counts: str, node: int) -> str:
    """Return how many tasks the node of this number has: `8(x2),4` means 8, 8, 4."""
    every: list[str] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        every += [str(int(count))] * int(times.rstrip(")") or 1)
    return every[node]
