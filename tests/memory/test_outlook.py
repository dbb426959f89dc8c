"""What a forecast means to a person: the ladder as it was climbed, the run's length, and remedies that really fit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from bench.memory import bundled
from core.hookspecs import GIB, Facts, Plan
from core.memory import outlook
from core.memory.forecast import MARGIN, Forecaster
from core.memory.ladder import Rung
from core.memory.outlook import (
    changed,
    climbed,
    columns,
    does_not_fit,
    duration,
    memory_lines,
    remedies,
    tokens_per_second,
    usable,
    whole_run,
)
from core.params import Params
from core.plan import resolve
from core.plugin_check import machine

REGISTRY = bundled()
FORECASTER = Forecaster()  # every test asks it, so that a step is simulated once
WIDE: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 1024}
RUNGS = ["adamw8bit", "bf16_weights", "checkpointing", "chunked_head"]


def facts_of(profile: str = "rtx2050", **fields: Any) -> Facts:
    """A machine that has this profile's card."""
    return replace(machine(REGISTRY.profile(profile)), **fields)


def params_of(**sections: Any) -> Params:
    sections["hardware"] = {"profile": "rtx2050", **sections.get("hardware", {})}
    sections["train"] = {"max_steps": 10, "batch_tokens": 4096, **sections.get("train", {})}
    return Params.model_validate({"tokenizer": {"vocab_size": 512}, "model": WIDE, **sections})


def planned(params: Params, facts: Facts | None = None) -> Plan:
    return resolve(params, facts or facts_of(), REGISTRY, FORECASTER)


def least(params: Params, facts: Facts | None = None) -> int:
    """What the smallest step takes with every rung that there is [bytes]."""
    return planned(changed(params, hardware={"memory_gib": 1e-3}), facts).fit.smallest.needed


def limit_between(low: int, high: int) -> float:
    """A memory_gib in which a step of `low` bytes fits and one of `high` does not."""
    assert low < high
    return (low + high) / 2 / (1 - MARGIN) / GIB


# ---- what a plan says


def test_a_plan_in_lines() -> None:
    plan = planned(params_of())
    memory, budget, peak, *_, speed = memory_lines(plan)
    f = plan.fit.forecast
    assert f"{f.needed / GIB:.2f} of {usable(plan) / GIB:.2f} GiB at micro-batch {f.micro_batch}" in memory
    assert plan.memory_reason in budget and "3% stay free" in budget
    assert f.op in peak and f.phase in peak and "weights" in peak
    assert "tokens/s expected" in speed


def test_what_is_over_the_margin_is_not_usable() -> None:
    plan = planned(params_of())
    assert usable(plan) == int(plan.memory_budget * (1 - MARGIN)) < plan.memory_budget


def rung(strategy: str, needed: int, taken: bool, note: str = "") -> Rung:
    return Rung(strategy, taken, needed * GIB, 1, None, note)


def test_a_rung_saves_what_the_plan_would_take_without_it() -> None:
    plan = planned(params_of())
    plan.ladder = [
        rung("", 10, True),
        rung("chunked_head", 9, True),
        rung("adamw8bit", 7, False),
        rung("bf16_weights", 4, True),
        rung("more", 3, False, "not faster"),
    ]
    assert [(r.strategy, r.saved // GIB, r.verdict) for r in climbed(plan)] == [
        ("", 0, ""),
        ("chunked_head", 1, "on"),
        ("adamw8bit", 2, "off: bf16_weights takes its place"),
        ("bf16_weights", 5, "on"),
        ("more", 1, "off: not faster"),
    ]


def test_the_length_of_a_run() -> None:
    params = params_of()
    plan = planned(params)
    worst, best = tokens_per_second(plan) or (0.0, 0.0)
    assert 0 < worst < best
    by_steps = whole_run(plan, params)
    assert by_steps and by_steps.tokens == (40960, 40960)
    assert by_steps.seconds == pytest.approx((40960 / best, 40960 / worst))
    by_tokens = whole_run(plan, params_of(train={"max_steps": None, "max_tokens": 10_000}))
    assert by_tokens and by_tokens.tokens == (8192, 8192)  # whole steps, as the trainer rounds
    by_minutes = whole_run(plan, params_of(train={"max_steps": None, "max_minutes": 1.0}))
    assert by_minutes and by_minutes.tokens == (int(worst * 60), int(best * 60))


def test_without_rates_there_is_no_speed() -> None:
    params = params_of(hardware={"profile": "cpu"})
    plan = planned(params, facts_of("cpu"))
    assert tokens_per_second(plan) is None and not any("speed" in line for line in memory_lines(plan))
    run = whole_run(plan, params)
    assert run and run.tokens == (40960, 40960) and run.seconds is None
    assert whole_run(plan, params_of(train={"max_steps": None, "max_minutes": 1.0})) is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (90, "90 s"), (400, "6.7 min"), (9000, "2.5 h"), (100_000, "28 h"), (300_000, "3.5 days")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_columns_line_up() -> None:
    assert columns([("a", "1", "x"), ("bcd", "10", "")], numbers=(1,)) == ["a     1  x", "bcd  10"]


# ---- what would fit


def applied(params: Params, remedy: str) -> Params:
    """Params with "section.key: value" done."""
    key, _, value = remedy.partition(": ")
    section, _, name = key.partition(".")
    known = json.loads(value) if value == "null" or value.isdigit() else value
    return changed(params, **{section: {name: known}})


NOTHING_LEFT = {"strategies": {"remove": RUNGS}}
SHORT = {**WIDE, "block_size": 512}


@pytest.mark.parametrize(
    ("small", "large", "remedy"),
    [
        ({}, {"train": {"micro_batch": 4}}, "train.micro_batch: auto"),
        ({"model": SHORT}, {}, "model.block_size: 512"),
        ({"model": {"preset": "nano"}}, {"model": {"preset": "micro"}}, "model.preset: nano"),
    ],
    ids=["micro-batch", "context", "preset"],
)
def test_what_would_fit_fits(small: dict[str, Any], large: dict[str, Any], remedy: str) -> None:
    small, large = {"hardware": NOTHING_LEFT, **small}, {"hardware": NOTHING_LEFT, **large}
    limit = limit_between(least(params_of(**small)), least(params_of(**large)))
    params = changed(params_of(**large), hardware={"memory_gib": limit})
    plan = planned(params)
    assert not plan.fits
    found = remedies(plan, params, facts_of(), REGISTRY, FORECASTER)
    assert remedy in found
    assert planned(applied(params, remedy)).fits
    (problem,) = does_not_fit(plan, params, facts_of(), REGISTRY, FORECASTER)
    assert problem.startswith("out of memory before it starts: ") and remedy in problem


def test_a_strategy_that_was_removed() -> None:
    params = params_of(hardware={"strategies": {"remove": ["chunked_head", "loader"]}})
    limit = limit_between(least(params_of()), least(params))
    params = changed(params, hardware={"memory_gib": limit})
    plan = planned(params)
    assert not plan.fits
    found = remedies(plan, params, facts_of(), REGISTRY, FORECASTER)
    assert found[0] == "hardware.strategies.remove without chunked_head"


def test_a_package_that_is_missing() -> None:
    bare = facts_of(modules=frozenset({"triton"}))
    tall = {"n_layer": 3, "n_head": 2, "n_embd": 512, "block_size": 256}
    params = params_of(model=tall, hardware={"strategies": {"remove": ["bf16_weights"]}})
    params = changed(params, hardware={"memory_gib": limit_between(least(params), least(params, bare))})
    plan = planned(params, bare)
    assert not plan.fits and planned(params).fits
    found = remedies(plan, params, bare, REGISTRY, FORECASTER)
    assert "the strategy adamw8bit (install it: pip install bitsandbytes)" in found


def test_nothing_fits() -> None:
    params = params_of(
        hardware={"profile": "cpu", "strategies": {"remove": ["chunked_head", *RUNGS[:3]]}},
        model={"preset": "nano"},
    )
    facts = facts_of("cpu", ram_bytes=1 << 20)
    plan = planned(params, facts)
    assert not plan.fits and remedies(plan, params, facts, REGISTRY, FORECASTER) == []
    (problem,) = does_not_fit(plan, params, facts, REGISTRY, FORECASTER)
    assert "nothing that was tried; it takes a card with" in problem


def test_what_cannot_help_is_not_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    params = params_of(model={"preset": "micro"}, hardware={**NOTHING_LEFT, "memory_gib": 0.01})
    plan = planned(params)
    asked: list[Any] = []
    monkeypatch.setattr(outlook._Attempt, "planned", lambda self, **changes: asked.append(changes))
    assert remedies(plan, params, facts_of(), REGISTRY, FORECASTER) == []
    # Weights and optimizer alone are too large, at any context and with any preset.
    assert asked and all("model" not in change for change in asked)
