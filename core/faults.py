"""Faults on purpose: named points where a rehearsal can kill the process, fill the disk or spoil a number.

`tightfit selftest --faults` and the tests arm them; TIGHTFIT_FAULTS does so for any command, as in
`TIGHTFIT_FAULTS="checkpoint.written=kill@2, step.loss=nan@5-7" tightfit train`: at the second visit, at visits 5 to 7.
Where nothing is armed a point is one look into an empty dict.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

from core.errors import UserError, did_you_mean

VARIABLE = "TIGHTFIT_FAULTS"

WRITING = {
    "begin": "nothing has been written",
    "header": "the header has been written",
    "written": "every byte has been written, none is sure to be on the disk",
    "synced": "every byte is on the disk, under the private name",
    "renamed": "it has its name; the folder may not be on the disk",
}
POINTS = {
    **{f"checkpoint.{moment}": f"a checkpoint: {meaning}" for moment, meaning in WRITING.items()},
    "checkpoint.durable": "a checkpoint would survive a power cut; older ones are still there",
    "checkpoint.pruned": "older checkpoints are gone",
    **{f"weights.{moment}": f"exported weights: {meaning}" for moment, meaning in WRITING.items()},
    "train.loop": "the first step of this life is about to begin",
    "train.window": "an optimizer step is about to begin",
    "train.micro_batch": "a micro-batch is about to begin",
    "train.backward": "a micro-batch's gradients are there",
    "train.update": "the optimizer is about to change the weights",
    "train.updated": "the optimizer has changed the weights",
    "train.evaluate": "a batch of an evaluation is about to begin",
    "train.log": "a line of log.jsonl is about to be written",
    "train.export": "the outputs of a finished run are about to be written",
    "tokenize.batch": "a batch of tokens is about to be written",
    "step.loss": "the loss of a micro-batch, before backward",
    "step.gradient": "the gradients of a window, before they are clipped",
}
KINDS = {
    "kill": "SIGKILL: no handler runs",
    "interrupt": "SIGINT, as Ctrl-C",
    "terminate": "SIGTERM",
    "full": "OSError ENOSPC, the disk is full",
    "quota": "OSError EDQUOT, the user's share of the disk is full",
    "readonly": "OSError EROFS, the disk is read-only",
    "oom": "RuntimeError, as torch's allocator raises it",
    "crash": "RuntimeError, a bug",
    "slow": "it takes 50 ms longer",
    "shrink": "Linux: from now on the process gets 48 MiB more memory and no more",
    "nan": "what passes becomes NaN",
    "inf": "what passes becomes infinite",
}
ERRNOS = {"full": errno.ENOSPC, "quota": getattr(errno, "EDQUOT", errno.ENOSPC), "readonly": errno.EROFS}
MESSAGES = {"oom": "DefaultCPUAllocator: can't allocate memory (rehearsed)", "crash": "a bug (rehearsed)"}

_armed: dict[str, Callable[[Any], Any]] = {}


def point(name: str) -> None:
    """Pass a point; whatever is armed there happens. Raises OSError or RuntimeError where that was asked for."""
    if name in _armed:
        _armed[name](None)


def spoil(name: str, value: Any) -> Any:
    """Pass a tensor through a point: itself, or spoiled where that is armed."""
    return _armed[name](value) if name in _armed else value


def when(name: str, action: Callable[[], Any]) -> None:
    """Call `action` at each visit of a point."""
    assert name in POINTS, name

    def visit(value: Any) -> Any:
        action()
        return value

    _armed[name] = visit


def disarm() -> None:
    _armed.clear()


def arm(spec: str) -> None:
    """Arm "point=kind@visit, …", all of it or nothing. Raises UserError naming what it does not know."""
    problems: list[str] = []
    wanted: dict[str, Callable[[Any], Any]] = {}
    for part in filter(None, (p.strip() for p in spec.split(","))):
        found = re.fullmatch(r"([\w.]+)=(\w+)(?:@(\d+)(?:-(\d+))?)?", part)
        if not found:
            problems.append(f"{part!r} is not `point=kind@visit`")
            continue
        name, kind, first, last = found.groups()
        for word, known in ((name, POINTS), (kind, KINDS)):
            if word not in known:
                problems.append(f"unknown: {word!r}.{did_you_mean(word, known)} Known: {', '.join(known)}")
        start = int(first or 1)
        end = int(last or start)
        if not 1 <= start <= end:
            problems.append(f"{part!r}: visits are counted from 1, as in @2 or @2-5")
        wanted[name] = _Visits(kind, start, end)
    if problems:
        raise UserError(problems, title=VARIABLE)
    _armed.update(wanted)


class _Visits:
    """Counts the visits of a point and strikes at some of them."""

    def __init__(self, kind: str, first: int, last: int) -> None:
        self.kind, self.first, self.last, self.count = kind, first, last, 0

    def __call__(self, value: Any) -> Any:
        self.count += 1
        return strike(self.kind, value) if self.first <= self.count <= self.last else value


def strike(kind: str, value: Any = None) -> Any:
    """Do what `kind` says."""
    if kind == "kill":
        os.kill(
            os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM)
        )  # on Windows either ends the process at once
    elif kind in ("interrupt", "terminate"):
        signal.raise_signal(signal.SIGINT if kind == "interrupt" else signal.SIGTERM)
    elif kind in ERRNOS:
        raise OSError(ERRNOS[kind], os.strerror(ERRNOS[kind]))
    elif kind in MESSAGES:
        raise RuntimeError(MESSAGES[kind])
    elif kind == "slow":
        time.sleep(0.05)
    elif kind == "shrink":
        _limit_memory(48 << 20)
    elif value is not None:
        return value * float(kind)
    return value


def _limit_memory(more: int) -> None:
    import resource

    import psutil

    limit = psutil.Process().memory_info().vms + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
