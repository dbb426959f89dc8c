"""Stopped anywhere and run again, a training ends bit for bit where it would have."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import core.env_check
import core.launch
from core import faults
from core.checkpoint import listing
from core.errors import PluginError, Stopped, Unsound, UserError
from core.hardware import read_facts
from core.launch import run_training
from core.project import Project
from core.run import NUMERICS, Run, _plain
from core.selftest.kills import wait_until

SMALL: dict[str, Any] = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
    "train": {"max_steps": 6, "batch_tokens": 128, "micro_batch": 2, "eval_interval": 3, "eval_tokens": 64},
}


@pytest.fixture(autouse=True)
def disarmed() -> Any:
    yield
    faults.disarm()


def train(project: Project, spec: str = "", fresh: bool = False) -> list[str]:
    lines: list[str] = []
    faults.disarm()
    faults.arm(spec)
    run_training(project, lines.append, fresh)
    return lines


def stop_and_go_on(project: Project, *specs: str) -> list[str]:
    """Stopped once for each spec, then run to the end."""
    for spec in specs:
        with pytest.raises(Stopped, match="everything is saved"):
            train(project, spec)
    return train(project)


def result(project: Project) -> tuple[bytes, bytes, bytes]:
    names = ("models/final/model.safetensors", "reports/curve.tsv", "reports/curve_val.tsv")
    return tuple((project.root / name).read_bytes() for name in names)  # type: ignore[return-value]


def merged(**sections: Any) -> dict[str, Any]:
    return {key: {**SMALL.get(key, {}), **sections.get(key, {})} for key in {*SMALL, *sections}}


def hardware(*add: str, **more: Any) -> dict[str, Any]:
    return {"profile": "cpu", "strategies": {"add": list(add), "remove": ["bf16"]}, **more}


CASES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "dropout": {"model": {"architecture": "gpt2", "dropout": 0.3}},
    "no accumulation": {"train": {"micro_batch": 8}},
    "no clipping": {"train": {"grad_clip": 0.0}},
    "8-bit moments": {"hardware": hardware("adamw8bit")},
    "bf16 weights": {
        "hardware": {**hardware("bf16_weights"), "strategies": {"add": ["bf16", "bf16_weights"]}}
    },
    "checkpointing": {
        "hardware": hardware("checkpointing"),
        "model": {"architecture": "gpt2", "dropout": 0.3},
    },
    "two workers": {"hardware": hardware(options={"loader": {"workers": 2}})},
    "many epochs": {"train": {"max_steps": 12, "batch_tokens": 1024, "micro_batch": 16, "eval_interval": 6}},
}


@pytest.mark.parametrize("name", CASES)
def test_stopped_in_the_middle_of_a_window_it_ends_the_same(
    ready: Callable[..., Project], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (core.env_check, core.launch):  # a CPU without bf16 instructions emulates them
        monkeypatch.setattr(module, "read_facts", lambda: replace(read_facts(), cpu_bf16=True))
    sections = merged(**CASES[name])
    steps, micro_batches = sections["train"]["max_steps"], 4 if name != "no accumulation" else 1
    whole = ready("whole", **sections)
    train(whole)
    project = ready("stopped", **sections)
    at = [micro_batches * steps // 2 + 1, 2 * micro_batches // 3 + 1]
    said = stop_and_go_on(project, *(f"train.backward=interrupt@{n}" for n in at))
    assert any("going on after step" in line for line in said)
    assert result(project) == result(whole)


def test_exact_at_every_micro_batch(ready: Callable[..., Project]) -> None:
    """One life per micro-batch: each does one, saves and leaves."""
    sections = merged(model={"architecture": "gpt2", "dropout": 0.3}, train={"max_steps": 3})
    whole = ready("whole", **sections)
    train(whole)
    project = ready("stopped", **sections)
    lives = 0
    while True:
        try:
            train(project, "train.backward=interrupt@1")
            break
        except Stopped:
            lives += 1
    assert lives == 12
    assert result(project) == result(whole)


def test_stopped_inside_an_evaluation_it_evaluates_again(ready: Callable[..., Project]) -> None:
    whole = ready("whole", **SMALL)
    train(whole)
    project = ready("stopped", **SMALL)
    stop_and_go_on(project, "train.evaluate=interrupt@2", "train.evaluate=interrupt@1")
    assert result(project) == result(whole)


def test_a_finished_run_is_exported_again_at_once(ready: Callable[..., Project]) -> None:
    project = ready(**SMALL)
    train(project)
    want = result(project)
    (project.final_model / "model.safetensors").unlink()
    assert any("going on after step 6" in line for line in train(project, "train.window=crash"))
    assert result(project) == want


def test_fresh_begins_again(ready: Callable[..., Project]) -> None:
    project = ready(**SMALL)
    train(project)
    want = result(project)
    assert not any("going on" in line for line in train(project, fresh=True))
    assert result(project) == want


def test_going_back_to_earlier_params_goes_on_with_their_run(ready: Callable[..., Project]) -> None:
    project = ready(**SMALL)
    with pytest.raises(Stopped):
        train(project, "train.backward=interrupt@10")
    train(ready(**merged(train={"lr": 0.002})))
    project = ready(**SMALL)
    assert any("going on after step 2 and 2 micro-batches" in line for line in train(project))
    whole = ready("whole", **SMALL)
    train(whole)
    assert result(project) == result(whole)
    assert len(list(project.runs.iterdir())) == 2


def test_another_micro_batch_in_the_middle_of_a_window_begins_the_window_again(
    ready: Callable[..., Project],
) -> None:
    """The same batches: the result differs by rounding alone."""
    whole = ready("whole", **SMALL)
    train(whole)
    project = ready("moved", **SMALL)
    with pytest.raises(Stopped):
        train(project, "train.backward=interrupt@10")
    project = ready("moved", **merged(train={"micro_batch": 4}))
    said = train(project)
    assert any("micro_batch 2 → 4" in line for line in said)
    assert any(line.startswith("going on after step 2 (") for line in said)
    for name, tensor in load_file(whole.final_model / "model.safetensors").items():
        other = load_file(project.final_model / "model.safetensors")[name]
        torch.testing.assert_close(other, tensor, rtol=1e-3, atol=1e-4)


def test_a_log_that_was_lost_costs_the_curves_their_points_and_nothing_else(
    ready: Callable[..., Project],
) -> None:
    project = ready(**SMALL)
    train(project)
    (weights, *_) = result(project)
    next(project.runs.glob("*/log.jsonl")).write_bytes(b"\xff{broken\n")
    assert any("is damaged" in line for line in train(project))
    assert result(project)[0] == weights


def test_best_weights_that_are_gone_are_told(ready: Callable[..., Project]) -> None:
    """The best is of step 3; a run at step 4 or later cannot make it again."""
    sections = merged(train={"max_steps": 9, "eval_interval": 3, "lr": 1e-5})
    project = ready(**sections)
    with pytest.raises(Stopped):
        train(project, "train.backward=interrupt@18")
    best = next(project.runs.glob("*/best"))
    (best / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="should hold the best weights so far, of step 3"):
        train(project)


def test_a_run_in_minutes_counts_all_its_lives(ready: Callable[..., Project]) -> None:
    sections = merged(train={"max_minutes": 0.05})
    sections["train"].pop("max_steps")
    project = ready(**sections)
    with pytest.raises(Stopped):
        train(project, "train.backward=interrupt@40")
    start = time.perf_counter()
    train(project)
    seconds = json.loads((project.reports / "train.json").read_text("utf-8"))["seconds"]
    assert 3.0 <= seconds < 6.0 and time.perf_counter() - start < 6.0


STATEFUL = '''
from core.hookspecs import Phase, Strategy, hookimpl


class Counting(Strategy):
    """Adds noise that depends on how often it was called: a run that forgets the count ends elsewhere."""

    name, phase, affects = "counting", Phase.LOOP, "recipe"

    @hookimpl
    def prepare_model(self, build):
        import torch

        self.calls, self.drift = 0, torch.zeros(3)

    @hookimpl
    def on_step_end(self, build):
        import torch

        self.calls += 1
        self.drift += 0.001 * self.calls
        with torch.no_grad():
            next(iter(build.network.parameters()))[0, :3] += self.drift

    @hookimpl
    def save_state(self):
        return {"calls": self.calls, "drift": self.drift}

    @hookimpl
    def load_state(self, state):
        self.calls = state["calls"]
        self.drift.copy_(state["drift"])


@hookimpl
def strategies():
    return Counting()
'''


def test_what_a_strategy_saves_it_gets_back(ready: Callable[..., Project]) -> None:
    results = []
    for name in ("whole", "stopped"):
        project = ready(name, **SMALL)
        (project.plugins / "strategies" / "counting.py").write_text(STATEFUL, encoding="utf-8")
        project = ready(name, **merged(hardware=hardware("counting"), train={"log_interval": 1}))
        train(project) if name == "whole" else stop_and_go_on(project, "train.backward=interrupt@10")
        results.append(result(project)[0])
    assert results[0] == results[1]


def test_records_that_the_disk_refused_are_in_the_checkpoint(ready: Callable[..., Project]) -> None:
    """The log is refused from some line on, and the process killed: no row of a curve, no evaluation is lost."""
    sections = merged(train={"log_interval": 1})
    whole = ready("whole", **sections)
    train(whole)
    for refused in ("train.log=full@3-100", "train.log=full@4-6"):
        project = ready(f"refused {refused[-1]}", **sections)
        with pytest.raises(RuntimeError, match="rehearsed"):
            train(project, f"{refused}, train.export=crash")
        (last,) = project.runs.glob("*/last/config.json")
        assert json.loads(last.read_text("utf-8"))["step"] == 6
        (project.runs / last.parts[-3] / "log.jsonl").write_bytes(b"")
        project = ready(f"refused {refused[-1]}", **sections)
        with pytest.raises(Stopped):
            train(project, f"{refused}, train.backward=interrupt@18", fresh=True)
        train(project)
        assert result(project) == result(whole)


def test_an_error_of_a_plugin_after_the_step_loses_nothing(ready: Callable[..., Project]) -> None:
    sections = merged(train={"log_interval": 1, "checkpoint_minutes": 60})
    whole = ready("whole", **sections)
    train(whole)
    project = ready("broken", **sections)
    broken = STATEFUL.replace("self.calls += 1", "raise OSError('gone')").replace('"recipe"', '"execution"')
    (project.plugins / "strategies" / "counting.py").write_text(broken, encoding="utf-8")
    project = ready("broken", **merged(**{**sections, "hardware": hardware("counting")}))
    with pytest.raises(PluginError, match="on_step_end"):
        train(project)
    project = ready("broken", **sections)
    assert any("going on after step 1" in line for line in train(project))
    assert result(project) == result(whole)


def test_unsound_numbers_are_never_kept(ready: Callable[..., Project]) -> None:
    project = ready(**SMALL)
    with pytest.raises(Unsound, match="first loss"):
        train(project, "step.loss=inf@1")
    assert not any(listing(folder) for folder in project.runs.iterdir())
    with pytest.raises(Unsound, match="3 steps in a row"):
        train(project, "step.loss=nan@9-100")
    assert all("000000005" not in path.name for folder in project.runs.iterdir() for path in listing(folder))


def test_half_of_a_swap_of_folders_is_finished(ready: Callable[..., Project]) -> None:
    """Killed while `best` took the place of another: the old one is put back, and goes when it is not needed."""
    project = ready(**SMALL)
    train(project)
    want = result(project)
    best = next(project.runs.glob("*/best"))
    best.rename(best.with_name(".best.old"))
    train(project)
    assert result(project) == want and best.is_dir() and not best.with_name(".best.old").exists()


def test_a_window_begun_alone_is_begun_again_by_two(ready: Callable[..., Project]) -> None:
    project = ready(**merged(train={"log_interval": 1}))
    with pytest.raises(Stopped):
        train(project, "train.backward=interrupt@11")
    project = ready(**merged(train={"log_interval": 1}, hardware=hardware(num_processes=2)))
    done = in_processes(project)
    assert done.returncode == 0 and "going on after step 2 (" in done.stdout, done.stdout + done.stderr
    assert "num_processes 1 → 2" in done.stdout


def test_the_fingerprint_of_code_is_that_of_every_python() -> None:
    """Of a fixed source: 3.12 and 3.13 gave their syntax trees fields that `ast.dump` shows."""
    tree = ast.parse(
        "def f(x: int = 1) -> str:\n    return f'{x!r:>3}' if x else 'a'\n\n@d\nclass A(B): pass\n"
    )
    digest = hashlib.sha256(json.dumps(_plain(tree)).encode()).hexdigest()
    assert digest.startswith("a29c060a0d46bc26"), digest


def in_processes(project: Project, **environ: str) -> subprocess.CompletedProcess[str]:
    """The stage by its command, one thread per process."""
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])} | environ
    command = [sys.executable, "-m", "stages.train"]
    return subprocess.run(
        command, cwd=project.root, env=given, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, True), (signal.SIGTERM, False), (9, False)])
def test_two_processes_stop_together_and_go_on(
    ready: Callable[..., Project], number: int, group: bool
) -> None:
    """Ctrl-C reaches all of them, SIGTERM the first; one that is killed leaves the others to notice."""
    sections = merged(
        hardware=hardware(num_processes=2),
        train={"max_steps": 8, "log_interval": 4},
        model={"architecture": "gpt2", "dropout": 0.2},
    )
    whole = ready("whole", **sections)
    assert in_processes(whole).returncode == 0
    project = ready("stopped", **sections)
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    environ["TIGHTFIT_FAULTS"] = "train.micro_batch=slow@1-100000"
    command = [sys.executable, "-m", "stages.train"]
    with subprocess.Popen(command, cwd=project.root, env=environ, start_new_session=True) as process:
        assert wait_until(lambda: any(p.stat().st_size for p in project.runs.glob("*/log.jsonl")), 60)
        (os.killpg if group else os.kill)(process.pid, number)
        assert process.wait(60) == (75 if number != 9 else -9)
    (folder,) = project.runs.iterdir()
    assert wait_until(lambda: not Run(folder, {}).is_held(), 30) and listing(folder)
    done = in_processes(project)
    assert done.returncode == 0 and "going on after step" in done.stdout, done.stdout + done.stderr
    assert result(project) == result(whole)


def test_dvc_watches_the_code_that_the_fingerprint_covers() -> None:
    """Else an edit would begin another run without DVC asking for it, or the other way round."""
    from ruamel.yaml import YAML

    text = (Path(__file__).parents[2] / "dvc.yaml").read_text(encoding="utf-8")
    deps = YAML(typ="safe", pure=True).load(text)["stages"]["train"]["deps"]
    assert {d.removeprefix("core/") for d in deps if d.startswith("core/")} == set(NUMERICS)
