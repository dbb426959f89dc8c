"""What five published runs on an A100 reserved, simulated without one: within 1 %."""

from __future__ import annotations

import pytest
import torch

from bench.memory import (
    Published,
    PublishedRun,
    accelerate_estimate,
    litgpt_estimate,
    published_config,
    published_reserved,
    published_runs,
)
from core.hookspecs import GIB


@pytest.mark.parametrize("run", published_runs(), ids=lambda run: run.name)
def test_reserved_as_published(run: PublishedRun) -> None:
    assert published_reserved(run) / GIB == pytest.approx(run.reserved_gib, rel=0.01)


def test_the_network_has_the_published_size() -> None:
    run = published_runs()[0]
    with torch.device("meta"):
        model = Published(run)
    n_params = sum(p.numel() for p in model.parameters())
    assert n_params == pytest.approx(163.0e6, rel=0.001)
    # Both peers count four times the weights and neither counts activations.
    assert accelerate_estimate(model, "fp32") == pytest.approx(16 * n_params, rel=0.1)  # the masks too
    assert litgpt_estimate(published_config(), 4) == pytest.approx(16 * n_params, rel=0.01)
