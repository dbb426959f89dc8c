"""Python's garbage collector, kept away from where it finds nothing and costs time."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """With the collector off; also a decorator."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def import_torch(training: bool) -> None:
    """Import torch with the collector off, and keep all there is by then out of its sight.

    torch makes a million objects that stay, which it would look at again and again, and once more at the end: with
    torch._dynamo 2.9 seconds, without that 1.8 (docs/lab-log.md). training: with what a training step imports anyway.
    """
    if ("torch._dynamo" if training else "torch") in sys.modules:
        return
    with uncollected():
        import torch

        if training:
            import accelerate  # noqa: F401
            import torch._dynamo  # noqa: F401 - every optimizer of torch needs it, and fake tensors do
        gc.freeze()
