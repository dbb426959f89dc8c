"""GeForce RTX 2050 laptop, 4 GB. Its GA107 is Ampere: bf16 is native, whatever the 20 in its name suggests."""

from core.hookspecs import HardwareProfile, hookimpl


@hookimpl
def hardware_profiles():
    return HardwareProfile(
        name="rtx2050",
        match=r"RTX 2050",
        vram_gib=4,
        compute_capability=(8, 6),
        bandwidth_gbs=112,
        tflops={"bf16": 12.1, "fp16": 12.1, "fp32": 6.05},
        strategies=("bf16", "muon", "accumulation", "allocator", "loader", "cleanup"),
        source="16 SMs x 512 FLOP x 1.477 GHz at 45 W (hmc-tech.com, waredb.com); 64 bit x 14 Gbps",
    )
