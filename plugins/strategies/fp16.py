"""fp16 autocast with loss scaling: for cards with tensor cores but no bf16 (Turing: T4, RTX 20xx)."""

from core.hookspecs import Phase, Strategy, hookimpl


class FP16(Strategy):
    name, phase, slot, affects = "fp16", Phase.PRECISION, "precision", "recipe"
    # torch.amp.GradScaler's own defaults.
    defaults = {"init_scale": 65536.0, "growth_interval": 2000}

    def available(self, facts, profile):
        if profile.device != "cuda":
            return "fp16 needs a CUDA card; on a CPU use bf16 or neither"
        if profile.compute_capability < (5, 3):
            return "fp16 needs compute capability 5.3"
        return None

    @hookimpl
    def adjust_plan(self, plan):
        plan.set("dtype", "fp16", reason="autocast to fp16, loss scaled", by=self.name)

    @hookimpl
    def accelerator_kwargs(self, plan):
        from accelerate.utils import GradScalerKwargs

        return {"mixed_precision": "fp16", "kwargs_handlers": [GradScalerKwargs(**self.opts(plan))]}


@hookimpl
def strategies():
    return FP16()
