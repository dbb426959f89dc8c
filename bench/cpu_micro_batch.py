"""Which micro-batch a CPU trains fastest with: the figure behind `max_micro_batch_tokens` of the profile cpu.

    GOMP_SPINCOUNT=1000 python -m bench.cpu_micro_batch

Forward and backward of the presets nano and micro on random tokens, in turns over the micro-batches. Prints tokens/s
(median of the turns), and the ratio to the best.
"""

from __future__ import annotations

import statistics
import time

import torch

from core.model import build_model
from core.model_config import ModelConfig
from core.params import ModelParams

TURNS, SECONDS = 3, 3.0


def tokens_per_second(model: torch.nn.Module, micro_batch: int) -> float:
    tokens = torch.randint(0, 8192, (micro_batch, 256), generator=torch.Generator().manual_seed(0))
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens, tokens)
        loss.backward()
        model.zero_grad()
        n += 1
    return n * tokens.numel() / (time.perf_counter() - start)


def main() -> None:
    print("| preset | micro-batch | tokens | tokens/s | of the best |\n|---|---|---|---|---|")
    for preset in ("nano", "micro"):
        model = build_model(ModelConfig.resolve(ModelParams(preset=preset), 8192), seed=1)
        tokens_per_second(model, 4)  # warm up
        turns = [[tokens_per_second(model, b) for b in (2, 4, 8, 16, 32)] for _ in range(TURNS)]
        medians = [statistics.median(column) for column in zip(*turns, strict=True)]
        for b, rate in zip((2, 4, 8, 16, 32), medians, strict=True):
            print(f"| {preset} | {b} | {b * 256} | {rate:,.0f} | {rate / max(medians):.2f} |")


if __name__ == "__main__":
    main()
