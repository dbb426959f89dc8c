"""Leaving in order: Ctrl-C, SIGTERM, a closed terminal or a dead `dvc` ask a run to save and end.

A signal only leaves a note, which the run reads between two micro-batches. The next signal ends the process at once,
even inside a long call; a checkpoint that is being written then has not got its name yet.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
PARENT_SECONDS = 1.0
LINE = 6
"""Ancestors among which dvc is looked for."""
# Set for the processes that we start, which must not start others: the file that takes their exit code.
LAUNCHED = "TIGHTFIT_LAUNCHED"


class StopRequested(Exception):
    """Raised where a run can be left: its text says what asked for it."""


class Stop:
    """Context manager that listens while a run trains; made when the stage begins, so that it knows who started it.

    patient: later signals do nothing, as launchers send several.
    """

    def __init__(self, patient: bool = False) -> None:
        self.requested = ""
        self.patient = patient
        self.before: dict[int, Any] = {}
        self.parents = _parents()
        self.looked = 0.0

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)
                # nohup ignores SIGHUP for us: so it stays
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name
        if not self.patient:
            for each in self.before:
                signal.signal(each, signal.SIG_DFL)

    def look(self) -> bool:
        """Whether something asked for an end; looks at the parents once a second."""
        if not self.requested and self.parents and time.monotonic() - self.looked > PARENT_SECONDS:
            self.looked = time.monotonic()
            if not all(map(_lives, self.parents)):
                self.requested = (
                    "`dvc` being gone" if "DVC_STAGE" in os.environ else "its launcher being gone"
                )
        return bool(self.requested)

    def check(self) -> None:
        """Raise StopRequested where something asked for it."""
        if self.look():
            raise StopRequested(self.requested)


def _lives(process: Any) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _parents() -> list[Any]:
    """The processes that this one shall not outlive: those between it and `dvc`, or between it and our launcher.

    None where neither started it: a training under nohup may outlive its terminal.
    """
    import psutil

    if "DVC_STAGE" not in os.environ and LAUNCHED not in os.environ:
        return []
    try:
        parents = psutil.Process().parents()[:LINE]
    except psutil.Error:
        return []
    if LAUNCHED in os.environ:  # torchrun, and the stage that started it, which looks after dvc
        return parents[:2]
    # `dvc repro` runs commands in a shell, and a virtual environment's python.exe on Windows starts another
    return parents[: next((i + 1 for i, p in enumerate(parents) if _is_dvc(p)), 1)]


def _is_dvc(process: Any) -> bool:
    import psutil

    try:
        return any(Path(word).stem.lower() in ("dvc", "dvc-script") for word in process.cmdline()[:4])
    except psutil.Error:
        return False
