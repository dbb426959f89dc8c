"""A signal leaves a note, and the next one ends the process; a `dvc` that is gone counts as a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from core import stop as module
from core.stop import LAUNCHED, SIGNALS, Stop, StopRequested

REPO = Path(__file__).parents[2]
HERE = [name for name in SIGNALS if hasattr(signal, name)]
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


def handlers() -> dict[str, Any]:
    return {name: signal.getsignal(getattr(signal, name)) for name in HERE}


@pytest.fixture(autouse=True)
def signals_are_heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A signal that Stop does not take fails the test, instead of ending them all."""

    def untaken(number: int, frame: Any) -> None:
        raise AssertionError(f"nobody took {signal.Signals(number).name}")

    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.delenv(LAUNCHED, raising=False)
    before = handlers()
    for name in HERE:
        signal.signal(getattr(signal, name), untaken)
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, which no `dvc` has started."""
    command = [sys.executable, "-c", code]
    environ = {**os.environ, "PYTHONPATH": str(REPO), **environ}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)


# --- signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HERE)
def test_a_signal_only_leaves_a_note(name: str) -> None:
    with Stop() as stop:
        stop.check()
        signal.raise_signal(getattr(signal, name))
        assert stop.requested == name
        with pytest.raises(StopRequested, match=f"^{name}$"):
            stop.check()
        with pytest.raises(StopRequested):
            stop.check()  # nobody has to catch the first


@pytest.mark.parametrize("patient", [False, True])
@pytest.mark.parametrize("signalled", [False, True])
def test_handlers_are_put_back(patient: bool, signalled: bool) -> None:
    before = handlers()
    with Stop(patient):
        assert all(handler != before[name] for name, handler in handlers().items())
        if signalled:
            signal.raise_signal(signal.SIGTERM)
    assert handlers() == before


def test_handlers_are_put_back_where_the_block_fails() -> None:
    before = handlers()
    with pytest.raises(RuntimeError), Stop():
        raise RuntimeError
    assert handlers() == before


def test_after_the_first_signal_every_one_has_its_default_action() -> None:
    with Stop():
        signal.raise_signal(signal.SIGINT)
        assert set(handlers().values()) == {signal.SIG_DFL}


@POSIX
@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_second_signal_ends_the_process(first: str, second: str) -> None:
    ended = python(f"""
import signal
from core.stop import Stop
with Stop() as stop:
    signal.raise_signal(signal.{first})
    print(stop.requested, flush=True)
    signal.raise_signal(signal.{second})
    print("still here")
""")
    assert ended.stdout.split() == [first]
    assert ended.returncode == -getattr(signal, second)


def test_patient_ignores_what_comes_after_the_first() -> None:
    """Launchers send SIGTERM to processes that heard the Ctrl-C themselves."""
    ended = python(f"""
import signal
from core.stop import Stop, StopRequested
with Stop(patient=True) as stop:
    for name in {[*HERE, *HERE]}:
        signal.raise_signal(getattr(signal, name))
    try:
        stop.check()
    except StopRequested as request:
        print(request)
""")
    assert ended.returncode == 0 and ended.stdout.split() == HERE[:1], ended.stderr


@POSIX
def test_nohup_stays_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop() as stop:
        signal.raise_signal(signal.SIGHUP)
        stop.check()
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, "not even after the first signal"
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before, seen = handlers(), []

    def work() -> None:
        with Stop() as stop:
            seen.append(handlers())
            stop.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before] and handlers() == before


@POSIX
def test_a_long_call_is_not_interrupted() -> None:
    """A checkpoint on its way to the disk is written to its end (PEP 475)."""
    with Stop() as stop:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        start = time.monotonic()
        time.sleep(0.2)
        assert time.monotonic() - start >= 0.2 and stop.requested == "SIGTERM"


# --- a dvc that is gone -------------------------------------------------------------------------------------


class Parent:
    def __init__(self) -> None:
        self.running, self.state = True, psutil.STATUS_SLEEPING

    def is_running(self) -> bool:
        return self.running

    def status(self) -> str:
        return self.state


@pytest.fixture
def parents(monkeypatch: pytest.MonkeyPatch) -> list[Parent]:
    """A shell and a dvc; looked at every time."""
    both = [Parent(), Parent()]
    monkeypatch.setattr(module, "PARENT_SECONDS", -1.0)
    monkeypatch.setattr(module, "_parents", lambda: both)
    monkeypatch.setenv("DVC_STAGE", "train")
    return both


@pytest.mark.parametrize("which", [0, 1])
def test_a_parent_that_is_gone_means_stop(parents: list[Parent], which: int) -> None:
    with Stop() as stop:
        stop.check()
        parents[which].running = False
        with pytest.raises(StopRequested, match="`dvc`"):
            stop.check()
        parents[which].running = True
        assert stop.look(), "once asked for, it stays so"


def test_a_launcher_that_is_gone_is_told_as_such(
    parents: list[Parent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_STAGE")
    with Stop() as stop:
        parents[1].running = False
        with pytest.raises(StopRequested, match="launcher"):
            stop.check()


def test_a_parent_that_nobody_buried_is_gone_too(parents: list[Parent]) -> None:
    with Stop() as stop:
        parents[1].state = psutil.STATUS_ZOMBIE
        with pytest.raises(StopRequested, match="`dvc`"):
            stop.check()


def test_a_signal_that_came_first_is_the_reason(parents: list[Parent]) -> None:
    with Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        parents[1].running = False
        with pytest.raises(StopRequested, match="SIGTERM"):
            stop.check()


def test_parents_are_looked_at_once_a_second(parents: list[Parent], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two micro-batches there is no time for more."""
    now = [100.0]
    monkeypatch.setattr(module, "PARENT_SECONDS", 1.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Stop() as stop:
        stop.check()
        parents[0].running = False
        now[0] += 0.9
        stop.check()
        now[0] += 0.2
        with pytest.raises(StopRequested):
            stop.check()


def test_living_processes() -> None:
    assert module._lives(psutil.Process())
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.DEVNULL) as child:
        process = psutil.Process(child.pid)
        deadline = time.monotonic() + 10
        while os.name != "nt" and process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.01)
        if os.name != "nt":
            assert not module._lives(process), "a zombie"
        child.wait()
        assert not module._lives(process), "gone"


PARENTS = "import json; from core.stop import Stop; print(json.dumps([p.pid for p in Stop().parents]))"


def test_without_dvc_a_training_may_outlive_who_started_it() -> None:
    assert python(PARENTS).stdout == "[]\n"


def test_under_dvc_its_parent_is_watched_whatever_it_is_called() -> None:
    assert json.loads(python(PARENTS, DVC_STAGE="train").stdout) == [os.getpid()]


def test_under_a_launcher_that_and_what_started_it_are_watched() -> None:
    found = json.loads(python(PARENTS, **{LAUNCHED: "told", "DVC_STAGE": "train"}).stdout)
    assert found == [os.getpid(), os.getppid()]


@POSIX
@pytest.mark.parametrize("shells", [0, 1, 2])
def test_all_between_dvc_and_the_stage_are_watched(tmp_path: Path, shells: int) -> None:
    """`dvc repro` runs commands in a shell, which outlives it."""
    (tmp_path / "parents.py").write_text(PARENTS, encoding="utf-8")
    command = f"'{sys.executable}' '{tmp_path / 'parents.py'}'"
    for i in range(shells):
        (tmp_path / f"{i}.sh").write_text(f"echo $$\n{command}\ntrue\n", encoding="utf-8")
        command = f"sh '{tmp_path / f'{i}.sh'}'"
    code = "import os, shlex, subprocess; print(os.getpid(), flush=True); "
    code += f"subprocess.run(shlex.split({command!r}))"
    (tmp_path / "dvc").write_text(code, encoding="utf-8")
    environ = os.environ | {"PYTHONPATH": str(REPO), "DVC_STAGE": "train"}
    out = subprocess.run(
        [sys.executable, str(tmp_path / "dvc")], env=environ, capture_output=True, text=True, check=True
    ).stdout
    *pids, found = out.splitlines()
    assert len(pids) == shells + 1
    assert json.loads(found) == [int(pid) for pid in reversed(pids)]
