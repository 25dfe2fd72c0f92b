"""What launchers say to a process they start, in the words torchrun uses: RANK, WORLD_SIZE and their kin.

torchrun says it so itself. The `deepspeed` launcher adds a flag, and SLURM's `srun` has names of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence

from vlft.errors import ConfigError


def without_local_rank(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """A command line without the `--local_rank=N` that the deepspeed launcher puts before the verb.

    The environment says the same, and alone counts.
    """
    started = "LOCAL_RANK" in environ and bool(argv) and argv[0].startswith("--local_rank=")
    return list(argv[1:] if started else argv)


def join(environ: MutableMapping[str, str]) -> None:
    """Complete what a launcher left in the environment; call before torch or DeepSpeed look at it.

    Of SLURM only steps of several tasks count: a job's own script has a rank too, though it is alone.

    Raises:
        ConfigError: SLURM's words make no sense.
    """
    if "RANK" not in environ and environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        environ.update(_of_slurm(environ) | {name: environ[name] for name in _GIVEN if name in environ})
    if "LOCAL_SIZE" in environ:  # the deepspeed launcher's word
        environ.setdefault("LOCAL_WORLD_SIZE", environ["LOCAL_SIZE"])


_GIVEN = ("MASTER_ADDR", "MASTER_PORT")


def _of_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's words for a task of `srun`, from those srun sets (man srun, output environment variables)."""
    alone = environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    try:
        return {
            "RANK": environ["SLURM_PROCID"],
            # With --gpus-per-task each task sees its own GPU only, which then is number 0.
            "LOCAL_RANK": "0" if alone else environ["SLURM_LOCALID"],
            "WORLD_SIZE": str(int(environ["SLURM_STEP_NUM_TASKS"])),
            "LOCAL_WORLD_SIZE": _tasks_on_node(
                environ["SLURM_STEP_TASKS_PER_NODE"], int(environ.get("SLURM_NODEID", "0"))
            ),
            "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
            # Jobs that share a node each need a port: it follows from the number of the job.
            "MASTER_PORT": str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 10000),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"srun started {environ['SLURM_STEP_NUM_TASKS']} tasks, but its environment cannot be read ({error!r}). "
            "Set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each task, or use "
            "torchrun."
        ) from error


def first_host(nodes: str) -> str:
    """The first name of a list of nodes: `gpu[03-06,9],login1` -> `gpu03`."""
    found = re.match(r"([^,\[]|\[\w[^\]]*\])+", nodes)  # up to the first comma outside of brackets
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes}")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found[0])


def _tasks_on_node(counts: str, node: int) -> str:
    """How many tasks a node has: `8(x2),4` -> 8, 8, 4."""
    every: list[str] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        every += [str(int(count))] * int(times.rstrip(")") or 1)
    return every[node]
