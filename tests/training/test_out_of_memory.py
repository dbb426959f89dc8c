"""Out of memory: the run goes on as if the smaller micro-batch had been planned, or ends with a clear message."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import UserError, is_out_of_memory
from core.keeper import Cursor
from core.launch import planned, run_training
from core.measure import smaller
from core.plan import runtime
from core.snapshot import RandomState
from core.survive import Survivor, cut
from core.trainer import build_training, make_accelerator, optimizer_step

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB."
SEQUENCES, T, V = 8, 32, 512


class FailAt(TorchDispatchMode):
    """Raises out of memory at the operations with these numbers, counted from 0."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.numbers, self.seen = set(numbers), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if self.seen - 1 in self.numbers:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return func(*args, **(kwargs or {}))


class Bench:
    """A training that can be put back to where it was."""

    def __init__(self, project: Any) -> None:
        self.plan, _ = planned(project)
        hook = runtime(self.plan).hook
        self.said: list[str] = []
        self.build = build_training(
            self.plan,
            hook,
            make_accelerator(self.plan),
            self.plan.model,
            project.params,
            self.said.append,
        )
        self.build.model.train()
        self.cursor = Cursor()
        self.step = lambda window: optimizer_step(self.build, hook, window, 1.0, self.cursor)
        self.start = copy.deepcopy((self.build.model.state_dict(), self.build.optimizer.state_dict()))

    def back(self) -> None:
        weights, moments = copy.deepcopy(self.start)
        self.build.model.load_state_dict(weights)
        self.build.optimizer.load_state_dict(moments)
        self.build.model.zero_grad(set_to_none=True)
        self.cursor.step = self.cursor.micro_batches = 0
        torch.manual_seed(5)

    def run(
        self, micro_batch: int, planned_switch: int | None = None, failing: Any = None
    ) -> list[torch.Tensor]:
        """Weights and losses of three steps; before the second one something happens."""
        self.back()
        survivor = Survivor(self.build, self.step, self.cursor, micro_batch)
        survivor.use(micro_batch, "test")
        found = []
        for number in range(3):
            tokens = torch.randint(0, V, (SEQUENCES, T + 1), generator=torch.Generator().manual_seed(number))
            window = [(t[:, :-1], t[:, 1:]) for t in tokens.split(micro_batch)]
            if number == 1 and planned_switch:
                survivor.use(planned_switch, "planned")
            with failing if number == 1 and failing else contextlib.nullcontext():
                loss, norm = survivor.step(window)
            found += [loss, norm]
        self.survivor = survivor
        return found + [p.detach().clone() for p in self.build.model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def bench(ready: Any) -> Bench:
    return Bench(ready())


def operations_before_the_update(bench: Bench) -> int:
    """How many operations a window of 8 sequences in two pieces has before the optimizer changes weights."""
    counter = FailAt()
    step = bench.build.optimizer.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        if bench.build.updating and not counter.numbers:
            counter.numbers = {-1}
            counted.seen = counter.seen  # type: ignore[attr-defined]
        return step(*args, **kwargs)

    bench.build.optimizer.step = counted
    bench.run(4, failing=counter)
    bench.build.optimizer.step = step
    return counted.seen  # type: ignore[attr-defined]


def test_at_every_point_of_a_step_it_is_the_planned_switch_bit_for_bit(bench: Bench) -> None:
    expected = bench.run(4, planned_switch=2)
    undisturbed = bench.run(4)
    last = operations_before_the_update(bench)
    points = range(0, last, max(1, last // 120))
    for point in points:
        found = bench.run(4, failing=FailAt(point))
        assert bench.survivor.micro_batch == 2, point
        assert equal(found, expected), f"operation {point} of {last}"
    for i in range(0, 6, 2):  # the losses
        assert abs(expected[i] - undisturbed[i]) <= 2e-6


@pytest.mark.parametrize("point", [0, 40, 200])
def test_twice_is_two_halvings(bench: Bench, point: int) -> None:
    expected = bench.run(4, planned_switch=1)
    assert equal(bench.run(4, failing=FailAt(point, 2 * point + 10)), expected)
    assert bench.survivor.micro_batch == 1
    assert [e["change"] for e in bench.survivor.happened] == ["micro-batch 2", "micro-batch 1"]


def test_twenty_times_ends_with_both_figures(bench: Bench) -> None:
    """Halved to 1, then what is left of the ladder, then a message: nothing more can give."""
    fails = FailAt(*(30 * i for i in range(20)))
    with pytest.raises(UserError) as error:
        bench.run(8, failing=fails)
    gave_way = [line.partition("going on with ")[2].partition(",")[0] for line in bench.said]
    assert gave_way == ["micro-batch 4", "micro-batch 2", "micro-batch 1", "the strategy checkpointing"]
    assert "GiB were predicted" in str(error.value) and "GiB were in use at most" in str(error.value)
    assert "tightfit plan" in str(error.value)


def test_a_rung_climbed_in_the_middle_leaves_the_numbers_alone(bench: Bench) -> None:
    one = bench.run(1)
    found = bench.run(1, failing=FailAt(40))
    assert [e["change"] for e in bench.survivor.happened] == ["the strategy checkpointing"]
    assert equal(found, one)


def test_random_numbers_start_again_with_the_window(ready: Any) -> None:
    """With dropout the masks follow the shape of the micro-batch, so only a planned switch can be matched."""
    bench = Bench(ready(model={"architecture": "gpt2", "dropout": 0.2}))
    expected = bench.run(4, planned_switch=2)
    for point in (5, 100, 300):
        assert equal(bench.run(4, failing=FailAt(point)), expected)


def test_inside_the_optimizers_update_it_stops(bench: Bench) -> None:
    step = bench.build.optimizer.step

    def fails(*args: Any, **kwargs: Any) -> Any:
        if bench.build.updating:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return step(*args, **kwargs)

    bench.build.optimizer.step = fails
    with pytest.raises(UserError, match="while the optimizer was changing the weights"):
        bench.run(4)
    bench.build.optimizer.step = step
    bench.build.updating = False


def test_the_shipped_optimizer_allocates_nothing_in_its_update(bench: Bench) -> None:
    from core.memory.trace import Trace

    step, made = bench.build.optimizer.step, []

    def traced(*args: Any, **kwargs: Any) -> Any:
        with Trace() as trace:
            result = step(*args, **kwargs)
        if bench.build.updating:
            # What was there before is seen for the first time, and stays; what a step takes for itself is freed.
            made.append(sum(e < 0 for e in trace.tape.events))
        return result

    bench.build.optimizer.step = traced
    bench.run(4)
    bench.build.optimizer.step = step
    assert made == [0, 0, 0]


def test_other_errors_pass_untouched(bench: Bench) -> None:
    class Broken(FailAt):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise ValueError("index out of memory bounds")

    with pytest.raises(ValueError, match="index out of memory bounds"):
        bench.run(4, failing=Broken())
    assert bench.build.plan["micro_batch"] == 4


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.OutOfMemoryError("two", "arguments"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"
        ),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."
        ),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp:1016"),
        MemoryError(),
    ],
    ids=lambda e: str(e)[:40],
)
def test_out_of_memory_in_all_its_clothes(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("CUDA out of memory"),
        RuntimeError("index is out of bounds for the memory format"),
        RuntimeError("expected contiguous memory, not enough memory formats match"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"),
        KeyError("out of memory"),
    ],
    ids=lambda e: str(e)[:40],
)
def test_what_only_mentions_memory_is_not_out_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_numpy_runs_out_of_memory_too() -> None:
    import numpy as np

    with pytest.raises(MemoryError) as error:
        np.empty(1 << 60, dtype=np.uint8)
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize(("size", "next_size"), [(16, 8), (2, 1), (9, 3), (7, 1), (6, 3)])
def test_the_next_smaller_micro_batch_divides_it(size: int, next_size: int) -> None:
    assert smaller(size) == next_size


def test_cutting_a_window_keeps_every_sequence_in_order() -> None:
    tokens = torch.arange(48).view(12, 4)
    window = [(t, t + 1) for t in tokens.split(6)]
    pieces = cut(window, 2)
    assert [x.shape[0] for x, _ in pieces] == [2] * 6
    assert torch.equal(torch.cat([x for x, _ in pieces]), tokens)
    assert cut(window, 6) is window


def test_random_state_is_torchs_on_a_cpu() -> None:
    state = RandomState.now(torch.device("cpu"))
    assert state.cuda is None and torch.equal(state.torch, torch.get_rng_state())


def test_a_whole_run_records_what_happened(ready: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in step 3 of 8, through the stage's own code: it ends like the run that planned the switch there."""
    import core.trainer

    project = ready()
    real, steps = optimizer_step, []

    def failing(build: Any, hook: Any, window: Any, *rest: Any) -> Any:
        steps.append(len(window))
        if len(steps) == 3:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasGemmEx`")
        return real(build, hook, window, *rest)

    monkeypatch.setattr(core.trainer, "optimizer_step", failing)
    lines: list[str] = []
    run_training(project, lines.append)
    report = json.loads((project.reports / "train.json").read_text(encoding="utf-8"))
    assert report["out_of_memory"] == 1 and report["micro_batch"] == 4
    log = [json.loads(line) for line in next(project.runs.glob("*/log.jsonl")).read_text().splitlines()]
    assert [r for r in log if "out_of_memory" in r] == [
        {
            "step": 3,
            "out_of_memory": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasGemmEx`",
            "change": "micro-batch 4",
        }
    ]
    assert any("out of memory" in line and "micro-batch 4" in line for line in lines)
    assert steps[2:4] == [1, 2]


def test_evaluation_goes_on_with_fewer_sequences(ready: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import core.measure

    project = ready(train={"max_steps": 2, "eval_interval": 2})
    run_training(project, lambda line: None)
    normal = json.loads((project.reports / "train.json").read_text(encoding="utf-8"))["best_val_loss"]
    real, sizes = core.measure.held_out_batches, []

    def failing(shards: Any, block_size: int, batch: int, max_tokens: int | None) -> Any:
        sizes.append(batch)
        if len(sizes) == 1:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return real(shards, block_size, batch, max_tokens)

    monkeypatch.setattr(core.measure, "held_out_batches", failing)
    lines: list[str] = []
    run_training(project, lines.append, fresh=True)
    assert sizes == [8, 4] and any("4 sequences at a time" in line for line in lines)
    again = json.loads((project.reports / "train.json").read_text(encoding="utf-8"))["best_val_loss"]
    assert again == pytest.approx(normal, rel=1e-6)


def test_evaluation_of_one_sequence_ends_with_a_message(ready: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import core.measure

    def failing(*args: Any) -> Any:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(core.measure, "held_out_batches", failing)
    with pytest.raises(UserError, match="out of memory in an evaluation with 1 sequences at a time"):
        run_training(ready(train={"max_steps": 1, "eval_interval": 1}), lambda line: None)


def test_what_was_given_up_is_in_the_log_of_a_run_that_ends(
    ready: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import core.trainer

    def failing(*args: Any) -> Any:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    project = ready()
    monkeypatch.setattr(core.trainer, "optimizer_step", failing)
    with pytest.raises(UserError, match="with a micro-batch of 1"):
        run_training(project, lambda line: None)
    log = next(project.runs.glob("*/log.jsonl")).read_text(encoding="utf-8").splitlines()
    changes = [json.loads(line)["change"] for line in log]
    assert changes == ["micro-batch 4", "micro-batch 2", "micro-batch 1", "the strategy checkpointing"]


LIMITED = """
import resource, sys
import core.trainer
from core.keeper import Cursor
from core.launch import run_training
from core.project import Project
from pathlib import Path

real = core.trainer.optimizer_step

def limited(*args):
    if not limited.set:
        limited.set = True
        status = Path("/proc/self/status").read_text()
        size = next(int(l.split()[1]) for l in status.splitlines() if l.startswith("VmSize")) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (size + (48 << 20), resource.RLIM_INFINITY))
    return real(*args)

limited.set = False
core.trainer.optimizer_step = limited
run_training(Project.find(), print)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_a_real_limit_of_memory(ready: Any) -> None:
    """The address space ends 48 MiB above what is in use when training starts; the first micro-batch wants more."""
    project = ready(
        hardware={
            "profile": "cpu",
            "strategies": {"add": [], "remove": ["bf16", "chunked_head"]},
            "options": {"accumulation": {"max_micro_batch_tokens": 0}},
        },
        train={"max_steps": 2, "batch_tokens": 16384, "eval_interval": 2, "eval_tokens": 512},
    )
    environ = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        cwd=project.root,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((project.reports / "train.json").read_text(encoding="utf-8"))
    assert report["out_of_memory"] >= 1 and report["micro_batch"] < 512
    assert "can't allocate memory" in done.stdout and "the batch stays the same" in done.stdout
