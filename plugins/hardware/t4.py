"""Tesla T4, 16 GB of which ECC leaves 14.8. Turing: fp16 with loss scaling, no bf16."""

from core.hookspecs import HardwareProfile, hookimpl


@hookimpl
def hardware_profiles():
    return HardwareProfile(
        name="t4",
        match=r"\bT4\b",
        vram_gib=15,
        compute_capability=(7, 5),
        bandwidth_gbs=320,
        tflops={"fp16": 65.0, "fp32": 8.1},
        strategies=("fp16", "muon", "accumulation", "allocator", "loader", "cleanup"),
        source="NVIDIA T4 datasheet",
    )
