"""Muon for the hidden matrices, AdamW for the rest: learns more from a token, and keeps 4 bytes less per weight.

`train.lr` times `matrix_lr` is the rate of the hidden matrices, times `adamw_lr` that of the rest. See core/muon.py.
"""

from core.hookspecs import Phase, Strategy, hookimpl

BOUNDS = {"matrix_lr": (0.001, 1000), "adamw_lr": (0, 1000), "momentum": (0, 0.999)}


class Muon(Strategy):
    name, phase, slot, affects = "muon", Phase.OPTIMIZER, "optimizer", "recipe"
    # The law behind train.lr's auto is for networks that are AdamW's altogether: what is left to it takes twice that.
    # By Liu et al. 2025 (Moonlight, arXiv 2502.16982) matrices of 768 x 768 would have 0.2 sqrt(768) = 5.5.
    defaults = {"matrix_lr": 4.5, "adamw_lr": 2.0, "momentum": 0.95}

    @hookimpl
    def check_plan(self, plan):
        return [
            f"hardware.options.muon.{key}: {value} should be {BOUNDS[key][0]} to {BOUNDS[key][1]}"
            for key, value in self.opts(plan).items()
            if not BOUNDS[key][0] <= value <= BOUNDS[key][1]
        ]

    @hookimpl
    def make_optimizer(self, build):
        from core.muon import muon

        return muon(build, **self.opts(build.plan))


@hookimpl
def strategies():
    return Muon()
