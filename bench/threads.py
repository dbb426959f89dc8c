"""How OpenMP's spinning and a busy neighbour change training speed on a CPU.

    python -m bench.threads

Trains two shapes on random tokens in turns: default spinning, and GOMP_SPINCOUNT=1000 and 5000, on an otherwise idle
machine and beside one process that wants a core. Prints tokens/s (median of the turns, smallest and largest) and the
ratio of the medians to default spinning. Linux only: elsewhere torch uses another OpenMP.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

TURNS, SECONDS = 3, 4
SPINS = (None, "1000", "5000")
SHAPES = {  # sizes as ModelConfig takes them, and the micro-batch
    "nano, 8 x 256": (("qwen3", 4, 4, 4, 192, 512, 256, 8192), 8),
    "4 layers, 128 wide, 12 x 64": (("qwen3", 4, 4, 4, 128, 384, 64, 320), 12),
}

WORKER = f"""
import sys, time, torch
from core.model import build_model
from core.model_config import ModelConfig
import json
sizes, micro_batch = json.loads(sys.argv[1])
config = ModelConfig(*sizes)
model = build_model(config, seed=1)
model.loss_chunk = 512
shape = (micro_batch, config.block_size)
tokens = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
def step():
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


def tokens_per_second(shape: str, spin: str | None) -> float:
    environ = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    if spin:
        environ["GOMP_SPINCOUNT"] = spin
    command = [sys.executable, "-c", WORKER, json.dumps(SHAPES[shape])]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    print(
        "| shape | machine | default spinning | GOMP_SPINCOUNT=1000 | ratio | GOMP_SPINCOUNT=5000 | ratio |"
    )
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for busy in (False, True):
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            try:
                turns = [[tokens_per_second(shape, spin) for spin in SPINS] for _ in range(TURNS)]
            finally:
                if neighbour:
                    neighbour.kill()
            columns = [sorted(column) for column in zip(*turns, strict=True)]
            default = statistics.median(columns[0])
            cells = []
            for rates in columns:
                median = statistics.median(rates)
                cells.append(f"{median:,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f}) tokens/s")
                cells += [f"{median / default:.2f}"] if rates is not columns[0] else []
            print(
                "|",
                shape,
                "|",
                "one busy neighbour" if busy else "idle",
                "|",
                " | ".join(cells),
                "|",
                flush=True,
            )


if __name__ == "__main__":
    main()
