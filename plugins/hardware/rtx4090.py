"""GeForce RTX 4090 desktop, 24 GB. The laptop card of that name has 16 GB and gets a derived profile."""

from core.hookspecs import HardwareProfile, hookimpl


@hookimpl
def hardware_profiles():
    return HardwareProfile(
        name="rtx4090",
        match=r"RTX 4090(?! D)",
        vram_gib=24,
        compute_capability=(8, 9),
        bandwidth_gbs=1008,
        tflops={"bf16": 165.2, "fp16": 165.2, "fp32": 82.6},
        strategies=("bf16", "muon", "accumulation", "allocator", "loader", "cleanup"),
        source="NVIDIA Ada whitepaper; waredb.com",
    )
