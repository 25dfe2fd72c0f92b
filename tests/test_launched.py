"""The variables and arguments of launchers are translated into the variables of torchrun."""

from __future__ import annotations

import pytest

from vlft.cli.launched import first_host, join, without_local_rank
from vlft.errors import ConfigError

#: The environment of a task on the second of two nodes (man srun).
SRUN = {
    "SLURM_JOB_ID": "104233",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
WORDS = {
    "RANK": "9",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "12",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "24233",
}


def joined(environ: dict[str, str]) -> dict[str, str]:
    """Return the variables that `join` adds or changes."""
    after = dict(environ)
    join(after)
    return {name: value for name, value in after.items() if environ.get(name) != value}


def test_a_task_of_srun():
    assert joined(SRUN) == WORDS


def test_a_task_of_srun_that_sees_one_gpu():
    assert joined({**SRUN, "CUDA_VISIBLE_DEVICES": "0"})["LOCAL_RANK"] == "0"
    assert joined({**SRUN, "CUDA_VISIBLE_DEVICES": "0,1,2,3"})["LOCAL_RANK"] == "1"


def test_what_was_set_wins_over_srun():
    address = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert joined({**SRUN, **address}) == {k: v for k, v in WORDS.items() if k not in address}
    assert joined({**SRUN, "RANK": "0", "WORLD_SIZE": "2"}) == {}  # srun started torchrun, and that started this


def test_a_job_script_is_alone():
    """A job script has a rank and the job's number of tasks, but it is not a step of several tasks."""
    assert joined({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}) == {}
    assert joined({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert joined({}) == {}


@pytest.mark.parametrize("change", [{"SLURM_STEP_TASKS_PER_NODE": "8"}, {"SLURM_STEP_NODELIST": ""}])
def test_an_srun_that_makes_no_sense(change):
    with pytest.raises(ConfigError, match="srun started 12 tasks, but its environment cannot be read"):
        joined({**SRUN, **change})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[07-09,12],b", "gpu07"),
        ("n[3,5]-ib0", "n3-ib0"),
        ("rack1-gpu2,x[1-2]", "rack1-gpu2"),
        ("r[1-2]n[03,05-9],b", "r1n03"),
    ],
)
def test_the_first_of_many_nodes(nodes, first):
    assert first_host(nodes) == first


def test_the_deepspeed_launcher():
    assert joined({"LOCAL_SIZE": "8", "RANK": "1", "LOCAL_RANK": "1"}) == {"LOCAL_WORLD_SIZE": "8"}
    assert without_local_rank(["--local_rank=1", "train", "--seed", "1"], {"LOCAL_RANK": "1"}) == [
        "train",
        "--seed",
        "1",
    ]
    assert without_local_rank(["--local_rank=1", "train"], {}) == ["--local_rank=1", "train"]
    assert without_local_rank([], {"LOCAL_RANK": "1"}) == []


def test_a_number_of_tasks_that_is_none():
    with pytest.raises(ConfigError, match=r"srun started many tasks.*invalid literal"):
        joined({**SRUN, "SLURM_STEP_NUM_TASKS": "many"})
