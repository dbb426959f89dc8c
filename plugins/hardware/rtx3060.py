"""GeForce RTX 3060 desktop, 12 GB."""

from core.hookspecs import HardwareProfile, hookimpl


@hookimpl
def hardware_profiles():
    return HardwareProfile(
        name="rtx3060",
        match=r"RTX 3060(?! Ti)",
        vram_gib=12,
        compute_capability=(8, 6),
        bandwidth_gbs=360,
        tflops={"bf16": 25.5, "fp16": 25.5, "fp32": 12.7},
        strategies=("bf16", "muon", "accumulation", "allocator", "loader", "cleanup"),
        source="28 SMs x 512 FLOP x 1.777 GHz (fpsbench.com); bandwidth unverified",
    )
