"""The simulated peak is the peak on real tensors, to the byte; and near what torch's CPU allocator hands out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from bench.memory import (
    Comparison,
    Configuration,
    allocator_peak,
    bundled,
    compare,
    configurations,
    runnable,
    undisturbed,
)
from core.hookspecs import Phase, Plan, Strategy, hookimpl
from core.memory.simulate import simulate, tape_of
from core.params import Params
from core.plugins import Registry

REGISTRY = bundled()
BOTH = ("checkpointing", "chunked_head")
PLAIN = Configuration("gpt2", "fp32")


def peaks(comparison: Comparison) -> set[int]:
    return {comparison.simulated, comparison.real, comparison.scaled}


def named(configuration: Configuration) -> str:
    return configuration.name


EXACT = configurations(REGISTRY)


def test_there_are_enough_of_them() -> None:
    assert len(EXACT) >= (18 if runnable(("adamw8bit",), REGISTRY) else 16)


@pytest.mark.parametrize("configuration", EXACT, ids=named)
def test_to_the_byte(configuration: Configuration) -> None:
    accumulates, alone = compare(configuration, REGISTRY)
    assert len(peaks(accumulates)) == 1, accumulates
    assert len(peaks(alone)) == 1, alone
    assert accumulates.real > alone.real > 0


def test_less_than_two_chunks_of_the_head_is_on_the_safe_side() -> None:
    configuration = replace(PLAIN, strategies=BOTH, micro_batch=3)
    for comparison in compare(configuration, REGISTRY):
        assert comparison.simulated == comparison.real <= comparison.scaled


def test_what_a_peak_consists_of() -> None:
    plan, params = PLAIN.plan(REGISTRY)
    with undisturbed():
        real = simulate(plan, params, micro_batch=8, fake=False).peak(8, True)
    assert sum(real.parts.values()) == real.bytes
    n_params, token_ids = plan.model.n_params, 4 * 8 * 64 * 8
    assert real.parts["gradients"] == 4 * n_params
    assert real.parts["optimizer"] == pytest.approx(8 * n_params, rel=1e-3)
    assert real.resident == pytest.approx(
        real.parts["weights"] + real.parts["optimizer"] + token_ids, rel=1e-4
    )


class Lazy(Strategy):
    """torch's AdamW, which makes its state in its first step."""

    name, phase, slot, affects = "lazy", Phase.OPTIMIZER, "optimizer", "recipe"

    @hookimpl
    def make_optimizer(self, build: Any) -> Any:
        return torch.optim.AdamW(build.model.parameters(), lr=1e-3, foreach=True)


@dataclass(frozen=True)
class WithStrategy(Configuration):
    strategy: Strategy | None = None

    def plan(self, registry: Registry) -> tuple[Plan, Params]:
        plan, params = super().plan(registry)
        plan.active += [self.strategy] if self.strategy else []
        return plan, params


def assert_near(configuration: Configuration, accumulates: bool) -> None:
    plan, params = configuration.plan(REGISTRY)
    simulated = tape_of(plan, params).peak(configuration.micro_batch, accumulates).bytes
    assert simulated / allocator_peak(configuration, REGISTRY, accumulates) == pytest.approx(1, abs=0.05)


def test_near_torchs_allocator() -> None:
    assert_near(Configuration("gpt2", "fp32", BOTH, n_embd=128, block_size=128), False)


def test_an_optimizer_that_makes_its_state_in_its_first_step() -> None:
    assert_near(WithStrategy("gpt2", "fp32", n_layer=5, micro_batch=2, strategy=Lazy()), True)


@pytest.mark.parametrize("tokens", [20, 35, 48, 55, 77, 130])
def test_a_chunk_of_any_size(tokens: int) -> None:
    """A chunk that the simulated micro-batch divides must not be taken as proportional to it."""
    configuration = replace(PLAIN, strategies=BOTH)
    plan, params = configuration.plan(REGISTRY)
    plan.options["chunked_head"] = {"tokens": tokens}
    n = configuration.micro_batch
    assert (
        tape_of(plan, params).peak(n, True).bytes == simulate(plan, params, micro_batch=n).peak(n, True).bytes
    )


def test_grouped_queries_on_a_card_without_flash_attention() -> None:
    """There keys and values are repeated, instead of taking the path that holds [T, T]."""
    activations = []
    for capability in ((7, 5), (8, 6)):
        plan, params = Configuration("qwen3", "bf16", n_layer=2).plan(REGISTRY)
        plan.profile = replace(plan.profile, device="cuda", compute_capability=capability)
        plan.model = replace(plan.model, n_head=4, n_kv_head=1)
        tape = simulate(plan, params, micro_batch=4)
        assert any("flash_attention" in op for op in tape.op) and "_softmax" not in tape.op
        activations.append(tape.peak(4, True).parts["activations"])
    assert activations[0] > activations[1]
