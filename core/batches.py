"""Which tokens a step sees: a pure function of seed and position, so that nothing has to be remembered.

Sequence number n of a run is a window of T + 1 tokens. An epoch visits every window once, in an order and from an
offset drawn for that epoch; a step takes the next sequences, whatever the micro-batch, workers or processes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.tokens import TokenShards


class Windows:
    """Map-style dataset: positions of a run → tokens. Picklable, for spawned workers."""

    def __init__(self, shards: TokenShards, block_size: int, seed: int) -> None:
        self.shards, self.block_size, self.seed = shards, block_size, seed
        # Each shard has as many windows as fit at any offset below T, or one where it is short.
        self.counts = [_windows_in(len(shard), block_size) for shard in shards.shards]
        self.per_epoch = sum(self.counts)
        assert self.per_epoch, "tokenize makes sure that a split holds one window"
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Return x and y, [T] int64 each; y is x one token later."""
        shard, start = self._place(position)
        tokens = self.shards.shards[shard][start : start + self.block_size + 1].astype(np.int64)
        return tokens[:-1], tokens[1:]

    def _place(self, position: int) -> tuple[int, int]:
        """(shard, first token)."""
        epoch, index = divmod(position, self.per_epoch)
        order, offsets = self._order(epoch)
        window = int(order[index])
        shard = 0
        while window >= self.counts[shard]:
            window -= self.counts[shard]
            shard += 1
        return shard, int(offsets[shard]) + window * self.block_size

    def places(self, first: int, n: int) -> list[str]:
        """Where n sequences from a position on begin: "train_000.bin[4096]", for a message."""
        files = self.shards.manifest[self.shards.split]["shards"]
        found = [self._place(position) for position in range(first, first + n)]
        return [f"{files[shard]['file']}[{start}]" for shard, start in found]

    def __getitems__(self, positions: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """A whole micro-batch at once: x and y, [B, T]."""
        rows = [self[p] for p in positions]
        return np.stack([x for x, _ in rows]), np.stack([y for _, y in rows])

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            # Raw Philox words, sorted: NumPy promises their stream, not that of Generator.permutation.
            words = np.random.Philox(key=[self.seed, epoch]).random_raw(self.per_epoch + len(self.counts))
            room = [
                min(self.block_size, len(shard) - count * self.block_size)
                for shard, count in zip(self.shards.shards, self.counts, strict=True)
            ]
            offsets = words[self.per_epoch :] % np.array(room, dtype=np.uint64)
            self._epoch = (epoch, np.argsort(words[: self.per_epoch], kind="stable"), offsets)
        return self._epoch[1], self._epoch[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epoch": None}


def _windows_in(n_tokens: int, block_size: int) -> int:
    return max((n_tokens - block_size) // block_size, 1 if n_tokens > block_size else 0)


@dataclass(frozen=True)
class Positions:
    """Batch sampler: the positions of each micro-batch of one process, from a step on, without end."""

    sequences: int
    """Per step, over all processes."""
    micro_batch: int
    rank: int = 0
    num_processes: int = 1
    first_step: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        share = self.sequences // self.num_processes
        step = self.first_step
        while True:
            start = step * self.sequences + self.rank * share
            for first in range(start, start + share, self.micro_batch):
                yield list(range(first, first + self.micro_batch))
            step += 1


def to_tensors(batch: Any) -> tuple[Any, Any]:
    """Collate: [B, T] arrays → tensors that share their memory."""
    import torch

    return torch.from_numpy(batch[0]), torch.from_numpy(batch[1])


def micro_batches(windows: Windows, positions: Positions, plan: Any) -> Iterator[tuple[Any, Any]]:
    """Endless (x, y) micro-batches, [B, T] int64 on the CPU, read the way the plan says."""
    import torch
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        windows,  # type: ignore[arg-type]
        batch_sampler=positions,
        collate_fn=to_tensors,
        num_workers=plan["num_workers"],
        pin_memory=plan["pin_memory"],
        persistent_workers=plan["persistent_workers"],
        # Workers are spawned on every OS, as on Windows; the generator keeps torch's own random state untouched.
        multiprocessing_context="spawn" if plan["num_workers"] else None,
        generator=torch.Generator(),
    )
    if not plan["num_workers"] or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    # Ctrl-C in a terminal reaches the workers too: they shall go on until the run has saved.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGINT, before)


def held_out_batches(
    shards: TokenShards, block_size: int, batch: int, max_tokens: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Consecutive windows that predict every held-out token once, up to `max_tokens`; x and y [B, T] int64.

    The last tokens of a shard come as a shorter row of their own.
    """
    left = max_tokens or shards.n_tokens
    for shard in shards.shards:
        start, end = 0, len(shard) - 1
        while start < end and left > 0:
            rows = min(batch, max(1, left // block_size), (end - start) // block_size)
            length = block_size if rows else min(end - start, left)
            count = max(rows, 1) * length
            tokens = shard[start : start + count + 1].astype(np.int64)
            yield tokens[:-1].reshape(-1, length), tokens[1:].reshape(-1, length)
            start, left = start + count, left - count
