"""AdamW with moments in 8 bits on top of bitsandbytes, and what stands in for it where memory is planned.

bitsandbytes keeps a tensor's moments as one byte a value, with one fp32 scale per block of 256 values, and those of a
tensor below 4,096 values in fp32 (bitsandbytes/optim/optimizer.py, Optimizer2State.init_state).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK, SMALLEST = 256, 4096
SLICE = 1 << 22  # values that adamw8bit_rounded updates at once: whole blocks


def adamw8bit(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> Any:
    """bitsandbytes' AdamW8bit with its state made, so that its steps allocate nothing."""
    from bitsandbytes.optim import AdamW8bit

    return _with_state(AdamW8bit(groups, lr=lr, betas=betas))


def _with_state(optimizer: Any) -> Any:
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            optimizer.init_state(group, p, g, i)
    return optimizer


def adamw8bit_rounded(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> Any:
    """adamw8bit for bf16 parameters: each update is computed in fp32, slice by slice, and rounded stochastically."""
    import bitsandbytes.functional as F
    from bitsandbytes.optim import AdamW8bit

    class Rounded(AdamW8bit):
        @torch.no_grad()
        def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
            if p.dtype == torch.float32:
                super().update_step(group, p, gindex, pindex)
                return
            state = self.state[p]
            state["step"] += 1
            blocks = state["state1"].dtype == torch.uint8
            update: Any = F.optimizer_update_8bit_blockwise if blocks else F.optimizer_update_32bit
            for a in range(0, p.numel(), SLICE):
                here = slice(a, a + SLICE)
                exact, grad = p.view(-1)[here].float(), p.grad.view(-1)[here].float()
                moments = [state[name].view(-1)[here] for name in ("state1", "state2")]
                rates = {"beta1": group["betas"][0], "beta2": group["betas"][1], "beta3": 0.0, "alpha": 0.0}
                rates |= {"eps": group["eps"], "lr": group["lr"], "weight_decay": group["weight_decay"]}
                if blocks:
                    scales = slice(a // BLOCK, -(-(a + SLICE) // BLOCK))
                    rates |= {name: state[name] for name in ("qmap1", "qmap2")}
                    rates |= {name: state[name][scales] for name in ("absmax1", "absmax2")}
                    update("adam", grad, exact, *moments, step=state["step"], **rates)
                else:
                    update("adam", grad, exact, moments[0], state2=moments[1], step=state["step"], **rates)
                round_stochastically(p.view(-1)[here], exact)

    return _with_state(Rounded(groups, lr=lr, betas=betas))


def round_stochastically(target: Tensor, exact: Tensor) -> None:
    """target [bf16] = exact [fp32], up or down at random so that the mean is exact. Overwrites `exact`.

    Adds 16 random bits below bf16's last one and cuts them off, as llm.c and torchao do.
    """
    bits = exact.view(torch.int32)
    bits += torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    bits &= -(1 << 16)
    target.copy_(exact)


class StandIn8bit(torch.optim.Optimizer):
    """The memory of `adamw8bit` without its kernels, which need data. It does not learn."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr})
        for p in (p for group in self.param_groups for p in group["params"]):
            shapes = [(p.shape, torch.uint8), ((-(-p.numel() // BLOCK),), torch.float32)]
            kept = shapes if p.numel() >= SMALLEST else [(p.shape, torch.float32)]
            self.state[p] = {
                f"{name}{i}": torch.zeros(shape, dtype=dtype, device=p.device)
                for i in (1, 2)
                for name, (shape, dtype) in zip(("state", "absmax"), kept, strict=False)
            }

    def load_state_dict(self, state_dict: Any) -> None:
        """Nothing: torch's would turn bytes into floats (accelerate hands an optimizer its own state back)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.update(p)

    def update(self, p: Any) -> None:
        p.add_(p.grad, alpha=0.0)


class StandInRounded(StandIn8bit):
    """The memory of `adamw8bit_rounded`: a slice's value and gradient in fp32, and its random bits."""

    def update(self, p: Any) -> None:
        if p.dtype == torch.float32:
            super().update(p)
            return
        for a in range(0, p.numel(), SLICE):
            exact, _grad = p.view(-1)[a : a + SLICE].float(), p.grad.view(-1)[a : a + SLICE].float()
            round_stochastically(p.view(-1)[a : a + SLICE], exact)
