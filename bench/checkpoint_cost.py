"""What keeping a run costs: a checkpoint against the same bytes written by dd, and the checks of a step.

    python -m bench.checkpoint_cost                  # both tables
    python -m bench.checkpoint_cost --table save     # one of them

save: a 124M GPT-2 with AdamW, 12 bytes a parameter, through core.checkpoint, beside `dd bs=8M conv=fsync` of that file
from the page cache onto the same disk, in turn; both keep two files. Where there is no dd, Python copies and syncs.
step: the default params' optimizer step with the guard against numbers that are not finite, the random states, and the
norm, beside the same step without, in turn.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch

import core.trainer
from bench.figures import spread
from core import checkpoint
from core.hardware import read_facts
from core.hookspecs import Build
from core.keeper import Cursor
from core.model import build_model
from core.model_config import ModelConfig
from core.numbers import step_if_finite
from core.optim import adamw
from core.params import ModelParams, load_params
from core.plan import resolve, runtime
from core.plugins import Registry
from core.project import Project
from core.snapshot import RandomState, capture

REPO = Path(__file__).parents[1]


def in_turn(times: int, *jobs: Callable[[], Any]) -> list[list[float]]:
    """Seconds of each job, `times` times, one after the other."""
    seconds: list[list[float]] = [[] for _ in jobs]
    for _, (i, job) in itertools.product(range(times), enumerate(jobs)):
        start = time.perf_counter()
        job()
        seconds[i].append(time.perf_counter() - start)
    return seconds


def table_of_saves(folder: Path, times: int) -> None:
    config = ModelConfig.resolve(ModelParams(architecture="gpt2", preset="124m"), 50257)
    network = build_model(config, seed=1)
    build: Any = SimpleNamespace(
        network=network,
        model=network,
        lr=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        accelerator=SimpleNamespace(scaler=None),
    )
    build.optimizer = adamw(build)
    tensors, state = capture(build)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    steps, copies = itertools.count(1), itertools.count(1)

    def save() -> None:
        checkpoint.save(folder, next(steps), 0, tensors, state)

    def read() -> None:
        checkpoint.read(checkpoint.listing(folder)[0])

    def dd() -> None:
        n = next(copies)
        source, out = checkpoint.listing(folder)[0], folder / f"copy-{n}"
        if shutil.which("dd"):
            command = ["dd", f"if={source}", f"of={out}", "bs=8M", "conv=fsync"]
            subprocess.run(command, check=True, capture_output=True)
        else:
            with source.open("rb") as f, out.open("wb") as g:
                shutil.copyfileobj(f, g, 8 << 20)
                g.flush()
                os.fsync(g.fileno())
        (folder / f"copy-{n - checkpoint.KEEP}").unlink(missing_ok=True)

    in_turn(2, save, dd)
    saved, written = in_turn(times, save, dd)
    (verified,) = in_turn(times, read)
    ratios = [a / b for a, b in zip(saved, written, strict=True)]
    click.echo("| what | seconds: median (lowest to highest) |\n|---|---|")
    click.echo(
        f"| checkpoint of {size / 1e9:.2f} GB: write, checksum, sync, rename, prune | {spread(saved)} |"
    )
    click.echo(f"| dd of the same file, synced | {spread(written)} |")
    click.echo(f"| checkpoint / dd | {spread(ratios)} |")
    click.echo(f"| reading it back and checking every byte, from the page cache | {spread(verified)} |")


def table_of_steps(times: int) -> None:
    params, project = load_params(REPO / "params.yaml"), Project(REPO)
    plan = resolve(params, read_facts(), Registry.load(project))
    hook = runtime(plan).hook
    build = core.trainer.build_training(
        plan, hook, core.trainer.make_accelerator(plan), plan.model, params, lambda line: None
    )
    build.model.train()
    tokens = torch.randint(0, plan.model.vocab_size, (plan.sequences, plan.model.block_size + 1))
    window = [(t[:, :-1], t[:, 1:]) for t in tokens.split(plan["micro_batch"])]
    cursor = Cursor()

    def guarded() -> None:
        core.trainer.step_if_finite = step_if_finite
        cursor.random = RandomState.now(build.accelerator.device)
        core.trainer.optimizer_step(build, hook, window, params.train.grad_clip, cursor)

    def plain(build: Build, loss: Any, norm: Any) -> None:
        build.optimizer.step()

    def unguarded() -> None:
        core.trainer.step_if_finite = plain
        core.trainer.optimizer_step(build, hook, window, params.train.grad_clip, cursor)

    in_turn(2, guarded, unguarded)
    with_, without = in_turn(times, guarded, unguarded)
    ratios = [a / b for a, b in zip(with_, without, strict=True)]
    click.echo("| what | seconds: median (lowest to highest) |\n|---|---|")
    click.echo(f"| a step with its checks | {spread(with_)} |")
    click.echo(f"| a step without | {spread(without)} |")
    click.echo(f"| with / without | {spread(ratios)} |")
    # A step's own seconds vary by more than its checks take: those by themselves, without the update.
    optimizer = SimpleNamespace(step=lambda: None, _step_supports_amp_scaling=True)
    idle: Any = SimpleNamespace(accelerator=build.accelerator, optimizer=optimizer, simulated=False)
    loss = norm = torch.ones(())
    checks = in_turn(
        200,
        lambda: RandomState.now(build.accelerator.device) and None,
        lambda: step_if_finite(idle, loss, norm),
    )
    alone = sum(statistics.median(values) for values in checks)
    click.echo(f"| the checks alone: random states, is it finite | {alone:.6f} |")
    click.echo(f"| their share of a step | {alone / statistics.median(with_):.4%} |")


@click.command()
@click.option("--table", type=click.Choice(["save", "step", "all"]), default="all")
@click.option("--times", default=5, show_default=True)
@click.option(
    "--folder", default=".", type=click.Path(path_type=Path, file_okay=False, exists=True), help="The disk."
)
def main(table: str, times: int, folder: Path) -> None:
    if table != "step":
        with tempfile.TemporaryDirectory(prefix="checkpoint-cost-", dir=folder) as private:
            table_of_saves(Path(private), times)
        click.echo("")
    if table != "save":
        table_of_steps(4 * times)


if __name__ == "__main__":
    main()
