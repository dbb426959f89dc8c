"""GeForce RTX 4060, 8 GB, desktop and laptop."""

from core.hookspecs import HardwareProfile, hookimpl


@hookimpl
def hardware_profiles():
    return HardwareProfile(
        name="rtx4060",
        match=r"RTX 4060(?! Ti)",
        vram_gib=8,
        compute_capability=(8, 9),
        bandwidth_gbs=272,
        tflops={"bf16": 30.2, "fp16": 30.2, "fp32": 15.1},
        strategies=("bf16", "muon", "accumulation", "allocator", "loader", "cleanup"),
        source="desktop: 24 SMs x 512 FLOP x 2.46 GHz; a laptop has 18.7 to 28.3 TFLOP/s (hmc-tech.com)",
    )
