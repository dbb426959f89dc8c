"""CUDA's caching allocator, set up against fragmentation before torch is imported.

Linux: expandable segments. Windows and WSL, where torch 2.13 does not support them or has been seen to fail
(pytorch#122057, #192330): a largest block that may be split, by the card's memory. The two are never combined, since
expandable segments ignore the split size (pytorch#134338). Both variable names are set to one value: torch 2.9.1
ignores the new one (pytorch#183387), and where both are read their precedence differs inside torch.
"""

from core.hookspecs import Phase, Strategy, hookimpl

# max_split_size_mb by VRAM up to so many GiB: the RTX 4060 guide's table ("PyTorch GPU Optimizasyon Rehberi").
SPLIT_SIZES = ((6.5, 64), (10, 128), (20, 256), (float("inf"), 512))
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class Allocator(Strategy):
    name, phase, slot = "allocator", Phase.ENV, "allocator"
    # max_split_size_mb 0: from the table where expandable segments do not work.
    defaults = {"expandable_segments": True, "max_split_size_mb": 0}

    def available(self, facts, profile):
        return None if profile.device == "cuda" else "it sets up CUDA's allocator; a CPU has none"

    @hookimpl
    def configure_env(self, plan, facts):
        split, expandable = self.opts(plan)["max_split_size_mb"], self.opts(plan)["expandable_segments"]
        grow = "segments grow instead of fragmenting; Linux supports it"
        reason = "allocator.max_split_size_mb" if split else grow
        if not split and not (expandable and facts.os == "linux"):
            split = next(mb for gib, mb in SPLIT_SIZES if plan.profile.vram_gib <= gib)
            why = "it is switched off" if facts.os == "linux" else f"{facts.os} does not support it"
            reason = f"for {plan.profile.vram_gib:g} GiB; no expandable_segments: {why}"
        value = f"max_split_size_mb:{split}" if split else "expandable_segments:True"
        theirs = next((name for name in VARIABLES if name in facts.environ), "")
        # Both names must say the same: the user's value goes to the other one, too.
        if (found := facts.environ.get(theirs, value)) != value:
            plan.notes.append(f"{theirs}={found} from your environment wins over {value} ({self.name})")
            value, reason = found, f"{theirs} of your environment, under both names"
        return dict.fromkeys(VARIABLES, (value, reason))

    @hookimpl
    def check_plan(self, plan):
        key, split = "hardware.options.allocator.max_split_size_mb", self.opts(plan)["max_split_size_mb"]
        # 20 is torch's own limit, c10/core/AllocatorConfig.h.
        return f"{key}: {split} is too small; torch takes 20 or more, or 0" if 0 != split < 20 else None


@hookimpl
def strategies():
    return Allocator()
