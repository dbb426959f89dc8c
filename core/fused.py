"""What `qwen3` does between its matrix products, in few passes over memory where torch has no kernels for it.

On a CPU torch takes rms_norm apart into a dozen passes, forward and backward, and keeps what each of them read. These
keep their input and one number a row. Shapes: B sequences of T tokens, H heads of D channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in fp32 at least, and returned in it."""
    return _RMSNorm.apply(x, weight, eps)


def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """n * cos + swap(n) * sin of n = rms_norm(x), in x's dtype; swap exchanges the halves of the last dimension.

    x: [B, T, H, D]. weight: [D]. cos, sin: [T, D], sin negative in its first half.
    """
    return _NormRotate.apply(x, weight, cos, sin, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, without keeping silu(gate)."""
    return _SwiGLU.apply(gate, up)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        rows = _inverse_rms(wide, eps)
        ctx.save_for_backward(x, weight, rows)
        return (wide * rows).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return *_norm_backward(grad, *ctx.saved_tensors), None


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        wide, half = _wide(x), x.shape[-1] // 2
        rows = _inverse_rms(wide, eps)
        ctx.save_for_backward(x, weight, rows, cos, sin)
        # The weight goes into the tables, which are small.
        y = wide * _over_heads(cos * weight, x)
        y.addcmul_(wide.roll(half, -1), _over_heads(sin * weight.roll(half), x)).mul_(rows)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, rows, cos, sin = ctx.saved_tensors
        grad = _wide(grad)
        unrotated = (grad * _over_heads(sin, x)).roll(x.shape[-1] // 2, -1)
        unrotated.addcmul_(grad, _over_heads(cos, x))
        return *_norm_backward(unrotated, x, weight, rows), None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, F.silu(gate).mul_(grad)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms of each row: [..., 1]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _over_heads(table: Tensor, x: Tensor) -> Tensor:
    """[T, D] repeated in memory to [T, H, D] of x: rows of D channels alone are short for a loop."""
    return table[:, None].expand(-1, x.shape[2], -1).contiguous()


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight. grad: of the norm's result. rows: 1 / rms.

    layer_norm's kernel with a mean of 0 does all of it in two passes. It also takes off each row's mean gradient, which
    is put back here.
    """
    n, inverse, w = x.shape[-1], rows.view(-1), weight.to(rows.dtype)
    grad, flat, mean = grad.reshape(-1, n), _wide(x).reshape(-1, n), torch.zeros_like(inverse)
    grad_x, grad_w, _ = torch.ops.aten.native_layer_norm_backward(
        grad, flat, [n], mean, inverse, w, None, [True, True, False]
    )
    total = torch.mv(grad, w, out=mean)  # autocast leaves out= alone
    grad_x.add_(total.mul_(inverse)[:, None], alpha=1 / n)
    return grad_x.view(x.shape).to(x.dtype), grad_w.to(weight.dtype)
