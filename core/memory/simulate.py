"""The trainer's own step on tensors without data: what it allocates, without a card and in about a second."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

from core.garbage import import_torch
from core.hookspecs import Plan
from core.memory.deepen import SHALLOW, deepen
from core.memory.tape import Tape
from core.params import Params

MIN_TOKENS = 1024
"""Tokens of a simulated micro-batch, at least: so that what works in chunks of tokens has several."""


def tape_of(plan: Plan, params: Params) -> Tape:
    """The tape of a plan's step, for any micro-batch: simulated on a few layers and deepened where that is exact."""
    n_layer = plan.model.n_layer
    if n_layer > SHALLOW:
        shallow = replace(plan, model=replace(plan.model, n_layer=SHALLOW))
        tape, owner = run_step(shallow, params)
        deep = deepen(tape, owner, n_layer, plan.model.n_params)
        if deep is not None:
            return deep
    return simulate(plan, params)


def simulate(plan: Plan, params: Params, *, micro_batch: int | None = None, fake: bool = True) -> Tape:
    """The tape of a plan's step with every layer run; see `run_step`."""
    return run_step(plan, params, micro_batch=micro_batch, fake=fake)[0]


def run_step(
    plan: Plan, params: Params, *, micro_batch: int | None = None, fake: bool = True
) -> tuple[Tape, dict[int, int | None]]:
    """Run the build, two micro-batches and an optimizer step of `plan`; return the tape, and the layer of each weight.

    Everything is the trainer's: the strategies' hooks, accelerate, and `optimizer_step`. Device cpu stands for the
    card (torch cannot make fake CUDA tensors without CUDA, and "meta" sends attention down another path).
    micro_batch: None takes a prime, so that the tape plays for every micro-batch; a number gives a tape of constant
    sizes, exact for that one. fake: False runs on real CPU tensors, which takes the memory and the time it takes.
    """
    import_torch(training=True)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from core.memory.trace import Trace
    from core.plan import runtime
    from core.trainer import build_training, make_accelerator, optimizer_step

    config, cuda = plan.model, plan.profile.device == "cuda"
    sequences = micro_batch or prime_batch(plan)
    # A card's plan runs on device cpu, in one process.
    profile = replace(plan.profile, device="cpu")
    here = replace(plan, profile=profile, num_processes=1, values=dict(plan.values))
    here.set("gradient_accumulation_steps", 2, reason="the second micro-batch finds gradients", by="core")
    hook = runtime(here).hook
    trace = Trace(
        sequences=0 if micro_batch else sequences,
        cuda=cuda,
        workspace=cublas_workspace(plan.profile.compute_capability),
        vocab_size=config.vocab_size,
    )
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    on_card = cuda_semantics(cuda, plan.profile.compute_capability)
    with own_garbage(), fresh_accelerate(), movable_modules(fake), fake_mode, on_card, trace:
        trace.tape.begin("build")
        accelerator = make_accelerator(here, simulated=True)
        build = build_training(here, hook, accelerator, config, params, lambda line: None, simulated=True)
        make_state(build)
        trace.relabel(iter(optimizer_tensors(build)), "optimizer")
        trace.tape.n_params = sum(p.numel() for p in build.network.parameters())
        for tensor, layer in owned(build):
            trace.note(tensor, layer)
        narrate(build, trace)
        gc.collect()  # what is freed from here on, and when, is the step's doing
        trace.tape.settle()
        build.model.train()
        trace.phase = "forward"
        shape = (sequences, config.block_size)
        window = [
            (torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)) for _ in range(2)
        ]
        optimizer_step(build, hook, window, params.train.grad_clip)
        trace.tape.begin("end")
        trace.phase = "weights"
    return trace.tape, trace.owner


def make_state(build: Any) -> None:
    """Let an optimizer that makes its state in its first step make it now: later steps find it there."""
    import torch

    parameters = [p for group in build.optimizer.param_groups for p in group["params"]]
    if all(build.optimizer.state.get(p) for p in parameters):
        return
    for p in parameters:
        p.grad = torch.zeros_like(p)
    build.optimizer.step()
    build.optimizer.zero_grad()


def optimizer_tensors(build: Any) -> list[Any]:
    """The optimizer's state, and what else of memory it holds."""
    import torch

    inner = getattr(build.optimizer, "optimizer", build.optimizer)
    held = [value for value in vars(inner).values() if isinstance(value, dict)]
    held += list(inner.state.values())
    return [t for values in held for t in values.values() if torch.is_tensor(t)]


def owned(build: Any) -> Iterator[tuple[Any, int | None]]:
    """Parameters, buffers, gradients and the optimizer's state, each with its layer, or None."""
    layer_of = {
        tensor: i
        for i, layer in enumerate(build.network.layers)
        for tensor in (*layer.parameters(), *layer.buffers())
    }
    for tensor in (*build.network.parameters(), *build.network.buffers()):
        state = build.optimizer.state.get(tensor, {}).values()
        for value in (tensor, tensor.grad, *state):
            if hasattr(value, "untyped_storage"):
                yield value, layer_of.get(tensor)


def narrate(build: Any, trace: Any) -> None:
    """Let accelerator and layers tell the trace which part of the step begins."""
    accelerator, tape = build.accelerator, trace.tape
    accumulate, backward, clip = accelerator.accumulate, accelerator.backward, accelerator.clip_grad_norm_
    step, layers = build.optimizer.step, build.network.layers
    begun = micro_batch = 0
    trace.chunked_head = build.network.loss_chunk > 0

    def on_accumulate(*models: Any) -> Any:
        nonlocal begun, micro_batch
        micro_batch += 1
        if micro_batch > 1:
            gradients = (p.grad for p in build.model.parameters() if p.grad is not None)
            trace.relabel(gradients, "gradients")
            for tensor, layer in owned(build):
                trace.note(tensor, layer)
        tape.begin(f"forward {micro_batch}")
        begun = len(tape.kind)
        return accumulate(*models)

    def on_backward(loss: Any, **kwargs: Any) -> None:
        trace.keep_activations(begun)
        tape.begin(f"loss {micro_batch}")
        backward(loss, **kwargs)

    def before_layer(i: int) -> Any:
        def hook(layer: Any, args: Any) -> None:
            tape.begin(f"forward {micro_batch}", i)
            if i == 0 and args[0].requires_grad:
                args[0].register_hook(lambda gradient: tape.begin(f"tail {micro_batch}"))

        return hook

    def after_layer(i: int) -> Any:
        def hook(layer: Any, args: Any, out: Any) -> None:
            out.register_hook(lambda gradient: tape.begin(f"backward {micro_batch}", i))
            if i == len(layers) - 1:
                tape.begin(f"head {micro_batch}")

        return hook

    def update(function: Any) -> Any:
        def on_update(*args: Any, **kwargs: Any) -> Any:
            if accelerator.sync_gradients and trace.phase != "update":
                tape.begin("update")
                trace.phase = "update"
            return function(*args, **kwargs)

        return on_update

    accelerator.accumulate, accelerator.backward = on_accumulate, on_backward
    accelerator.clip_grad_norm_, build.optimizer.step = update(clip), update(step)
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(before_layer(i))
        layer.register_forward_hook(after_layer(i))


def prime_batch(plan: Plan) -> int:
    """A prime that divides none of the network's dimensions nor a strategy's numbers, such as the size of a chunk.

    At least 5, and at least MIN_TOKENS tokens long.
    """
    config = plan.model
    chosen = [
        v for s in plan.active for v in plan.options.get(s.name, {}).values() if type(v) is int and v > 0
    ]
    sizes = (
        *(config.n_embd, config.n_inner, config.n_head, config.n_kv_head, config.n_layer),
        *(config.block_size, config.vocab_size, config.head_dim, *chosen),
    )
    n = max(5, -(-MIN_TOKENS // config.block_size))
    while any(n % k == 0 for k in range(2, n)) or any(size % n == 0 for size in sizes):
        n += 1
    return n


def cublas_workspace(capability: tuple[int, int]) -> int:
    """Bytes that cuBLAS keeps per handle and stream: CUBLAS_WORKSPACE_CONFIG's default in torch's CUDABlas.cpp."""
    return 4096 * 8 * 1024 if capability >= (9, 0) else 4096 * 2 * 1024 + 16 * 8 * 1024


@contextlib.contextmanager
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one state per process, and a second run with another precision would clash with it."""
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    try:
        yield
    finally:
        reset()


@contextlib.contextmanager
def cuda_semantics(cuda: bool, capability: tuple[int, int] = (8, 0)) -> Iterator[None]:
    """Where device cpu stands for a card: what torch does in another way there.

    F.dropout on a CPU keeps a mask of the input's width, on CUDA one of bools. Attention's dropout sends a CPU to the
    path that holds [T, T], on CUDA it happens inside the kernel. rms_norm is taken apart on a CPU; CUDA has a kernel
    that keeps its input and one number a row (aten/src/ATen/native/cuda/layer_norm_kernel.cu, _fused_rms_norm_cuda).
    """
    import torch
    import torch.nn.functional as F

    import core.model

    class FusedRMSNorm(torch.autograd.Function):
        """The kernel's memory. It computes nothing."""

        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any) -> Any:
            rows = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
            ctx.save_for_backward(x, weight, rows)
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            x, weight, _ = ctx.saved_tensors
            return torch.empty_like(x), None if weight is None else torch.empty_like(weight)

    attention = F.scaled_dot_product_attention

    def without_dropout(
        q: Any, k: Any, v: Any, mask: Any = None, dropout_p: float = 0.0, *args: Any, **more: Any
    ) -> Any:
        return attention(q, k, v, more.pop("attn_mask", mask), 0.0, *args, **more)

    def dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return torch.ops.aten.native_dropout(x, p, True)[0] if training and p else x

    def rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
        return FusedRMSNorm.apply(x, weight)

    def shares_heads(q: Any) -> bool:
        return q.dtype != torch.float32 and capability >= (8, 0)

    with contextlib.ExitStack() as stack:
        if cuda:
            stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", without_dropout))
            stack.enter_context(mock.patch.object(F, "dropout", dropout))
            stack.enter_context(mock.patch.object(core.model, "shares_heads", shares_heads))
            stack.enter_context(mock.patch.object(F, "rms_norm", rms_norm))
            stack.enter_context(mock.patch.object(core.model, "takes_apart", lambda x: False))
        yield


@contextlib.contextmanager
def own_garbage() -> Iterator[None]:
    """What was there before is out of the garbage collector's sight, which makes a look at the rest fast."""
    if gc.get_freeze_count():  # by import_torch: what came since is little
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def movable_modules(fake: bool) -> Iterator[None]:
    """Module.to() swaps fake parameters, which the trace's weak references forbid: put new ones in their place."""
    import torch

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        made: dict[Any, Any] = {}
        for module in self.modules() if dtype else ():
            for name, p in module._parameters.items():
                if p is not None and p.is_floating_point():  # tied ones stay tied
                    made.setdefault(p, torch.nn.Parameter(p.detach().to(dtype), p.requires_grad))
                    module._parameters[name] = made[p]
            for name, b in module._buffers.items():
                if b is not None and b.is_floating_point():
                    module._buffers[name] = b.to(dtype)
        return self

    with mock.patch.object(torch.nn.Module, "to", to) if fake else contextlib.nullcontext():
        yield
