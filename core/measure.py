"""How good a model is: loss, perplexity and bits per byte on held-out text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from core.batches import held_out_batches
from core.tokens import TokenShards


def measure(
    model: Any,
    accelerator: Any,
    held_out: TokenShards,
    bytes_of: np.ndarray,
    batch: int,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Predict every held-out token once, in windows of the model's context; `batch` sequences at a time.

    Returns loss [nats per token], perplexity, bits_per_byte, tokens and bytes. Bits per byte is all nats, those of the
    document separators included, over the bytes of the text: it compares across tokenizers. Uses no more memory than a
    training step, since there are no gradients. Several processes share the work. bytes_of: [V], UTF-8 bytes of an id.
    """
    import torch

    model = accelerator.unwrap_model(model)  # without DDP, which would wait for processes that have no batch
    block_size = model.config.block_size
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
