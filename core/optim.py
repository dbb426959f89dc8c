"""How the network learns: parameter groups, AdamW, and the learning rate as a function of progress."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from core.params import TrainParams

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from core.hookspecs import Build


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings decay; norms and biases do not. Every parameter is in exactly one group."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(build: Build) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), fused: no temporary copies of the moments.

    Its state is made here and not in the first step, so that no step allocates: running out of memory inside one
    would leave some weights updated and others not.
    """
    import torch

    groups = parameter_groups(build.model, build.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=build.lr, betas=build.betas, fused=True)
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = adamw_state(p)
    return optimizer


def adamw_state(p: Tensor) -> dict[str, Tensor]:
    """What torch's fused AdamW keeps of a parameter, before its first step."""
    import torch

    return {
        "step": torch.zeros((), dtype=torch.float32, device=p.device),
        "exp_avg": torch.zeros_like(p),
        "exp_avg_sq": torch.zeros_like(p),
    }


def check_groups(model: nn.Module, optimizer: Optimizer) -> None:
    """Assert that every parameter belongs to exactly one optimizer group, whichever strategy made it."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    missing = [name for key, name in names.items() if key not in held]
    twice = [
        names.get(key, "a foreign tensor") for key in set(held) if held.count(key) > 1 or key not in names
    ]
    assert not missing and not twice, f"optimizer groups: missing {missing}, not exactly once {twice}"


def lr_factor(params: TrainParams, step: int, progress: float) -> float:
    """Learning rate at `step` (from 0) as a share of the peak.

    Rises over warmup_steps, is constant, and falls over the last `cooldown` of the run. progress: share of the budget
    that is spent, in [0, 1].
    """
    warmup = min(1.0, (step + 1) / params.warmup_steps) if params.warmup_steps else 1.0
    left = (1.0 - progress) / params.cooldown if params.cooldown else 1.0
    if left >= 1.0:
        return warmup
    shape = left if params.schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))
    return warmup * (params.final_lr + (1.0 - params.final_lr) * shape)
