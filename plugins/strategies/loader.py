"""How batches reach the device: workers, pinned memory, persistent workers, by OS and device."""

from core.hookspecs import Phase, Strategy, hookimpl


class Loader(Strategy):
    name, phase, slot = "loader", Phase.DATA, "data loader"
    # workers -1: by device and OS.
    defaults = {"workers": -1, "pin_memory": True, "persistent_workers": True}

    @hookimpl
    def adjust_plan(self, plan, facts):
        options = self.opts(plan)
        workers, why = options["workers"], "loader.workers"
        if workers < 0:
            workers, why = self._workers(plan.profile.device, facts)
        cuda = plan.profile.device == "cuda"
        plan.set("num_workers", workers, reason=why, by=self.name)
        pin = options["pin_memory"] and cuda
        why = (
            "copies to the card overlap with its work"
            if pin
            else "no card to copy to"
            if not cuda
            else "loader.pin_memory"
        )
        plan.set("pin_memory", pin, reason=why, by=self.name)
        persistent = options["persistent_workers"] and workers > 0
        why = (
            "starting workers again costs seconds"
            if persistent
            else "no workers to keep"
            if not workers
            else "loader.persistent_workers"
        )
        plan.set("persistent_workers", persistent, reason=why, by=self.name)

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
