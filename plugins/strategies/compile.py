"""torch.compile of the layers: fused kernels instead of one after the other. The first build on a machine is slow.

Execution, as the chunked head is: the same sums, rounded in another order. Where a probe at the build shows that
compiling does not work, the layers stay as they are, and the run goes on. The memory planner's step is not compiled:
the plan predicts the uncompiled one, which keeps no fewer activations. Not measured on a GPU.
"""

from core.hookspecs import Phase, Strategy, hookimpl

NO_COMPILER = (
    "no C++ compiler found: install g++ (on Windows Visual Studio's, and use its prompt), or set CXX"
)
STATE = {True: "compiled", False: "uncompiled"}


class Compile(Strategy):
    name, phase, slot = "compile", Phase.COMPILE, "compile"
    compiled = False

    def available(self, facts, profile):
        if profile.device == "cpu":
            return None if "c++" in facts.modules else NO_COMPILER
        if profile.compute_capability < (7, 0):
            return f"Triton needs compute capability 7.0, {profile.name} has less; train without"
        package = "triton-windows" if facts.os == "windows" else "triton"
        return None if "triton" in facts.modules else f"install Triton: pip install {package}"

    @hookimpl
    def finalize_model(self, build):
        from core.compile import compile_layers

        self.compiled = not build.simulated and compile_layers(build)

    @hookimpl
    def save_state(self):
        return {"compiled": self.compiled}

    @hookimpl
    def load_state(self, build, state):
        if state["compiled"] != self.compiled:
            before, now = STATE[state["compiled"]], STATE[self.compiled]
            build.say(f"note: the layers were {before} before and are {now} now: sums may round differently")


@hookimpl
def strategies():
    return Compile()
