"""What memory there is, who uses it, and how much of the model fits: under names that readers of guides know.

Nothing of what is exported here is needed to train: `tightfit train` follows the plan, whose memory the other modules
of this folder predict. It is for notebooks and scripts of your own. docs/guides.md shows every function at work.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.memory.compute import (
        Compute,
        cleanup_after_training,
        get_compute,
        get_memory_stats,
        initialize_compute,
        log_memory_stats,
        optimize_memory,
        reset_peak_memory_stats,
        step_memory,
        suggest_batch_size,
        vram_usage_gib,
    )

__all__ = [
    "Compute",
    "cleanup_after_training",
    "get_compute",
    "get_memory_stats",
    "initialize_compute",
    "log_memory_stats",
    "optimize_memory",
    "reset_peak_memory_stats",
    "step_memory",
    "suggest_batch_size",
    "vram_usage_gib",
]


def __getattr__(name: str) -> Any:
    """Of compute.py, once it is asked for: the planner's modules are imported without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from core.memory import compute

    return getattr(compute, name)
