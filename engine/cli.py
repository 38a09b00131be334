"""Command lines: jsonargparse over the dataclasses of engine/config/distill.py, one-line errors, exit codes."""

from __future__ import annotations

import difflib
import json
import os
import re
import signal
import sys
import time
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from engine.config.distill import RunConfig
from engine.config.finetune import FinetuneConfig
from engine.config.proxy import ProxyJobConfig
from engine.config.tools import ExportConfig, HostCheckConfig, PrepareConfig
from engine.errors import EXIT_BAD_INPUT, EXIT_CRASH, EXIT_DONE, EXIT_INTERRUPTED, RunFailure, UserError
from engine.ranks import allocator, environment, rendezvous, threads

RANK_ZERO_SPEAKS_WITHIN_S = 20.0

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART_NEEDS = ("models/all-MiniLM-L6-v2/model.safetensors", "data/news/manifest.json")

ConfigT = TypeVar("ConfigT")
set_parsing_settings(docstring_parse_attribute_docstrings=True)


def build_parser(config_class: type[Any], description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below.")
    parser.add_class_arguments(config_class, nested_key=None)
    return parser


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """The deepspeed launcher adds --local_rank=N to every script's arguments."""
    return [word for word in argv if not word.startswith("--local_rank")]


def quickstart() -> list[str]:
    """The arguments that stand for none at all. Raises UserError when `make data` has not been run."""
    missing = [path for path in QUICKSTART_NEEDS if not (ROOT / path).exists()]
    if missing:
        raise UserError(f"the quick start needs {' and '.join(missing)}: run `make data` in {ROOT}")
    os.chdir(ROOT)  # its paths are relative to the repository
    return ["--config", str(ROOT / "examples" / "quickstart.yaml")]


def _expand_switches(argv: Sequence[str], config_class: type[Any]) -> list[str]:
    """`--dry_run` alone means `--dry_run=true`, as everywhere else; jsonargparse wants the value spelled out."""
    hints = get_type_hints(config_class)
    switches = {f"--{name}" for name, hint in hints.items() if hint is bool}
    for section, hint in hints.items():
        if is_dataclass(hint):
            switches |= {f"--{section}.{name}" for name, inner in get_type_hints(hint).items() if inner is bool}
    out: list[str] = []
    for i, word in enumerate(argv):
        following = argv[i + 1] if i + 1 < len(argv) else "--"
        out.append(f"{word}=true" if word in switches and following.startswith("--") else word)
    return out


def _files_first(argv: Sequence[str]) -> list[str]:
    """The command line wins over the file, also where it stands before it; jsonargparse goes by the order."""
    files: list[str] = []
    others: list[str] = []
    for i, word in enumerate(argv):
        is_file = word == "--config" or word.startswith("--config=") or (i > 0 and argv[i - 1] == "--config")
        (files if is_file else others).append(word)
    return files + others


def _config_files(argv: Sequence[str]) -> list[str]:
    return [
        word.removeprefix("--config=")
        for before, word in pairwise(["", *argv])
        if word.startswith("--config=") or before == "--config"
    ]


def _explain(error: Exception, parser: ArgumentParser) -> str:
    """One line that names key, value and what would be right, from jsonargparse's message."""
    text = " ".join(str(error).split())
    keys = sorted(action.dest for action in parser._actions if action.dest not in ("help", "print_config"))
    unknown = re.search(r"unrecognized arguments: --([\w.]+)", text)
    grouped = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text)
    plain = re.search(r"does not accept option '([\w.]+)'|Key '([\w.]+)' is not expected|option '([\w.]+)'", text)
    ambiguous = re.search(r"ambiguous option: --([\w.]+)", text)
    name = None
    if ambiguous:
        name = ambiguous.group(1)
    elif unknown:
        name = unknown.group(1)
    elif grouped:
        name = f"{grouped.group(1)}.{grouped.group(2)}"
    elif plain:
        name = next(group for group in plain.groups() if group)
    if name is not None:
        close = difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else "--help lists every key"
        return f"unknown setting {name!r}; {hint}"
    text = re.sub(r"^Parser key \"([\w.]+)\": ", r"\1: ", text)
    text = re.sub(r"Expected a <class '(\w+)'>\.?", r"expected \1,", text)
    text = re.sub(r"Problem with given class_path '[\w.]+': ", "", text)
    text = re.sub(r"Parser key \"([\w.]+)\": ", r"\1: ", text)
    not_text = re.search(r"expected str, Got value: (True|False|[\d.]+)\b", text)
    hint = "; YAML reads it as a number or a truth value: write it in quotes" if not_text else ""
    union = re.match(
        r"([\w.]+(?:: \w+)?): Does not validate against any of the Union subtypes .*Given value: (.*)$", text
    )
    if union:  # each member of the union has said what it expected
        wanted = [word.replace("NoneType", "null") for word in dict.fromkeys(re.findall(r"expected (\w+)", text))]
        return f"{union.group(1)}: expected {' or '.join(wanted)}, got {union.group(2)}{hint}"
    text = re.sub(r"Expected a typing\.Literal\[(.*?)\]\.", r"expected one of \1,", text)
    return re.sub(r"Got value: (.*)$", r"got \1", text) + hint


def parse_config(config_class: type[ConfigT], argv: Sequence[str], description: str) -> ConfigT:
    """The resolved configuration. Raises UserError for anything wrong in it."""
    parser = build_parser(config_class, description)
    try:
        namespace = parser.parse_args(_expand_switches(_files_first(argv), config_class))
        values = parser.instantiate(namespace).as_dict()
    except UserError:
        raise
    except (ArgumentError, TypeError, ValueError) as error:
        where = f"{' or '.join(_config_files(argv))}: " if "parsing config" in str(error) else ""
        raise UserError(where + _explain(error, parser)) from None
    return config_class(**{name: value for name, value in values.items() if name != "config"})


def is_rank_zero() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _let_rank_zero_speak() -> None:
    """The launcher ends all ranks as soon as one exits, so the first to leave would silence rank 0. Mostly rank 0 has
    the same error, says it, and this process is ended meanwhile; an error of this rank alone is said after the wait.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(RANK_ZERO_SPEAKS_WITHIN_S)


def _told_to_all(error: str) -> str:
    """The errors of all ranks, where nobody else would end the others."""
    if not rendezvous.is_needed() or rendezvous.store() is not None:
        return error
    try:
        rendezvous.agree(error)
    except UserError as errors:
        return str(errors)
    return error


def _say_error(error: str) -> None:
    """Once: rank 0 speaks for all where they know, or have found, the same."""
    text = _told_to_all(error)
    everyone_knows = rendezvous.has_failed()
    if not is_rank_zero() and not everyone_knows:
        _let_rank_zero_speak()
    if is_rank_zero() or not everyone_knows:
        who = "" if is_rank_zero() else f"rank {os.environ['RANK']}: "
        print(f"error: {who}{text}", file=sys.stderr, flush=True)
    if everyone_knows:
        rendezvous.leave()


def run_main(body: Callable[[], int]) -> int:
    """Runs `body`; a UserError becomes one line (of rank 0 when it has it too) and exit code 2 on every rank, a
    RunFailure one line and exit code 1."""
    try:
        environment.complete(os.environ)
        threads.wait_briefly(os.environ)
        allocator.bound_compiled_kernels(os.environ)
        return body()
    except (UserError, RunFailure) as error:
        _say_error(str(error))
        return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_CRASH
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        _told_to_all(f"{type(error).__name__}: {error}")
        if rendezvous.has_failed():
            rendezvous.leave()
        raise


def distill_main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        words = without_local_rank(sys.argv[1:] if argv is None else argv)
        config = parse_config(RunConfig, words or quickstart(), "Distil a teacher (start this with `deepspeed`).")
        from engine.jobs.distill.job import distill  # heavy imports only once the configuration is known to be sound

        return distill(config)

    return run_main(body)


def _listed(argv: Sequence[str], flag: str) -> list[str]:
    """`--genomes A B C` as one YAML list, which is what jsonargparse reads."""
    words = list(argv)
    if flag not in words:
        return words
    at = words.index(flag)
    end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
    given = words[at + 1 : end]
    if len(given) == 1 and given[0].startswith("["):
        return words
    return [*words[: at + 1], json.dumps(given), *words[end:]]


def proxy_main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        words = _listed(without_local_rank(sys.argv[1:] if argv is None else argv), "--genomes")
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
