"""GeForce RTX 3090, 24 GB."""

from core.hookspecs import HardwareProfile, hookimpl


@hookimpl
def hardware_profiles():
    return HardwareProfile(
        name="rtx3090",
        match=r"RTX 3090(?! Ti)",
        vram_gib=24,
        compute_capability=(8, 6),
        bandwidth_gbs=936,
        tflops={"bf16": 71.0, "fp16": 71.0, "fp32": 35.6},
        strategies=("bf16", "muon", "accumulation", "allocator", "loader", "cleanup"),
        source="NVIDIA Ampere GA102 whitepaper v2",
    )
