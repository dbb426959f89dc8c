"""How good a model is: loss, perplexity and bits per byte on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from core.batches import held_out_batches
from core.files import read_json, write_json, write_text
from core.plan import runtime
from core.project import Project
from core.tokenizer import Tokenizer
from core.tokens import TokenShards

UNDER_TRAINED = 5  # tokens per parameter: a quarter of what is compute-optimal
REPEATS_THAT_HELP = 4
OVERFIT_GAP = 1.15  # held-out loss over training loss


def measure(
    model: Any, accelerator: Any, held_out: TokenShards, batch: int, max_tokens: int | None = None
) -> dict[str, Any]:
    """Predict every held-out token once, in windows of the model's context; `batch` sequences at a time.

    Returns loss [nats per token], perplexity, bits_per_byte, tokens and bytes. Bits per byte is all nats, those of the
    document separators included, over the bytes of the text: it compares across tokenizers. Uses no more memory than a
    training step, since there are no gradients. Several processes share the work.
    """
    import torch

    block_size = accelerator.unwrap_model(model).config.block_size
    bytes_of = Tokenizer.load(held_out.folder / "tokenizer").token_bytes()
    training, total = model.training, torch.zeros((), device=accelerator.device, dtype=torch.float64)
    tokens = text_bytes = 0
    model.eval()
    with torch.inference_mode():
        for i, (x, y) in enumerate(held_out_batches(held_out, block_size, batch, max_tokens)):
            tokens += y.size
            text_bytes += int(bytes_of[y].sum())
            if i % accelerator.num_processes == accelerator.process_index:
                xs, ys = (torch.from_numpy(t).to(accelerator.device) for t in (x, y))
                total += model(xs, ys).double()
    model.train(training)
    nats = accelerator.reduce(total, "sum").item()
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),
        "bits_per_byte": nats / math.log(2) / text_bytes,
        "tokens": tokens,
        "bytes": text_bytes,
    }


def evaluate(project: Project, echo: Callable[[str], None]) -> dict[str, Any]:
    """Measure the final model, draw samples, and write metrics.json, samples.md and report.html into reports/.

    Raises UserError where the model or the tokens are missing or damaged.
    """
    from core.generate import generate
    from core.launch import planned
    from core.report import write_report
    from core.run import load_model
    from core.trainer import make_accelerator

    plan, _ = planned(project)
    params = project.params.evaluate
    held_out = TokenShards.open(project.tokens, "val")
    trained = read_json(project.reports / "train.json", made_by="python -m stages.train")
    model, facts = load_model(project.final_model)
    tokenizer = Tokenizer.load(project.final_model / "tokenizer")

    alone = replace(plan, num_processes=1)  # one process measures; the plan may train with several
    accelerator = make_accelerator(alone, runtime(plan).hook)
    model = accelerator.prepare(model)
    result = measure(model, accelerator, held_out, plan["micro_batch"], params.max_tokens)
    config = accelerator.unwrap_model(model).config
    metrics = {
        "bits_per_byte": round(result["bits_per_byte"], 6),
        "loss": round(result["loss"], 6),
        "perplexity": round(result["perplexity"], 4),
        "held_out_tokens": result["tokens"],
        "held_out_bytes": result["bytes"],
        "parameters": config.n_params,
        "training_tokens": facts["tokens"],
        "tokens_per_parameter": round(facts["tokens"] / config.n_params, 4),
    }
    echo(
        f"held-out text: {metrics['bits_per_byte']:.4f} bits per byte, loss {metrics['loss']:.4f}, "
        f"perplexity {metrics['perplexity']:.1f} ({metrics['held_out_tokens']:,} tokens)"
    )
    warnings = judge(metrics, trained)
    for warning in warnings:
        echo(f"warning: {warning}")

    samples = []
    network = accelerator.unwrap_model(model)
    for i, prompt in enumerate(params.prompts or opening_words(held_out, tokenizer, params.n_samples)):
        text = "".join(
            generate(
                network,
                tokenizer,
                prompt,
                max_tokens=params.sample_tokens,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                seed=project.params.seed + i,
            )
        )
        samples.append((prompt, text))
        echo(f"\n» {prompt}{text}")

    write_json(project.reports / "metrics.json", metrics)
    write_text(project.reports / "samples.md", samples_markdown(samples))
    write_report(project, metrics, trained, warnings, samples, network, facts)
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
    import numpy as np

    shard = held_out.shards[0]
    starts = np.flatnonzero(shard[: 1 << 24] == tokenizer.bos)
    starts = starts[starts + length < len(shard)]
    if not len(starts) or not n:
        return [""] * n
    chosen = starts[np.linspace(0, len(starts) - 1, min(n, len(starts))).astype(int)]
    return [tokenizer.decode(shard[s + 1 : s + 1 + length]) for s in chosen]


def samples_markdown(samples: list[tuple[str, str]]) -> str:
    """Prompts in bold, continuations as they are."""
    parts = ["# Samples"]
    parts += [f"**{prompt.strip()}**{text}" for prompt, text in samples]
    return "\n\n---\n\n".join(parts) + "\n"
