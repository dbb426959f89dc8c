"""How batches reach the device: workers, pinned memory, persistent workers, by OS and device."""

from core.hookspecs import Phase, Strategy, hookimpl


class Loader(Strategy):
    name, phase, slot = "loader", Phase.DATA, "data loader"
    # workers -1: by device and OS.
    defaults = {"workers": -1, "pin_memory": True, "persistent_workers": True}

    @hookimpl
    def adjust_plan(self, plan, facts):
        workers, why = self.opts(plan)["workers"], "loader.workers"
        if workers < 0:
            workers, why = self._workers(plan.profile.device, facts)
        plan.set("num_workers", workers, reason=why, by=self.name)
        why, cuda = "copies to the card overlap with its work", plan.profile.device == "cuda"
        self._switch(plan, "pin_memory", why, cuda, "no card to copy to")
        why = "starting workers again costs seconds"
        self._switch(plan, "persistent_workers", why, workers > 0, "no workers to keep")

    def _switch(self, plan, key, why, possible, why_not):
        wanted = self.opts(plan)[key]
        reason = why_not if not possible else why if wanted else f"loader.{key}"
        plan.set(key, wanted and possible, reason=reason, by=self.name)

    @staticmethod
    def _workers(device, facts):
        if device == "cpu":
            return 0, "the CPU's cores are busy training; reading memory-mapped tokens takes microseconds"
        if facts.os in ("windows", "wsl"):
            return 0, f"on {facts.os} a worker starts in seconds and saves microseconds"
        return min(2, max(1, facts.cores // 4)), "one reads ahead while the card works"


@hookimpl
def strategies():
    return Loader()
