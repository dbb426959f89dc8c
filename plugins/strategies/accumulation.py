"""Gradient accumulation: the batch in tokens stays what params say, whatever micro-batch fits."""

from core.errors import UserError
from core.hookspecs import GIB, Phase, Strategy, hookimpl


class Accumulation(Strategy):
    name, phase, slot = "accumulation", Phase.BATCH, "accumulation"
    # 0: no limit. A CPU gains nothing from a micro-batch larger than its caches.
    defaults = {"max_micro_batch_tokens": 0}

    @hookimpl
    def adjust_plan(self, plan):
        batch = plan.sequences // plan.num_processes
        fitting = [n for n in range(batch, 0, -1) if batch % n == 0]
        size, reason = plan.micro_batch, "train.micro_batch"
        if size is None:
            size, reason = self._largest(plan, fitting)
        elif size not in fitting:
            near = min(fitting, key=lambda n: abs(n - size))
            found = f"{size} does not divide the {batch} sequences of a step; {near} does"
            raise UserError(f"train.micro_batch: {found}")
        plan.set("micro_batch", size, reason=reason, by=self.name)
        reason = f"{batch} sequences per step / {size}: the batch in tokens does not change"
        plan.set("gradient_accumulation_steps", batch // size, reason=reason, by=self.name)

    def _largest(self, plan, fitting):
        limit = self.opts(plan)["max_micro_batch_tokens"]
        budget = f"{plan.memory_budget / GIB:.1f} GiB"
        for n in fitting:
            if plan.step_bytes(n) <= plan.memory_budget and (not limit or n * plan.model.block_size <= limit):
                largest = f"largest of at most {limit} tokens" if limit else "largest"
                return n, f"{largest} whose estimate, {plan.step_bytes(n) / GIB:.2f} GiB, is within {budget}"
        return 1, f"the smallest there is; its estimate, {plan.step_bytes(1) / GIB:.2f} GiB, against {budget}"


@hookimpl
def strategies():
    return Accumulation()
