"""docs/architecture.md: what it names exists, and it names every room."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from launching import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:engine|ga)/[\w/]+\.py):([\w.]+)`", PAGE)))


def defined_in(path: Path) -> set[str]:
    """Returns every function and class of a file, methods as Class.method."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
            found |= {f"{node.name}.{one.name}" for one in ast.walk(node) if isinstance(one, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_the_page_names_exists(file: str, name: str) -> None:
    assert name in defined_in(ROOT / file)


def test_the_walks_are_there() -> None:
    assert len(NAMED) > 30


@pytest.mark.parametrize("package", ["engine", "ga"])
def test_a_package_has_few_entries_and_the_page_names_them_all(package: str) -> None:
    entries = {path.stem for path in (ROOT / package).iterdir() if path.is_dir() or path.suffix == ".py"}
    entries -= {"__init__", "__pycache__"}
    assert len(entries) <= {"engine": 15, "ga": 12}[package]
    assert not [entry for entry in entries if not re.search(rf"\b{entry}\b", PAGE)]


def test_few_files_know_deepspeeds_engine() -> None:
    knows = {path.name for path in (ROOT / "engine").rglob("*.py") if "ds_engine" in path.read_text()}
    assert knows == {"deepspeed_engine.py", "universal.py", "checkpoint_files.py"}


def private_names(path: Path) -> set[str]:
    """Returns the private names of others that a file of ga touches: attributes of anything but self, and imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            found.add(node.attr)
        if isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    named = {"system_attrs", "get_storage"}  # without an underscore, but not for users
    return {name for name in found if (name.startswith("_") and not name.startswith("__")) or name in named}


def test_one_file_touches_optunas_private_names() -> None:
    touching = {path.name: names for path in (ROOT / "ga").rglob("*.py") if (names := private_names(path))}
    assert touching.keys() == {"optuna_private.py"}, touching


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_exists(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("engine", "ga"):
            for name in node.names:
                exec(f"from {node.module} import {name.name}")
