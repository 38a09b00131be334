"""Telling NVIDIA Apex from the unrelated package of that name on PyPI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT
from tiny_encoders import tiny_model

from engine.errors import UserError
from engine.models.apex import probe_apex
from engine.models.student import replace_layer_norm


def probe_with(folder: Path) -> tuple[bool, str]:
    """Probes in a fresh process with `folder` first on sys.path, so that nothing stays imported here."""
    code = "from engine.models.apex import probe_apex; ok, why = probe_apex(); print(int(ok), why)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    ok, _, why = run.stdout.partition(" ")
    return ok == "1", why.strip()


def test_absent() -> None:
    usable, reason = probe_apex()
    if usable:
        pytest.skip(reason)
    assert "not installed" in reason
    assert "github.com/NVIDIA/apex" in reason


@pytest.mark.parametrize("body", ["", "raise ImportError('needs pyramid')", "import no_such_module_at_all"])
def test_impostor(tmp_path: Path, body: str) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text(body, encoding="utf-8")
    usable, reason = probe_with(tmp_path)
    assert not usable
    assert "is not NVIDIA Apex" in reason
    assert "pip uninstall apex" in reason
    assert "github.com/NVIDIA/apex" in reason
    assert str(tmp_path) in reason


def test_fused_layer_norm_without_apex_is_an_error() -> None:
    if probe_apex()[0]:
        pytest.skip("NVIDIA Apex is installed")
    with pytest.raises(UserError, match=r"student.fused_layer_norm=true: NVIDIA Apex is not installed"):
        replace_layer_norm(tiny_model("bert"))
