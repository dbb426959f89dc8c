"""What `auto` means for the learning rate, its warm-up and the batch: laws with their sources."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from core.errors import UserError
from core.model_config import ModelConfig

if TYPE_CHECKING:
    from core.params import Params

AUTO = ("lr", "batch_tokens", "warmup_steps")
LR_LAW, BATCH_LAW = (0.3118, -0.1250), (0.2920, 0.3271)
"""a and b of a C^b, for a run of C FLOPs outside embedding and head: DeepSeek-AI 2024, arXiv 2401.02954, equation 1."""
LARGEST_LR = 0.01
"""The law was fitted to runs of 1e17 FLOPs and more; for the smallest ones it would ask for more than is good."""
WARMUP, LONGEST_WARMUP = 0.05, 40
"""Share of the run, and steps (docs/lab-log.md): a short run has no steps to spare."""
FLOPS_PER_SECOND = 1e11
"""Where the clock bounds a run, what a small CPU does is assumed: a batch too small costs less than one too large."""


def peak_lr(flops: float) -> float:
    """AdamW's peak learning rate for a run of so many FLOPs."""
    return _law(LR_LAW, flops)


def batch_tokens(flops: float) -> float:
    """Tokens per optimizer step for a run of so many FLOPs."""
    return _law(BATCH_LAW, flops)


def _law(law: tuple[float, float], flops: float) -> float:
    return law[0] * flops ** law[1]


def settled(params: Params) -> Params:
    """Params with numbers in the place of `auto`; `TrainParams.reason` says where they come from."""
    train = params.train
    wanted = [key for key in AUTO if getattr(train, key) == "auto" or key in train._laws]
    if not wanted:
        return params
    try:
        model = ModelConfig.resolve(params.model, params.tokenizer.n_vocab)
    except UserError:  # told with everything else, when the plan is made
        numbers = {"lr": 1e-3, "batch_tokens": 1, "warmup_steps": 0}
        return params.model_copy(update={"train": train.model_copy(update=numbers)})
    head = 6 * model.vocab_size * model.n_embd
    per_token = model.flops_per_token - head
    whole = model.block_size * params.hardware.num_processes
    given = None if "batch_tokens" in wanted else train.batch_tokens
    if train.max_tokens:
        flops = float(per_token * train.max_tokens)
    elif train.max_steps and given:
        flops = float(per_token * train.max_steps * given)
    elif train.max_steps:  # tokens = steps x batch, and the batch follows from them
        flops = (per_token * train.max_steps * BATCH_LAW[0]) ** (1 / (1 - BATCH_LAW[1]))
    else:
        flops = FLOPS_PER_SECOND * 60 * (train.max_minutes or 0.0)
    batch = given or whole * 2 ** max(0, math.floor(math.log2(batch_tokens(flops) / whole)))
    lr = min(LARGEST_LR, float(f"{peak_lr(flops):.2g}"))
    steps = train.max_steps or flops / per_token / batch
    warmup = math.ceil(min(LONGEST_WARMUP, WARMUP * steps))
    law = f"for {flops:.2g} FLOPs outside embedding and head (arXiv 2401.02954)"
    found = {
        "lr": (lr, f"{LR_LAW[0]:g} C^{LR_LAW[1]:g} {law}"),
        "batch_tokens": (
            batch,
            f"{BATCH_LAW[0]:g} C^{BATCH_LAW[1]:g} {law}, rounded down to a power of two of sequences",
        ),
        "warmup_steps": (warmup, f"{WARMUP:.0%} of the run, at most {LONGEST_WARMUP} steps"),
    }
    train = train.model_copy(update={key: found[key][0] for key in wanted})
    train._laws = {key: found[key][1] for key in wanted}
    return params.model_copy(update={"train": train})
