"""Every row of the fault matrix is a test; the full table is made by `python -m bench.faults --full`."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from core.cli import main
from core.selftest.lab import Lab, Outcome, Tally
from core.selftest.matrix import Fault, Rehearsed, choose, matrix, rehearse, row


@pytest.mark.parametrize("fault", matrix(), ids=lambda fault: fault.id)
def test_survived(fault: Fault, lab: Lab) -> None:
    done = rehearse(lab, fault)
    if done.outcome is None:
        pytest.skip(done.why_not)
    assert done.outcome.passed, done.outcome
    assert done.outcome.tried >= min(fault.times, 1)


def test_all_rows_are_there() -> None:
    assert [fault.id for fault in matrix()] == [f"F{i}" for i in range(1, 42)]


def test_the_share_that_every_test_run_tries() -> None:
    times = {fault.id: fault.times for fault in matrix()}
    assert times["F1"] >= 20 and times["F37"] >= 10 and times["F9"] >= 300
    assert max(fault.full for fault in matrix() if fault.id == "F1") >= 100


def test_a_tally_can_fail() -> None:
    tally = Tally()
    tally.check("one", True, True)
    assert tally.outcome().passed
    tally.check("two", True, False)
    assert not tally.outcome().passed and "two" in tally.outcome().note
    assert not Outcome(2, 1).passed and Outcome(2, 2).passed


def test_a_rehearsal_that_breaks_is_not_survived(lab: Lab) -> None:
    def broken(lab: Lab, times: int) -> Outcome:
        raise KeyError("oops")

    done = rehearse(lab, Fault("F0", "broken", broken))
    assert done.failed and "oops" in row(done)
    assert "no card" in row(Rehearsed(done.fault, None, 0.0, "no card"))


def test_the_command_lists_and_chooses() -> None:
    listed = CliRunner().invoke(main, ["selftest", "--list"]).output.splitlines()
    assert len(listed) == 41 and listed[0].startswith("F1 ")
    assert [fault.id for fault in choose("f9, F2")] == ["F2", "F9"]
    wrong = CliRunner().invoke(main, ["selftest", "--faults", "--only", "F99"])
    assert wrong.exit_code == 2 and "F99" in wrong.output
    assert CliRunner().invoke(main, ["selftest"]).exit_code == 2


def test_the_command_rehearses(tmp_path: object) -> None:
    done = CliRunner().invoke(main, ["selftest", "--faults", "--only", "F19,F41", "--folder", str(tmp_path)])
    assert done.exit_code == 0 and "| F41 |" in done.output and "nothing was lost" in done.output
