"""Where the memory of a step goes, as a picture: bars stacked by kind, under a line at the budget."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.hookspecs import GIB
from core.memory.allocator import KINDS

COLOURS = {
    "weights": "#2f4b6e",
    "gradients": "#7aa6c2",
    "optimizer": "#4b7f52",
    "activations": "#d9a441",
    "logits": "#c2452d",
    "temporaries": "#8d6a9f",
    "allocator": "#bbbbbb",
}
COLUMNS = 3
"""Panels beside each other."""


@dataclass(frozen=True)
class Bar:
    """One step's memory."""

    label: str
    parts: Mapping[str, int]
    """By `KINDS` [bytes]."""
    needed: int
    """What it needs in all; the rest is what the allocator cannot use [bytes]."""


@dataclass(frozen=True)
class Panel:
    """Bars that share a budget."""

    title: str
    bars: Sequence[Bar]
    budget: int
    """[bytes]"""


def picture(panels: Sequence[Panel]) -> str:
    """An SVG file's text. Equal panels give equal bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "tightfit",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with rc_context(style):
        figure = Figure(figsize=(8 if columns == 1 else 5 * columns, 3.8 * rows), layout="constrained")
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, panel in zip(grid, panels, strict=False):
            _draw(axes, panel)
        for axes in grid[len(panels) :]:
            axes.remove()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8
        )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _draw(axes: Any, panel: Panel) -> None:
    """The bars of a panel, and its budget."""
    places = range(len(panel.bars))
    bottom = [0.0] * len(panel.bars)
    for kind in (*KINDS, "allocator"):
        heights = [_height(bar, kind) for bar in panel.bars]
        axes.bar(places, heights, 0.6, bottom=bottom, color=COLOURS[kind], label=kind)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    budget = panel.budget / GIB
    axes.axhline(budget, color="black", linewidth=1, linestyle="--", label="budget")
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for place, top in zip(places, bottom, strict=True):
        where: Any = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{top:.2f}", (place, top), **where, fontsize=8, bbox=behind)
    axes.set_ylim(0, 1.1 * max(*bottom, budget))
    axes.set_xticks(places, [bar.label for bar in panel.bars], fontsize=8)
    axes.set(ylabel="GiB", title=f"{panel.title}: budget {budget:.2f} GiB")


def _height(bar: Bar, kind: str) -> float:
    """A part of a bar [GiB]."""
    size = bar.needed - sum(bar.parts.values()) if kind == "allocator" else bar.parts[kind]
    return size / GIB
