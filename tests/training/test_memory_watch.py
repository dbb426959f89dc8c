"""What the run says about its memory: predicted against measured, and warnings before it hurts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import core.monitor
from core.hookspecs import GIB
from core.monitor import MemoryWatch

CARD, CPU = SimpleNamespace(type="cuda"), SimpleNamespace(type="cpu")


def plan(gib: float) -> Any:
    forecast = SimpleNamespace(reserved=int(gib * GIB), allocated=int(gib * GIB), resident=0)
    return SimpleNamespace(fit=SimpleNamespace(forecast=forecast))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A watch on a made-up card; `watch.card` has its state."""
    import torch

    card = SimpleNamespace(peak=3 * GIB, retries=0)
    monkeypatch.setattr(core.monitor, "peak_memory", lambda device: card.peak)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": card.retries})
    said: list[str] = []
    watch = MemoryWatch(CARD, plan(2.5), said.append)
    watch.card, watch.said = card, said  # type: ignore[attr-defined]
    return watch


def look(watch: Any, rate: float, used: float = 2.0) -> list[str]:
    """What is said about a logged step at this rate."""
    before = len(watch.said)
    watch.look(7, {"tokens_per_second": rate, "vram_used_gib": used, "vram_total_gib": 4.0})
    return watch.said[before:]


def test_predicted_and_measured_once(watch: Any) -> None:
    assert look(watch, 100) == ["memory: 3.00 GiB reserved at peak, 2.50 predicted (x1.20)"]
    assert look(watch, 100) == []
    assert watch.summary() == {"peak_memory_gib": 3.0, "predicted_memory_gib": 2.5}


def test_the_peak_outlives_a_reset_of_the_cards_own(watch: Any) -> None:
    look(watch, 100)
    watch.card.peak = 1 * GIB
    assert watch.read() == 3 * GIB


def test_a_spill_is_told_with_its_remedy(watch: Any) -> None:
    """Windows moves memory into RAM: suddenly slow, and the card full."""
    for _ in range(3):
        look(watch, 1000)
    said = look(watch, 150, used=3.95)
    assert len(said) == 1 and "7 times slower" in said[0] and "Sysmem Fallback Policy" in said[0]
    assert look(watch, 150, used=3.95) == []  # once


@pytest.mark.parametrize(("rate", "used"), [(150, 2.0), (900, 3.95)], ids=["slow but free", "full but fast"])
def test_neither_alone_is_a_spill(watch: Any, rate: float, used: float) -> None:
    for _ in range(3):
        look(watch, 1000)
    assert look(watch, rate, used) == []


def test_the_first_steps_slowness_is_warming_up(watch: Any) -> None:
    look(watch, 5000, used=3.95)
    assert look(watch, 1000, used=3.95) == []


def test_retries_are_told_when_they_begin_and_double(watch: Any) -> None:
    look(watch, 1000)
    told = []
    for retries in (0, 1, 1, 2, 3, 6, 7):
        watch.card.retries = retries
        told.append(len(look(watch, 1000)))
    assert told == [0, 1, 0, 0, 1, 0, 1]
    watch.card.retries = 99
    assert "99 times" in look(watch, 1000)[0]


def test_running_out_of_memory_is_not_told_twice(watch: Any) -> None:
    look(watch, 1000)
    watch.card.retries = 3
    watch.forgive()
    assert look(watch, 1000) == []
    watch.card.retries = 7
    assert len(look(watch, 1000)) == 1


def test_on_a_cpu_it_is_what_the_process_grew_by() -> None:
    import numpy as np

    watch = MemoryWatch(CPU, plan(1.0), lambda line: None)
    before = watch.read()
    further = core.monitor.peak_resident() - core.monitor.resident()  # where an earlier test has been
    block = np.ones(further + int(0.3 * GIB), dtype=np.uint8)
    grown = watch.read() - before
    del block
    assert 0.2 * GIB < grown < 0.4 * GIB


def test_without_a_forecast_there_is_no_comparison() -> None:
    said: list[str] = []
    watch = MemoryWatch(CPU, SimpleNamespace(fit=None), said.append)
    watch.look(1, {"tokens_per_second": 1.0})
    assert said == [] and "predicted_memory_gib" not in watch.summary()
