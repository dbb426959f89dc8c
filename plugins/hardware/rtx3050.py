"""GeForce RTX 3050 laptop, 4 GB. Versions with 6 and 8 GB are planned as this one; set your own profile to use more."""

from core.hookspecs import HardwareProfile, hookimpl


@hookimpl
def hardware_profiles():
    return HardwareProfile(
        name="rtx3050",
        match=r"RTX 3050",
        vram_gib=4,
        compute_capability=(8, 6),
        bandwidth_gbs=192,
        tflops={"bf16": 14.25, "fp16": 14.25, "fp32": 7.13},
        strategies=("bf16", "muon", "accumulation", "allocator", "loader", "cleanup"),
        source="80 W figures (hmc-tech.com); bandwidth of the 128-bit version, unverified",
    )
