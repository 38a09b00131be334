"""What a run says of its speed while it trains."""

from __future__ import annotations

import pytest

from engine.data.batch import Counts
from engine.train.progress import Progress
from engine.train.step_report import Interval, StepReport


def report(step: int) -> StepReport:
    return StepReport(
        interval=Interval(step, Counts(), {}, 0.0),
        total=1.0,
        terms={},
        observed={},
        coefficients={},
        lr=1e-3,
        grad_norm=None,
        loss_scale=None,
        skipped_steps=0,
    )


@pytest.mark.parametrize(
    ("speeds", "warnings"),
    [
        ([100, 900, 1000, 1000, 600, 600], 0),
        ([100, 900, 1000, 400, 1000, 400], 0),
        ([100, 900, 1000, 400, 400, 400, 400], 1),
        ([1000, 400, 300, 300, 300], 1),
    ],
)
def test_it_warns_once_when_the_speed_stays_low(
    speeds: list[float], warnings: int, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(100, "")
    progress.begin(0)
    for i, speed in enumerate(speeds):
        progress.step(report(10 * (i + 1)), speed)
    lines = capsys.readouterr().out.splitlines()
    assert (
        sum(line.startswith("warning: ") and "tokens/s, after 1,000 in the first" in line for line in lines) == warnings
    )
    assert sum(line.startswith("step ") for line in lines) == len(speeds)
