"""How good a model is: loss, perplexity and bits per byte on held-out text."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from core.batches import held_out_batches
from core.errors import UserError, is_out_of_memory
from core.faults import point
from core.tokens import TokenShards


def measure(
    model: Any,
    accelerator: Any,
    held_out: TokenShards,
    bytes_of: np.ndarray,
    batch: int,
    max_tokens: int | None = None,
    say: Callable[[str], None] = print,
    leave: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Predict every held-out token once, in windows of the model's context; `batch` sequences at a time.

    Returns loss [nats per token], perplexity, bits_per_byte, tokens, bytes and sequences_at_once. Bits per byte is all
    nats, those of the document separators included, over the bytes of the text: it compares across tokenizers. Uses no
    more memory than a training step, since nothing is kept for gradients and logits exist for few tokens at a time;
    where memory runs out all the same, it goes on with fewer sequences, and says so. Raises UserError where one is too
    many. Several processes share the work. bytes_of: [V], UTF-8 bytes of an id. leave:
    called before each batch, may raise.
    """
    import torch

    if accelerator.num_processes > 1:  # without DDP, which would wait for processes that have no batch
        model = accelerator.unwrap_model(model)  # imports torch._dynamo: a second
    block_size = model.config.block_size
    training = model.training
    model.eval()
    while True:
        total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
        tokens = text_bytes = 0
        try:
            with torch.inference_mode():
                for i, (x, y) in enumerate(held_out_batches(held_out, block_size, batch, max_tokens)):
                    leave()
                    point("train.evaluate")
                    tokens += y.size
                    text_bytes += int(bytes_of[y].sum())
                    if i % accelerator.num_processes == accelerator.process_index:
                        xs, ys = (torch.from_numpy(t).to(accelerator.device) for t in (x, y))
                        total += model(xs, ys).double()
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if batch == 1 or accelerator.num_processes > 1:
                raise UserError(
                    f"out of memory in an evaluation with {batch} sequences at a time ({str(error).splitlines()[0]}): "
                    "close what else uses the memory, or set a smaller model.block_size or model.preset"
                ) from None
        batch = smaller(batch)
        say(f"out of memory in an evaluation: going on with {batch} sequences at a time")
        free_cached(accelerator.device)
    model.train(training)
    nats = accelerator.reduce(total, "sum").item()
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),
        "bits_per_byte": nats / math.log(2) / text_bytes,
        "tokens": tokens,
        "bytes": text_bytes,
        "sequences_at_once": batch,
    }


def smaller(micro_batch: int) -> int:
    """The next smaller size that divides it: half where it is even."""
    return micro_batch // next(d for d in range(2, micro_batch + 1) if micro_batch % d == 0)


def free_cached(device: Any) -> None:
    """Hand what nobody holds back, so that smaller pieces find room."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
