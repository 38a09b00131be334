"""Which rank this process is where srun or mpirun started it, and where its ranks meet. No torch here.

DeepSpeed's own launcher (pdsh, and on one machine) sets RANK and its companions. With `--launcher slurm` and `openmpi`
srun and mpirun start the script, and say in their own variables what it needs to know.

What decides, in this order:
1. RANK is set: a launcher, or the user, has said everything.
2. OMPI_COMM_WORLD_*, or PMI_* with MPI_LOCALRANKID: a rank of mpirun (OpenMPI's, or MPICH's and Intel's Hydra).
   Before Slurm, because inside a Slurm job mpirun starts its daemons with srun, whose variables reach the ranks.
3. SLURM_STEP_ID with SLURM_STEP_NUM_TASKS: a task of a step. srun alone sets these two. SLURM_PROCID and SLURM_NTASKS
   decide nothing: sbatch sets both for the batch script, where PROCID is 0, and salloc sets SLURM_NTASKS for its shell.
   Where `salloc` opens its shell in a step of its own (LaunchParameters=use_interactive_step), the id of that step is
   above those of srun's, and the shell is none of the tasks. Not told apart: a shell of `srun --ntasks=4 --pty bash`,
   which is task 0 of 4; give such a shell one task, or `unset SLURM_STEP_ID` in it.
4. PMI_RANK with PMI_SIZE: a rank of another MPI.
A process that is none of these, or the only rank, is left as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping

from engine.errors import UserError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
_NUMBERS = (*_NAMES, "LOCAL_WORLD_SIZE", "MASTER_PORT")
_MPIRUN = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_EXPORTS = {
    "MASTER_ADDR": "MASTER_ADDR=HOST_OF_RANK_0",
    "MASTER_PORT": "MASTER_PORT=29500",
    "LOCAL_RANK": "LOCAL_RANK=NUMBER_ON_ITS_HOST",
}
_LAST_STEP_OF_SRUN = 0xFFFFFFF0
"""slurm.h, SLURM_MAX_NORMAL_STEP_ID: ids above it are of the batch script, of salloc's shell, and the like."""
PORTS = range(20_000, 32_000)
"""Ports below those that Linux hands out by itself."""


def refuse_unusable(environ: Mapping[str, str]) -> None:
    """Raises UserError where there is no home folder (libraries would make one that is named `~`), or for an
    accelerator of DeepSpeed's that is none of ours (or of no one's, which would be a traceback)."""
    accelerator = environ.get("DS_ACCELERATOR", "cuda")
    if accelerator not in ("cuda", "cpu"):
        raise UserError(f"DS_ACCELERATOR={accelerator} in the environment: write cuda or cpu, or unset it")
    if os.path.expanduser("~") == "~":
        raise UserError(
            f"there is no home folder: HOME is not set, and this machine does not know user {os.getuid()}, as in many "
            "containers; set HOME to a folder that can be written"
        )


def complete(environ: MutableMapping[str, str]) -> None:
    """Adds, where srun or mpirun started this process as one of several ranks, what is not set yet of RANK, WORLD_SIZE,
    LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT. Does nothing where RANK is set, nor for a process on its own: a
    search that runs as one task must not hand RANK=0 to the ranks that it starts.

    Raises UserError, with RANK set, when it is not known where the ranks meet; and, with none of them set, for what no
    launcher sets.
    """
    numbers = {name: environ[name] for name in _NUMBERS if name in environ}
    _refuse_remains(environ, [f"{name}={text}" for name, text in numbers.items() if not text.isdecimal()])
    world = int(numbers.get("WORLD_SIZE", "1"))
    if "RANK" in environ:
        in_range = int(numbers["RANK"]) < world
        _refuse_remains(environ, [] if in_range else [f"RANK={numbers['RANK']} of WORLD_SIZE={world}"])
        return
    known = _of_mpirun(environ) or _of_srun(environ) or _of_other_mpi(environ)
    if int(known.get("WORLD_SIZE", "1")) == 1:
        _refuse_remains(environ, [] if world == 1 else [f"WORLD_SIZE={world} without RANK"])
        return
    for name, value in known.items():
        environ.setdefault(name, value)
    missing = [export for name, export in _EXPORTS.items() if name not in environ]
    if missing:
        raise UserError(
            f"this is one of {environ['WORLD_SIZE']} ranks that an MPI started, and they do not know where to meet: "
            f"export {' '.join(missing)} for all of them (`mpirun -x NAME`; for `deepspeed`, lines in .deepspeed_env)"
        )


def _refuse_remains(environ: MutableMapping[str, str], wrong: list[str]) -> None:
    """Raises UserError for variables that would end in a traceback, or in a wait for ranks that nobody has started."""
    if not wrong:
        return
    for name in _NUMBERS:  # this process speaks for itself
        environ.pop(name, None)
    raise UserError(
        f"environment variables that only a launcher sets have wrong values: {', '.join(wrong)}; remove them (unset "
        f"{' '.join(_NUMBERS)}), or start with `deepspeed`"
    )


def local_size(environ: Mapping[str, str]) -> int | None:
    """Returns the number of ranks on this host; None where it is not known."""
    size = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")  # torchrun's name comes first
    return int(size) if size else None


def first_host(nodelist: str) -> str:
    """Returns the first host of a Slurm node list: `node03` of `node[03-05,9],other1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    assert first is not None  # it matches the empty text too
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())


def _of_mpirun(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns what mpirun's variables say; nothing where it did not start this process."""
    for names in _MPIRUN:
        if all(name in environ for name in names):
            known = {ours: environ[theirs] for ours, theirs in zip(_NAMES, names, strict=True)}
            if known["LOCAL_SIZE"] == known["WORLD_SIZE"]:
                known["MASTER_ADDR"] = "127.0.0.1"
            return known
    return {}


def _of_srun(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns what srun's variables say; nothing where this process is no task of a step that it started."""
    step = environ.get("SLURM_STEP_ID")
    if step is None or int(step) > _LAST_STEP_OF_SRUN or "SLURM_STEP_NUM_TASKS" not in environ:
        return {}
    known = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
    }
    tasks = _tasks_by_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(environ.get("SLURM_NODEID", "0"))
    if node < len(tasks):
        known["LOCAL_SIZE"] = str(tasks[node])
    # A step may have some of the job's nodes only. Its first one has task 0.
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if nodes:
        known["MASTER_ADDR"] = first_host(nodes)
    if "SLURM_JOB_ID" in environ:
        # The same for all ranks of this step, and another for the steps and jobs beside it. 31: prime to the number of
        # ports, so that neighbouring jobs of up to 31 steps each do not meet.
        number = 31 * int(environ["SLURM_JOB_ID"]) + int(step)
        known["MASTER_PORT"] = str(PORTS[number % len(PORTS)])
    return known


def _of_other_mpi(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns what the variables of another MPI say; nothing where none started this process."""
    if "PMI_RANK" not in environ or "PMI_SIZE" not in environ:
        return {}
    return {"RANK": environ["PMI_RANK"], "WORLD_SIZE": environ["PMI_SIZE"]}


def _tasks_by_node(text: str) -> list[int]:
    """Returns [2, 2, 2, 1] of Slurm's `2(x3),1`."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in runs for _ in range(int(times or 1))]
