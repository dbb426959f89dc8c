"""The learning rate, and who owns which parameter."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from core.optim import check_groups, lr_factor, parameter_groups
from core.params import TrainParams


def schedule(steps=100, **given):
    params = TrainParams(max_steps=steps, **given)
    return [lr_factor(params, s, s / steps) for s in range(steps)]


def test_linear_rises_stays_and_falls_to_zero():
    lr = schedule(warmup_steps=10, cooldown=0.5)
    assert lr[0] == pytest.approx(0.1) and lr[9] == 1.0
    assert lr[10:51] == [1.0] * 41
    assert lr[75] == pytest.approx(0.5)
    assert lr[99] == pytest.approx(0.02)
    assert all(a >= b for a, b in pairwise(lr[10:]))


def test_a_budget_that_is_spent_gives_the_last_rate():
    for schedule in ("linear", "cosine"):
        assert (
            lr_factor(TrainParams(max_steps=1, schedule=schedule, final_lr=0.1, warmup_steps=0), 9, 1.0)
            == 0.1
        )


def test_cosine_over_the_whole_run_ends_at_final_lr():
    lr = schedule(warmup_steps=0, cooldown=1.0, schedule="cosine", final_lr=0.1)
    assert lr[0] == 1.0
    assert lr[50] == pytest.approx(0.55)
    assert lr[99] == pytest.approx(0.1, abs=1e-3)


def test_no_cooldown_is_constant():
    assert schedule(warmup_steps=0, cooldown=0.0) == [1.0] * 100


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)


def test_only_matrices_decay():
    net = Net()
    matrices, rest = parameter_groups(net, 0.1)
    assert [p.shape for p in matrices["params"]] == [(4, 4)] and matrices["weight_decay"] == 0.1
    assert len(rest["params"]) == 3 and rest["weight_decay"] == 0.0


def test_groups_cover_every_parameter_exactly_once():
    net = Net()
    check_groups(net, torch.optim.AdamW(parameter_groups(net, 0.1)))
    with pytest.raises(AssertionError, match=r"missing.*norm"):
        check_groups(net, torch.optim.SGD(net.a.parameters(), lr=1.0))
    twice = torch.optim.SGD(net.parameters(), lr=1.0)
    twice.param_groups.append({**twice.param_groups[0], "params": [net.a.weight]})
    with pytest.raises(AssertionError, match=r"a\.weight"):
        check_groups(net, twice)
