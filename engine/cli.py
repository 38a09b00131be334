"""What each script does with its command line; one-line errors, exit codes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.config.distill import RunConfig
from engine.config.finetune import FinetuneConfig
from engine.config.proxy import ProxyJobConfig
from engine.config.reading import parse_config
from engine.config.tools import ExportConfig, HostCheckConfig, PrepareConfig
from engine.errors import EXIT_BAD_INPUT, EXIT_CRASH, EXIT_DONE, EXIT_INTERRUPTED, RunFailure, UserError
from engine.ranks import allocator, environment, rendezvous, threads
from engine.records.stdout import survive_lost_readers

WAIT_FOR_RANK_ZERO_S = 20.0

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART_NEEDS = ("models/all-MiniLM-L6-v2/model.safetensors", "data/news/manifest.json")


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """Returns the words without the rank that launchers add: deepspeed --local_rank=N, torch.distributed.launch
    --local-rank=N."""
    return [word for word in argv if not word.startswith(("--local_rank", "--local-rank"))]


def quickstart_arguments() -> list[str]:
    """Returns the arguments that stand for none at all, and goes to the repository: their paths are relative to it.
    Raises UserError when `make data` has not been run."""
    missing = [path for path in QUICKSTART_NEEDS if not (ROOT / path).exists()]
    if missing:
        raise UserError(f"the quick start needs {' and '.join(missing)}: run `make data` in {ROOT}")
    os.chdir(ROOT)
    return ["--config", str(ROOT / "examples" / "quickstart.yaml")]


def is_rank_zero() -> bool:
    """Returns whether this rank, which has not met the others yet, is the first."""
    return os.environ.get("RANK", "0") == "0"


def _wait_for_rank_zero() -> None:
    """Waits until rank 0 has reported its error. The launcher ends all ranks as soon as one exits, so the first to
    leave would silence it. Mostly rank 0 has the same error, and this process is ended meanwhile; an error of this rank
    alone is reported after the wait."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(WAIT_FOR_RANK_ZERO_S)


def _gather_errors(error: str) -> str:
    """Returns the errors of all ranks where they are about to meet, since nobody else would end the others; else this
    one."""
    if not rendezvous.is_needed() or rendezvous.store() is not None:
        return error
    try:
        rendezvous.agree(error)
    except UserError as errors:
        return str(errors)
    return error


def _report_error(error: str) -> None:
    """Prints an error once: rank 0 speaks for all where they know, or have met, the same."""
    text = _gather_errors(error)
    everyone_knows = rendezvous.has_failed()
    if not is_rank_zero() and not everyone_knows:
        _wait_for_rank_zero()
    if is_rank_zero() or not everyone_knows:
        who = "" if is_rank_zero() else f"rank {os.environ['RANK']}: "
        print(f"error: {who}{text}", file=sys.stderr, flush=True)
    if everyone_knows:
        rendezvous.leave()


def run_main(body: Callable[[], int]) -> int:
    """Runs `body`; a UserError becomes one line (of rank 0 when it has it too) and exit code 2 on every rank, a
    RunFailure one line and exit code 1, a package that is missing or a file that may not be read one line and exit code
    2."""
    survive_lost_readers()
    try:
        environment.refuse_unusable(os.environ)
        environment.complete(os.environ)
        threads.wait_briefly(os.environ)
        allocator.bound_compiled_kernels(os.environ)
        return body()
    except (UserError, RunFailure) as error:
        _report_error(str(error))
        return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_CRASH
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except PermissionError as error:
        if error.filename is None:
            raise
        _report_error(f"{error.filename}: {error.strerror}; give this user the right to read it, or copy it")
        return EXIT_BAD_INPUT
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "engine", "ga"):
            raise
        _report_error(f"the Python package {package!r} is missing; pip install {package}")
        return EXIT_BAD_INPUT
    except Exception as error:
        _gather_errors(f"{type(error).__name__}: {error}")
        if rendezvous.has_failed():
            rendezvous.leave()
        raise


def distill_main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        words = without_local_rank(sys.argv[1:] if argv is None else argv)
        config = parse_config(
            RunConfig, words or quickstart_arguments(), "Distil a teacher (start this with `deepspeed`)."
        )
        from engine.jobs.distill.job import distill  # heavy imports only once the configuration is known to be sound

        return distill(config)

    return run_main(body)


def proxy_main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        words = without_local_rank(sys.argv[1:] if argv is None else argv)
        config = parse_config(ProxyJobConfig, words, "Distil layer mappings briefly, side by side, and score them.")
        from engine.jobs.proxy.job import proxy

        return proxy(config)

    return run_main(body)


def finetune_main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        words = without_local_rank(sys.argv[1:] if argv is None else argv)
        config = parse_config(FinetuneConfig, words, "Fine-tune a model on tasks (start this with `deepspeed`).")
        from engine.jobs.finetune.job import finetune

        return finetune(config)

    return run_main(body)


def prepare_main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        words = sys.argv[1:] if argv is None else argv
        config = parse_config(PrepareConfig, words, "Turn raw text into packed, memory-mapped token sequences.")
        from engine.data.prepare.corpus import prepare

        prepare(config)
        return EXIT_DONE

    return run_main(body)


def export_main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        words = sys.argv[1:] if argv is None else argv
        config = parse_config(ExportConfig, words, "Turn a sharded checkpoint into a Hugging Face folder.")
        from engine.train.export import export_run

        export_run(config)
        return EXIT_DONE

    return run_main(body)


def check_hosts_main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        from engine.ranks.hosts.check import check_hosts

        words = sys.argv[1:] if argv is None else argv
        config = parse_config(HostCheckConfig, words, "Check that the hosts of a hostfile can train together.")
        return EXIT_DONE if check_hosts(config) else EXIT_BAD_INPUT

    return run_main(body)
