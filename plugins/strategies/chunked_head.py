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
        key, tokens = "hardware.options.chunked_head.tokens", self.opts(plan)["tokens"]
        return None if 16 <= tokens <= 4096 else f"{key}: {tokens} should be 16 to 4096"

    @hookimpl
    def prepare_model(self, build):
        build.network.loss_chunk = self.opts(build.plan)["tokens"]


@hookimpl
def strategies():
    return ChunkedHead()
