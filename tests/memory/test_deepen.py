"""A shallow network's tape made deep is the deep network's own; where layers differ, every layer is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.memory import Configuration, bundled, runnable, undisturbed
from core.hookspecs import Phase, Plan, Strategy, hookimpl
from core.memory import simulate as planner
from core.memory.allocator import AllocatorSettings
from core.memory.deepen import SHALLOW, deepen
from core.memory.simulate import run_step, simulate, tape_of
from core.memory.tape import Tape
from core.params import Params
from core.plan import resolve
from core.plugin_check import machine

REGISTRY = bundled()
SETTINGS = AllocatorSettings(), AllocatorSettings(expandable_segments=True)
RUNS = [
    ("124m", "rtx2050", "qwen3", (), 0.0),
    ("124m", "t4", "gpt2", (), 0.1),
    ("124m", "t4", "gpt2", ("checkpointing",), 0.1),
    ("124m", "rtx2050", "qwen3", ("checkpointing", "chunked_head", "bf16_weights"), 0.0),
]


@pytest.fixture(autouse=True, scope="module")
def quickly() -> Iterator[None]:
    with undisturbed():
        yield


def plan_for(
    preset: str, profile: str, architecture: str, strategies: tuple[str, ...], dropout: float
) -> tuple[Plan, Params]:
    params = Params.model_validate(
        {
            "hardware": {"profile": profile, "strategies": {"add": list(strategies)}},
            "tokenizer": {"kind": "gpt2"},
            "model": {"preset": preset, "architecture": architecture, "dropout": dropout},
            "train": {"max_steps": 1, "batch_tokens": 65536},
        }
    )
    return resolve(params, machine(REGISTRY.profile(profile)), REGISTRY), params


def assert_same(deep: Tape, whole: Tape) -> None:
    """Both tapes say the same for every micro-batch, and to every allocator."""
    assert deep.n_params == whole.n_params
    for accumulates in (True, False):
        for micro_batch in (1, 16):
            assert deep.peak(micro_batch, accumulates) == whole.peak(micro_batch, accumulates)
            for settings in SETTINGS:
                ours, theirs = (tape.play(micro_batch, accumulates, settings) for tape in (deep, whole))
                assert ours.peak_reserved == theirs.peak_reserved
                assert ours.peak_allocated == theirs.peak_allocated
    for steps in (0, 8):  # the update alone, and a step
        assert deep.seconds(4, steps, 1e13, 1e11) == pytest.approx(
            whole.seconds(4, steps, 1e13, 1e11), rel=1e-4
        )


@pytest.mark.parametrize(
    "run",
    [run for run in RUNS if runnable(run[3], REGISTRY)],
    ids=lambda run: " ".join((*run[:3], *run[3], *(["dropout"] if run[4] else []))),
)
def test_deep_as_if_every_layer_had_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, params = plan_for(*run)
    whole = simulate(plan, params)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("every layer was run")

    monkeypatch.setattr(planner, "simulate", never)
    assert_same(tape_of(plan, params), whole)


class Doubled(Strategy):
    """Adds an activation to some layers."""

    name, phase, affects = "doubled", Phase.MODEL, "recipe"

    def __init__(self, chosen: Callable[[int], bool]) -> None:
        self.chosen = chosen

    @hookimpl
    def prepare_model(self, build: Any) -> None:
        def doubled(forward: Any) -> Any:
            return lambda *args: forward(*args).sin()

        for i, layer in enumerate(build.network.layers):
            if self.chosen(i):
                layer.forward = doubled(layer.forward)


def deepened(plan: Plan, params: Params) -> Tape | None:
    shallow = replace(plan, model=replace(plan.model, n_layer=SHALLOW))
    return deepen(*run_step(shallow, params), plan.model.n_layer, plan.model.n_params)


@pytest.mark.parametrize("chosen", [{2}, {3}, {0, 2, 4, 6}], ids=str)
def test_layers_that_differ_are_all_run(chosen: set[int]) -> None:
    plan, params = Configuration("gpt2", "fp32", n_layer=SHALLOW + 2, vocab_size=512).plan(REGISTRY)
    plain = simulate(plan, params).peak(8, True).bytes
    plan.active.append(Doubled(lambda i: i in chosen))
    assert deepened(plan, params) is None
    whole = simulate(plan, params)
    assert_same(tape_of(plan, params), whole)
    assert whole.peak(8, True).bytes > plain


@pytest.mark.parametrize("chosen", [lambda i: i == 0, lambda i: True], ids=["the first", "all"])
def test_the_first_layer_may_differ(chosen: Callable[[int], bool]) -> None:
    plan, params = Configuration("gpt2", "fp32", n_layer=SHALLOW + 2, vocab_size=512).plan(REGISTRY)
    plan.active.append(Doubled(chosen))
    assert deepened(plan, params) is not None
    assert_same(tape_of(plan, params), simulate(plan, params))


class OneUpdate(Strategy):
    """An optimizer that has temporaries for all tensors at once: torch's foreach kernels."""

    name, phase, slot, affects = "one_update", Phase.OPTIMIZER, "optimizer", "recipe"

    @hookimpl
    def make_optimizer(self, build: Any) -> Any:
        return torch.optim.AdamW(build.model.parameters(), lr=1e-3, foreach=True)


def test_an_update_of_all_tensors_at_once() -> None:
    plan, params = Configuration("gpt2", "fp32", n_layer=12, vocab_size=512, micro_batch=1).plan(REGISTRY)
    plan.active = [s for s in plan.active if s.slot != "optimizer"] + [OneUpdate()]
    assert_same(tape_of(plan, params), simulate(plan, params))


def test_a_shallow_network_is_run_as_it_is() -> None:
    plan, params = Configuration("gpt2", "fp32", n_layer=SHALLOW, vocab_size=512).plan(REGISTRY)
    assert_same(tape_of(plan, params), simulate(plan, params))
