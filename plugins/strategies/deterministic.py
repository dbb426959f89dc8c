"""Kernels that add in a fixed order, so that two runs on one card agree bit for bit. It costs some speed.

Without it, kernels that several blocks add into (flash attention's gradient of the queries, for one) round differently
each time: pytorch.org/docs/stable/notes/randomness.html.
"""

from core.hookspecs import Phase, Strategy, hookimpl


class Deterministic(Strategy):
    name, phase = "deterministic", Phase.ENV

    def available(self, facts, profile):
        return None if profile.device == "cuda" else "a CPU's kernels add in a fixed order as they are"

    @hookimpl
    def configure_env(self):
        why = "cuBLAS then has no choice of kernel that depends on what else runs"
        return {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", why)}

    @hookimpl
    def prepare_model(self, build):
        import torch

        if not build.simulated:
            torch.use_deterministic_algorithms(True)

    @hookimpl
    def on_train_end(self):
        import torch

        torch.use_deterministic_algorithms(False)


@hookimpl
def strategies():
    return Deterministic()
