"""What a training step allocates, written down once and played for any micro-batch. No torch needed.

Every size on a tape is constant or proportional to the micro-batch, so one simulated step answers for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from core.memory.allocator import KINDS, AllocatorSettings, Block, CachingAllocator, OutOfMemory

LAUNCH_SECONDS = 4e-6
"""Least time of an operation, however small: starting a kernel takes some microseconds (assumed, not measured)."""


class Segment(NamedTuple):
    """A stretch of a tape: a part of the step, and the layer that is at work where it is one."""

    part: str
    """build, forward 1, head 1, loss 1, backward 1, tail 1, forward 2, …, update."""
    layer: int | None
    event: int
    """Where it begins in `Tape.events`,"""
    operation: int
    """and in `Tape.roofline`."""


class Operation(NamedTuple):
    """Arithmetic and memory traffic of an operation, of each sequence and whatever the micro-batch."""

    flops: float
    bytes: float
    flops_once: float
    bytes_once: float
    layers: float = 0.0
    """Of an operation of the update: the share that is done for the layers' own parameters."""


@dataclass
class Tape:
    """A stream of allocations: the build, two micro-batches, and the optimizer's update.

    Allocation i has `constant[i] + per_sequence[i] * B` bytes at micro-batch B, the kind `KINDS[kind[i]]`, was made by
    `op[i]`, and belongs to a layer or to none. `events` holds i for its allocation and ~i for its end.
    """

    constant: list[int] = field(default_factory=list)
    per_sequence: list[float] = field(default_factory=list)
    kind: list[int] = field(default_factory=list)
    op: list[str] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    roofline: list[Operation] = field(default_factory=list)
    n_params: int = 0

    def allocate(self, constant: int, per_sequence: float, kind: int, op: str) -> int:
        """Write an allocation down; return its number."""
        self.constant.append(constant)
        self.per_sequence.append(per_sequence)
        self.kind.append(kind)
        self.op.append(op)
        self.events.append(len(self.kind) - 1)
        return len(self.kind) - 1

    def begin(self, part: str, layer: int | None = None) -> None:
        """A segment begins here."""
        self.segments.append(Segment(part, layer, len(self.events), len(self.roofline)))

    def start(self, part: str) -> Segment:
        """The first segment of a part."""
        return next(segment for segment in self.segments if segment.part == part)

    def settle(self) -> None:
        """Forget what the segment that is at its end has made and freed.

        After the build: a network is made on the CPU and only then moved to the card, parameter by parameter.
        """
        start = self.segments[-1].event
        freed = {~e for e in self.events[start:] if e < 0}
        self.events[start:] = [e for e in self.events[start:] if e >= 0 and e not in freed]

    def sizes(self, micro_batch: int) -> np.ndarray:
        """[allocations] int64, bytes."""
        return (np.array(self.constant) + np.array(self.per_sequence) * micro_batch).astype(np.int64)

    def played(self, accumulates: bool) -> list[int]:
        """The events of a run: build, then a step as it is from the second on.

        accumulates: the step has more than one micro-batch, so that gradients are there when forward runs. Further
        ones repeat the second. Without, the first micro-batch is followed by the update at once.
        """
        if accumulates:
            return self.events
        second, update = self.start("forward 2").event, self.start("update").event
        kept = self.events[:second] + self.events[update:]
        made = {e for e in kept if e >= 0}
        return [e for e in kept if e >= 0 or ~e in made]

    def peak(self, micro_batch: int, accumulates: bool) -> Peak:
        """The largest sum of what is alive at once, without the allocator's rounding."""
        events = np.array(self.played(accumulates))
        made = events >= 0
        ids = np.where(made, events, ~events)
        sizes = self.sizes(micro_batch)[ids] * np.where(made, 1, -1)
        alive = np.cumsum(sizes)
        top = int(alive.argmax())
        kinds = np.array(self.kind)[ids[: top + 1]]
        parts = {name: int(sizes[: top + 1][kinds == k].sum()) for k, name in enumerate(KINDS)}
        update = len(events) - (len(self.events) - self.start("update").event)
        built = self.start("forward 1").event
        phase = "build" if top < built else "update" if top >= update else "forward and backward"
        return Peak(int(alive[top]), parts, self.op[int(ids[top])], phase, int(alive[built - 1]))

    def play(
        self,
        micro_batch: int,
        accumulates: bool,
        settings: AllocatorSettings | None = None,
        limit: int | None = None,
    ) -> CachingAllocator:
        """The allocator after the tape. Raises OutOfMemory where it passes the limit [bytes]."""
        allocator = CachingAllocator(limit, settings)
        sizes = self.sizes(micro_batch).tolist()
        alive: dict[int, Block | None] = {}
        malloc, free = allocator.malloc, allocator.free
        for event in self.played(accumulates):
            if event >= 0:
                alive[event] = malloc(sizes[event])
            else:
                free(alive.pop(~event))
        return allocator

    def fits(self, micro_batch: int, accumulates: bool, settings: AllocatorSettings, limit: int) -> bool:
        """Whether the tape plays within `limit` bytes reserved."""
        if self.peak(micro_batch, accumulates).bytes > limit:
            return False
        try:
            self.play(micro_batch, accumulates, settings, limit)
        except OutOfMemory:
            return False
        return True

    def flops(self, micro_batch: int, accumulation_steps: int) -> float:
        """Arithmetic of an optimizer step, what is computed twice counted twice [FLOP]."""
        second, update = self.start("forward 2").operation, self.start("update").operation
        return sum(op.flops for op in self.roofline[second:update]) * micro_batch * accumulation_steps

    def seconds(
        self, micro_batch: int, accumulation_steps: float, flops_per_second: float, bytes_per_second: float
    ) -> float:
        """Time of an optimizer step where each operation runs at the faster-reached of two limits [seconds].

        The roofline model: an operation takes its arithmetic at the peak rate or its memory traffic at full bandwidth,
        whichever is longer (Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785).
        """
        ops = np.array(self.roofline).reshape(-1, len(Operation._fields))
        flops, moved = (ops[:, :2] * micro_batch + ops[:, 2:4]).T
        time = np.maximum(flops / flops_per_second, moved / bytes_per_second)
        second, update = self.start("forward 2").operation, self.start("update").operation
        window = np.maximum(time[second:update], LAUNCH_SECONDS)  # an update is one kernel for many tensors
        return float(window.sum() * accumulation_steps + time[update:].sum())


@dataclass(frozen=True)
class Peak:
    """The moment when most memory is in use."""

    bytes: int
    parts: dict[str, int]
    """By `KINDS` [bytes]."""
    op: str
    """The operation that needed it."""
    phase: str
    """build, forward and backward, or update."""
    resident: int
    """What stays between steps: weights and the optimizer's state [bytes]."""
