"""The output head and its loss for a few tokens at a time: the logits of a micro-batch never exist at once.

With 50,000 ids they are the largest tensors of a step. Computed once, in forward; see core/loss.py.
"""

from core.hookspecs import Phase, Strategy, hookimpl


class ChunkedHead(Strategy):
    name, phase, slot = "chunked_head", Phase.MODEL, "head"
    rung, mid_run = 10, True
    defaults = {"tokens": 512}

    @hookimpl
    def check_plan(self, plan):
        tokens = self.opts(plan)["tokens"]
        return f"hardware.options.chunked_head.tokens: {tokens} should be 1 or more" if tokens < 1 else None

    @hookimpl
    def prepare_model(self, build):
        # A rung that is climbed in the middle of a run was in no plan: it has its defaults there.
        build.network.loss_chunk = build.plan.options.get(self.name, self.defaults)["tokens"]


@hookimpl
def strategies():
    return ChunkedHead()
