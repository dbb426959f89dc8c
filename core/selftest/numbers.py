"""Rehearsals of numbers that go bad and of memory that runs out, in the middle of a training."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace
from typing import Any

from core.checkpoint import listing, read
from core.errors import is_out_of_memory
from core.project import Project
from core.selftest.kills import run_folder
from core.selftest.lab import Lab, Outcome, Tally, fault

FP16 = '''"""fp16 with a loss scaler on a CPU, where accelerate offers none: for rehearsals only, it is slow."""

from core.hookspecs import Phase, Strategy, hookimpl


class FP16OnCpu(Strategy):
    name, phase, slot, affects = "fp16_cpu", Phase.PRECISION, "precision", "recipe"
    defaults = {"init_scale": 65536.0, "growth_interval": 3}

    @hookimpl
    def adjust_plan(self, plan):
        plan.set("dtype", "fp16", reason="rehearsal", by=self.name)

    @hookimpl
    def prepare_model(self, build):
        import torch

        if not build.simulated:
            accelerator = build.accelerator
            accelerator.scaler = torch.amp.GradScaler("cpu", **self.opts(build.plan))
            accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"

    @hookimpl
    def step_context(self):
        import torch

        return torch.autocast("cpu", torch.float16)


@hookimpl
def strategies():
    return FP16OnCpu()
'''


def fp16_project(lab: Lab, name: str, **options: Any) -> Project:
    project = lab.project(name)
    (project.plugins / "strategies" / "fp16_cpu.py").write_text(FP16, encoding="utf-8")
    from core.selftest.lab import write_params

    strategies = {"add": ["fp16_cpu"], "remove": ["bf16", "threads"]}
    write_params(project.root, hardware={"strategies": strategies, "options": {"fp16_cpu": options}})
    ended = lab.run(project, "env-check")
    assert ended.code == 0, ended.out
    return project


def log(project: Project) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder(project) / "log.jsonl").read_text("utf-8").splitlines()]


def finite(project: Project) -> bool:
    """Whether every weight of every checkpoint is a number."""
    return all(
        bool(tensor.isfinite().all())
        for path in listing(run_folder(project))
        for name, tensor in read(path).tensors()
        if name.startswith("model/")
    )


@fault("F14", "a loss that is no number", times=4)
def bad_loss(lab: Lab, times: int) -> Outcome:
    """Once: the step changes nothing and is counted. Three in a row: the run stops and names the text."""
    tally = Tally()
    for kind in ("nan", "inf"):
        project = lab.project("once")
        ended = lab.run(project, "train", faults=f"step.loss={kind}@18")  # the second micro-batch of step 5
        report = json.loads((project.reports / "train.json").read_text("utf-8"))
        survived = ended.code == 0 and report["skipped_steps"] == 1 and ended.says("step 5", "not stepped")
        tally.check(f"{kind}: {ended.out[-300:]}", survived and finite(project))
    project = lab.project("forever")
    ended = lab.run(project, "train", faults="step.loss=nan@21-10000")
    again = lab.run(project, "train")
    said = ended.code == 2 and ended.says("3 steps in a row", "train_000.bin[")
    tally.check(f"forever: {ended.out[-300:]}", said and finite(project) and again.code == 0)
    project = lab.project("first")
    ended = lab.run(project, "train", faults="step.loss=nan@1")
    tally.check(f"the first: {ended.out[-300:]}", ended.code == 2 and ended.says("first loss is nan"))
    return tally.outcome()


@fault("F15", "fp16: gradients overflow", times=5)
def overflow(lab: Lab, times: int) -> Outcome:
    """Skipped and counted, the scale falls, and a killed run has the scaler it had; a scale that collapses stops it."""
    tally = Tally()
    whole = fp16_project(lab, "whole", init_scale=2.0**40)
    first = lab.run(whole, "train")
    want = (whole.final_model / "model.safetensors").read_bytes() if first.code == 0 else b""
    skipped = [r for r in log(whole) if r.get("skipped")]
    tally.check(f"undisturbed: {first.out[-300:]}", first.code == 0 and bool(skipped))
    for i, faults in enumerate(
        ("checkpoint.pruned=kill@3", "train.backward=interrupt@14", "train.update=kill@7")
    ):
        project = fp16_project(lab, f"killed-{i}", init_scale=2.0**40)
        lab.run(project, "train", faults=faults)
        ended = lab.run(project, "train")
        same = ended.code == 0 and (project.final_model / "model.safetensors").read_bytes() == want
        tally.check(f"{faults}: {ended.out[-300:]}", ended.code == 0, same)
    project = fp16_project(lab, "collapse")
    from core.selftest.lab import write_params

    strategies = {"add": ["fp16_cpu"], "remove": ["bf16", "threads"]}
    write_params(
        project.root, hardware={"strategies": strategies}, train={"max_steps": 40, "eval_interval": 40}
    )
    lab.run(project, "env-check")
    ended = lab.run(project, "train", faults="step.gradient=inf@5-10000")
    tally.check(f"collapse: {ended.out[-300:]}", ended.code == 2 and ended.says("loss scale"))
    return tally.outcome()


@fault("F16", "fp16: small gradients vanish")
def underflow(lab: Lab, times: int) -> Outcome:
    """Told at the first step, by matrix and share."""
    tally = Tally()
    project = fp16_project(lab, "vanish", init_scale=2.0**-10)
    ended = lab.run(project, "train")
    tally.check(ended.out[:600], ended.code == 0 and ended.says("exactly zero", "step 1"))
    project = fp16_project(lab, "fine")
    ended = lab.run(project, "train")
    tally.check(f"a sound scale: {ended.out[:600]}", ended.code == 0 and "exactly zero" not in ended.out)
    return tally.outcome()


@fault("F17", "a bad number hidden in the log")
def truth(lab: Lab, times: int) -> Outcome:
    """The log says nan where it was nan, with the step."""
    tally = Tally()
    project = lab.project("truth")
    lab.run(project, "train", faults="step.loss=nan@18")
    tally.check("log.jsonl", [r["step"] for r in log(project) if r.get("loss") == "nan"] == [5])
    project = lab.project("truth")
    lab.run(project, "train", faults="step.loss=nan@24")  # step 6, which is logged anyway
    steps = [r["step"] for r in log(project) if r.get("loss") == "nan"]
    curve = (project.reports / "curve.tsv").read_text("utf-8")
    tally.check("log.jsonl of a logged step", steps == [6, 6] and "\tnan" in curve)
    return tally.outcome()


@fault("F18", "out of memory at every part of a step", times=4, full=16)
def out_of_memory(lab: Lab, times: int) -> Outcome:
    """The window is done again in smaller pieces, and a run killed after that goes on with those."""
    tally = Tally()
    places = ("train.micro_batch", "train.backward", "step.loss", "train.update")
    for i in range(times):
        faults = f"{places[i % 4]}={'oom'}@{(6, 3, 9, 2)[i % 4] + 4 * (i // 4) * (i % 4 != 3)}"
        whole = lab.project("memory")
        first = lab.run(whole, "train", faults=faults)
        want = (whole.final_model / "model.safetensors").read_bytes() if first.code == 0 else b""
        smaller = first.says("going on with micro-batch 1")
        killed = lab.project("memory-killed")
        dead = lab.run(killed, "train", faults=f"{faults}, checkpoint.pruned=kill@{4 + i // 4}")
        ended = lab.run(killed, "train")
        same = ended.code == 0 and (killed.final_model / "model.safetensors").read_bytes() == want
        survived = first.code == 0 and smaller and dead.killed
        tally.check(f"{faults}: {first.out[-200:]} {ended.out[-200:]}", survived, same)
    return tally.outcome("compared: killed after it, with not killed")


@fault("F19", "out of memory under other names", times=11)
def other_names(lab: Lab, times: int) -> Outcome:
    tally = Tally()
    for text in (
        "CUDA out of memory. Tried to allocate 20.00 MiB",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: you tried to allocate",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        "Triton Error [CUDA]: out of memory",
    ):
        tally.check(text, is_out_of_memory(RuntimeError(text)))
    tally.check("MemoryError", is_out_of_memory(MemoryError()))
    for error in (
        ValueError("index out of memory bounds"),
        RuntimeError("out of memory bank"),
        OSError("CUDA out of memory"),
        KeyError("memory"),
    ):
        tally.check(f"{error!r} was taken for it", not is_out_of_memory(error))
    return tally.outcome()


def no_limits() -> str | None:
    return None if sys.platform == "linux" else "limiting a process's memory needs Linux"


@fault("F20", "the machine really runs out of RAM", unless=no_limits)
def no_more_ram(lab: Lab, times: int) -> Outcome:
    """The process may take 48 MiB more when training starts; the first micro-batch wants more than that."""
    tally = Tally()
    hardware = {
        "strategies": {"add": [], "remove": ["bf16", "threads", "chunked_head"]},
        "options": {"accumulation": {"max_micro_batch_tokens": 0}},
    }
    train = {"max_steps": 2, "batch_tokens": 65536, "micro_batch": "auto", "eval_interval": 2}
    project = lab.project("ram", hardware=hardware, train=train)
    ended = lab.run(project, "train", faults="train.window=shrink@1")
    said = ended.says("can't allocate memory", "the batch stays the same")
    tally.check(ended.out[-400:], ended.code == 0 and said)
    return tally.outcome()


@fault("F21", "Windows moves the card's memory into RAM")
def silent_spill(lab: Lab, times: int) -> Outcome:
    """Five times slower on a full card: told at that step, once."""
    from core.monitor import MemoryWatch

    tally = Tally()
    said: list[str] = []
    watch = MemoryWatch(SimpleNamespace(type="cpu"), SimpleNamespace(fit=None), said.append)  # type: ignore[arg-type]
    for step, rate in enumerate((900.0, 1000.0, 1000.0, 1000.0, 200.0, 200.0)):
        watch.look(step, {"tokens_per_second": rate, "vram_used_gib": 3.95, "vram_total_gib": 4.0})
    tally.check("; ".join(said), len(said) == 1 and "step 4" in said[0] and "shared GPU memory" in said[0])
    assert math.isfinite(watch.fastest)
    return tally.outcome()
