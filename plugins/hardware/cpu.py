"""No card: trains on the processor. Its peak rate is measured when training starts, since it has no data sheet."""

from core.hookspecs import HardwareProfile, hookimpl


@hookimpl
def hardware_profiles():
    return HardwareProfile(
        name="cpu",
        device="cpu",
        strategies=("threads", "malloc?", "bf16?", "muon", "accumulation", "chunked_head", "loader"),
        options={"accumulation": {"max_micro_batch_tokens": 2048}},  # bench/cpu_micro_batch.py
    )
