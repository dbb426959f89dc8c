"""How far a plan must go to fit: rungs are strategies that save memory, and are climbed only as far as needed.

A rung that leaves the numbers alone is also taken where it makes the step faster, by what it frees for a larger
micro-batch. One that changes them, such as an optimizer with 8-bit moments, only where nothing else fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.hookspecs import Facts, Plan, Strategy
from core.memory.forecast import Fit
from core.params import HardwareParams
from core.plugins import Registry

WORTH = 0.15
"""A larger micro-batch must promise this much less time before another rung is tried for it: rungs cost time, too."""


@dataclass(frozen=True)
class Rung:
    """One step of the ladder, as it was tried."""

    strategy: str
    """Empty for the ground: no rung at all."""
    taken: bool
    needed: int
    """Bytes of a step at the smallest micro-batch, with this rung and those below."""
    micro_batch: int
    """The largest that fits; 0: none does."""
    seconds: float | None
    """An optimizer step at that micro-batch, as the roofline has it."""
    note: str


def climb(
    draft: Callable[[Sequence[Strategy]], Plan], fit: Callable[[Plan], Fit], rungs: Sequence[Strategy]
) -> tuple[Plan, Fit, list[Rung]]:
    """The plan with the rungs that it takes, its fit, and what was tried. Nothing fits: the highest rung's."""
    tried: list[tuple[Plan, Fit, str]] = []
    up: list[Strategy] = []
    best = -1
    for rung in (None, *rungs):
        if rung is not None:
            if best >= 0 and (rung.affects == "recipe" or not _could_gain(*tried[best][:2])):
                break
            if not set(rung.requires) <= {s.name for s in tried[0][0].active} | {s.name for s in up}:
                continue
            if any(s.name in rung.conflicts or rung.name in s.conflicts for s in up):
                continue
            up = [s for s in up if not (rung.slot and s.slot == rung.slot)] + [rung]
        plan = draft(up)
        answer = fit(plan)
        tried.append((plan, answer, rung.name if rung else ""))
        if answer.fits and (best < 0 or _seconds(answer) < _seconds(tried[best][1])):
            best = len(tried) - 1
    chosen = best if best >= 0 else len(tried) - 1
    plan, answer, _ = tried[chosen]
    active = {s.name for s in plan.active}
    record = []
    for i, (_, a, name) in enumerate(tried):
        note = "" if not name or name in active else "not faster" if a.fits else "does not fit"
        if i < chosen and not a.fits and name and name not in active:
            note = "another takes its place"
        record.append(
            Rung(
                strategy=name,
                taken=not name or name in active,
                needed=a.smallest.needed,
                micro_batch=a.forecast.micro_batch if a.fits else 0,
                seconds=_seconds(a) if a.fits and a.forecast.seconds else None,
                note=note,
            )
        )
    return plan, answer, record


def _could_gain(plan: Plan, answer: Fit) -> bool:
    """Whether a larger micro-batch would be worth another rung."""
    return answer.forecast.micro_batch < plan.micro_batches[0] and answer.forecast.gain >= WORTH


def _seconds(answer: Fit) -> float:
    return answer.forecast.seconds[0] if answer.forecast.seconds else math.inf


def rungs_of(plan: Plan, facts: Facts, registry: Registry, hardware: HardwareParams) -> list[Strategy]:
    """The rungs that this plan could climb, cheapest first: they work here, nobody removed them, their role is free.

    A role is free where the hardware profile filled it, by what is no rung itself and nobody set options for.
    """
    own = {*(name.rstrip("?") for name in hardware.strategies.add), *hardware.options}
    taken = {s.slot for s in plan.active if s.slot and (s.name in own or s.rung)}
    active = {s.name for s in plan.active}
    found = sorted(
        (
            s
            for s in registry.strategies.values()
            if s.rung > 0
            and s.name not in active
            and s.name not in hardware.strategies.remove
            and s.slot not in taken
            and not active & set(s.conflicts)
            and not any(s.name in other.conflicts for other in plan.active)
            and s.available(facts, plan.profile) is None
        ),
        key=lambda s: (s.rung, s.name),
    )
    names = active | {s.name for s in found}
    return [s for s in found if set(s.requires) <= names]
