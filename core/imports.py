"""Importing what takes seconds."""

from __future__ import annotations

import gc
import importlib
import sys

TRAINING = ("torch", "accelerate", "torch._dynamo")
"""What a training step needs; torch._dynamo because every optimizer of torch imports it, and fake tensors do."""


def import_uncollected(*names: str) -> None:
    """Import modules with the garbage collector off, and keep all there is by then out of its sight.

    torch and torch._dynamo make a million objects that stay, which it would look at again and again, and once more at
    the end: 2.9 seconds for those two, without it 1.8 (docs/lab-log.md).
    """
    if all(name in sys.modules for name in names):
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        gc.freeze()
        if collects:
            gc.enable()
