"""How long a CPU thread spins at the end of a parallel loop before it sleeps.

OpenMP's default spins for so long that training on all cores slows down severely as soon as any other program
wants one of them; a short spin costs an idle machine a few percent (docs/measurements/threads.md).
Threads are not bound to cores: a bound one waits for its core while another is free.
"""

from core.hookspecs import Phase, Strategy, hookimpl


class Threads(Strategy):
    name, phase, slot = "threads", Phase.ENV, "threads"
    # threads 0: torch's own choice, all cores that it may use. spin_count: libgomp's rounds, 300,000 by default (GCC's
    # libgomp manual, GOMP_SPINCOUNT).
    defaults = {"threads": 0, "spin_count": 5000}

    def available(self, facts, profile):
        return None if profile.device == "cpu" else "the card does the work, not the CPU's threads"

    @hookimpl
    def configure_env(self, plan, facts):
        asked = self.opts(plan)["threads"]
        threads = {"OMP_NUM_THREADS": (str(asked), "threads.threads")} if asked else {}
        reason = "a thread that waits gives its core to other programs soon"
        if facts.os in ("windows", "macos"):  # there torch uses Intel's or LLVM's OpenMP; 1 ms instead of 200
            return threads | {"KMP_BLOCKTIME": ("1", reason)}
        return threads | {"GOMP_SPINCOUNT": (str(self.opts(plan)["spin_count"]), reason)}


@hookimpl
def strategies():
    return Threads()
