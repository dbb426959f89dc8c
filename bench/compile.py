"""What the strategy compile gains and costs where no card is: speed, memory, and the seconds until the first step.

    python -m bench.compile

The trainer's own optimizer step on random tokens, as a plan with the profile cpu builds it, with and without the
strategy, in turn: seconds of each (median, lowest to highest), and tokens/s. Then, each in a process of its own, the
seconds that the build takes longer: with inductor's cache empty, and with what that run left in it; and the memory.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from bench.figures import spread
from core.hardware import read_facts
from core.monitor import peak_resident
from core.params import Params, load_params
from core.plan import apply_env, resolve, runtime
from core.plugins import Registry
from core.project import Project

REPO = Path(__file__).parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "nano, 8 x 256 tokens": {
        "model": {"preset": "nano"},
        "tokenizer": {"vocab_size": 8192},
        "train": {"batch_tokens": 8 * 256},
    },
    "4 layers, 4 heads, 128 wide, 12 x 64 tokens": {
        "model": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64},
        "tokenizer": {"vocab_size": 320},
        "train": {"batch_tokens": 12 * 64},
    },
}


class Training:
    """A training of a shape, built as a run builds it."""

    def __init__(self, shape: str, compiled: bool) -> None:
        hardware = {
            "profile": "cpu",
            "strategies": {"add": ["compile"] if compiled else [], "remove": []},
        }
        given = load_params(REPO / "params.yaml").model_dump() | {"hardware": hardware}
        for section, keys in SHAPES[shape].items():
            given[section] = given[section] | keys
        self.params = Params.model_validate(given)
        self.plan = resolve(self.params, read_facts(), Registry.load(Project(REPO), entry_points=False))
        apply_env(self.plan)
        import torch

        from core.trainer import build_training, make_accelerator, optimizer_step

        self.hook, self.step_function = runtime(self.plan).hook, optimizer_step
        accelerator, said = make_accelerator(self.plan), list[str]()
        start = time.perf_counter()
        self.build = build_training(
            self.plan, self.hook, accelerator, self.plan.model, self.params, said.append
        )
        self.build_seconds = time.perf_counter() - start
        if any("uncompiled" in line for line in said):
            raise click.ClickException(said[-1])
        self.build.model.train()
        size = self.plan.sequences, self.plan.model.block_size + 1
        tokens = torch.randint(
            0, self.plan.model.vocab_size, size, generator=torch.Generator().manual_seed(0)
        )
        self.window = [(t[:, :-1], t[:, 1:]) for t in tokens.split(self.plan["micro_batch"])]
        self.losses: list[float] = []

    def step(self) -> float:
        """Seconds of one optimizer step, always over the same tokens."""
        start = time.perf_counter()
        loss, _ = self.step_function(self.build, self.hook, self.window, self.params.train.grad_clip)
        self.losses.append(loss.item())
        return time.perf_counter() - start


def speed(shape: str, times: int) -> dict[str, Any]:
    """Seconds per step without and with compile, in turn."""
    plain, compiled = Training(shape, False), Training(shape, True)
    for training in (plain, compiled) * 3:
        training.step()
    seconds = [(plain.step(), compiled.step()) for _ in range(times)]
    return {
        "plain": [a for a, _ in seconds],
        "compiled": [b for _, b in seconds],
        "apart": max(abs(a - b) for a, b in zip(plain.losses, compiled.losses, strict=True)),
        "losses": [plain.losses[0], plain.losses[-1]],
        "tokens": plain.params.train.batch_tokens,
        "with": ", ".join([plain.plan["dtype"], *(s.name for s in plain.plan.active)]),
    }


def build(shape: str, compiled: bool) -> dict[str, Any]:
    """Seconds of the build, and the resident memory before the first step and at most."""
    import psutil

    training = Training(shape, compiled)
    before = psutil.Process().memory_info().rss
    for _ in range(5):
        training.step()
    return {"seconds": training.build_seconds, "before": before, "peak": peak_resident()}


def in_child(cache: str, *call: Any) -> dict[str, Any]:
    """What a function here answers in a process of its own, whose kernels go into this folder."""
    # inductor keeps precompiled headers in the system's folder for temporary files, whatever its cache is.
    environ = os.environ | dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TMPDIR", "TEMP", "TMP"), cache)
    command = [sys.executable, "-m", "bench.compile", "--call", json.dumps(call)]
    done = subprocess.run(command, env=environ, cwd=REPO, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise click.ClickException(f"{call[0]} of {call[1]} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def table(shape: str, times: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-compile-") as cache:
        plain = in_child(cache, "build", shape, False)
        cold, warm = (in_child(cache, "build", shape, True) for _ in range(2))
        measured = in_child(cache, "speed", shape, times)
    a, b = (statistics.median(measured[name]) for name in ("plain", "compiled"))
    ratios = [x / y for x, y in zip(measured["plain"], measured["compiled"], strict=True)]
    click.echo(f"| {shape}; {measured['with']} | without | with compile |\n|---|---|---|")
    click.echo(
        f"| seconds per step | {spread(measured['plain'], '.4g')} | {spread(measured['compiled'], '.4g')} |"
    )
    click.echo(f"| tokens/s | {measured['tokens'] / a:,.0f} | {measured['tokens'] / b:,.0f} |")
    click.echo(f"| speed, pair by pair | 1 | {spread(ratios, '.4g')} |")
    first, last = measured["losses"]
    click.echo(
        f"| loss, {times + 3} steps | {first:.4f} to {last:.4f} | at most {measured['apart']:.2g} from it |"
    )
    for name, built in (("empty", cold), ("warm", warm)):
        more = built["seconds"] - plain["seconds"]
        pays = f"pays after {more / (a - b):,.0f} steps" if b < a else "never pays"
        click.echo(f"| build, cache {name} [s] | {plain['seconds']:.1f} | {built['seconds']:.1f}: {pays} |")
    for key, name in (("before", "before the first step"), ("peak", "at most")):
        click.echo(f"| resident {name} [MiB] | {plain[key] / 2**20:,.0f} | {warm[key] / 2**20:,.0f} |")
    click.echo("")


@click.command()
@click.option("--times", default=50, show_default=True, help="Steps of each.")
@click.option("--call", hidden=True, help="JSON: a function of this file and its arguments.")
def main(times: int, call: str | None) -> None:
    if call:
        name, *args = json.loads(call)
        click.echo(json.dumps({"build": build, "speed": speed}[name](*args)))
        return
    for shape in SHAPES:
        table(shape, times)


if __name__ == "__main__":
    main()
