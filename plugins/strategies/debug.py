"""Find the line that fails on the card: kernels run one by one, memory is not cached. Very slow."""

from core.hookspecs import Phase, Strategy, hookimpl


class Debug(Strategy):
    name, phase = "debug", Phase.ENV
    conflicts = {"allocator": "without a cache its settings do nothing"}

    def available(self, facts, profile):
        return (
            None
            if profile.device == "cuda"
            else "it debugs CUDA kernels; a CPU already fails at the right line"
        )

    @hookimpl
    def adjust_plan(self, plan):
        plan.notes.append(
            "SLOW: the strategy debug is on; training takes several times as long. Remove it when done."
        )

    @hookimpl
    def configure_env(self):
        return {
            "CUDA_LAUNCH_BLOCKING": ("1", "an error is raised at the line that caused it"),
            "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1", "tools such as compute-sanitizer see every allocation"),
        }

    @hookimpl
    def on_evaluate_end(self, build, step):
        build.say(f"step {step}: SLOW, the strategy debug is on")


@hookimpl
def strategies():
    return Debug()
