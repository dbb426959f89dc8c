"""AdamW with its moments in 8 bits, by bitsandbytes: 2 bytes a parameter instead of 8.

Blocks of 256 values share a scale (Dettmers et al. 2022, arXiv 2110.02861); tensors below 4,096 values stay in fp32.
"""

from core.hookspecs import Phase, Strategy, hookimpl


class AdamW8bit(Strategy):
    name, phase, slot, affects = "adamw8bit", Phase.OPTIMIZER, "optimizer", "recipe"
    rung = 30

    def available(self, facts, profile):
        return None if "bitsandbytes" in facts.modules else "install it: pip install bitsandbytes"

    @hookimpl
    def make_optimizer(self, build):
        from core.optim import parameter_groups
        from core.optim8bit import StandIn8bit, adamw8bit

        groups = parameter_groups(build.model, build.weight_decay)
        kind = StandIn8bit if build.simulated else adamw8bit
        return kind(groups, lr=build.lr, betas=build.betas)


@hookimpl
def strategies():
    return AdamW8bit()
