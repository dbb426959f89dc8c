"""The strategy compile: the same training to rounding, one graph, exact when resumed, and a fallback that says why.

What needs real kernels runs with a C++ compiler, on one shape; the rest with a backend that compiles nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import core.compile
from core import faults
from core.batches import held_out_batches
from core.checkpoint import listing
from core.errors import Stopped
from core.hardware import read_facts
from core.launch import planned, run_training
from core.memory.simulate import simulate
from core.plan import runtime
from core.snapshot import RandomState
from core.survive import Survivor
from core.tokens import TokenShards
from core.trainer import build_training, make_accelerator, optimizer_step

needs_compiler = pytest.mark.skipif(
    "c++" not in read_facts().modules, reason="no C++ compiler, which torch.compile needs on a CPU"
)
GPT2 = {"architecture": "gpt2", "dropout": 0.2}  # half as many kernels to compile as qwen3 has
TRAIN = {"lr": 1e-3, "micro_batch": 4, "max_steps": 6, "eval_interval": 3, "eval_tokens": 300}


def sections(*add: str, model: dict[str, Any] | None = None) -> dict[str, Any]:
    hardware = {"profile": "cpu", "strategies": {"add": list(add), "remove": ["bf16"]}}
    return {"hardware": hardware, "train": TRAIN, "model": model or {}}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels of these tests, compiled once for all of them and for the processes that they start."""
    folder, before = tmp_path_factory.mktemp("inductor"), os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    yield
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
    if before is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    counters.clear()
    yield
    faults.disarm()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured and differentiated as ever, and then run as they are: no compiler, and fast."""
    compile = torch.compile

    def without_kernels(function: Any, *, dynamic: bool, options: dict[str, Any]) -> Any:
        return compile(function, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", without_kernels)
    monkeypatch.setattr(core.hardware, "_installed", lambda name, environ: name == "c++")


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Training:
    """A build and steps on seeded tokens."""

    def __init__(self, project: Any) -> None:
        self.project, (self.plan, _) = project, planned(project)
        self.hook, self.said = runtime(self.plan).hook, list[str]()
        accelerator = make_accelerator(self.plan)
        self.build = build_training(
            self.plan, self.hook, accelerator, self.plan.model, project.params, self.said.append
        )
        self.build.model.train()

    def step(self, number: int = 0) -> list[torch.Tensor]:
        """Loss, gradients and their norm of one step."""
        found: list[torch.Tensor] = []

        def inspect() -> None:
            found.extend(p.grad.clone() for p in self.build.model.parameters())

        tokens = torch.randint(0, 512, (8, 33), generator=torch.Generator().manual_seed(number))
        window = [(t[:, :-1], t[:, 1:]) for t in tokens.split(self.plan["micro_batch"])]
        loss, norm = optimizer_step(self.build, self.hook, window, 1.0, inspect=inspect)
        return [loss, *found, norm]

    def steps(self, numbers: Iterable[int] = range(4)) -> list[list[torch.Tensor]]:
        """What each step gives, and the weights at the end."""
        found = [self.step(number) for number in numbers]
        return [*found, [p.detach().clone() for p in self.build.model.parameters()]]


def close(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> bool:
    """The first step's loss and gradients to fp32's rounding; later losses, and the weights, to what grows from it."""
    first = zip(a[0], b[0], strict=True)
    later = [(x[0], y[0]) for x, y in zip(a[1:-1], b[1:-1], strict=True)]
    same = all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in first)
    return same and all(
        torch.allclose(x, y, rtol=0, atol=1e-3) for x, y in (*later, *zip(a[-1], b[-1], strict=True))
    )


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def train(project: Any, spec: str = "") -> list[str]:
    lines: list[str] = []
    faults.disarm()
    faults.arm(spec)
    run_training(project, lines.append)
    return lines


def result(project: Any) -> list[bytes]:
    return [
        (project.root / name).read_bytes()
        for name in ("models/final/model.safetensors", "reports/curve.tsv", "reports/curve_val.tsv")
    ]


# ---- with real kernels


@needs_compiler
def test_it_is_the_same_training_to_rounding_and_one_graph_for_all_layers(ready: Any) -> None:
    plain = Training(ready("plain", **sections(model=GPT2))).steps()
    training = Training(ready("compiled", **sections("compile", model=GPT2)))
    assert training.said == ["compiling the layers; the first time on a machine takes longest"]
    assert graphs() == 1  # the probe's; the steps compile nothing
    assert close(training.steps(), plain)
    assert graphs() == 1


@needs_compiler
def test_a_run_resumed_by_a_fresh_process_ends_bit_for_bit_the_same(ready: Any) -> None:
    whole = ready("whole", **sections("compile", model=GPT2))
    train(whole)
    project = ready("stopped", **sections("compile", model=GPT2))
    with pytest.raises(Stopped):
        train(project, "train.backward=interrupt@5")
    given = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "stages.train"]
    done = subprocess.run(command, cwd=project.root, env=given, capture_output=True, text=True)
    assert done.returncode == 0 and "going on after step 2 and 1 micro" in done.stdout, done.stdout
    assert "compiling the layers" in done.stdout and "uncompiled" not in done.stdout
    assert "another execution" not in done.stdout
    assert result(project) == result(whole)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for a compiler is a shell script")
@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exit 1", "No working C++ compiler found"),
        (
            'test "$1" = --version && echo "c++ 12" && exit\n'
            'echo "x.h:1: fatal error: Python.h: No such file" >&2; exit 1',
            "x.h:1: fatal error: Python.h: No such file; install Python's headers (python3-dev, python3-devel)",
        ),
    ],
    ids=["no compiler", "no headers"],
)
def test_where_compiling_fails_it_says_why_and_trains_as_without(
    ready: Any, tmp_path: Path, script: str, why: str
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    compiler.chmod(0o755)
    plain = ready("plain", **sections())
    train(plain)
    project = ready("compiled", **sections("compile"))
    with torch._inductor.config.patch({"cpp.cxx": (None, str(compiler))}):
        with pytest.raises(Stopped):
            train(project, "train.backward=interrupt@5")
        lines = train(project)
    (said,) = [line for line in lines if "uncompiled" in line]
    assert said.startswith("note: compiling does not work here, the layers run uncompiled: ") and why in said
    assert "\n" not in said and not any("began with" in line for line in lines)
    assert result(project) == result(plain)


# ---- with graphs only


def test_a_missing_compiler_is_named_in_one_line() -> None:
    error = RuntimeError(
        "InvalidCxxCompiler: No working C++ compiler found in (None, 'g++')\n\nSet TORCH_LOGS"
    )
    said = core.compile.explained(error)
    assert said.endswith("found in (None, 'g++'); install a C++ compiler that works, or set CXX to one")
    assert core.compile.explained(RuntimeError("")) == "RuntimeError; TORCH_LOGS=+dynamo shows more"
    assert len(core.compile.explained(RuntimeError("x" * 1000))) < 250


@pytest.mark.parametrize("fails", [False, True])
def test_the_probe_leaves_random_numbers_gradients_and_weights_alone(
    ready: Any, traced: None, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    plain = Training(ready("plain", **sections(model=GPT2)))
    before = RandomState.now(torch.device("cpu")).tensors("")
    probe = core.compile.probe

    def and_then_fail(build: Any, forward: Any) -> None:
        probe(build, forward)
        raise RuntimeError("late")

    if fails:
        monkeypatch.setattr(core.compile, "probe", and_then_fail)
    training = Training(ready("compiled", **sections("compile", model=GPT2)))
    assert ("late" in training.said[-1]) == fails and graphs() == 1
    after = RandomState.now(torch.device("cpu")).tensors("")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in training.build.model.parameters())
    assert equal(list(training.build.model.parameters()), list(plain.build.model.parameters()))
    assert list(training.build.network.state_dict()) == list(plain.build.network.state_dict())


@pytest.mark.parametrize("add", [(), ("checkpointing",)], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("model", [{}, GPT2], ids=["qwen3", "gpt2"])
def test_one_graph_for_all_layers_with_the_same_dropout(
    ready: Any, traced: None, model: dict[str, Any], add: tuple[str, ...]
) -> None:
    plain = Training(ready("plain", **sections(*add, model=model)))
    torch.manual_seed(3)
    wanted = plain.steps()
    training = Training(ready("compiled", **sections("compile", *add, model=model)))
    torch.manual_seed(3)
    assert close(training.steps(), wanted)
    assert graphs() == 1 and not counters["graph_break"]


def test_measuring_and_generating_compile_nothing_and_are_as_without(ready: Any, traced: None) -> None:
    from core.generate import generate
    from core.measure import measure
    from core.tokenizer import Tokenizer

    found = []
    for project in (ready("plain", **sections()), ready("compiled", **sections("compile"))):
        training = Training(project)
        held_out = TokenShards.open(project.tokens, "val", verify=True)
        assert len({x.shape for x, _ in held_out_batches(held_out, 32, 4, None)}) > 1
        tokenizer = Tokenizer.load(project.tokens / "tokenizer")
        before = graphs()
        accelerator = training.build.accelerator
        measured = measure(training.build.model, accelerator, held_out, tokenizer.token_bytes(), 4)
        text = list(generate(training.build.network, tokenizer, "a lantern", max_tokens=40))
        assert graphs() == before
        found.append((measured, text))
    assert found[0] == found[1] and graphs() == 1


def test_smaller_micro_batches_and_checkpointing_in_the_middle_of_a_run(ready: Any, traced: None) -> None:
    """What running out of memory comes to. Each size is compiled once."""

    def run(project: Any) -> list[list[torch.Tensor]]:
        training = Training(project)
        survivor = Survivor(training.build, lambda window: None, None, 4)
        found = [training.step(0)]
        for micro_batch, more in ((2, 1), (1, 1), (1, 0)):
            survivor.use(micro_batch, "test")
            before = graphs()
            found += [training.step(1), training.step(2)]
            assert graphs() - before in (0, more)
        rung = next(s for s in training.plan.rungs_left if s.name == "checkpointing")
        rung.prepare_model(build=training.build)
        return found + training.steps((3, 4))

    assert close(run(ready("plain", **sections())), run(ready("compiled", **sections("compile"))))
    assert graphs() == 3


def test_a_simulated_build_compiles_nothing(ready: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.hardware, "_installed", lambda name, environ: name == "c++")
    monkeypatch.setattr(core.compile, "compile_layers", lambda build: pytest.fail("compiled"))
    peaks = []
    for project in (ready("plain", **sections()), ready("compiled", **sections("compile"))):
        plan, _ = planned(project)
        peaks.append(simulate(plan, project.params, micro_batch=4).peak(4, False).bytes)
    assert peaks[0] == peaks[1]


def test_a_resumed_run_says_where_the_kernels_differ(ready: Any, traced: None) -> None:
    project = ready(**sections("compile"))
    with pytest.raises(Stopped):
        train(project, "train.backward=interrupt@5")
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(core.compile, "probe", lambda build, forward: 1 / 0)
        lines = train(project)
    assert any("uncompiled: division by zero" in line for line in lines)
    said = "note: the layers were compiled before and are uncompiled now: sums may round differently"
    assert said in lines and any("going on after step 2" in line for line in lines)
    (run,) = project.runs.iterdir()
    assert listing(run)
