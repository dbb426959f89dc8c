"""Matrices and their gradients in bf16, updated with stochastic rounding; moments in 8 bits. 6 bytes a parameter.

bf16 has 8 bits of precision: rounding to nearest would lose every update below 0.4 % of a weight. Rounding up or down
at random, with the odds of the distance, keeps them on average (Gupta et al. 2015, arXiv 1502.02551).
"""

from core.hookspecs import Phase, Strategy, hookimpl


class BF16Weights(Strategy):
    name, phase, slot, affects = "bf16_weights", Phase.OPTIMIZER, "optimizer", "recipe"
    rung, requires = 40, ("bf16",)

    def available(self, facts, profile):
        return None if "bitsandbytes" in facts.modules else "install it: pip install bitsandbytes"

    @hookimpl
    def prepare_model(self, build):
        import torch

        made = {}
        for module in build.network.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if p.dim() > 1:  # norms and biases stay in fp32; what is tied stays tied
                    made.setdefault(p, torch.nn.Parameter(p.detach().to(torch.bfloat16)))
                    setattr(module, name, made[p])

    @hookimpl
    def make_optimizer(self, build):
        from core.optim import parameter_groups
        from core.optim8bit import StandInRounded, adamw8bit_rounded

        groups = parameter_groups(build.model, build.weight_decay)
        kind = StandInRounded if build.simulated else adamw8bit_rounded
        return kind(groups, lr=build.lr, betas=build.betas)


@hookimpl
def strategies():
    return BF16Weights()
