"""The layers as compiled kernels, and the probe that decides whether they become that.

One layer is compiled, and its kernels serve all of them; embedding, head and loop stay as they are. What is compiled
is what earlier strategies made of `layer.forward`, so that a layer whose activations are computed again is one graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from core.measure import free_cached
from core.snapshot import RandomState

if TYPE_CHECKING:
    from core.hookspecs import Build

# What a compiler's complaint means, by a word in it; the first that is found.
REMEDIES = {
    "Python.h": "install Python's headers (python3-dev, python3-devel)",
    "too long": "set TORCHINDUCTOR_CACHE_DIR to a short path",
    "No space left": "make room, or set TORCHINDUCTOR_CACHE_DIR to another disk",
    "out of memory": "close what else uses the memory",
    "riton": "install the Triton that fits this torch (on Windows the package triton-windows)",
    "ompiler": "install a C++ compiler that works, or set CXX to one",
    "C++": "install a C++ compiler that works, or set CXX to one",
}


def compile_layers(build: Build) -> bool:
    """Compile each layer in place and return True, or say why they stay as they are, with the remedy.

    Decided before the first step, by a forward and backward pass of one layer. Random states, gradients and weights
    are left as they were.
    """
    device, layers = build.accelerator.device, list(build.network.layers)
    build.say("compiling the layers; the first time on a machine takes longest")
    random = RandomState.now(device)
    torch.compiler.reset()  # kernels of an earlier build in this process count towards the limit of dynamo's cache
    try:
        forwards = [where_it_trains(layer.forward) for layer in layers]
        probe(build, forwards[0])
    except Exception as error:  # compilers fail in more ways than anyone could list
        build.say(f"note: compiling does not work here, the layers run uncompiled: {explained(error)}")
        return False
    finally:
        random.restore(device)
        free_cached(device)
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    return True


def where_it_trains(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` compiled where gradients are wanted; elsewhere as it is.

    Measuring and generating come in many shapes, each of which would be compiled anew; so they compute as the stage
    evaluate does. dynamic=False: kernels then depend on the shapes alone, not on those that came before, and a
    resumed run computes with the same. fallback_random: dropout draws the numbers that it draws uncompiled.
    """
    compiled = torch.compile(forward, dynamic=False, options={"fallback_random": True})

    def call(*args: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args)

    return call


def probe(build: Build, forward: Callable[..., Any]) -> None:
    """The first layer's forward and backward pass over a micro-batch of the planned size. Raises what goes wrong."""
    size = build.plan["micro_batch"], build.network.config.block_size
    tokens = torch.zeros(size, dtype=torch.int64, device=build.accelerator.device)
    layer = build.network.layers[0]
    with torch.enable_grad(), build.accelerator.autocast():
        args = arguments(layer, lambda: build.network.hidden(tokens, None))
        out = forward(*args)
    # Not backward(), which would leave gradients in the weights.
    wanted = [args[0], *(p for p in layer.parameters() if p.requires_grad)]
    torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)


def arguments(layer: Any, run: Callable[[], Any]) -> tuple[Any, ...]:
    """What `run` calls the layer with; it gets no further."""

    class Reached(Exception):
        pass

    def stop(layer: Any, args: tuple[Any, ...]) -> None:
        raise Reached(args)

    handle = layer.register_forward_pre_hook(stop)
    try:
        run()
    except Reached as reached:
        found: tuple[Any, ...] = reached.args[0]
        return found
    finally:
        handle.remove()
    raise AssertionError("the network does not call its first layer")


def explained(error: Exception) -> str:
    """One line: what the compiler says, and what to do."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    said = next((line for line in lines if re.search(r"\berror: ", line)), lines[0])
    remedy = next((r for word, r in REMEDIES.items() if word in text), "TORCH_LOGS=+dynamo shows more")
    return f"{said if len(said) <= 200 else said[:197] + '...'}; {remedy}"
