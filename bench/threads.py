"""How OpenMP's spinning and a busy neighbour change training speed on a CPU.

    python -m bench.threads

Trains the preset nano on random tokens in turns: default spinning and GOMP_SPINCOUNT=1000, on an otherwise idle
machine and beside one process that wants a core. Prints tokens/s (median of the turns, smallest and largest) and the
ratio of the medians. Linux only:
elsewhere torch uses another OpenMP.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

TURNS, SECONDS = 5, 4

WORKER = f"""
import time, torch
from core.model import build_model
from core.model_config import ModelConfig
from core.params import ModelParams
model = build_model(ModelConfig.resolve(ModelParams(preset="nano"), 8192), seed=1)
tokens = torch.randint(0, 8192, (8, 256), generator=torch.Generator().manual_seed(0))
def step():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, tokens)
    loss.backward()
    model.zero_grad()
step()
n, start = 0, time.perf_counter()
while time.perf_counter() - start < {SECONDS}:
    step()
    n += 1
print(n * tokens.numel() / (time.perf_counter() - start))
"""


def tokens_per_second(spin: str | None) -> float:
    environ = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    if spin:
        environ["GOMP_SPINCOUNT"] = spin
    done = subprocess.run(
        [sys.executable, "-c", WORKER], env=environ, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    columns = {}
    for busy in (False, True):
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            turns = [(tokens_per_second(None), tokens_per_second("1000")) for _ in range(TURNS)]
        finally:
            if neighbour:
                neighbour.kill()
        columns[busy] = [sorted(column) for column in zip(*turns, strict=True)]
    print("| machine | default spinning | GOMP_SPINCOUNT=1000 | ratio |\n|---|---|---|---|")
    for busy, rates in columns.items():
        name = "one busy neighbour" if busy else "idle"
        default, short = (statistics.median(r) for r in rates)
        shown = [f"{statistics.median(r):,.0f} ({r[0]:,.0f} to {r[-1]:,.0f}) tokens/s" for r in rates]
        print(f"| {name} | {shown[0]} | {shown[1]} | {short / default:.2f} |")


if __name__ == "__main__":
    main()
