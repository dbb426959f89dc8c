"""The CUDA caching allocator as a model: what torch would reserve for a stream of allocations. No torch needed.

Rules and constants are those of torch 2.13: c10/core/AllocatorConfig.h (block and segment sizes) and
c10/cuda/CUDACachingAllocator.cpp (best fit, splitting, merging, releasing cached segments before giving up).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "temporaries")
"""What memory is for. Weights include buffers; activations are what forward keeps for backward."""
MIB = 1 << 20
MIN_BLOCK = 512  # every request is rounded up to a multiple of it
SMALL_REQUEST = MIB  # up to here a request comes from the small pool
SMALL_SEGMENT = 2 * MIB
MEDIUM_REQUEST = 10 * MIB  # below it a large request gets a segment of 20 MiB, from it on one of its own size
LARGE_SEGMENT = 20 * MIB
SEGMENT_ROUNDING = 2 * MIB
MAX_OVERSIZE = 20 * MIB  # a block beyond max_split_size may be this much larger than what it is given for


class OutOfMemory(Exception):
    """The limit would be passed even after every unused segment is given back."""


@dataclass(frozen=True)
class AllocatorSettings:
    """What PYTORCH_ALLOC_CONF says, as far as it changes what is reserved."""

    expandable_segments: bool = False
    max_split_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> AllocatorSettings:
        """Read a value of PYTORCH_ALLOC_CONF; settings that reserve nothing are passed over."""
        pairs = dict(entry.split(":", 1) for entry in text.replace(" ", "").split(",") if ":" in entry)
        split = pairs.get("max_split_size_mb", "")
        return cls(pairs.get("expandable_segments") == "True", int(split) * MIB if split.isdigit() else None)


class Block:
    """A piece of a segment, between its neighbours `before` and `after`."""

    __slots__ = ("address", "after", "before", "free", "pool", "requested", "size")

    def __init__(
        self, address: int, size: int, pool: Pool, before: Block | None, after: Block | None
    ) -> None:
        self.address, self.size, self.pool, self.before, self.after = address, size, pool, before, after
        self.free, self.requested = True, 0


class Pool:
    """The small or the large pool: its free blocks by size, then address, and the end of its growing segment."""

    __slots__ = ("end", "free", "segment_size", "small")

    def __init__(self, small: bool) -> None:
        self.small, self.segment_size = small, SMALL_SEGMENT if small else LARGE_SEGMENT
        self.free: list[tuple[int, int, Block]] = []
        self.end: Block | None = None  # the last block, where segments are expandable

    def add(self, block: Block) -> None:
        block.free = True
        bisect.insort(self.free, (block.size, block.address, block))

    def take(self, block: Block) -> None:
        i = bisect.bisect_left(self.free, (block.size, block.address))
        assert self.free[i][2] is block
        del self.free[i]


class CachingAllocator:
    """`malloc` and `free` with torch's counters [bytes]: allocated, reserved, and the peak of each.

    limit: most that may be reserved [bytes]; None: no limit. retries counts how often the limit made it give unused
    segments back, as num_alloc_retries in torch.cuda.memory_stats() does. Expandable segments shrink here at their end
    only, where torch can also unmap pages inside: what is predicted for them under a limit is on the safe side.
    """

    def __init__(self, limit: int | None = None, settings: AllocatorSettings | None = None) -> None:
        self.limit, self.settings = limit, settings or AllocatorSettings()
        self.small, self.large = Pool(True), Pool(False)
        self.heads: set[Block] = set()  # the first block of each segment that is not expandable
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = self.retries = 0
        self._address = 0

    def malloc(self, nbytes: int) -> Block | None:
        """A block of at least `nbytes`; None for 0 bytes. Raises OutOfMemory."""
        if nbytes <= 0:
            return None
        size = -(-nbytes // MIN_BLOCK) * MIN_BLOCK
        pool = self.small if size <= SMALL_REQUEST else self.large
        block = self._best_fit(pool, size)
        if block is not None:
            pool.take(block)
        elif self.settings.expandable_segments:
            block = self._extend(pool, size)
        else:
            block = self._new_segment(pool, size)
        if self._splits(pool, size, block.size - size):
            self._split(block, size)
        block.free, block.requested = False, nbytes
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block | None) -> None:
        """Give a block back to its pool, merged with free neighbours."""
        if block is None:
            return
        self.allocated -= block.size
        pool = block.pool
        if block.after is not None and block.after.free:
            pool.take(block.after)
            self._merge(block, block.after)
        if block.before is not None and block.before.free:
            pool.take(block.before)
            block = self._merge(block.before, block)
        pool.add(block)

    def release_cached(self) -> None:
        """Give every unused segment back to the driver, as torch.cuda.empty_cache() does."""
        for head in [head for head in self.heads if head.free and head.after is None]:
            head.pool.take(head)
            self.heads.discard(head)
            self.reserved -= head.size
        for pool in (self.small, self.large):
            end = pool.end
            # Whole granules at the end of the segment; the rest of the block stays.
            given = end.size // pool.segment_size * pool.segment_size if end is not None and end.free else 0
            if end is None or not given:
                continue
            pool.take(end)
            self.reserved -= given
            end.size -= given
            if end.size:
                pool.add(end)
            else:
                pool.end = end.before
                if end.before is not None:
                    end.before.after = None

    def _best_fit(self, pool: Pool, size: int) -> Block | None:
        i = bisect.bisect_left(pool.free, (size, -1))
        if i == len(pool.free):
            return None
        block, most = pool.free[i][2], self.settings.max_split_bytes
        if most is not None and not self.settings.expandable_segments:
            if size < most <= block.size:
                return None  # large blocks stay whole
            if size >= most and block.size >= size + MAX_OVERSIZE:
                return None
        return block

    def _splits(self, pool: Pool, size: int, rest: int) -> bool:
        if pool.small or self.settings.expandable_segments:
            return rest >= MIN_BLOCK
        most = self.settings.max_split_bytes
        return rest > SMALL_REQUEST and (most is None or size < most)

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.pool, block, block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        if block.pool.end is block:
            block.pool.end = rest
        block.pool.add(rest)

    def _merge(self, block: Block, after: Block) -> Block:
        block.size += after.size
        block.after = after.after
        if after.after is not None:
            after.after.before = block
        if block.pool.end is after:
            block.pool.end = block
        return block

    def _reserve(self, wanted: Any, asked: int) -> int:
        """Reserve `wanted()` bytes; where they pass the limit, give cached segments back and ask again.

        asked: what torch checks against the limit first, the whole request, even if less is missing [bytes].
        """
        n = wanted()
        if self.limit is not None and self.reserved + max(n, asked) > self.limit:
            self.retries += 1
            self.release_cached()
            n = wanted()  # the end that was to be extended may be gone
            if self.reserved + max(n, asked) > self.limit:
                raise OutOfMemory(
                    f"{n} bytes wanted, {self.reserved} of {self.limit} reserved, {self.allocated} allocated"
                )
        self.reserved += n
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return n

    def _new_segment(self, pool: Pool, size: int) -> Block:
        nbytes = pool.segment_size
        if size >= MEDIUM_REQUEST:
            nbytes = -(-size // SEGMENT_ROUNDING) * SEGMENT_ROUNDING
        self._reserve(lambda: nbytes, nbytes)
        head = Block(self._address, nbytes, pool, None, None)
        self._address += nbytes
        self.heads.add(head)
        return head

    def _extend(self, pool: Pool, size: int) -> Block:
        """Grow the pool's one segment by whole granules, from the free block at its end on."""

        def missing() -> int:
            have = pool.end.size if pool.end is not None and pool.end.free else 0
            return -(-(size - have) // pool.segment_size) * pool.segment_size

        asked = (
            -(-size // SEGMENT_ROUNDING) * SEGMENT_ROUNDING if size >= MEDIUM_REQUEST else pool.segment_size
        )
        nbytes, end = self._reserve(missing, asked), pool.end
        if end is not None and end.free:
            pool.take(end)
            end.size += nbytes
            return end
        block = Block(end.address + end.size if end else 0, nbytes, pool, end, None)
        if end is not None:
            end.after = block
        pool.end = block
        return block
