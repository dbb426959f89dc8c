"""Faults on purpose: what arms them, when they strike, and that every point is one that is passed."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import core
from core import faults
from core.cli import main
from core.errors import UserError, is_media, is_out_of_memory
from core.faults import KINDS, POINTS, VARIABLE, arm, disarm, point, spoil, when

REPO = Path(core.__file__).parents[1]
NAME = "train.window"


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    disarm()
    yield
    disarm()


def strikes(visits: int, name: str = NAME) -> list[int]:
    """At which of so many visits something was raised."""
    found = []
    for visit in range(1, visits + 1):
        try:
            point(name)
        except RuntimeError:
            found.append(visit)
    return found


# --- the points ---------------------------------------------------------------------------------------------


def test_nothing_is_armed_by_default() -> None:
    code = "import core.cli, core.faults; print(core.faults._armed)"
    environ = {k: v for k, v in os.environ.items() if k != VARIABLE} | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout == "{}\n"


def test_every_point_is_passed_somewhere() -> None:
    """A name in an f-string counts for each prefix that can stand there."""
    passed = set()
    for path in (REPO / "core").rglob("*.py"):
        source = path.read_text("utf-8")
        for name in re.findall(r'\b(?:point|spoil)\(f?"([^"]+)"', source):
            prefixes = ("checkpoint", "weights") if name.startswith("{what}") else ("",)
            passed |= {name.replace("{what}", prefix) for prefix in prefixes}
    assert passed == set(POINTS)


@pytest.mark.parametrize("what", ["checkpoint", "weights"])
def test_both_kinds_of_files_pass_the_points_of_writing(tmp_path: Path, what: str) -> None:
    from core.checkpoint import write_tensors

    seen: list[str] = []
    for name in POINTS:
        when(name, lambda name=name: seen.append(name))
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {}, what)
    assert seen == [f"{what}.{moment}" for moment in faults.WRITING]


def test_every_point_and_every_kind_is_explained() -> None:
    assert all(POINTS.values()) and all(KINDS.values())
    for kind in KINDS:
        arm(f"{NAME}={kind}")


# --- arming -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("train.window=crash", [1]),
        ("train.window=crash@1", [1]),
        ("train.window=crash@3", [3]),
        ("train.window=crash@2-4", [2, 3, 4]),
        ("train.window=crash@4-4", [4]),
        ("train.window=crash@5-100000", [5, 6]),
        (" train.window=crash@2 , step.loss=nan,, ", [2]),
        ("train.window=crash@1, train.window=crash@6", [6]),
        ("train.update=crash", []),
        ("", []),
        (" , ", []),
    ],
)
def test_visits(spec: str, expected: list[int]) -> None:
    arm(spec)
    assert strikes(6) == expected


def test_each_point_counts_its_own_visits() -> None:
    arm("train.window=crash@2, train.update=crash@1")
    assert strikes(1) == [] and strikes(2, "train.update") == [1] and strikes(1) == [1]


def test_armed_again_it_counts_again() -> None:
    arm("train.window=crash@2")
    assert strikes(1) == []
    arm("train.window=crash@2")
    assert strikes(3) == [2]


def test_disarmed_nothing_happens() -> None:
    arm("train.window=crash@1-100, step.loss=nan@1-100")
    when("train.update", lambda: pytest.fail("it is disarmed"))
    disarm()
    assert strikes(3) == [] and strikes(1, "train.update") == []
    assert spoil("step.loss", torch.ones(())).item() == 1.0


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("train.windov=kill", ["'train.windov'", "Did you mean 'train.window'?", "train.micro_batch"]),
        ("train.window=kil", ["'kil'", "Did you mean 'kill'?", "terminate"]),
        ("train.window", ["'train.window' is not `point=kind@visit`"]),
        ("train.window=", ["is not `point=kind@visit`"]),
        ("train.window=kill@", ["is not `point=kind@visit`"]),
        ("train.window=kill@-1", ["is not `point=kind@visit`"]),
        ("train.window=kill@1-", ["is not `point=kind@visit`"]),
        ("train.window=kill@1.5", ["is not `point=kind@visit`"]),
        ("train.window=kill;step.loss=nan", ["is not `point=kind@visit`"]),
        ("a=kill, train.window=b, c", ["'a'", "'b'", "'c'"]),
    ],
)
def test_what_it_does_not_know_is_named(spec: str, told: list[str]) -> None:
    with pytest.raises(UserError) as e:
        arm(spec)
    assert all(word in str(e.value) for word in [VARIABLE, *told]), str(e.value)


@pytest.mark.parametrize("visits", ["0", "0-0", "5-3"])
def test_visits_that_never_come_are_an_error(visits: str) -> None:
    with pytest.raises(UserError, match=visits):
        arm(f"train.window=crash@{visits}")


def test_a_mistake_arms_nothing() -> None:
    with pytest.raises(UserError):
        arm("train.window=crash, train.update=crach")
    assert strikes(1) == []


# --- what happens -------------------------------------------------------------------------------------------


def test_errors_are_those_that_the_system_and_torch_raise() -> None:
    for kind, number in (
        ("full", errno.ENOSPC),
        ("quota", getattr(errno, "EDQUOT", errno.ENOSPC)),
        ("readonly", errno.EROFS),
    ):
        arm(f"{NAME}={kind}")
        with pytest.raises(OSError) as e:
            point(NAME)
        assert e.value.errno == number and is_media(e.value) and e.value.strerror
    arm(f"{NAME}=oom")
    with pytest.raises(RuntimeError) as no_memory:
        point(NAME)
    assert is_out_of_memory(no_memory.value)
    arm(f"{NAME}=crash")
    with pytest.raises(RuntimeError) as bug:
        point(NAME)
    assert not is_out_of_memory(bug.value)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(("kind", "name"), [("interrupt", "SIGINT"), ("terminate", "SIGTERM")])
def test_signals_are_real(kind: str, name: str) -> None:
    number, heard = getattr(signal, name), []
    before = signal.signal(number, lambda *_: heard.append(name))
    try:
        arm(f"{NAME}={kind}@2")
        point(NAME)
        assert heard == []
        point(NAME)
        assert heard == [name]
    finally:
        signal.signal(number, before)


def test_kill_runs_no_handler() -> None:
    code = f"""
import atexit
from core import faults
atexit.register(print, "a handler ran")
faults.arm("{NAME}=kill@2")
faults.point("{NAME}")
try:
    print("once", flush=True)
    faults.point("{NAME}")
finally:
    print("twice", flush=True)
"""
    environ = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert ended.stdout == "once\n"
    assert ended.returncode == (signal.SIGTERM if os.name == "nt" else -signal.SIGKILL)


def test_slow_takes_longer_and_does_nothing_else() -> None:
    arm(f"{NAME}=slow, step.loss=slow")
    start = time.perf_counter()
    point(NAME)
    assert time.perf_counter() - start >= 0.05
    assert spoil("step.loss", 1.5) == 1.5


def test_a_spoiled_number_still_has_its_gradient() -> None:
    for kind, bad in (("nan", math.isnan), ("inf", math.isinf)):
        arm(f"step.loss={kind}@2")
        weight = torch.ones(3, requires_grad=True)
        loss = weight.sum()
        assert spoil("step.loss", loss) is loss
        spoiled = spoil("step.loss", loss)
        spoiled.backward()
        assert bad(spoiled.item()) and all(map(bad, weight.grad.tolist()))
        assert spoil("step.loss", loss) is loss


def test_when_calls_at_every_visit_and_changes_nothing() -> None:
    calls: list[int] = []
    when("step.loss", lambda: calls.append(1))
    value = torch.ones(2)
    assert all(spoil("step.loss", value) is value for _ in range(3))
    point("step.loss")
    assert len(calls) == 4


def test_when_knows_the_points() -> None:
    with pytest.raises(AssertionError, match=r"train\.windov"):
        when("train.windov", lambda: None)


# --- commands -----------------------------------------------------------------------------------------------


def test_the_variable_reaches_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").touch()
    monkeypatch.setenv(VARIABLE, "train.window=crash@2")
    assert CliRunner().invoke(main, ["runs", "list"]).exit_code == 0
    assert strikes(3) == [2]


def test_a_mistake_in_the_variable_ends_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").touch()
    monkeypatch.setenv(VARIABLE, "checkpoint.writen=kill")
    result: Any = CliRunner().invoke(main, ["runs", "list"])
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert VARIABLE in result.output and "Did you mean 'checkpoint.written'?" in result.output
