"""Importing torch, which takes seconds."""

from __future__ import annotations

import gc
import sys


def import_torch(training: bool) -> None:
    """Import torch with the garbage collector off, and keep all there is by then out of its sight.

    torch makes a million objects that stay, which it would look at again and again, and once more at the end: with
    torch._dynamo 2.9 seconds, without that 1.8 (docs/lab-log.md). training: with what a training step imports anyway.
    """
    if ("torch._dynamo" if training else "torch") in sys.modules:
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch

        if training:
            import accelerate  # noqa: F401
            import torch._dynamo  # noqa: F401 - every optimizer of torch needs it, and fake tensors do
    finally:
        gc.freeze()
        if collects:
            gc.enable()
