"""What `auto` means for the learning rate and the batch: laws fitted by others to many runs, with their sources."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from core.errors import UserError
from core.model_config import ModelConfig

if TYPE_CHECKING:
    from core.params import Params

AUTO = ("lr", "batch_tokens")
LARGEST_LR = 0.01
"""The law was fitted to runs of 1e17 FLOPs and more; for the smallest ones it would ask for more than is good."""
FLOPS_PER_SECOND = 1e11
"""Where the clock bounds a run, what a small CPU does is assumed: a batch too small costs less than one too large."""


def peak_lr(flops: float) -> float:
    """AdamW's peak learning rate for a run of so many FLOPs, outside embedding and head.

    DeepSeek-AI 2024, arXiv 2401.02954, equation 1.
    """
    return 0.3118 * flops**-0.1250


def batch_tokens(flops: float) -> float:
    """Tokens per optimizer step for a run of so many FLOPs. DeepSeek-AI 2024, arXiv 2401.02954, equation 1."""
    return 0.2920 * flops**0.3271


def settled(params: Params) -> Params:
    """Params with numbers in the place of `auto`; `TrainParams.reason` says where they come from."""
    train = params.train
    wanted = [key for key in AUTO if getattr(train, key) == "auto" or key in train._laws]
    if not wanted:
        return params
    try:
        model = ModelConfig.resolve(params.model, params.tokenizer.n_vocab)
    except UserError:  # told with everything else, when the plan is made
        return params.model_copy(update={"train": train.model_copy(update={"lr": 1e-3, "batch_tokens": 1})})
    head = 6 * model.vocab_size * model.n_embd
    per_token = model.flops_per_token - head
    whole = model.block_size * params.hardware.num_processes
    given = None if "batch_tokens" in wanted else train.batch_tokens
    if train.max_tokens:
        flops = float(per_token * train.max_tokens)
    elif train.max_steps and given:
        flops = float(per_token * train.max_steps * given)
    elif train.max_steps:  # tokens = steps x batch, and the batch follows from them
        flops = (per_token * train.max_steps * 0.2920) ** (1 / (1 - 0.3271))
    else:
        flops = FLOPS_PER_SECOND * 60 * (train.max_minutes or 0.0)
    batch = given or whole * 2 ** max(0, math.floor(math.log2(batch_tokens(flops) / whole)))
    lr = min(LARGEST_LR, float(f"{peak_lr(flops):.2g}"))
    law = f"for {flops:.2g} FLOPs outside embedding and head (arXiv 2401.02954)"
    found = {
        "lr": (lr, f"0.3118 C^-0.125 {law}"),
        "batch_tokens": (batch, f"0.292 C^0.327 {law}, rounded down to a power of two of sequences"),
    }
    train = train.model_copy(update={key: found[key][0] for key in wanted})
    train._laws = {key: found[key][1] for key in wanted}
    return params.model_copy(update={"train": train})
