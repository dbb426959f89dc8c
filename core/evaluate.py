"""The stage evaluate: measure the final model, let it write, say what to think of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from core.errors import UserError
from core.files import read_json, write_json, write_text
from core.measure import measure
from core.project import Project
from core.tokenizer import Tokenizer
from core.tokens import TokenShards

UNDER_TRAINED = 5  # tokens per parameter: a quarter of what is compute-optimal
REPEATS_THAT_HELP = 4
OVERFIT_GAP = 1.15  # held-out loss over training loss


def evaluate(project: Project, echo: Callable[[str], None]) -> dict[str, Any]:
    """Measure the final model, draw samples, and write metrics.json, samples.md and report.html into reports/.

    Raises UserError where the model or the tokens are missing or damaged, or do not belong together.
    """
    from core.generate import generate
    from core.launch import planned
    from core.report import write_report
    from core.run import load_model
    from core.trainer import make_accelerator

    plan, _ = planned(project)
    params = project.params.evaluate
    held_out = TokenShards.open(project.tokens, "val", verify=True)
    trained = read_json(
        project.reports / "train.json", made_by="python -m stages.train", keys=("epochs", "loss")
    )
    model, facts = load_model(project.final_model)
    tokenizer = Tokenizer.load(project.final_model / "tokenizer")
    if tokenizer.sha256 != held_out.manifest["tokenizer_sha256"]:
        raise UserError(
            f"{project.final_model} was trained with another tokenizer than that of {project.tokens}: run "
            "`python -m stages.train` first (or `dvc repro`)"
        )

    alone = replace(plan, num_processes=1)  # one process measures; the plan may train with several
    accelerator = make_accelerator(alone)
    model.to(accelerator.device)
    bytes_of = tokenizer.token_bytes()
    with accelerator.autocast():
        result = measure(model, accelerator, held_out, bytes_of, plan["micro_batch"], params.max_tokens, echo)
    metrics = {
        "bits_per_byte": round(result["bits_per_byte"], 6),
        "loss": round(result["loss"], 6),
        "perplexity": round(result["perplexity"], 4),
        "held_out_tokens": result["tokens"],
        "held_out_bytes": result["bytes"],
        "parameters": model.config.n_params,
        "training_tokens": facts["tokens"],
        "tokens_per_parameter": round(facts["tokens"] / model.config.n_params, 4),
    }
    echo(
        f"held-out text: {metrics['bits_per_byte']:.4f} bits per byte, loss {metrics['loss']:.4f}, "
        f"perplexity {metrics['perplexity']:.1f} ({metrics['held_out_tokens']:,} tokens)"
    )
    warnings = judge(metrics, trained)
    for warning in warnings:
        echo(f"warning: {warning}")

    samples = []
    for i, prompt in enumerate(params.prompts or opening_words(held_out, tokenizer, params.n_samples)):
        pieces = generate(
            model,
            tokenizer,
            prompt,
            max_tokens=params.sample_tokens,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=project.params.seed + i,
        )
        with accelerator.autocast():
            text = "".join(pieces)
        samples.append((prompt, text))
        echo(f"\n» {prompt}{text}")

    write_json(project.reports / "metrics.json", metrics)
    write_text(project.reports / "samples.md", samples_markdown(samples))
    write_report(project, metrics, trained, warnings, samples, model, facts)
    echo(f"\nreport: {project.reports / 'report.html'}")
    return metrics


def judge(metrics: dict[str, Any], trained: dict[str, Any]) -> list[str]:
    """What a reader should know before believing in the model; empty for a well-trained one."""
    warnings = []
    if metrics["tokens_per_parameter"] < UNDER_TRAINED:
        warnings.append(
            f"far under-trained: {metrics['tokens_per_parameter']:.2g} tokens per parameter, where some 20 make the "
            "best use of compute (Hoffmann et al. 2022, arXiv 2203.15556). Train longer or take a smaller preset."
        )
    if trained["epochs"] > REPEATS_THAT_HELP:
        warnings.append(
            f"the corpus was read {trained['epochs']:.1f} times; beyond 4 repeats more text helps more than more "
            "training (Muennighoff et al. 2023, arXiv 2305.16264)."
        )
    if metrics["loss"] > trained["loss"] * OVERFIT_GAP:
        warnings.append(
            f"overfits: held-out loss {metrics['loss']:.2f} against {trained['loss']:.2f} in training. Use more text, "
            "a smaller preset or fewer steps."
        )
    return warnings


def opening_words(held_out: TokenShards, tokenizer: Tokenizer, n: int, length: int = 12) -> list[str]:
    """The first `length` tokens of n held-out documents, evenly spread."""
    shard = held_out.shards[0]
    starts = np.flatnonzero(shard[: 1 << 24] == tokenizer.bos)
    starts = starts[starts + length < len(shard)]
    if not len(starts) or not n:
        return [""] * n
    chosen = starts[np.linspace(0, len(starts) - 1, min(n, len(starts))).astype(int)]
    openings = [shard[s + 1 : s + 1 + length] for s in chosen]
    ends = [np.flatnonzero(ids == tokenizer.bos) for ids in openings]  # a short document ends before that
    return [
        tokenizer.decode(ids[: end[0] if len(end) else length])
        for ids, end in zip(openings, ends, strict=True)
    ]


def samples_markdown(samples: list[tuple[str, str]]) -> str:
    """Prompts in bold, continuations as they are."""
    parts = ["# Samples"]
    parts += [f"**{prompt.strip()}**{text}" for prompt, text in samples]
    return "\n\n---\n\n".join(parts) + "\n"
