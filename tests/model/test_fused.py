"""qwen3's own CPU functions: the plain formulas, in values, gradients, dtypes and what is kept for backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from core import fused, model
from core.model import Cache, Qwen3Attention, Rotary, build_model
from core.model_config import ModelConfig

CONFIG = ModelConfig("qwen3", 2, 4, 2, 48, 80, 32, 320)  # D = 12, two queries a key
EPS = 1e-6


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tables(n: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    cos, sin = Rotary(head_dim, 32, 10000.0).tables(3, n)
    return cos.to(dtype), sin.to(dtype)


def plain_norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    n = F.rms_norm(x.float(), weight.shape, weight, eps).transpose(1, 2)
    left, right = n.chunk(2, -1)
    return (n * cos + torch.cat((right, left), -1) * sin).transpose(1, 2).to(x.dtype)


@contextlib.contextmanager
def taken_apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch's own functions."""
    with monkeypatch.context() as patch:
        patch.setattr(model, "takes_apart", lambda x: False)
        yield


def needs_grad(*tensors: Tensor) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def test_gradients_in_float64() -> None:
    def double(*shape: int, seed: int = 0) -> Tensor:
        return draw(*shape, dtype=torch.float64, seed=seed).requires_grad_()

    cos, sin = tables(3, 6, torch.float64)
    check = torch.autograd.gradcheck
    assert check(lambda x, w: fused.rms_norm(x, w, EPS), (double(2, 3, 5), double(5, seed=1)))
    assert check(lambda x, w: fused.norm_rotate(x, w, cos, sin, EPS), (double(2, 3, 2, 6), double(6, seed=1)))
    assert check(fused.swiglu, (double(2, 3, 5), double(2, 3, 5, seed=1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 7, 4, 12), (1, 1, 1, 2), (3, 5, 3, 34)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_plain_formula(dtype: torch.dtype, shape: tuple[int, ...], contiguous: bool) -> None:
    weight, (cos, sin) = draw(shape[-1], seed=1), tables(shape[1], shape[-1])
    x, up = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=2)
    if not contiguous:
        x, up = (t.transpose(0, 2).contiguous().transpose(0, 2) for t in (x, up))
    pairs = [
        (
            lambda x, w: fused.rms_norm(x, w, EPS),
            lambda x, w: F.rms_norm(x.float(), w.shape, w, EPS),
            (x, weight),
        ),
        (
            lambda x, w: fused.norm_rotate(x, w, cos, sin, EPS),
            lambda x, w: plain_norm_rotate(x, w, cos, sin, EPS),
            (x, weight),
        ),
        (fused.swiglu, lambda g, u: F.silu(g) * u, (x, up)),
    ]
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs, given in pairs:
        one, two = needs_grad(*given), needs_grad(*given)
        out, expected = ours(*one), theirs(*two)
        torch.testing.assert_close(out, expected)
        grad = draw(*shape, dtype=out.dtype, seed=3)
        if not contiguous:
            grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
        out.backward(grad)
        expected.backward(grad)
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=rtol, atol=2e-5)


def test_swiglu_is_the_plain_formula_to_the_bit() -> None:
    one, two = needs_grad(draw(5, 7), draw(5, 7, seed=1)), needs_grad(draw(5, 7), draw(5, 7, seed=1))
    out, expected = fused.swiglu(*one), F.silu(two[0]) * two[1]
    assert torch.equal(out, expected)
    gradients = (torch.autograd.grad(y.sum(), given) for y, given in ((out, one), (expected, two)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_row_of_zeros_and_a_large_one() -> None:
    x = draw(1, 3, 8)
    x[0, 0], x[0, 1] = 0.0, 1e15
    one, two, weight = *needs_grad(x, x), draw(8, seed=1)
    out, expected = fused.rms_norm(one, weight, EPS), F.rms_norm(two, (8,), weight, EPS)
    torch.testing.assert_close(out, expected)
    out.backward(draw(1, 3, 8, seed=2))
    expected.backward(draw(1, 3, 8, seed=2))
    torch.testing.assert_close(one.grad, two.grad)


def losses_and_gradients(precision: str, checkpointed: bool) -> tuple[Tensor, dict[str, Tensor]]:
    network = build_model(CONFIG, seed=1)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    if precision == "bf16 weights":
        for parameter in network.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.to(torch.bfloat16)
    if checkpointed:
        for layer in network.layers:
            forward = layer.forward
            layer.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision.startswith("bf16")):
        loss = network(tokens, tokens.roll(-1, 1))
        loss.backward()  # inside, where autocast would lower the precision of a product
    return loss.detach(), {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 weights"])
def test_a_network(precision: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with taken_apart(monkeypatch):
        loss, gradients = losses_and_gradients(precision, False)
    ours, own = losses_and_gradients(precision, checkpointed)
    torch.testing.assert_close(ours, loss, rtol=1e-6 if precision == "fp32" else 1e-3, atol=0)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert own[name].dtype == gradient.dtype
        apart = (own[name].float() - gradient.float()).norm() / gradient.float().norm()
        assert apart < (1e-5 if precision == "fp32" else 3e-2), name


def test_checkpointing_changes_no_bit() -> None:
    (loss, gradients), (again, recomputed) = (losses_and_gradients("fp32", c) for c in (False, True))
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_cached_tokens_are_rotated_to_their_positions(
    n_kv_head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = Qwen3Attention(replace(CONFIG, n_kv_head=n_kv_head), 0)
    rotary, x = Rotary(CONFIG.head_dim, 32, 10000.0), draw(2, 9, 48)

    @torch.no_grad()
    def generated() -> Tensor:
        cache: Cache = []
        return torch.cat([attention(t, rotary, cache) for t in (x[:, :6], *x[:, 6:].split(1, 1))], 1)

    with taken_apart(monkeypatch):
        expected = generated()
    torch.testing.assert_close(generated(), expected)
    torch.testing.assert_close(generated(), attention(x, rotary, None))


def kept(network: model.Network, tokens: Tensor) -> int:
    """Bytes that autograd holds for backward, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = network.hidden(tokens, None)
    del hidden
    return sum(held.values())


def test_less_is_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_model(CONFIG, seed=1)
    tokens = torch.zeros(4, 32, dtype=torch.int64)
    with taken_apart(monkeypatch):
        before = kept(network, tokens)
    assert kept(network, tokens) < 0.75 * before


def test_a_second_derivative_is_refused() -> None:
    x, weight = needs_grad(draw(3, 8), draw(8, seed=1))
    (grad,) = torch.autograd.grad(fused.rms_norm(x, weight, EPS).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_compiler_sees_the_plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(2, 3, 8)
    assert model.takes_apart(x)
    assert not model.takes_apart(x.to("meta"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not model.takes_apart(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalized_embeddings_keep_their_dtype(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    x = draw(5, 16, dtype=dtype) * 0.02
    ours = model.normalized(x)
    with taken_apart(monkeypatch):
        torch.testing.assert_close(ours, model.normalized(x))
