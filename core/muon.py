"""Muon: momentum whose matrices are made orthogonal before they are stepped, with AdamW for everything else.

A hidden matrix's update has all its singular values near 1, so that no direction of it is left behind (Jordan et al.
2024, kellerjordan.github.io/posts/muon; Bernstein & Newhouse 2024, arXiv 2409.20325). It keeps one number per weight
where AdamW keeps two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from core.optim import adamw_state

if TYPE_CHECKING:
    from torch import nn

    from core.hookspecs import Build
    from core.model import Network

# Odd polynomials a x + b x^3 + c x^5, one after the other. Each is the one that brings the singular values nearest to 1
# that those before have left, from [0.003, 1] on: at the end they lie in [0.80, 1.20]. The construction is Amsel et al.
# 2025 (Polar Express, arXiv 2505.16932, theorem 3.1); tests/training/test_muon.py computes them again.
POLYNOMIALS = (
    (8.3837, -24.7659, 18.3571),
    (4.0434, -3.0114, 0.5695),
    (3.5056, -2.6267, 0.5257),
    (2.4901, -1.8343, 0.4368),
)
SLACK = 1.01
"""Singular values are brought below 1 / SLACK, so that rounding cannot push one over 1, where polynomials grow."""
GRAM_SHAPE = 1.5
"""Above so many columns per row it is cheaper to apply all polynomials to the Gram matrix X X^T, rows x rows, and their
product to X once: 13 products of rows^3 and 2 of rows^2 columns, instead of 4 and 8 (Zhang, Amsel, Chen & Dao 2026,
dao-ailab.github.io/blog/2026/gram-newton-schulz). Only in fp32: in 16 bits the Gram matrix loses the small singular
values, which are squared in it."""
AT_ONCE = 8
"""Matrices of one shape that are made orthogonal together, at most …"""
VALUES_AT_ONCE = 1 << 22
"""… and their values: what bounds the memory that the update works in."""
FIRST_MOMENTUM, MOMENTUM_STEPS = 0.85, 300
"""Momentum rises from there over so many steps, as in nanochat's base_train.py and modded-nanogpt's train_gpt.py."""


class Muon(torch.optim.Optimizer):
    """Groups with `muon: True` hold hidden matrices; the others are stepped by AdamW, fused.

    All memory that a step needs is taken here, so that none of it can fail half-way. A step whose `found_inf` is 1
    changes nothing, and nothing is read from the device (as in torch's fused optimizers).
    """

    _step_supports_amp_scaling = True

    def __init__(self, groups: Iterable[dict[str, Any]], dtype: torch.dtype = torch.float32) -> None:
        """dtype: what matrices are made orthogonal in."""
        defaults = {"lr": 0.0, "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-10, "momentum": 0.95}
        super().__init__(groups, {**defaults, "muon": False})
        self._room: dict[str, Tensor] = {}
        values = side = 0
        for group in self.param_groups:
            for p in group["params"]:
                if group["muon"]:
                    step = torch.zeros((), dtype=torch.float32, device=p.device)
                    self.state[p] = {"step": step, "momentum": torch.zeros_like(p)}
                    rows, _ = _wide(p.shape)
                    n = _at_once(p.shape)
                    values, side = max(values, n * p.numel()), max(side, n * rows**2)
                else:
                    self.state[p] = adamw_state(p)
        if values:
            sizes = {"x": values, "y": values, "gram": side, "factor": side, "norm": AT_ONCE}
            if dtype == torch.float32:
                sizes |= {"product": side, "spare": side}
            for name, size in sizes.items():
                self._room[name] = torch.empty(size, dtype=dtype, device=p.device)
            for name in ("good", "momentum", "weight", "decay", "scale"):
                self._room[name] = torch.empty((), dtype=torch.float32, device=p.device)
            self._room["bad"] = torch.empty((), dtype=torch.bool, device=p.device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if with_gradient and group["muon"]:
                self._step_matrices(group, with_gradient)
            elif with_gradient:
                self._step_others(group, with_gradient)

    def _step_others(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_matrices(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        good, momentum, weight, decay = (self._room[n] for n in ("good", "momentum", "weight", "decay"))
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        good.fill_(1.0)
        if found_inf is not None:
            good.sub_(found_inf)
        bad = torch.eq(good, 0.0, out=self._room["bad"])
        rise = group["momentum"] - FIRST_MOMENTUM
        momentum.copy_(self.state[parameters[0]]["step"])
        momentum.div_(MOMENTUM_STEPS).clamp_(max=1.0).mul_(rise).add_(FIRST_MOMENTUM)
        # Of the gradient in the average; 0 where it is bad.
        weight.copy_(momentum).neg_().add_(1.0).mul_(good)
        for p in parameters:
            gradient, state = p.grad, self.state[p]
            assert gradient is not None
            if grad_scale is not None:
                gradient.div_(grad_scale)
            if found_inf is not None:
                gradient.masked_fill_(bad, 0.0)
            state["step"].add_(good)
            state["momentum"].lerp_(gradient, weight)
            gradient.lerp_(state["momentum"], momentum)  # Nesterov's: as if this gradient came once more
        for together in batches(parameters):
            orthogonal = self._orthogonal(together).mul_(good)
            rows, columns = together[0].shape
            lr = group["lr"] * math.sqrt(max(1.0, rows / columns))
            decay.copy_(good).mul_(-group["lr"] * group["weight_decay"]).add_(1.0)
            for p, update in zip(together, orthogonal, strict=True):
                if group["weight_decay"]:
                    p.mul_(decay)
                p.add_(update if rows <= columns else update.mT, alpha=-lr)

    def _orthogonal(self, matrices: list[Tensor]) -> Tensor:
        """The gradients of equally shaped matrices, transposed where they are tall, with singular values near 1.

        [n, rows, columns], in memory that the next call overwrites.
        """
        rows, columns = _wide(matrices[0].shape)
        n = len(matrices)
        x, y = (self._room[name][: n * rows * columns].view(n, rows, columns) for name in "xy")
        for row, p in zip(x, matrices, strict=True):
            assert p.grad is not None
            if x.dtype == torch.float16:  # where small gradients would lose their digits
                p.grad.div_(torch.linalg.vector_norm(p.grad, out=self._room["scale"]).clamp_(min=1e-7))
            row.copy_(p.grad if p.shape == row.shape else p.grad.mT)
        norm = self._room["norm"][:n].view(n, 1, 1)  # no singular value is larger
        torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, out=norm)
        x.div_(norm.mul_(SLACK).clamp_(min=1e-7))
        if x.dtype == torch.float32 and columns > GRAM_SHAPE * rows:
            return torch.bmm(self._factor(x), x, out=y)
        gram, factor = self._squares(x, "gram", "factor")
        for linear, cubic, quintic in POLYNOMIALS:
            torch.bmm(x, x.mT, out=gram)
            torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic, out=factor)
            torch.baddbmm(x, factor, x, beta=linear, out=y)
            x, y = y, x
        return x

    def _factor(self, x: Tensor) -> Tensor:
        """What x has to be multiplied by, from the left, for all of its singular values to be near 1."""
        gram, factor, product, spare = self._squares(x, "gram", "factor", "product", "spare")
        torch.bmm(x, x.mT, out=gram)
        for i, (linear, cubic, quintic) in enumerate(POLYNOMIALS):
            if i:  # the Gram matrix of what the polynomial before makes of x
                torch.bmm(factor, gram, out=spare)
                torch.bmm(spare, factor, out=gram)
            torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic, out=factor)
            factor.diagonal(dim1=1, dim2=2).add_(linear)
            if i:
                torch.bmm(factor, product, out=spare)
                product, spare = spare, product
            else:
                product.copy_(factor)
        return product

    def _squares(self, x: Tensor, *names: str) -> Iterator[Tensor]:
        n, rows, _ = x.shape
        return (self._room[name][: n * rows * rows].view(n, rows, rows) for name in names)


def batches(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices of equal shape, as many together as the update has room for."""
    for shape, alike in groupby(sorted(parameters, key=lambda p: p.shape), key=lambda p: p.shape):
        matrices = list(alike)
        for i in range(0, len(matrices), _at_once(shape)):
            yield matrices[i : i + _at_once(shape)]


def _wide(shape: torch.Size) -> tuple[int, int]:
    return min(shape), max(shape)


def _at_once(shape: torch.Size) -> int:
    return max(1, min(AT_ONCE, VALUES_AT_ONCE // shape.numel()))


def muon(build: Build, matrix_lr: float, adamw_lr: float, momentum: float) -> Muon:
    """Muon for the matrices of the network's layers, AdamW for embeddings, head, norms and biases.

    matrix_lr: of the matrices, whose updates have the norm sqrt(max(1, rows / columns)) before it; adamw_lr: of the
    rest; both in build.lr. A step takes build.lr * build.weight_decay of a matrix away, as AdamW's does (so Liu et al.
    2025, Moonlight, arXiv 2502.16982), and nothing of the rest.
    """
    hidden, rest = hidden_matrices(build.network)
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": build.lr * adamw_lr, "betas": build.betas},
        {
            "params": hidden,
            "lr": build.lr * matrix_lr,
            "weight_decay": build.weight_decay / matrix_lr,
            "momentum": momentum,
            "muon": True,
        },
    ]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(build.plan["dtype"], torch.float32)
    if build.simulated and dtype == torch.float16:
        dtype = torch.bfloat16
    return Muon(groups, dtype)


def hidden_matrices(network: Network) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the layers, and every other parameter."""
    hidden = [p for layer in network.layers for p in layer.parameters() if p.dim() == 2]
    known = {id(p) for p in hidden}
    return hidden, [p for p in network.parameters() if id(p) not in known]
