"""Who may measure: two drivers of one output directory, with a real job. Whole rehearsals are in tests/distributed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import ROOT

from engine.errors import UserError
from ga.config import SearchConfig
from ga.dry_run import MEASURED, end_lost_measurement
from ga.jobs.processes import start_ticks

DRIVER = """
import sys, time
from pathlib import Path
from ga.jobs.launcher import Job
from ga.dry_run import _alone_in

folder = Path(sys.argv[1])
with _alone_in(folder):
    job = Job.start([sys.executable, "-c", "import time; time.sleep(600)"], job_dir=folder, added={}, cwd=folder)
    print(job.session.id, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def measuring(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A driver that measures a job in tmp_path, whose process id is the line that it writes."""
    folder = tmp_path / MEASURED
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()
    end_lost_measurement(SearchConfig(output_dir=str(tmp_path)))


@pytest.mark.faults
def test_only_the_job_of_a_dead_driver_is_ended(measuring: subprocess.Popen[str], tmp_path: Path) -> None:
    assert measuring.stdout is not None
    job = int(measuring.stdout.readline())
    with pytest.raises(UserError, match=r"another --dry_run is measuring in .*measured; wait until it has ended"):
        end_lost_measurement(SearchConfig(output_dir=str(tmp_path), dry_run=True))
    end_lost_measurement(SearchConfig(output_dir=str(tmp_path)))  # a search goes on without its result
    assert start_ticks(job) is not None
    measuring.kill()
    measuring.wait()
    end_lost_measurement(SearchConfig(output_dir=str(tmp_path), dry_run=True))
    assert start_ticks(job) is None


def test_where_nothing_was_measured_nothing_is_made(tmp_path: Path) -> None:
    end_lost_measurement(SearchConfig(output_dir=str(tmp_path), dry_run=True))
    assert not list(tmp_path.iterdir())
