"""`tightfit generate`: continue a prompt with the final model or any run's weights."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click

from core.cli import command
from core.errors import UserError
from core.project import Project


@command("generate")
@click.argument("prompt")
@click.option("--model", "where", help="A model folder or the name of a run; default: models/final.")
@click.option(
    "--weights", type=click.Choice(["best", "last"]), default="best", help="Which of a run's weights."
)
@click.option(
    "--max-tokens", default=200, show_default=True, type=click.IntRange(min=1), help="Length at most."
)
@click.option("--temperature", default=0.8, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", default=50, show_default=True, help="Draw from the k likeliest tokens; 0: from all.")
@click.option(
    "--top-p", default=1.0, show_default=True, help="Draw from the likeliest tokens of this joint share."
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="auto: the card where torch can use one.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Same seed, same text."
)
def main(
    project: Project,
    prompt: str,
    where: str | None,
    weights: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    device: str,
    seed: int,
) -> None:
    """Continue PROMPT, printing as it goes."""
    from core.generate import check_sampling, generate

    check_sampling(temperature, top_k, top_p)
    folder = model_folder(project, where, weights)

    from core.run import load_model
    from core.tokenizer import Tokenizer

    model, _ = load_model(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    import torch

    if device == "cuda":
        from core.memory.compute import gpu_problem

        if problem := gpu_problem():
            raise UserError(f"--device cuda: {problem}")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        model.to("cuda")
    click.echo(prompt, nl=False)
    pieces = generate(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


def model_folder(project: Project, where: str | None, weights: str) -> Path:
    """The folder to load. Raises UserError naming the runs there are."""
    if where is None:
        if not project.final_model.is_dir():
            raise UserError("there is no models/final yet: run `dvc repro`, or name a run with --model")
        return project.final_model
    for folder in (project.runs / where / weights, Path(where) / weights, Path(where)):
        with contextlib.suppress(OSError):  # such as a name too long
            if (folder / "config.json").is_file():
                return folder
    runs = (
        sorted(p.parent.parent.name for p in project.runs.glob("*/*/config.json"))
        if project.runs.is_dir()
        else []
    )
    raise UserError(f"--model: no model at {where!r}. Runs: {', '.join(dict.fromkeys(runs)) or 'none yet'}")
