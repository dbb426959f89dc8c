"""The training loss, whole or in chunks of tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKEN_SLICE = 512  # tokens that a half-precision product sums over
VOCAB_SLICE = 16384  # rows of the weight's gradient that are computed at once in half precision


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy summed over all targets [nats], in fp32.

    logits: [B, T, V]. targets: [B, T] int64. A sum, so that a window of micro-batches is divided once by its tokens.
    """
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum")


def chunked_cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """`cross_entropy_sum(hidden @ weight.T, targets)` with the logits of `chunk` tokens at a time, never all.

    hidden: [B, T, C]. weight: [V, C]. targets: [B, T] int64. Computes in autocast's dtype where that is on, and sums
    in fp32. Gradients are computed along the way, in one pass over the logits; that of the weight goes straight into
    weight.grad, which spares the copy that autograd would keep until a tied embedding's own gradient arrives.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return _Chunked.apply(hidden, weight, targets.reshape(-1), chunk, dtype)


class _Chunked(torch.autograd.Function):
    """Gradients are those of the sum, so their entries are near (p - 1) or p: fp16 holds them before any loss scale.

    backward multiplies them by the gradient that arrives, with the loss scale in it. It can run once.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype
    ) -> Tensor:
        x, w = (
            hidden.detach().reshape(-1, hidden.shape[-1]).to(dtype),
            weight.detach().to(dtype),
        )  # [N, C], [V, C]
        needs_x, needs_w = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if needs_x else None
        grad_w = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_w else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, len(x), chunk):
            rows, wanted = x[start : start + chunk], targets[start : start + chunk, None]
            log_p = F.log_softmax(rows @ w.t(), 1, dtype=torch.float32)  # [chunk, V]; from here on in place
            total -= log_p.gather(1, wanted).sum()
            if not (needs_x or needs_w):
                continue
            log_p.exp_().scatter_add_(1, wanted, log_p.new_full(wanted.shape, -1.0))
            grad = log_p.to(dtype)  # probabilities, less 1 at the targets
            del log_p
            if grad_x is not None:
                grad_x[start : start + chunk] = grad @ w
            if grad_w is not None:
                _add_product(grad_w, grad, rows)
            del grad  # before the next logits
        ctx.grad_x, ctx.grad_w, ctx.weight = grad_x, grad_w, weight
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_x, grad_w, weight = ctx.grad_x, ctx.grad_w, ctx.weight
        ctx.grad_x = ctx.grad_w = ctx.weight = None
        if grad_x is not None:
            grad_x = grad_x.to(ctx.dtype).mul_(grad).view(ctx.shape)
        if grad_w is not None:
            grad_w = grad_w.mul_(grad).to(weight.dtype)
            if not torch.distributed.is_initialized():  # DDP reduces what autograd hands over
                if weight.grad is None:
                    weight.grad = grad_w
                else:
                    weight.grad += grad_w
                grad_w = None
        return grad_x, grad_w, None, None, None


def _add_product(total: Tensor, grad: Tensor, rows: Tensor) -> None:
    """total += grad.T @ rows: [V, C] fp32, [chunk, V], [chunk, C].

    Half precision goes by slices of V, for room, and of few tokens: a product that sums over thousands would leave
    fp16's range, which no loss scale could mend.
    """
    if grad.dtype == total.dtype:
        total.addmm_(grad.t(), rows)
        return
    for g, r in zip(grad.split(TOKEN_SLICE), rows.split(TOKEN_SLICE), strict=True):
        for v in range(0, len(total), VOCAB_SLICE):
            total[v : v + VOCAB_SLICE] += g[:, v : v + VOCAB_SLICE].t() @ r
