"""What the fork server starts (tests/support/fork_server.py) is what the real launcher starts."""

from __future__ import annotations

import os
import signal

import pytest
from compare import assert_same_bits
from faulting import assert_gone, processes_of
from launching import kill_session, start

from engine.ranks import guard

pytestmark = pytest.mark.launcher


@pytest.fixture(autouse=True)
def forked_even_in_test_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test-all` starts everything else through the real launcher."""
    monkeypatch.delenv("MAPDISTILL_LAUNCHER", raising=False)


def test_the_same_losses_and_student_as_through_the_real_launcher(make_run) -> None:
    settings = {"ranks": 2, "stage": 1, "micro": 2, "student__dropout": 0.1}
    forked = make_run("forked", launcher="forked", **settings)
    real = make_run("real", launcher="real", **settings)
    for run in (forked, real):
        run.finish()
    for key in ("total", "grad_norm", "lr"):
        assert forked.curve(key) == real.curve(key)
    assert_same_bits(forked.student(), real.student())
    assert_same_bits(forked.projections(), real.projections())


def test_a_killed_rank_ends_the_others_and_their_guards(make_run) -> None:
    run = make_run("run", ranks=2, micro=2, train__steps=100_000, train__schedule="constant", train__log_every=50)
    process = run.start()
    try:
        run.wait_for_step(50, process)
        guards = [p for p in processes_of(process.pid) if guard.__file__ in p.cmdline()]
        assert len(guards) == 2
        os.kill(run.rank_pids(process.pid)[1], signal.SIGKILL)
        process.communicate(timeout=60)
        assert_gone(process.pid, within_s=5)
    finally:
        kill_session(process)
    assert process.returncode == 256 - signal.SIGKILL


def test_the_code_of_the_rank_that_fails_is_that_of_the_start(make_run) -> None:
    run = make_run("run", ranks=2)
    output = run.finish("--train.lr", "none", expect=2)
    assert output.count("error:") == 1
    assert "error: train.lr" in output
    assert "usage: " in run.finish("--help", expect=0)


def test_a_start_has_the_environment_and_the_words_of_a_script(tmp_path, monkeypatch) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\n"
        "print(__name__, sys.argv[1:], os.environ['MINE'], 'TRITON_INTERPRET' in os.environ, torch.get_num_threads(),\n"
        "      os.environ.get('RANK'), sys.stdin.read())\n"
        "print('unflushed', end='')\n"
        "sys.exit(7)\n"
    )
    monkeypatch.setenv("MINE", "ours")
    process = start([str(script), "one", "two words"])
    output, _ = process.communicate(timeout=60)
    assert output == "__main__ ['one', 'two words'] ours False 1 None \nunflushed"
    assert process.returncode == 7
