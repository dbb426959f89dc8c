"""Gradient accumulation: the batch in tokens stays what params say, whatever micro-batch fits."""

import math

from core.errors import UserError
from core.hookspecs import Phase, Strategy, hookimpl


class Accumulation(Strategy):
    name, phase, slot = "accumulation", Phase.BATCH, "accumulation"
    # 0: no limit. A CPU gains nothing from a micro-batch larger than its caches.
    defaults = {"max_micro_batch_tokens": 0}

    @hookimpl
    def adjust_plan(self, plan):
        batch, limit = plan.sequences // plan.num_processes, self.opts(plan)["max_micro_batch_tokens"]
        low = {n for n in range(1, math.isqrt(batch) + 1) if batch % n == 0}
        sizes = sorted(low | {batch // n for n in low}, reverse=True)
        if plan.micro_batch is None:
            sizes = [n for n in sizes if not limit or n * plan.model.block_size <= limit] or [1]
        elif plan.micro_batch in sizes:
            sizes = [plan.micro_batch]
        else:
            near = min(sizes, key=lambda n: abs(n - plan.micro_batch))
            found = f"{plan.micro_batch} does not divide the {batch} sequences of a step; {near} does"
            raise UserError(f"train.micro_batch: {found}")
        if limit < 0:
            raise UserError(f"hardware.options.{self.name}.max_micro_batch_tokens: {limit} is below 0")
        most = f"the largest of at most {limit} tokens" if limit else "the largest that there is"
        reason = "train.micro_batch" if plan.micro_batch else most
        plan.micro_batches = tuple(sizes)  # core takes the largest that fits into memory
        plan.set("micro_batch", sizes[0], reason=reason, by=self.name)
        reason = f"{batch} sequences per step / {sizes[0]}: the batch in tokens does not change"
        plan.set("gradient_accumulation_steps", batch // sizes[0], reason=reason, by=self.name)


@hookimpl
def strategies():
    return Accumulation()
