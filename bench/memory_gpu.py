"""Predicted against measured memory on the NVIDIA card that is here: 48 trainings, both allocators, and two caps.

    python -m bench.memory_gpu

First the peaks: `max_memory_allocated` and `max_memory_reserved` of real steps beside the forecast. Then the cap: under
4 and 8 GiB the micro-batch that the planner takes must run, and the next larger one must not. Each allocator needs a
process of its own, since torch reads its settings once.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

ALLOCATORS = {"native": "", "expandable": "expandable_segments:True"}
STRATEGIES = ((), ("chunked_head",), ("checkpointing",), ("chunked_head", "checkpointing"))
CAPS = ((4, "124m"), (4, "350m"), (8, "124m"), (8, "350m"))  # GiB, preset
STEPS = 3
GIB = 1024**3


def configurations() -> Iterator[dict[str, Any]]:
    """The 48 trainings: architecture x dtype x what saves memory x micro-batch."""
    for architecture, dtype, names, micro_batch in itertools.product(
        ("qwen3", "gpt2"), ("bf16", "fp16", "fp32"), STRATEGIES, (2, 8)
    ):
        yield {
            "architecture": architecture,
            "preset": "124m",
            "strategies": [*([dtype] if dtype != "fp32" else []), "accumulation", *names],
            "micro_batch": micro_batch,
        }


def plan_of(config: dict[str, Any], vram_gib: float | None = None) -> tuple[Any, Any]:
    """Plan and params of a configuration on this card, or on one of `vram_gib`. vram_gib: the planner decides."""
    from core.hardware import derive_profile, read_facts
    from core.memory.forecast import Forecaster
    from core.params import Params
    from core.plan import resolve
    from core.plugins import Registry
    from core.project import Project

    registry, facts = Registry.load(Project(Path(__file__).parents[1])), read_facts()
    assert facts.gpu is not None, "no NVIDIA card"
    profile = replace(derive_profile(facts.gpu), name="here", strategies=tuple(config["strategies"]))
    if vram_gib:
        profile = replace(profile, vram_gib=vram_gib)
    registry.profiles["here"] = profile
    params = Params.model_validate(
        {
            "model": {"architecture": config["architecture"], "preset": config["preset"]},
            "tokenizer": {"kind": "gpt2"},
            "hardware": {"profile": "here"},
            "train": {
                "max_steps": STEPS,
                "batch_tokens": 1024 * (512 if vram_gib else 2 * config["micro_batch"]),
                "micro_batch": config.get("micro_batch", "auto"),
            },
        }
    )
    plan = resolve(params, facts, registry, Forecaster() if vram_gib else None)
    conf = os.environ.get("PYTORCH_ALLOC_CONF", "")
    if conf:
        from core.hookspecs import Choice

        plan.env["PYTORCH_ALLOC_CONF"] = Choice(conf, "", "bench")
    return plan, params


def train(plan: Any, params: Any, micro_batch: int) -> tuple[int, int]:
    """Peak bytes allocated and reserved by real steps of two micro-batches."""
    import torch

    from core.memory.simulate import fresh_accelerate
    from core.plan import runtime
    from core.trainer import build_training, make_accelerator, optimizer_step

    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    plan = replace(plan, values=dict(plan.values))
    plan.set("gradient_accumulation_steps", 2, reason="", by="bench")
    hook, T = runtime(plan).hook, plan.model.block_size
    with fresh_accelerate():
        build = build_training(plan, hook, make_accelerator(plan), plan.model, params, print)
        build.model.train()
        for _ in range(STEPS):
            tokens = torch.randint(0, plan.model.vocab_size, (2 * micro_batch, T + 1))
            window = [(t[:, :-1], t[:, 1:]) for t in tokens.split(micro_batch)]
            optimizer_step(build, hook, window, params.train.grad_clip)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def peaks() -> None:
    """Print one JSON line per configuration: predicted and measured bytes."""
    from core.memory.forecast import allocator_settings
    from core.memory.simulate import tape_of

    for config in configurations():
        plan, params = plan_of(config)
        played = tape_of(plan, params).play(config["micro_batch"], True, allocator_settings(plan))
        allocated, reserved = train(plan, params, config["micro_batch"])
        predicted = {"allocated": played.peak_allocated, "reserved": played.peak_reserved}
        measured = {"allocated": allocated, "reserved": reserved}
        print(json.dumps({**config, "predicted": predicted, "measured": measured}), flush=True)


def caps() -> None:
    """Print one JSON line per cap and preset: the planned micro-batch and the next larger one, and whether each ran."""
    import torch

    from core.errors import is_out_of_memory

    for gib, preset in CAPS:
        config = {"architecture": "qwen3", "preset": preset, "strategies": ["bf16", "accumulation"]}
        plan, params = plan_of(config, vram_gib=gib)
        n, ran = plan["micro_batch"], {}
        for size in (n, 2 * n):
            try:
                train(plan, params, size)  # make_accelerator enforces the plan's budget
                ran[size] = True
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                ran[size] = False
            torch.cuda.empty_cache()
        names = [s.name for s in plan.active]
        print(json.dumps({"gib": gib, "preset": preset, "strategies": names, "ran": ran}), flush=True)


@click.command()
@click.option("--part", type=click.Choice(["peaks", "caps"]), hidden=True)
def main(part: str | None) -> None:
    """Print Markdown tables of predicted and measured memory on this machine's card."""
    if part:
        {"peaks": peaks, "caps": caps}[part]()
        return
    for part_, allocator in (*(("peaks", a) for a in ALLOCATORS), ("caps", "expandable")):
        environ = {**os.environ, "PYTORCH_ALLOC_CONF": ALLOCATORS[allocator]}
        environ["PYTORCH_CUDA_ALLOC_CONF"] = ALLOCATORS[allocator]
        command = [sys.executable, "-m", "bench.memory_gpu", "--part", part_]
        done = subprocess.run(
            command, env=environ, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True
        )
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        click.echo(f"\n{part_}, allocator {allocator}\n")
        for line in table(rows) if part_ == "peaks" else cap_table(rows):
            click.echo(line)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| training | micro-batch | allocated GiB | ratio | reserved GiB | ratio |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        cells = []
        for kind in ("allocated", "reserved"):
            predicted, measured = row["predicted"][kind], row["measured"][kind]
            cells += [f"{predicted / GIB:.3f} / {measured / GIB:.3f}", f"{predicted / measured:.3f}"]
        name = f"{row['architecture']} {' '.join(row['strategies'])}"
        yield f"| {name} | {row['micro_batch']} | {' | '.join(cells)} |"


def cap_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| cap GiB | preset | strategies | planned | ran | next larger | ran |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        (n, first), (larger, second) = row["ran"].items()
        names = " ".join(row["strategies"])
        yield f"| {row['gib']} | {row['preset']} | {names} | {n} | {first} | {larger} | {second} |"


if __name__ == "__main__":
    main()
