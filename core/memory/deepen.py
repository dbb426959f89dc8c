"""A tape of a shallow network made into that of a deep one: layers in the middle all do the same.

A network of six layers says everything about one of forty-eight, in a tenth of the time. Layers 2 and 3 must have
left the same stretches of tape; where they have not, because a strategy treats layers differently, there is no answer.
"""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

from core.memory.tape import Segment, Tape

SHALLOW = 6  # two at the start, two in the middle that are compared, two at the end


def deepen(tape: Tape, owner: dict[int, int | None], n_layer: int, n_params: int) -> Tape | None:
    """The tape of `n_layer` layers from one of SHALLOW; None where the layers in the middle differ.

    owner: the layer of each allocation that outlives the build, such as a weight, or moment. n_params: of the deep
    network.
    """
    return Deepening(tape, owner, n_layer).result(n_params)


class Deepening:
    """tape → made, allocation by allocation."""

    def __init__(self, tape: Tape, owner: dict[int, int | None], n_layer: int) -> None:
        self.tape, self.owner, self.n_layer = tape, owner, n_layer
        self.made = Tape()
        self.stretches = [
            (
                segment,
                tape.events[segment.event : after.event],
                tape.roofline[segment.operation : after.operation],
            )
            for segment, after in pairwise(
                [*tape.segments, Segment("", None, len(tape.events), len(tape.roofline))]
            )
        ]
        # Where each allocation was made: its segment, and its number among those of the segment.
        self.place: dict[int, tuple[str, int | None, int]] = {}
        for segment, events, _ in self.stretches:
            for k, allocation in enumerate(e for e in events if e >= 0):
                layer = owner.get(allocation, segment.layer) if segment.part == "build" else segment.layer
                self.place[allocation] = (segment.part, layer, k)
        self.copies: dict[
            tuple[int, int], int
        ] = {}  # (allocation, layer of the copy or -1) → allocation of made

    def _update_holds_everything(self) -> bool:
        """Whether the update has temporaries of many tensors at once, as torch's foreach optimizers do."""
        alive = most = 0
        events = next(events for segment, events, _ in self.stretches if segment.part == "update")
        for event in events:
            allocation = event if event >= 0 else ~event
            if self.place[allocation][0] == "update" and self.tape.constant[allocation] >= 512:
                alive += 1 if event >= 0 else -1
                most = max(most, alive)
        return most > 2 * SHALLOW

    def result(self, n_params: int) -> Tape | None:
        if self._update_holds_everything():
            return None
        parts = groupby(self.stretches, key=lambda stretch: (stretch[0].part, stretch[0].layer is not None))
        for (_, in_layers), group in parts:
            stretches = list(group)
            if not in_layers:
                for stretch in stretches:
                    self._outside(*stretch)
                continue
            by_layer = {segment.layer: (segment, events, ops) for segment, events, ops in stretches}
            if len(stretches) != SHALLOW or set(by_layer) != set(range(SHALLOW)):
                return None
            shapes = [self._shape(*by_layer[i][:2]) for i in (1, 2, 3, 4)]
            made = [[entry for entry in shape if len(entry) == 4] for shape in shapes]
            if shapes[1] != shapes[2] or any(made[0] != other for other in made):
                return None
            layers = range(self.n_layer)
            for layer in layers if stretches[0][0].layer == 0 else reversed(layers):
                self._layer(*by_layer[self._template(layer)], layer)
        deeper = self.n_layer / SHALLOW
        update = self.made.start("update").operation
        for i, op in enumerate(self.made.roofline[update:], update):
            grown = 1 + op.layers * (deeper - 1)
            self.made.roofline[i] = op._replace(
                flops_once=op.flops_once * grown, bytes_once=op.bytes_once * grown
            )
        self.made.n_params = n_params
        return self.made

    def _template(self, layer: int) -> int:
        """The layer of the tape that stands for this one."""
        left = self.n_layer - layer
        return SHALLOW - left if left <= 2 else min(layer, 2)

    def _shape(self, segment: Segment, events: list[int]) -> list[Any]:
        """Events without what differs between equal layers: numbers of allocations, and layers."""
        tape = self.tape
        shape: list[Any] = []
        for event in events:
            if event >= 0:
                shape.append(
                    (tape.constant[event], tape.per_sequence[event], tape.kind[event], tape.op[event])
                )
            else:
                part, layer, k = self.place[~event]
                distance = None if layer is None else layer - (segment.layer or 0)
                shape.append((part, distance, k if part != "build" else None))
        return shape

    def _allocate(self, allocation: int, layer: int) -> None:
        tape = self.tape
        values = tape.constant[allocation], tape.per_sequence[allocation]
        self.copies[allocation, layer] = self.made.allocate(
            *values, tape.kind[allocation], tape.op[allocation]
        )

    def _outside(self, segment: Segment, events: list[int], ops: list[Any]) -> None:
        """A segment of no layer. What belongs to layer 2 is repeated for every layer that it stands for."""
        self.made.begin(segment.part)
        self.made.roofline += ops
        # Runs of one layer stay together, as in the deep network: parameters are made and freed layer by layer.
        for template, run in groupby(
            events, key=lambda event: self.place[event if event >= 0 else ~event][1]
        ):
            if template == 3:
                continue
            stretch = list(run)
            for layer in self._stands_for(template):
                for event in stretch:
                    if event >= 0:
                        self._allocate(event, layer)
                    else:
                        self.made.events.append(~self.copies[~event, layer])

    def _stands_for(self, template: int | None) -> range:
        if template is None:
            return range(-1, 0)
        if template == 2:
            return range(2, self.n_layer - 2)
        layer = template if template < 2 else self.n_layer - SHALLOW + template
        return range(layer, layer + 1)

    def _layer(self, segment: Segment, events: list[int], ops: list[Any], layer: int) -> None:
        self.made.begin(segment.part, layer)
        self.made.roofline += ops
        assert segment.layer is not None
        for event in events:
            if event >= 0:
                self._allocate(event, layer)
                continue
            target = self.place[~event][1]
            if target is None:
                self.made.events.append(~self.copies[~event, -1])
                continue
            there = layer + target - segment.layer
            twin = self._twin(~event, self._template(there))
            self.made.events.append(~self.copies[twin, there])

    def _twin(self, allocation: int, template: int) -> int:
        """The allocation at the same place in another layer of the tape."""
        if not hasattr(self, "_at"):
            self._at = {place: allocation for allocation, place in self.place.items()}
        part, _, k = self.place[allocation]
        return self._at[part, template, k]
