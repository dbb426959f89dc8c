"""Kills on a card: random SIGKILLs of a training in bf16 and in fp16, with deterministic kernels and without.

    python -m bench.faults_gpu              # 20 kills each; needs an NVIDIA card and Linux
    python -m bench.faults_gpu --times 100

With the strategy `deterministic` the resumed result must be the undisturbed one, bit for bit. Without it two
undisturbed runs may differ already: the last column says how far their final weights part. Not run on a card yet.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file

from core.project import Project
from core.selftest.kills import kill_at_random
from core.selftest.lab import Lab

MODEL = {"architecture": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "dropout": 0.1}
TRAIN = {"max_steps": 40, "batch_tokens": 4096, "micro_batch": 8, "eval_interval": 20, "eval_tokens": 512}


def sections(precision: str, deterministic: bool) -> dict[str, Any]:
    add = [precision, *(["deterministic"] if deterministic else [])]
    other = {"bf16": "fp16", "fp16": "bf16"}[precision]
    hardware = {"profile": "auto", "strategies": {"add": add, "remove": [f"{other}"]}}
    return {"hardware": hardware, "model": MODEL, "train": TRAIN}


def distance(a: Path, b: Path) -> float:
    """The largest difference of two models' weights."""
    one, two = (load_file(Project(p).final_model / "model.safetensors") for p in (a, b))
    return max((one[name] - two[name]).abs().max().item() for name in one)


@click.command()
@click.option("--times", default=20, show_default=True)
@click.option("--folder", default=".", type=click.Path(path_type=Path, file_okay=False, exists=True))
def main(times: int, folder: Path) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("no CUDA card: this measures one. `python -m bench.faults` runs on a CPU")
    click.echo("| precision | kernels | kills | survived | bit-exact | two undisturbed runs part by |")
    click.echo("|---|---|---|---|---|---|")
    with Lab.open(folder.resolve(), Path(__file__).parents[1] / "plugins") as lab:
        for precision in ("bf16", "fp16"):
            for deterministic in (True, False):
                given = sections(precision, deterministic)
                outcome = kill_at_random(lab, times, **given)
                again = lab.project("again", **given)
                assert lab.run(again, "train").code == 0
                apart = distance(lab.reference(**given), again.root)
                kernels = "deterministic" if deterministic else "as they come"
                click.echo(
                    f"| {precision} | {kernels} | {outcome.tried} | {outcome.survived} | {outcome.exact} of "
                    f"{outcome.compared} | {apart:g} |"
                )
    click.echo(
        f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
