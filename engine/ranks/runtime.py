"""Process set-up: accelerator, distributed group, seeds, threads, logging and signals."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.distributed_c10d import PrefixStore

from engine.errors import UserError, first_line
from engine.ranks import allocator, environment, extension_builds, rendezvous, threads, watchdog
from engine.ranks.collectives import summed
from engine.ranks.process import STOPPING
from engine.records.columns import counted

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
DEFAULT_PORT = "29500"
"""Of DeepSpeed's launcher, and of what else starts ranks of PyTorch."""
_STDERR = 2


def has_fast_bf16() -> bool:
    """Returns whether this CPU multiplies bf16 matrices natively (AMX or AVX-512 bf16); elsewhere bf16 is emulated and
    slow."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def has_fp16() -> bool:
    """Returns whether DeepSpeed trains in fp16 on this processor (AVX-512 FP16; AMD's have none yet). GPUs are not
    asked."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    return bool(CPU_Accelerator().is_fp16_supported())


def launcher_rank() -> int:
    """Returns the number of this rank in its job, known before any group exists."""
    return int(os.environ.get("RANK", "0"))


def launcher_world_size() -> int:
    """Returns the number of ranks of this job, known before any group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def uses_gpu() -> bool:
    """Returns whether this job computes on CUDA devices; DS_ACCELERATOR=cpu keeps it off them."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def name_accelerator() -> None:
    """Says before DeepSpeed is imported that there is no GPU: it would try every accelerator, and warn."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@dataclass(frozen=True)
class Runtime:
    """This rank: its place among the others, its device and threads."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    """Number of ranks on this host"""
    device: torch.device
    threads: int
    cores_of_others: float = 0.0
    """Cores that other jobs kept busy when rank 0 started on a CPU; 0 on other ranks, which have no banner."""

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def where(self) -> str:
        """Device and threads, and what slows them down, for a banner"""
        text = f"{self.device}, {counted(self.threads, 'thread')}"
        if self.cores_of_others < 0.5:
            return text
        cores = counted(len(os.sched_getaffinity(0)), "core")
        return f"{text}; other jobs keep {self.cores_of_others:.1f} of {cores} busy"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _choose_port(local_size: int) -> None:
    """Sets MASTER_PORT where nobody has: to a free one for a single rank, and for the ranks of one host, to which
    DeepSpeed's launcher gives the same port as to every other job of the machine, to one by the launcher's pid."""
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    is_default = os.environ["MASTER_PORT"] == DEFAULT_PORT and launcher_world_size() == local_size
    if is_default and watchdog.launchers() and "TORCHELASTIC_RUN_ID" not in os.environ:
        os.environ["MASTER_PORT"] = str(environment.PORTS[watchdog.launchers()[0].pid % len(environment.PORTS)])


@contextlib.contextmanager
def _explain_meeting() -> Iterator[None]:
    """Turns an error of ranks that do not find each other into one line."""
    try:
        yield
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {os.environ['MASTER_PORT']} is taken, perhaps by another job on this machine; name a free one, "
                f"e.g. deepspeed --master_port {_free_port()}"
            ) from None
        raise UserError(
            f"rank {os.environ['RANK']} could not meet the others at {where}: {first_line(error)}"
        ) from None


def _unlink_shared_buffers(local_rank: int) -> None:
    """Takes the names off the buffers of DeepSpeed's shared-memory all-reduce (66 MiB a rank in /dev/shm), once every
    rank has mapped them. Each start on a new port would keep that memory until the next reboot (a day's starts filled
    20 of 24 GiB here), and one on an old port would find the remains of another run."""
    # until DeepSpeed > 0.19.8: it never does that itself
    torch.distributed.barrier()
    if local_rank == 0:
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_*"
        for buffer in Path("/dev/shm").glob(name):
            buffer.unlink(missing_ok=True)


def join_ranks(seed: int) -> Runtime:
    """Joins the distributed group of the launcher (or a group of one when started with plain `python`); that of an
    earlier job, or of the program that runs this one, where this process has a group already.

    Raises UserError when srun or mpirun started several ranks and it is not known where they meet, when the environment
    does not say the same as a group that is there already, or, on several hosts, when any rank has found an error or
    does not arrive."""
    environment.complete(os.environ)
    name_accelerator()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_SIZE", "1")):
        os.environ.setdefault(name, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = environment.local_size(os.environ) or 1
    watchdog.start_guard()
    has_group = torch.distributed.is_initialized()
    if has_group:
        _require_same_group()
    else:
        _choose_port(local_size)
    on_gpu = uses_gpu()
    if not on_gpu:
        allocator.keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            # every rank would otherwise start a thread per core: 2 ranks on 2 cores then run several times slower
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))

    import deepspeed
    from deepspeed.utils.logging import set_log_level_from_string

    set_log_level_from_string(os.environ.get("DS_LOG_LEVEL", "warning"))
    if on_gpu:
        torch.cuda.set_device(local_rank)
    # until DeepSpeed > 0.19.8: it calls a collective that PyTorch 2.13 has renamed, which says so at every call
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated", category=FutureWarning)
    extension_builds.require_operators()
    backend = "nccl" if on_gpu else "gloo"
    if not has_group and rendezvous.is_needed():
        rendezvous.agree(None)
        torch.distributed.init_process_group(
            backend,
            store=PrefixStore("group", rendezvous.store()),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=COLLECTIVE_TIMEOUT,
        )
    quiet = contextlib.redirect_stdout(io.StringIO())  # every rank prints that it has an operator
    with extension_builds.explain_failures(), _explain_meeting(), quiet:
        deepspeed.init_distributed(backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)
    if not on_gpu and not has_group:
        _unlink_shared_buffers(local_rank)
    torch.manual_seed(seed)
    return Runtime(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        local_rank=local_rank,
        local_size=local_size,
        device=torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"),
        threads=torch.get_num_threads(),
        cores_of_others=0.0 if on_gpu or os.environ["RANK"] != "0" else threads.cores_of_others(local_size),
    )


def _require_same_group() -> None:
    """Raises UserError where the environment, by which batches were planned, says another place than this rank has."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if (rank, world) != (launcher_rank(), launcher_world_size()):
        raise UserError(
            f"this process is rank {rank} of {world} in a group of torch.distributed, but its environment says RANK="
            f"{launcher_rank()} and WORLD_SIZE={launcher_world_size()}: set these and LOCAL_RANK as torchrun does"
        )


def leave_ranks() -> None:
    """Leaves the group, if there is one. Collective."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def seed_micro_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Seeds torch. Dropout's random numbers are a function of (seed, step, micro step, rank), so that a resumed run
    needs no saved RNG state, and a member of a cohort draws the same as alone."""
    torch.manual_seed((((seed * 1_000_003 + step) * 8_191 + micro) * 65_537 + rank) % 2**63)


class StopRequest:
    """Remembers Ctrl-C, SIGTERM and SIGUSR1; the loop finishes its step, writes a checkpoint and leaves. A second
    Ctrl-C ends the process at once, or goes to whoever has heard it before, if that is not Python's own handler. Hears
    nothing in another thread than the main one."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._second = signal.getsignal(signal.SIGINT)
        if self._second is signal.default_int_handler:
            self._second = signal.SIG_DFL
        for number in STOPPING if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) is not signal.SIG_IGN:  # a job in the background of a script
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:  # the launcher, which gets the same Ctrl-C, sends SIGTERM after it
            self.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._second)
            if launcher_rank() == 0:
                with contextlib.suppress(OSError):  # it would be raised wherever training is just now
                    os.write(_STDERR, b"\nstopping after this step; press Ctrl-C again to end at once\n")

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def requested_anywhere(self) -> bool:
        """Returns whether any rank was told to stop. Collective."""
        return summed([self.requested])[0] > 0
