"""Muon: what it makes of a matrix, who is stepped by it, and that a step allocates nothing and can be skipped."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from core import muon as muon_module
from core.hookspecs import Build
from core.model import build_model
from core.model_config import ModelConfig
from core.muon import AT_ONCE, MOMENTUM_STEPS, POLYNOMIALS, Muon, batches, hidden_matrices, muon

SHAPES = [(24, 24)] * (AT_ONCE + 3) + [(48, 24), (24, 48), (48, 24)]
CONFIG = ModelConfig("qwen3", 2, 2, 2, 32, 64, 16, 64)


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    found = [nn.Parameter(torch.randn(shape, generator=generator) * 0.05) for shape in SHAPES]
    for p in found:  # singular values from 1 down to a thirtieth
        u, _, v = torch.linalg.svd(torch.randn(p.shape, generator=generator), full_matrices=False)
        p.grad = u @ torch.diag(torch.logspace(0, -1.5, min(p.shape))) @ v
    return found


def optimizer(parameters: list[nn.Parameter], **group: Any) -> Muon:
    return Muon([{"params": parameters, "lr": 0.1, "muon": True, **group}])


def optimal(least: float, greatest: float) -> tuple[tuple[float, ...], float]:
    """The odd polynomial of degree 5 nearest to 1 on [least, greatest], by Remez' exchange, and its error."""
    x = np.array([least, (2 * least + greatest) / 3, (least + 2 * greatest) / 3, greatest])
    for _ in range(60):
        a, b, c, error = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1), np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt(sorted([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]))
        x = np.array([least, *inner, greatest])
    return (a, b, c), error


def test_the_polynomials_are_the_optimal_ones() -> None:
    least, greatest = 0.003, 1.0
    for polynomial in POLYNOMIALS:
        found, error = optimal(least, greatest)
        assert polynomial == pytest.approx(found, abs=5e-5)
        least, greatest = 1.0 - error, 1.0 + error
    assert greatest == pytest.approx(1.20, abs=0.005)


def test_an_update_has_singular_values_near_one_and_the_gradients_own_directions() -> None:
    parameters = matrices()
    before, gradients = [p.detach().clone() for p in parameters], [p.grad.clone() for p in parameters]
    optimizer(parameters).step()
    for p, old, gradient in zip(parameters, before, gradients, strict=True):
        rows, columns = p.shape
        update = (old - p.detach()) / (0.1 * max(1.0, rows / columns) ** 0.5)
        values = torch.linalg.svdvals(update)
        assert values.min() > 0.75 and values.max() < 1.25
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        aligned = torch.diag(u.mT @ update @ v.mT)
        assert (aligned > 0.75).all(), "a descent along every singular direction"


def test_small_gradients_keep_their_digits_in_fp16() -> None:
    """Their norm is taken off before: fp16 has 6e-5 as its smallest number of full precision."""
    stepped = []
    for scale in (1.0, 2.0**-16):
        p = matrices()[0]
        assert p.grad is not None
        p.grad.mul_(scale)
        Muon([{"params": [p], "lr": 0.1, "muon": True}], torch.float16).step()
        stepped.append(p.detach())
    assert torch.equal(*stepped)


def test_matrices_are_stepped_together_as_each_would_be_alone() -> None:
    together, alone = matrices(), matrices()
    optimizer(together).step()
    for p in alone:
        optimizer([p]).step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_the_gram_matrix_gives_what_the_matrices_give(monkeypatch: pytest.MonkeyPatch) -> None:
    by_gram, by_matrix = matrices(), matrices()
    assert any(max(p.shape) > muon_module.GRAM_SHAPE * min(p.shape) for p in by_gram)
    optimizer(by_gram).step()
    monkeypatch.setattr(muon_module, "GRAM_SHAPE", 1e9)
    optimizer(by_matrix).step()
    for p, q in zip(by_gram, by_matrix, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_batches_hold_equal_shapes_each_matrix_once() -> None:
    parameters = matrices()
    found = list(batches(parameters))
    assert sorted(id(p) for batch in found for p in batch) == sorted(map(id, parameters))
    assert all(len({p.shape for p in batch}) == 1 and len(batch) <= AT_ONCE for batch in found)
    assert len(found) == 4


def test_momentum_rises_and_averages() -> None:
    [p] = parameters = [nn.Parameter(torch.zeros(4, 4))]
    stepped = optimizer(parameters)
    for n in range(3):
        p.grad = torch.eye(4)
        stepped.step()
        assert stepped.state[p]["step"] == n + 1
    expected = 0.0
    for n in range(3):
        momentum = 0.85 + 0.10 * n / MOMENTUM_STEPS
        expected = expected * momentum + (1.0 - momentum)
    torch.testing.assert_close(stepped.state[p]["momentum"], expected * torch.eye(4))


def test_weights_decay_only_where_asked() -> None:
    for decay in (0.0, 0.5):
        [p] = parameters = [nn.Parameter(torch.eye(4) * 2)]
        p.grad = torch.zeros(4, 4)
        optimizer(parameters, weight_decay=decay).step()
        torch.testing.assert_close(p.detach(), torch.eye(4) * 2 * (1 - 0.1 * decay))


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_a_step_that_found_infinities_changes_nothing(value: float) -> None:
    parameters = [*matrices(), nn.Parameter(torch.ones(5))]
    stepped = Muon(
        [
            {"params": parameters[:-1], "lr": 0.1, "muon": True, "weight_decay": 0.1},
            {"params": parameters[-1:], "lr": 0.1},
        ]
    )
    parameters[-1].grad = torch.ones(5)
    stepped.step()
    kept = [p.detach().clone() for p in parameters]
    state = copy.deepcopy([stepped.state[p] for p in parameters])
    for p in parameters:
        p.grad = torch.full_like(p, value)
    stepped.found_inf = torch.ones(())
    stepped.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, kept, strict=True))
    for now, before in zip((stepped.state[p] for p in parameters), state, strict=True):
        assert all(torch.equal(now[key], before[key]) for key in before)


def test_a_good_step_under_the_guard_is_a_plain_one() -> None:
    plain, guarded = matrices(), matrices()
    optimizer(plain, weight_decay=0.1).step()
    other = optimizer(guarded, weight_decay=0.1)
    other.found_inf = torch.zeros(())
    other.step()
    for p, q in zip(plain, guarded, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)


def test_a_zero_gradient_leaves_the_weight_finite_and_as_it_was() -> None:
    [p] = parameters = [nn.Parameter(torch.ones(4, 4))]
    p.grad = torch.zeros(4, 4)
    optimizer(parameters).step()
    assert torch.equal(p.detach(), torch.ones(4, 4))


def test_hidden_matrices_are_those_of_the_layers() -> None:
    for config in (CONFIG, ModelConfig("gpt2", 2, 2, 2, 32, 64, 16, 64)):
        network = build_model(config, seed=1)
        hidden, rest = hidden_matrices(network)
        names = {id(p): name for name, p in network.named_parameters()}
        assert len(hidden) + len(rest) == len(names)
        assert all(".layers." in names[id(p)] or ".h." in names[id(p)] for p in hidden)
        rest_matrices = {names[id(p)].split(".")[-2] for p in rest if p.dim() == 2}
        assert rest_matrices <= {"embed_tokens", "wte", "wpe", "lm_head"}


def build_of(dtype: str, simulated: bool = False) -> Build:
    network = build_model(CONFIG, seed=1)
    plan: Any = {"dtype": dtype}
    return Build(
        plan=plan, accelerator=SimpleNamespace(), network=network, model=network, lr=3e-3, simulated=simulated
    )


@pytest.mark.parametrize(
    ("dtype", "room"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_it_works_in_the_plans_precision_and_ends_near_fp32(dtype: str, room: torch.dtype) -> None:
    builds = [build_of("fp32"), build_of(dtype)]
    optimizers = [muon(build, matrix_lr=10.0, adamw_lr=1.0, momentum=0.95) for build in builds]
    assert optimizers[1]._room["x"].dtype == room
    generator = torch.Generator().manual_seed(3)
    for p, q in zip(*(build.network.parameters() for build in builds), strict=True):
        before = p.detach().clone()
        p.grad = torch.randn(p.shape, generator=generator)
        q.grad = p.grad.clone()
        assert torch.equal(before, q)
    for one in optimizers:
        one.step()
    for p, q in zip(*(build.network.parameters() for build in builds), strict=True):
        assert (p - q).abs().max() < 0.03 * 0.1


def test_rates_and_decay_are_those_of_params_times_a_constant() -> None:
    build = build_of("fp32")
    build.weight_decay = 0.1
    rest, hidden = muon(build, matrix_lr=5.0, adamw_lr=2.0, momentum=0.95).param_groups
    assert rest["lr"] == 2.0 * build.lr and rest["weight_decay"] == 0.0
    assert hidden["lr"] == 5.0 * build.lr
    assert hidden["lr"] * hidden["weight_decay"] == pytest.approx(build.lr * 0.1)


def test_the_memory_of_a_step_does_not_depend_on_the_depth() -> None:
    """What core.memory.deepen relies on: six layers take the same room as any more."""
    rooms = []
    for n_layer in (6, 9):
        network = build_model(ModelConfig("qwen3", n_layer, 2, 2, 32, 64, 16, 64), seed=1)
        room = Muon([{"params": hidden_matrices(network)[0], "muon": True}])._room
        rooms.append({name: t.numel() for name, t in room.items()})
    assert rooms[0] == rooms[1]
