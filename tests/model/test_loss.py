"""The chunked head: the same loss and gradients as the whole one, in every precision, and nothing of [N, V]."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.loss import VOCAB_SLICE, chunked_cross_entropy_sum, cross_entropy_sum
from core.memory.trace import Trace

B, T, C, V = 4, 48, 32, 640


def inputs(scale: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, C, generator=generator)
    weight = torch.randn(V, C, generator=generator) * scale
    return hidden, weight, torch.randint(0, V, (B, T), generator=generator)


def learn(kind: str, dtype: torch.dtype, chunk: int = 50, factor: float = 1.0, passes: int = 1):
    """Loss, and gradients of hidden and weight, as the trainer makes them: the sum, times a factor, accumulated."""
    hidden, weight, targets = inputs()
    hidden, weight = hidden.requires_grad_(), torch.nn.Parameter(weight)
    for _ in range(passes):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            if kind == "whole":
                loss = cross_entropy_sum(F.linear(hidden, weight), targets)
            else:
                loss = chunked_cross_entropy_sum(hidden, weight, targets, chunk)
        (loss * factor).backward()
    return loss.detach(), hidden.grad, weight.grad


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("chunk", [1, 7, 50, B * T, 10_000])
def test_fp32_is_the_whole_head_to_rounding(chunk: int) -> None:
    whole, chunked = learn("whole", torch.float32), learn("chunked", torch.float32, chunk)
    assert all(error(a, b) < 2e-6 for a, b in zip(chunked, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_to_the_truth_as_the_whole_head(dtype: torch.dtype) -> None:
    truth, whole, chunked = learn("whole", torch.float32), learn("whole", dtype), learn("chunked", dtype)
    for a, b, exact in zip(chunked, whole, truth, strict=True):
        assert a.dtype == torch.float32
        assert error(a, exact) <= 1.1 * error(b, exact) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_loss_scale_arrives_and_overflows_nothing(dtype: torch.dtype) -> None:
    """fp16's first scale, over a window of 500,000 tokens: where torch's own linear_cross_entropy gives NaN."""
    factor = 65536.0 / 524288 * 8
    _, hidden, weight = learn("chunked", dtype, factor=factor)
    _, exact_hidden, exact_weight = learn("whole", torch.float32)
    assert hidden.isfinite().all() and weight.isfinite().all()
    limit = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert error(hidden / factor, exact_hidden) < limit and error(weight / factor, exact_weight) < limit


def test_micro_batches_add_up() -> None:
    _, hidden, weight = learn("chunked", torch.float32, passes=3)
    _, once_hidden, once_weight = learn("whole", torch.float32)
    assert error(hidden, 3 * once_hidden) < 2e-6 and error(weight, 3 * once_weight) < 2e-6


def test_a_weight_in_bf16_gets_its_gradient_in_bf16() -> None:
    hidden, weight, targets = inputs()
    parameter = torch.nn.Parameter(weight.bfloat16())
    chunked_cross_entropy_sum(hidden.bfloat16(), parameter, targets, 50).backward()
    assert parameter.grad is not None and parameter.grad.dtype == torch.bfloat16
    assert error(parameter.grad, learn("whole", torch.float32)[2]) < 2e-2


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, targets = inputs()
    loss = chunked_cross_entropy_sum(hidden, weight.requires_grad_(), targets, 50)
    loss.backward()
    assert hidden.grad is None and weight.grad is not None
    with torch.no_grad():
        assert torch.equal(chunked_cross_entropy_sum(hidden, weight, targets, 50), loss)


def test_a_vocabulary_larger_than_a_slice() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(1, 4, 8, generator=generator),
        torch.randn(VOCAB_SLICE + 64, 8, generator=generator),
    )
    targets = torch.tensor([[0, VOCAB_SLICE - 1, VOCAB_SLICE, VOCAB_SLICE + 63]])
    gradients = []
    for chunk in (0, 3):
        w = torch.nn.Parameter(weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if chunk:
                chunked_cross_entropy_sum(hidden, w, targets, chunk).backward()
            else:
                cross_entropy_sum(F.linear(hidden, w), targets).backward()
        gradients.append(w.grad)
    assert error(gradients[1], gradients[0]) < 1e-2


def test_logits_of_all_tokens_never_exist() -> None:
    hidden, weight, targets = inputs()
    weight.requires_grad_()
    with Trace() as trace:
        chunked_cross_entropy_sum(hidden, weight, targets, 16).backward()
    assert max(trace.tape.constant) < B * T * V * 4
    assert max(trace.tape.constant) == V * C * 4  # the gradient itself


def test_several_processes_get_the_gradient_through_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP reduces what autograd hands over, so there nothing is written past it."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    hidden, weight, targets = inputs()
    weight.requires_grad_()
    gradient = torch.autograd.grad(chunked_cross_entropy_sum(hidden, weight, targets, 50), weight)[0]
    assert weight.grad is None and error(gradient, learn("whole", torch.float32)[2]) < 2e-6


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_network_learns_the_same_with_it(architecture: str, tie: bool) -> None:
    from core.model import build_model
    from core.model_config import ModelConfig
    from core.params import ModelParams

    params = ModelParams(
        architecture=architecture,
        n_layer=2,
        n_head=2,
        n_embd=32,
        block_size=32,
        tie_embeddings=tie,  # type: ignore[arg-type]
    )
    gradients, losses = [], []
    tokens = torch.randint(0, 300, (3, 33), generator=torch.Generator().manual_seed(1))
    for chunk in (0, 20):
        network = build_model(ModelConfig.resolve(params, 300), 0)
        network.loss_chunk = chunk
        for _ in range(2):
            loss = network(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in network.parameters()])
        with torch.no_grad():
            assert error(network(tokens[:, :-1], tokens[:, 1:]), loss.detach()) < 1e-6
    assert error(losses[1], losses[0]) < 1e-6
    for a, b in zip(*gradients, strict=True):
        assert error(b, a) < 1e-5
