"""Muon for the hidden matrices, AdamW for the rest: learns more from a token, and keeps 4 bytes less per weight.

`lr` is that of the hidden matrices; the rest has AdamW's, `train.lr`, times `adamw_lr`. See core/muon.py.
"""

from core.hookspecs import Phase, Strategy, hookimpl

BOUNDS = {"lr": (0, 1), "momentum": (0, 0.999), "weight_decay": (0, 10), "adamw_lr": (0, 100)}


class Muon(Strategy):
    name, phase, slot, affects = "muon", Phase.OPTIMIZER, "optimizer", "recipe"
    # The law behind train.lr's auto is for networks whose matrices are AdamW's, too: what is left takes twice as much.
    defaults = {"lr": 0.04, "momentum": 0.95, "weight_decay": 0.0, "adamw_lr": 2.0}

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
