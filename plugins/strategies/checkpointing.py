"""Activation checkpointing: a layer keeps its input only, and computes the rest again when backward needs it.

Costs about a third of the forward pass (Chen et al. 2016, arXiv 1604.06174). Autocast's cache of cast weights goes
off: it would hold a second copy of every weight through the whole forward pass.
"""

from core.hookspecs import Phase, Strategy, hookimpl


class Checkpointing(Strategy):
    name, phase, slot = "checkpointing", Phase.MODEL, "activations"
    rung, mid_run = 20, True

    @hookimpl
    def prepare_model(self, build):
        import torch
        from torch.utils.checkpoint import checkpoint

        random = build.network.config.dropout > 0

        def recomputed(forward):
            def call(*args):
                if not torch.is_grad_enabled():
                    return forward(*args)
                if torch.is_autocast_enabled(args[0].device.type):  # which restores it at its end
                    torch.set_autocast_cache_enabled(False)
                return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=random)

            return call

        for layer in build.network.layers:
            layer.forward = recomputed(layer.forward)


@hookimpl
def strategies():
    return Checkpointing()
