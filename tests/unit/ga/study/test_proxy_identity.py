"""Results of one study are of one proxy: what its first job has found on its machine."""

from __future__ import annotations

import optuna
import pytest

from engine.errors import UserError
from ga.jobs.outcome import JobReport
from ga.study.proxy_identity import adopt_proxy, confirm_proxy, proxy_of

CPU = JobReport({}, {}, {}, "", "cpu", {"train": {"precision": "float32"}, "loss": {}})
GPU = JobReport({}, {}, {}, "", "gpu", {"train": {"precision": "bfloat16"}, "loss": {}})
LOST = JobReport({}, {}, {}, "")


def study_of(*jobs: JobReport) -> optuna.Study:
    study = optuna.create_study(study_name="mine")
    for job in jobs:
        confirm_proxy(study, job)
    return study


def test_the_first_job_says_which_proxy_it_is() -> None:
    study = study_of(LOST, CPU, CPU, LOST)
    assert proxy_of(study) == {"fingerprint": "cpu", "parts": CPU.parts}
    with pytest.raises(UserError, match=r"search 'mine' cannot be continued: .*fingerprint cpu, now gpu: train\)"):
        confirm_proxy(study, GPU)
    assert proxy_of(study) == {"fingerprint": "cpu", "parts": CPU.parts}


def test_results_are_taken_over_from_the_same_proxy_alone() -> None:
    new = study_of()
    assert not adopt_proxy(new, study_of()), "it has no results"
    assert adopt_proxy(new, study_of(CPU))
    assert not adopt_proxy(new, study_of(GPU))
    assert adopt_proxy(new, study_of(CPU))
    with pytest.raises(UserError):
        confirm_proxy(new, GPU)
