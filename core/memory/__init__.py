"""What memory there is, who uses it, and how much of the model fits: under names that readers of guides know.

Nothing here is needed to train: `tightfit train` follows the plan. It is for notebooks and scripts of your own.
docs/guides.md shows every function at work.
"""

from core.memory.compute import (
    Compute,
    cleanup_after_training,
    get_compute,
    get_memory_stats,
    initialize_compute,
    log_memory_stats,
    optimize_memory,
    reset_peak_memory_stats,
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
    "suggest_batch_size",
    "vram_usage_gib",
]
