"""The training loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy summed over all targets [nats], in fp32.

    logits: [B, T, V]. targets: [B, T] int64. A sum, so that a window of micro-batches is divided once by its tokens.
    """
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum")
