"""bf16 autocast: half the activations, fp32's range, no loss scaling.

Decided by real capability, never by a card's name or torch.cuda.is_bf16_supported(), which answers True on a T4 by
emulation (torch 2.13, torch/cuda/__init__.py, `including_emulation=True`).
"""

from core.hookspecs import Phase, Strategy, hookimpl


class BF16(Strategy):
    name, phase, slot, affects = "bf16", Phase.PRECISION, "precision", "recipe"

    def available(self, facts, profile):
        if profile.device == "cuda" and profile.compute_capability < (8, 0):
            has = ".".join(map(str, profile.compute_capability))
            return f"bf16 needs compute capability 8.0, {profile.name} has {has}; use fp16 or neither"
        if profile.device == "cpu" and not facts.cpu_bf16:
            return "this CPU shows no bf16 instructions (AVX512_BF16 or AMX), it would only emulate them"
        return None

    @hookimpl
    def adjust_plan(self, plan):
        plan.set("dtype", "bf16", reason="the hardware multiplies bf16 natively", by=self.name)

    @hookimpl
    def accelerator_kwargs(self):
        return {"mixed_precision": "bf16"}


@hookimpl
def strategies():
    return BF16()
