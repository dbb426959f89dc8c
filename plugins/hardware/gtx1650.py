"""GeForce GTX 1650, 4 GB. No tensor cores, no bf16, and fp16 overflows on it (pytorch#58123): fp32."""

from core.hookspecs import HardwareProfile, hookimpl


@hookimpl
def hardware_profiles():
    return HardwareProfile(
        name="gtx1650",
        match=r"GTX 1650",
        vram_gib=4,
        compute_capability=(7, 5),
        bandwidth_gbs=128,
        tflops={"fp32": 2.98},
        strategies=("muon", "accumulation", "allocator", "loader", "cleanup"),
        source="cputronic.com, pcpartdb.com; GDDR5 version",
    )
