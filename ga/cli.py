"""The command line of a search, and `mapdistill`, the command of an installation."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import engine

LAUNCHER_SWITCHES = ("--no_ssh", "--no_ssh_check", "--force_multi", "--save_pid", "--bind_cores_to_rank", "--quiet")
LAUNCHER_VALUES = (
    *("--hostfile", "--include", "--exclude", "--num_nodes", "--num_gpus", "--num_accelerators", "--node_rank"),
    *("--master_port", "--master_addr", "--launcher", "--launcher_args", "--ssh_port", "--venv_script", "--log_level"),
    *("--enable_each_rank_log", "--bind_core_list"),
)
"""Options of DeepSpeed's launcher without and with a value, but for those that change how a rank is started."""
_ASKS = frozenset({"--help", "-h", "--version", "--print_config"})
"""Options of scripts that print something, and start nothing."""
_HOSTFILE = Path("/job/hostfile")
"""Where DeepSpeed looks for one that is not named."""


def search_main(argv: Sequence[str] | None = None) -> int:
    from engine.cli import print_origin, run_main, usage
    from engine.config.reading import parse_config
    from engine.errors import EXIT_DONE
    from ga.config import SearchConfig

    def body() -> int:
        words = sys.argv[1:] if argv is None else argv
        text = usage(
            "search",
            "Searches the layer mapping with proxy jobs, and writes a report.",
            "--config examples/search.yaml --dry_run",
            "--config examples/search.yaml --search.trials 128 --output_dir runs/longer",
        )
        from ga.study.storage import hide_password

        config = parse_config(SearchConfig, words, text, lambda line: print_origin(hide_password(line)))
        from ga.search import search

        search(config)
        return EXIT_DONE

    return run_main(body)


USAGE = """\
usage: mapdistill COMMAND [SETTINGS]

  distill        distils a teacher into a student; without settings: the quick start
  finetune       fine-tunes a student, or any encoder, on tasks and scores it
  proxy          distils several layer mappings briefly, side by side, and scores them
  search         searches the layer mapping with proxy jobs
  export         exports a checkpoint as a Hugging Face folder
  measure        measures the size and speed of a student and its teacher
  score          scores encoders on similarity, retrieval and other tasks, without fine-tuning
  prepare_data   turns text into a corpus
  check_hosts    checks whether the hosts of a hostfile can train together

`mapdistill COMMAND --help` says more, `mapdistill --version` prints the version. distill, finetune and proxy start
DeepSpeed's launcher if there are several GPUs, or if you give one of its options, like --num_accelerators 2 or
--hostfile FILE.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command of an installation, `mapdistill COMMAND …`. Returns its exit code."""
    _refuse_another_engine()
    from engine import cli
    from engine.config.places import RANKED
    from engine.errors import EXIT_DONE, UserError

    command, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("--help", "-h", "--version"):
        print(USAGE if command != "--version" else f"mapdistill {engine.__version__}\n", end="")
        return EXIT_DONE
    mains: dict[str, Callable[[Sequence[str]], int]] = {
        "distill": cli.distill_main,
        "finetune": cli.finetune_main,
        "proxy": cli.proxy_main,
        "search": search_main,
        "export": cli.export_main,
        "measure": cli.measure_main,
        "score": cli.score_main,
        "prepare_data": cli.prepare_main,
        "check_hosts": cli.check_hosts_main,
    }

    def refuse() -> int:
        close = difflib.get_close_matches(command.replace("-", "_"), mains, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(mains)}"
        raise UserError(f"unknown command {command!r}; {remedy}")

    if command not in mains:
        return cli.run_main(refuse)
    if command in RANKED and not _ASKS & {word.partition("=")[0] for word in words}:
        return cli.run_main(lambda: _start_ranks(command, words, mains[command]))
    return mains[command](words)


def _refuse_another_engine() -> None:
    """Ends this process where `import engine` finds a package of somebody else, or of another mapdistill."""
    ours = Path(__file__).resolve().parents[1] / "engine"
    found = Path(engine.__file__ or "").resolve()
    if found.parent != ours:
        print(
            f"error: `import engine` finds {found}, not mapdistill's package in {ours}; rename it, or take its folder "
            "out of PYTHONPATH",
            file=sys.stderr,
        )
        raise SystemExit(2)


def _start_ranks(script: str, words: Sequence[str], main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Runs a script here, where one process is enough; else this process becomes DeepSpeed's launcher."""
    from engine import cli
    from engine.config.places import SHIPPED
    from ga.jobs.pool import visible_gpus
    from ga.jobs.slots import free_port

    options, settings = split_launcher_options(words)
    if not options and (cli.is_rank() or len(visible_gpus()) <= 1):
        cli.become_rank(main, settings)
    named = {option.partition("=")[0] for option in options}
    if not named & {"--hostfile", "--master_port"} and not _HOSTFILE.is_file():
        options = ["--master_port", str(free_port()), *options]
    if not named & {"--quiet", "--log_level"}:
        options = ["--log_level", "critical", *options]
    path = str(SHIPPED / "launch" / f"{script}.py")
    os.execv(sys.executable, [sys.executable, "-m", "deepspeed.launcher.runner", *options, path, *settings])


def split_launcher_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the options of DeepSpeed's launcher with their values, and all other words. Raises UserError."""
    from engine.errors import UserError

    options: list[str] = []
    others: list[str] = []
    left = iter(words)
    for word in left:
        name, equals, _ = word.partition("=")
        if word in LAUNCHER_SWITCHES or (name in LAUNCHER_VALUES and equals):
            options.append(word)
        elif name in LAUNCHER_VALUES:
            value = next(left, None)
            if value is None:
                raise UserError(f"{name}: a value is missing")
            options += [name, value]
        else:
            others.append(word)
    return options, others
