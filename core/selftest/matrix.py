"""The fault matrix: every rehearsal, F1 to F41, in order, and a row of the table for each."""

from __future__ import annotations

import time
from dataclasses import dataclass

# Each module enters its rehearsals.
import core.selftest.inputs
import core.selftest.kills
import core.selftest.media
import core.selftest.numbers
import core.selftest.plugin_faults  # noqa: F401
from core.errors import UserError, did_you_mean
from core.selftest.lab import FAULTS, Fault, Lab, Outcome

COLUMNS = ("", "fault", "tried", "survived", "bit-exact", "seconds", "note")


@dataclass(frozen=True)
class Rehearsed:
    """A fault, what came of it, and how long it took [seconds]; outcome: None where it could not be rehearsed here."""

    fault: Fault
    outcome: Outcome | None
    seconds: float
    why_not: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome is not None and not self.outcome.passed


def matrix() -> list[Fault]:
    """All rehearsals, by number."""
    return sorted(FAULTS.values(), key=lambda fault: int(fault.id[1:]))


def choose(only: str) -> list[Fault]:
    """Those named in "F1,F2", or all. Raises UserError for a name that there is not."""
    names = [name.strip().upper() for name in only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in FAULTS]:
        known = [fault.id for fault in matrix()]
        raise UserError([f"--only: no fault {name!r}.{did_you_mean(name, known)}" for name in unknown])
    return [fault for fault in matrix() if not names or fault.id in names]


def rehearse(lab: Lab, fault: Fault, full: bool = False) -> Rehearsed:
    """Try one fault. An error of the rehearsal itself counts as not survived."""
    if why_not := fault.unless():
        return Rehearsed(fault, None, 0.0, why_not)
    start = time.perf_counter()
    try:
        outcome = fault.rehearse(lab, fault.full if full else fault.times)
    except Exception as error:
        outcome = Outcome(1, 0, note=f"FAILED: {type(error).__name__}: {error}")
    return Rehearsed(fault, outcome, time.perf_counter() - start)


def heading() -> list[str]:
    return [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]


def row(done: Rehearsed) -> str:
    """A line of the table, as Markdown."""
    o = done.outcome
    cells = [done.fault.id, done.fault.name]
    if o is None:
        cells += ["-", "-", "-", "-", done.why_not]
    else:
        exact = f"{o.exact} of {o.compared}" if o.compared else "-"
        note = " ".join(o.note.split()).replace("|", "\\|")
        cells += [str(o.tried), str(o.survived), exact, f"{done.seconds:.0f}", note]
    return f"| {' | '.join(cells)} |"
