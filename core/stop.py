"""Leaving in order: Ctrl-C, SIGTERM, a closed terminal or a dead `dvc` ask a run to save and end.

A signal only leaves a note, which the run reads between two micro-batches. The next signal ends the process at once,
even inside a long call; a checkpoint that is being written then has not got its name yet.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish", "cmd", "powershell", "pwsh")
PARENT_SECONDS = 1.0


class StopRequested(Exception):
    """Raised where a run can be left: its text says what asked for it."""


class Stop:
    """Context manager that listens while a run trains. patient: later signals do nothing, as launchers send several."""

    def __init__(self, patient: bool = False) -> None:
        self.requested = ""
        self.patient = patient
        self.before: dict[int, Any] = {}
        self.parents: list[Any] = []
        self.looked = time.monotonic()

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)
                # nohup ignores SIGHUP for us: so it stays
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._on_signal)
        if "DVC_STAGE" in os.environ:
            self.parents = _parents()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name
        if not self.patient:
            for each in self.before:
                signal.signal(each, signal.SIG_DFL)

    def check(self) -> None:
        """Raise StopRequested where something asked for it."""
        if not self.requested and self.parents and time.monotonic() - self.looked > PARENT_SECONDS:
            self.looked = time.monotonic()
            if not all(map(_lives, self.parents)):
                self.requested = "`dvc` is gone"
        if self.requested:
            raise StopRequested(self.requested)


def _lives(process: Any) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _parents() -> list[Any]:
    """The process that started us, and where that is a shell the one behind it: `dvc repro` runs commands in one."""
    import psutil

    try:
        parents = psutil.Process().parents()
        shell = parents[0].name().removesuffix(".exe").lower() in SHELLS
    except (psutil.Error, IndexError):
        return []
    return parents[: 2 if shell else 1]
