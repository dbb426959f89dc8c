"""Memory in the log: peak statistics per evaluation, and the cache handed back at the end.

Garbage collection comes first: empty_cache() can only return blocks that no tensor holds any more.
"""

import gc

from core.hookspecs import GIB, Phase, Strategy, hookimpl


class Cleanup(Strategy):
    name, phase = "cleanup", Phase.LOOP

    def available(self, facts, profile):
        return None if profile.device == "cuda" else "there is no CUDA memory to clean on a CPU"

    @hookimpl
    def on_evaluate_end(self, build, step, metrics):
        import torch

        device = build.accelerator.device
        metrics["peak_allocated_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        metrics["peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
        build.say(
            f"step {step}: peak memory since the last evaluation {metrics['peak_allocated_gib']:.2f} GiB allocated, "
            f"{metrics['peak_reserved_gib']:.2f} GiB reserved"
        )
        torch.cuda.reset_peak_memory_stats(device)

    @hookimpl
    def on_train_end(self, build):
        import torch

        gc.collect()
        torch.cuda.empty_cache()


@hookimpl
def strategies():
    return Cleanup()
