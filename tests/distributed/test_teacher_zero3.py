"""`teacher.placement: zero3` on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import ROOT, finished, start
from tiny_encoders import save_tiny

BF16_ROUNDING = 2**-5
"""A few units in the last place of the largest entry."""
REAL = ROOT / "models" / "all-MiniLM-L6-v2"


@pytest.mark.launcher
@pytest.mark.timeout(900)  # the first DeepSpeed start compiles its CPU operators
def test_sharded_teacher_equals_the_replicated_one(tmp_path: Path) -> None:
    models = [save_tiny(family, tmp_path / family) for family in ("modernbert", "deberta-v2")]
    models.append(save_tiny("bert", tmp_path / "mlm-bert", mlm=True))
    if not (REAL / "config.json").is_file():
        pytest.skip(f"{REAL} is not there (see the README on fetching models)")
    models.append(str(REAL))
    script = str(Path(__file__).with_name("teacher_zero3.py"))
    finished(start([script, str(tmp_path), *models], ranks=2), 0)
    files = sorted(tmp_path.glob("rank*.json"))
    assert len(files) == 2
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        assert result.pop("world") == 2
        assert len(result) == 2 * len(models)
        for case, seen in result.items():
            # in bf16 the replicated one has its weights packed for the matrix products, which then sum in another order
            assert seen["difference"] <= (BF16_ROUNDING if "bfloat16" in case else 0.0), (case, seen)
            assert seen["same_counts"], case
            assert seen["same_flops"], case
            assert 0.5 <= seen["sharded_bytes"] / seen["whole_bytes"] < 0.51, (case, seen)
