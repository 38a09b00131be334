"""Ranks that srun or mpirun starts: what is read from their variables, and real processes that have nothing else."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import environment, free_port

from engine.errors import UserError
from engine.ranks.environment import complete, first_host, refuse_unusable

BATCH_SCRIPT = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "node[02-04]",
    "SLURM_NTASKS": "5",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
TASK = BATCH_SCRIPT | {
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
}
OF_MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
OF_HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
MEET = {"MASTER_ADDR": "node01", "MASTER_PORT": "29512"}

RANK = """
import torch
from engine.ranks.runtime import join_ranks, launcher_rank, launcher_world_size

runtime = join_ranks(0)
assert (runtime.rank, runtime.world_size) == (launcher_rank(), launcher_world_size())
number = torch.tensor([10.0 + runtime.rank])
torch.distributed.all_reduce(number)
print(f"seen {runtime.rank} {runtime.world_size} {runtime.local_rank} {number.item()}\\n", end="", flush=True)
torch.distributed.destroy_process_group()
"""


def completed(environ: dict[str, str]) -> dict[str, str]:
    """What is added."""
    after = dict(environ)
    complete(after)
    assert after.items() >= environ.items()  # nothing is changed or taken away
    return {key: value for key, value in after.items() if key not in environ}


def test_a_task_of_srun() -> None:
    added = completed(TASK)
    port = int(added.pop("MASTER_PORT"))
    assert added == {
        "RANK": "2",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "node03",  # where the step's task 0 is, not the job's
    }
    other = completed(TASK | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"})
    assert (other["LOCAL_SIZE"], other["MASTER_PORT"]) == ("2", str(port))


def test_steps_and_jobs_side_by_side_have_ports_of_their_own() -> None:
    ports = [
        int(completed(TASK | {"SLURM_JOB_ID": str(9_000_000 + job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"])
        for job in range(50)
        for step in range(20)
    ]
    assert len(set(ports)) == len(ports)
    assert 1024 < min(ports) <= max(ports) < 32768  # from there on Linux gives ports to whoever asks


def test_a_rank_of_openmpi_or_hydra() -> None:
    want = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
    for variables in (OF_MPIRUN, OF_HYDRA):
        assert completed(variables | MEET) == want
        daemon_of_mpirun = TASK | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
        assert completed(daemon_of_mpirun | variables | MEET) == want


def test_ranks_on_one_host_need_a_port_only() -> None:
    assert completed(OF_MPIRUN | {"OMPI_COMM_WORLD_SIZE": "4", "MASTER_PORT": "29512"})["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        BATCH_SCRIPT,
        {key: BATCH_SCRIPT[key] for key in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NTASKS")},  # salloc's shell
        TASK | {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"},  # the same, as a step of its own
        TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        TASK | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        OF_MPIRUN | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        OF_MPIRUN | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
    ids=["shell", "sbatch", "salloc", "interactive_step", "one_task", "launched_in_step", "launched_in_mpirun", "one"],
)
def test_left_alone(environ: dict[str, str]) -> None:
    assert completed(environ) == {}


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"RANK": "1"}, "RANK=1 of WORLD_SIZE=1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 of WORLD_SIZE=0"),
        ({"WORLD_SIZE": "8", "LOCAL_RANK": "0"}, "WORLD_SIZE=8 without RANK"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"MASTER_PORT": "abc", "LOCAL_SIZE": ""}, "LOCAL_SIZE=, MASTER_PORT=abc"),
    ],
)
def test_remains_of_another_launcher_are_named(environ: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=rf"have wrong values: {says}; remove them \(unset RANK WORLD_SIZE "):
        complete(environ)
    assert environ == {}  # whoever says the error waits for nobody


def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unusable({})
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # as where a container runs as any number
    with pytest.raises(UserError, match=r"HOME is not set, and .* does not know user .*; set HOME to a folder"):
        refuse_unusable({})


@pytest.mark.parametrize("name", ["", "gpu", "CUDA", "npu"])
def test_an_accelerator_that_is_not_supported(name: str) -> None:
    with pytest.raises(UserError, match=f"DS_ACCELERATOR={name} .*: write cuda or cpu, or unset it"):
        refuse_unusable({"DS_ACCELERATOR": name})


def test_what_is_exported_wins() -> None:
    assert not set(MEET) & set(completed(TASK | MEET))


@pytest.mark.parametrize(
    ("environ", "asked_for", "not_asked_for"),
    [
        (OF_MPIRUN, ["MASTER_ADDR=", "MASTER_PORT="], ["LOCAL_RANK="]),
        (OF_MPIRUN | {"MASTER_ADDR": "node01"}, ["MASTER_PORT="], ["MASTER_ADDR="]),
        ({"PMI_RANK": "5", "PMI_SIZE": "8"} | MEET, ["LOCAL_RANK="], ["MASTER_ADDR="]),
    ],
)
def test_the_error_says_what_to_export(environ: dict[str, str], asked_for: list[str], not_asked_for: list[str]) -> None:
    after = dict(environ)
    with pytest.raises(UserError, match="one of 8 ranks") as caught:
        complete(after)
    assert all(word in str(caught.value) for word in asked_for)
    assert not any(word in str(caught.value) for word in not_asked_for)
    assert after["RANK"] == "5"  # so that rank 0 says it, and not all


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node7", "node7"),
        ("node7,node1", "node7"),
        ("node[03-05,9],other1", "node03"),
        ("node[9,03-05]", "node9"),
        ("a1,node[03-05]", "a1"),
        ("rack-2-node[1-2]-ib,x", "rack-2-node1-ib"),
        ("row[2-3]node[08-11]", "row2node08"),
        ("10.0.0.7", "10.0.0.7"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_a_script_says_it_in_one_line() -> None:
    rank_zero = environment() | OF_MPIRUN | {"OMPI_COMM_WORLD_RANK": "0"}
    code = "import sys; from engine.cli import distill_main; sys.exit(distill_main([]))"
    done = subprocess.run([sys.executable, "-c", code], env=rank_zero, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this is one of 8 ranks")
    assert done.stderr.count("\n") == 1


def srun_like(rank: int, port: int) -> dict[str, str]:
    # The step's number is what gives all ranks this port.
    return {
        "SLURM_JOB_ID": "0",
        "SLURM_STEP_ID": str(port - 20_000),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2",
    }


def mpirun_like(rank: int, port: int) -> dict[str, str]:
    numbers = dict.fromkeys(("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"), str(rank))
    sizes = dict.fromkeys(("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"), "2")
    return numbers | sizes | {"MASTER_PORT": str(port)}


def port_in(low: int, high: int) -> int:
    """A free one."""
    for port in range(low, high):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) != 0:
                return port
    raise AssertionError(f"no free port from {low} to {high}")


SEEN = ["seen 0 2 0 21.0", "seen 1 2 1 21.0"]


@pytest.mark.parametrize("like", [srun_like, mpirun_like])
def test_two_processes_are_two_ranks(like: Callable[[int, int], dict[str, str]], tmp_path: Path) -> None:
    port = port_in(20_000 + os.getpid() % 10_000, 32_000)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=environment() | like(rank, port),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [out.splitlines()[-1] for out, _ in outputs] == SEEN


@pytest.mark.skipif(shutil.which("ompi_info") is None, reason="no OpenMPI here (Debian: apt install openmpi-bin)")
def test_two_ranks_of_a_real_mpirun(tmp_path: Path) -> None:
    words = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-c", RANK]
    env = environment() | {"MASTER_PORT": str(free_port())}
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"seen \d \d \d [\d.]+?\.0", done.stdout)  # mpirun may glue the lines of two ranks
    assert sorted(found) == SEEN, done.stdout + done.stderr
