"""What each script does with its command line; one-line errors, exit codes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NoReturn, TypeVar

from engine.config.distill import RunConfig
from engine.config.finetune import FinetuneConfig
from engine.config.places import IS_INSTALLED, ROOT, SHIPPED, command
from engine.config.proxy import ProxyJobConfig
from engine.config.reading import parse_config, split_options
from engine.config.tools import ExportConfig, HostCheckConfig, MeasureConfig, PrepareConfig, ScoreConfig
from engine.errors import (
    EXIT_BAD_INPUT,
    EXIT_CRASH,
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    Diverged,
    Preempted,
    RunFailure,
    UserError,
)
from engine.ranks import environment, rendezvous
from engine.ranks.exit import run_rank
from engine.ranks.process import prepare_process
from engine.records.columns import labelled_lines
from engine.records.stdout import survive_lost_readers

WAIT_FOR_RANK_ZERO_S = 20.0

Settings = TypeVar("Settings")

QUICKSTART = "examples/quickstart.yaml"
QUICKSTART_NEEDS = ("models/all-MiniLM-L6-v2/model.safetensors", "data/news/manifest.json")


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """Returns the words without the rank that launchers add: deepspeed --local_rank=N, torch.distributed.launch
    --local-rank=N."""
    return [word for word in argv if not word.startswith(("--local_rank", "--local-rank"))]


def usage(script: str, purpose: str, *examples: str) -> str:
    """Returns the beginning of a script's help. examples: what follows its command."""
    lines = [f"  {command(script)} {words}".rstrip() for words in examples]
    return "\n".join(
        [f"usage: {command(script)} [--config FILE.yaml] [--SETTING VALUE] …", "", purpose, "", "examples:", *lines]
    )


def is_quickstart(argv: Sequence[str]) -> bool:
    """Returns whether the arguments set nothing: what they ask for is the quick start, or a look at it."""
    options, unexpected = split_options(argv)
    return not unexpected and {name for name, _ in options} <= {"--dry_run", "--print_config"}


def go_to_quickstart() -> None:
    """Changes to the folder of the quick start's paths: the clone, or the current folder of an installation. Raises
    UserError where its teacher or its text is missing."""
    folder = Path.cwd() if IS_INSTALLED else ROOT
    missing = [path for path in QUICKSTART_NEEDS if not (folder / path).exists()]
    if missing:
        remedy = f"run `make data` in {ROOT}"
        if IS_INSTALLED:
            script = SHIPPED / "examples" / "quickstart_data.py"
            corpus = "mapdistill prepare_data --config examples/quickstart_corpus.yaml"
            remedy = f"run `{sys.executable} {script}` and `{corpus}` in this folder"
        raise UserError(f"the quick start needs {' and '.join(missing)}: {remedy}")
    os.chdir(folder)


def print_origin(line: str, before: str = "") -> None:
    """Prints where the settings of this job come from, on rank 0."""
    if is_rank_zero():
        print(labelled_lines([("settings", before + line)]), flush=True)


def is_rank() -> bool:
    """Returns whether a launcher, srun or mpirun has started this process. Raises UserError for what none of them
    sets."""
    known = dict(os.environ)
    environment.complete(known)
    return "RANK" in known


def become_rank(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> NoReturn:
    """Runs the main of a script as its file in `launch` does."""
    run_rank(partial(main, argv))


def is_rank_zero() -> bool:
    """Returns whether this rank, which has not met the others yet, is the first."""
    return os.environ.get("RANK", "0") == "0"


def _wait_for_rank_zero() -> None:
    """Waits until rank 0 has reported its error. The launcher ends all ranks as soon as one exits, so the first to
    leave would silence it. Mostly rank 0 has the same error, and this process is ended meanwhile; an error of this rank
    alone is reported after the wait."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(WAIT_FOR_RANK_ZERO_S)


def _report_error(error: str) -> None:
    """Prints an error once: rank 0 speaks for all where they know, or have met, the same."""
    text = rendezvous.gather_errors(error)
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
        prepare_process()
        return body()
    except (UserError, RunFailure) as error:
        _report_error(str(error))
        return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_CRASH
    except Preempted:  # it has said so
        return EXIT_PREEMPTED
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
        rendezvous.gather_errors(f"{type(error).__name__}: {error}")
        if rendezvous.has_failed():
            rendezvous.leave()
        raise


def run_job(job: Callable[[], None]) -> int:
    """Runs a job of ranks, and leaves their group; returns the exit code. Collective."""
    from engine.ranks.runtime import leave_ranks

    code = EXIT_DONE
    try:
        job()
    except (Diverged, Preempted) as end:  # it has said so
        code = EXIT_DIVERGED if isinstance(end, Diverged) else EXIT_PREEMPTED
    leave_ranks()  # not after another exception: it could wait for ranks that are gone
    return code


def read_rank_settings(
    argv: Sequence[str] | None, kind: type[Settings], script: str, purpose: str, *examples: str
) -> Settings:
    """Returns the configuration of a script whose ranks a launcher starts, and prints where it comes from."""
    words = without_local_rank(sys.argv[1:] if argv is None else argv)
    return parse_config(kind, words, usage(script, purpose, *examples), print_origin)


def distill_main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        words, announce = without_local_rank(sys.argv[1:] if argv is None else argv), print_origin
        if is_quickstart(words):
            go_to_quickstart()
            words = ["--config", QUICKSTART, *words]
            announce = partial(print_origin, before="no setting is given, so this is the quick start: ")
        text = usage(
            "distill",
            "Distils a teacher into a student of fewer or narrower layers. Without settings, it runs the quick start.",
            "",
            f"--config {QUICKSTART} --train.steps 1000 --output_dir runs/longer",
        )
        config = parse_config(RunConfig, words, text, announce)
        from engine.jobs.distill.job import distill  # heavy imports only once the configuration is known to be sound

        return run_job(lambda: distill(config))

    return run_main(body)


def proxy_main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        config = read_rank_settings(
            argv,
            ProxyJobConfig,
            "proxy",
            "Distils several layer mappings briefly, side by side, and scores the students on tasks.",
            "--config examples/proxy.yaml --genomes uniform last first",
            "--config examples/proxy.yaml --genomes uniform 0-3-6 --proxy.repeats 3 --output_dir runs/repeats",
        )
        from engine.jobs.proxy.job import proxy

        return run_job(lambda: proxy(config))

    return run_main(body)


def finetune_main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        config = read_rank_settings(
            argv,
            FinetuneConfig,
            "finetune",
            "Fine-tunes a student, or any encoder, on tasks and scores it.",
            "--config examples/finetune.yaml",
            "--model.path runs/quickstart --task.name SST-2,MRPC --task.data_dir data/glue --output_dir runs/glue",
        )
        from engine.jobs.finetune.job import finetune

        return run_job(lambda: finetune(config))

    return run_main(body)


def run_tool(
    argv: Sequence[str] | None, kind: type[Settings], script: str, purpose: str, *examples: str, job: str
) -> int:
    """Runs a script of one process. job: `module:function` that takes its configuration; the module, whose imports may
    be heavy, is imported once the configuration is known to be sound."""

    def body() -> int:
        config = parse_config(kind, sys.argv[1:] if argv is None else argv, usage(script, purpose, *examples))
        module, _, function = job.partition(":")
        getattr(import_module(module), function)(config)
        return EXIT_DONE

    return run_main(body)


def prepare_main(argv: Sequence[str] | None = None) -> int:
    return run_tool(
        argv,
        PrepareConfig,
        "prepare_data",
        "Turns text into a corpus: packed, memory-mapped token sequences.",
        "--config examples/quickstart_corpus.yaml",
        "--sources my.txt --tokenizer models/all-MiniLM-L6-v2 --output_dir data/mine",
        job="engine.data.prepare.corpus:prepare",
    )


def export_main(argv: Sequence[str] | None = None) -> int:
    return run_tool(
        argv,
        ExportConfig,
        "export",
        "Exports a checkpoint as a Hugging Face folder, with an ONNX file or to the hub where that is asked for.",
        "--run runs/quickstart",
        "--run runs/quickstart --tag step-00000200 --output_dir students/at-200 --format onnx",
        "--run runs/quickstart --push_to_hub OWNER/NAME --dry_run true",
        job="engine.train.export:export_run",
    )


def measure_main(argv: Sequence[str] | None = None) -> int:
    return run_tool(
        argv,
        MeasureConfig,
        "measure",
        "Measures the size and speed of encoders on this machine: a student and its teacher, or any others.",
        "--models runs/quickstart",
        "--models models/all-MiniLM-L6-v2 runs/quickstart runs/longer --seq_len 64 --dtype bfloat16",
        job="engine.jobs.measure.job:measure",
    )


def score_main(argv: Sequence[str] | None = None) -> int:
    return run_tool(
        argv,
        ScoreConfig,
        "score",
        "Scores encoders without fine-tuning: similarity and retrieval by cosine, other tasks by a probe.",
        "--models runs/quickstart --tasks STS-B --task.data_dir data/glue",
        "--config tasks.yaml --models models/all-MiniLM-L6-v2 runs/quickstart runs/longer --tasks tickets faq",
        job="engine.jobs.score.job:score",
    )


def check_hosts_main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        from engine.ranks.hosts.check import check_hosts

        words = sys.argv[1:] if argv is None else argv
        text = usage(
            "check_hosts",
            "Checks whether the hosts of a hostfile can train together.",
            "--hostfile hostfile",
            "--hostfile hostfile --shared /shared/runs --json",
        )
        config = parse_config(HostCheckConfig, words, text)
        return EXIT_DONE if check_hosts(config) else EXIT_BAD_INPUT

    return run_main(body)
