"""What this machine is, without importing torch, and which hardware profile is its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from core.errors import PluginError
from core.hookspecs import GIB, Facts, Gpu, HardwareProfile

TORCH_HELP = "README, 'When torch came without CUDA'"
OPTIONAL_MODULES = ("triton", "bitsandbytes", "c++")

# fp32-accumulating tensor FLOP per clock and SM, by compute capability. GeForce cards run it at half the rate of
# professional ones with the same chip. The products with SM count and boost clock reproduce the whitepapers' 71
# TFLOP/s (RTX 3090), 165 (RTX 4090), 53.8 (RTX 2080 Ti), 125 (A10, V100), 312 (A100), 989 (H100) and 65 (T4).
TENSOR_FLOPS_PER_CLOCK = {
    (7, 0): 1024,
    (7, 5): 1024,
    (8, 0): 2048,
    (8, 6): 1024,
    (8, 7): 1024,
    (8, 9): 1024,
    (9, 0): 4096,
}
GEFORCE_HALF = {(7, 5), (8, 6), (8, 9)}
CUDA_CORES_PER_SM = {(7, 0): 64, (7, 5): 64, (8, 0): 64}  # 128 from 8.6 on


def read_facts(environ: dict[str, str] | None = None) -> Facts:
    """Look at this machine: OS, GPUs (through NVML), torch's build, CPU and memory. torch is not imported."""
    environ = dict(os.environ if environ is None else environ)
    return Facts(
        os=_os_name(),
        gpus=_visible(_nvml_gpus(), environ.get("CUDA_VISIBLE_DEVICES")),
        torch_version=_version("torch"),
        torch_cuda=torch_cuda_build(),
        cores=usable_cores(),
        ram_bytes=_ram_bytes(),
        cpu_bf16=_cpu_multiplies_bf16(),
        modules=frozenset(m for m in OPTIONAL_MODULES if _installed(m, environ)),
        environ=environ,
    )


def _installed(name: str, environ: dict[str, str]) -> bool:
    """Whether a package is installed, or for "c++" the compiler that torch.compile would start."""
    if name != "c++":
        return importlib.util.find_spec(name) is not None
    usual = {"Windows": "cl", "Darwin": "clang++"}.get(platform.system(), "g++")
    return shutil.which(environ.get("CXX", usual), path=environ.get("PATH")) is not None


def _os_name() -> str:
    if "microsoft" in platform.release().lower():
        return "wsl"
    return {"Windows": "windows", "Darwin": "macos"}.get(platform.system(), "linux")


def _nvml_gpus() -> list[Gpu]:
    """Every NVIDIA card the driver knows, or none where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    gpus = []
    for i in range(pynvml.nvmlDeviceGetCount()):
        try:
            card = pynvml.nvmlDeviceGetHandleByIndex(i)
            name, memory = pynvml.nvmlDeviceGetName(card), pynvml.nvmlDeviceGetMemoryInfo(card).total
            capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(card))
        except pynvml.NVMLError:  # a card that fell off the bus, or one without memory of its own
            continue

        def ask(function: Any, *args: Any, card: Any = card) -> Any:
            try:
                return function(card, *args)
            except pynvml.NVMLError:  # laptops and old drivers leave some questions unanswered
                return 0

        gpus.append(
            Gpu(
                name=_text(name),
                vram_bytes=int(memory),
                compute_capability=capability,
                nvml_index=i,
                uuid=_text(ask(pynvml.nvmlDeviceGetUUID) or ""),
                sm_count=ask(pynvml.nvmlDeviceGetNumGpuCores) // CUDA_CORES_PER_SM.get(capability, 128),
                clock_mhz=ask(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM),
                memory_clock_mhz=ask(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_MEM),
                memory_bus_bits=ask(pynvml.nvmlDeviceGetMemoryBusWidth),
            )
        )
    pynvml.nvmlShutdown()
    return gpus


def _visible(gpus: list[Gpu], setting: str | None) -> tuple[Gpu, ...]:
    """CUDA_VISIBLE_DEVICES, by index or UUID, as CUDA reads it: up to the first entry that names no card."""
    if setting is None:
        return tuple(gpus)
    chosen = []
    for entry in (e.strip() for e in setting.split(",")):
        by_index = gpus[int(entry)] if entry.isdigit() and int(entry) < len(gpus) else None
        by_uuid = next((g for g in gpus if entry.startswith("GPU-") and g.uuid.startswith(entry)), None)
        if not (by_index or by_uuid):
            break
        chosen.append(by_index or by_uuid)
    return tuple(g for g in chosen if g)


def torch_cuda_build() -> str | None:
    """CUDA version of the installed torch build, read from its version.py; None for a CPU build or no torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    source = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", source, re.M)
    return found[1] if found else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def usable_cores() -> int:
    """Cores this process may use: a container's share, not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ram_bytes() -> int:
    import psutil

    return psutil.virtual_memory().total


def _cpu_multiplies_bf16() -> bool:
    """From the CPU's flags on Linux; elsewhere unknown, which counts as no."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", flags))


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def choose_profile(profiles: dict[str, HardwareProfile], facts: Facts) -> tuple[HardwareProfile, str]:
    """Return the profile for `hardware.profile: auto`, and why it was chosen.

    A card that no profile matches gets one derived from its own properties. Raises PluginError where two profiles
    match equally well: which was loaded first must not decide.
    """
    gpu = facts.gpu
    if gpu is None:
        return profiles["cpu"], "no NVIDIA GPU found"
    if not facts.torch_cuda:
        return profiles["cpu"], (
            f"{gpu.name} is here, but torch {facts.torch_version} is a CPU-only build and cannot use it; "
            f"install one with CUDA ({TORCH_HELP})"
        )
    vram_gib = gpu.vram_bytes / GIB
    matching = [p for p in profiles.values() if p.match and re.search(p.match, gpu.name, re.I)]
    # A name can cover cards of several sizes (RTX 3050 with 4, 6 and 8 GB): take the profile that is no larger.
    fitting = [p for p in matching if p.vram_gib * 0.9 <= vram_gib]
    if fitting:
        rank = {p.name: (p.vram_gib, len(p.match)) for p in fitting}
        best = max(fitting, key=lambda p: rank[p.name])
        if rivals := sorted(p.name for p in fitting if p is not best and rank[p.name] == rank[best.name]):
            names = sorted([best.name, *rivals])
            raise PluginError(
                f"hardware.profile: auto cannot choose between {' and '.join(names)}, which match {gpu.name} equally "
                f"well: name one (hardware.profile: {names[0]})"
            )
        return best, f"{gpu.name} matches {best.match!r}"
    return derive_profile(gpu), f"no profile matches {gpu.name}: derived from its properties"


def best_precision(name: str, capability: tuple[int, int]) -> str:
    """What a card trains in best: "bf16", "fp16" or "fp32"."""
    if capability >= (8, 0):
        return "bf16"
    # GTX 16xx has no tensor cores, and fp16 overflows on it (pytorch#58123).
    return "fp16" if capability in TENSOR_FLOPS_PER_CLOCK and "GTX" not in name else "fp32"


def derive_profile(gpu: Gpu) -> HardwareProfile:
    """A profile for an unknown card, from SM count, clocks, memory bus and compute capability.

    Rates: SMs x FLOP per clock x clock; fp32 outside tensor cores: two FLOP per CUDA core and clock.
    Bandwidth: two transfers per memory clock x bus width. Zero where the driver does not tell.
    """
    capability = gpu.compute_capability
    per_clock = TENSOR_FLOPS_PER_CLOCK.get(capability, 1024 if capability >= (8, 0) else 0)
    if "GeForce" in gpu.name and (capability in GEFORCE_HALF or capability >= (10, 0)):
        per_clock //= 2
    precision = best_precision(gpu.name, capability)
    if precision == "fp32":
        per_clock = 0
    clock = gpu.clock_mhz * 1e6
    half = gpu.sm_count * per_clock * clock / 1e12
    fp32 = gpu.sm_count * CUDA_CORES_PER_SM.get(capability, 128) * 2 * clock / 1e12
    rates = {"fp32": fp32, "fp16": half, "bf16": half if capability >= (8, 0) else 0.0}
    strategies = ("muon", "accumulation", "allocator", "loader", "cleanup")
    return HardwareProfile(
        name="derived",
        vram_gib=round(gpu.vram_bytes / GIB, 2),
        compute_capability=capability,
        bandwidth_gbs=round(2 * gpu.memory_clock_mhz * 1e6 * gpu.memory_bus_bits / 8 / 1e9, 1),
        tflops={dtype: round(rate, 1) for dtype, rate in rates.items() if rate},
        strategies=strategies if precision == "fp32" else (precision, *strategies),
        source=f"derived from {gpu.name}: {gpu.sm_count} SMs at {gpu.clock_mhz} MHz",
    )


def try_gpu(i: int = 0) -> Any:
    """torch.device of GPU `i` where torch can use it, else of the CPU.

    Raises UserError for an `i` that is no number from 0 up.
    """
    import torch

    from core.errors import UserError

    if not isinstance(i, int) or i < 0:
        raise UserError(f"try_gpu: {i!r} should be the number of a GPU; the first is 0")
    # device_count() alone counts cards that a missing or too old driver cannot use.
    here = torch.cuda.is_available() and i < torch.cuda.device_count()
    return torch.device("cuda", i) if here else torch.device("cpu")


def try_all_gpus() -> list[Any]:
    """torch.device of every GPU that torch can use, or [cpu] where there is none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
