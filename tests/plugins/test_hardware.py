"""Which profile a machine gets, what is derived for an unknown card, and how a machine is read."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

import core
from core import hardware
from core.hardware import choose_profile, derive_profile, read_facts, torch_cuda_build
from core.hookspecs import GIB, Facts, Gpu, HardwareProfile
from core.plugins import Registry
from core.project import Project

REPO = Path(core.__file__).parents[1]
SHIPPED = sorted(p.stem for p in (REPO / "plugins" / "hardware").glob("*.py"))
ON_CARDS = ["muon", "accumulation", "allocator", "loader", "cleanup"]  # besides a precision


@pytest.fixture(scope="module")
def profiles() -> dict[str, HardwareProfile]:
    return Registry.load(Project(REPO), entry_points=False).profiles


def machine(name: str, gib: float, capability: tuple[int, int] = (8, 6), **facts: Any) -> Facts:
    """One with a card that shows 3 % less memory than its nominal `gib`, as drivers do."""
    gpu = Gpu(name, int(gib * 0.97 * GIB), capability, sm_count=20, clock_mhz=1500)
    return Facts(**{"gpus": (gpu,), "torch_version": "2.13.0", "torch_cuda": "13.0", **facts})


# ---- choosing


CARDS = [
    ("NVIDIA GeForce RTX 4060", 8, "rtx4060"),
    ("NVIDIA GeForce RTX 4060 Laptop GPU", 8, "rtx4060"),
    ("nvidia geforce rtx 4060", 8, "rtx4060"),
    ("NVIDIA GeForce RTX 2050", 4, "rtx2050"),
    ("NVIDIA GeForce RTX 3050 Laptop GPU", 4, "rtx3050"),
    ("NVIDIA GeForce RTX 3050 6GB Laptop GPU", 6, "rtx3050"),
    ("NVIDIA GeForce RTX 3050", 8, "rtx3050"),
    ("NVIDIA GeForce RTX 3060", 12, "rtx3060"),
    ("NVIDIA GeForce RTX 3090", 24, "rtx3090"),
    ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
    ("NVIDIA GeForce GTX 1650", 4, "gtx1650"),
    ("Tesla T4", 15, "t4"),
    ("NVIDIA T4", 15, "t4"),
]


@pytest.mark.parametrize(("name", "gib", "expected"), CARDS)
def test_real_names_get_their_profile(
    profiles: dict[str, HardwareProfile], name: str, gib: float, expected: str
) -> None:
    profile, why = choose_profile(profiles, machine(name, gib))
    assert profile is profiles[expected]
    assert why == f"{name} matches {profile.match!r}"


def test_every_shipped_card_is_among_them() -> None:
    assert {expected for _, _, expected in CARDS} | {"cpu"} == set(SHIPPED)


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 16),
        ("NVIDIA GeForce RTX 4060 Ti", 8),
        ("NVIDIA GeForce RTX 3060 Ti", 8),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", 6),  # the name of a 12 GB profile
        ("NVIDIA GeForce RTX 3090 Ti", 24),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16),
        ("NVIDIA GeForce RTX 4090 D", 24),
        ("NVIDIA GeForce RTX 5070", 12),
        ("NVIDIA T400", 4),
        ("Some Card", 8),
    ],
)
def test_other_cards_get_a_derived_profile(
    profiles: dict[str, HardwareProfile], name: str, gib: float
) -> None:
    profile, why = choose_profile(profiles, machine(name, gib))
    assert profile.name == "derived" and profile.vram_gib == pytest.approx(gib * 0.97, abs=0.01)
    assert why == f"no profile matches {name}: derived from its properties"


def test_no_card_gets_the_cpu(profiles: dict[str, HardwareProfile]) -> None:
    profile, why = choose_profile(profiles, Facts(torch_version="2.13.0", torch_cuda="13.0"))
    assert profile.name == "cpu" and why == "no NVIDIA GPU found"


def test_card_that_torch_cannot_use_gets_the_cpu_and_the_remedy(profiles: dict[str, HardwareProfile]) -> None:
    facts = machine("NVIDIA GeForce RTX 4060", 8, torch_cuda=None, torch_version="2.13.0+cpu")
    profile, why = choose_profile(profiles, facts)
    assert profile.name == "cpu"
    assert (
        "RTX 4060 is here" in why
        and "2.13.0+cpu is a CPU-only build" in why
        and "install one with CUDA" in why
    )


def test_largest_profile_that_is_no_larger_than_the_card_wins(profiles: dict[str, HardwareProfile]) -> None:
    name, match = "NVIDIA GeForce RTX 3050", r"RTX 3050"
    mine = {
        f"own{gib}": HardwareProfile(f"own{gib}", match=match, vram_gib=gib, compute_capability=(8, 6))
        for gib in (6, 8)
    }
    for gib, expected in ((4, "rtx3050"), (6, "own6"), (8, "own8"), (12, "own8")):
        assert choose_profile({**mine, **profiles}, machine(name, gib))[0].name == expected


def test_more_exact_pattern_wins_at_equal_size(profiles: dict[str, HardwareProfile]) -> None:
    laptop = replace(profiles["rtx4060"], name="laptop", match=r"RTX 4060 Laptop GPU")
    chosen, _ = choose_profile(
        {**profiles, "laptop": laptop}, machine("NVIDIA GeForce RTX 4060 Laptop GPU", 8)
    )
    assert chosen is laptop


# ---- deriving


def rates(name: str, capability: tuple[int, int], sms: int, mhz: int) -> dict[str, float]:
    gpu = Gpu(name, 8 * GIB, capability, sm_count=sms, clock_mhz=mhz)
    return dict(derive_profile(gpu).tflops)


@pytest.mark.parametrize(
    ("name", "capability", "sms", "mhz", "dtype", "tflops"),
    [
        ("NVIDIA GeForce RTX 3090", (8, 6), 82, 1695, "bf16", 71),
        ("NVIDIA GeForce RTX 3090", (8, 6), 82, 1695, "fp32", 35.6),
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, 2520, "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, 2520, "fp32", 82.6),
        ("Tesla T4", (7, 5), 40, 1590, "fp16", 65),
        ("Tesla T4", (7, 5), 40, 1590, "fp32", 8.1),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1410, "bf16", 312),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1410, "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, 1830, "bf16", 989),
    ],
)
def test_derived_rates_are_the_whitepapers(
    name: str, capability: tuple[int, int], sms: int, mhz: int, dtype: str, tflops: float
) -> None:
    assert rates(name, capability, sms, mhz)[dtype] == pytest.approx(tflops, rel=0.02)


@pytest.mark.parametrize(
    ("name", "capability", "sms", "mhz", "tflops"),
    [
        ("NVIDIA GeForce RTX 2080 Ti", (7, 5), 68, 1545, 53.8),
        ("NVIDIA A10", (8, 6), 72, 1695, 125),
        ("NVIDIA L4", (8, 9), 58, 2040, 121),
    ],
)
def test_derived_rates_tell_geforce_from_professional_cards(
    name: str, capability: tuple[int, int], sms: int, mhz: int, tflops: float
) -> None:
    assert rates(name, capability, sms, mhz)["fp16"] == pytest.approx(tflops, rel=0.02)


def test_derived_profiles_train_as_the_shipped_ones_do(profiles: dict[str, HardwareProfile]) -> None:
    shipped = [p for p in profiles.values() if p.device == "cuda"]
    assert shipped and all(
        [s for s in p.strategies if s not in ("fp16", "bf16")] == ON_CARDS for p in shipped
    )


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1660 Ti", "NVIDIA GeForce GTX 1650 SUPER"])
def test_gtx_16_has_no_tensor_cores(name: str) -> None:
    profile = derive_profile(Gpu(name, 6 * GIB, (7, 5), sm_count=24, clock_mhz=1770))
    assert set(profile.tflops) == {"fp32"} and not {"fp16", "bf16"} & set(profile.strategies)


@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        ((6, 1), set()),
        ((7, 0), {"fp16"}),
        ((7, 2), set()),
        ((7, 5), {"fp16"}),
        ((8, 6), {"bf16"}),
        ((12, 0), {"bf16"}),
    ],
)
def test_derived_precision_follows_the_capability(capability: tuple[int, int], precision: set[str]) -> None:
    profile = derive_profile(Gpu("NVIDIA Something", 8 * GIB, capability, sm_count=30, clock_mhz=1700))
    assert {"fp16", "bf16"} & set(profile.strategies) == precision
    assert [s for s in profile.strategies if s not in precision] == ON_CARDS


def test_derived_bandwidth_and_size() -> None:
    # RTX 4060: 17 Gbps GDDR6 shows as 8501 MHz, 128 bit: 272 GB/s.
    gpu = Gpu("X", 8 * GIB, (8, 9), 24, 2460, memory_clock_mhz=8501, memory_bus_bits=128)
    profile = derive_profile(gpu)
    assert profile.bandwidth_gbs == pytest.approx(272, rel=0.01) and profile.vram_gib == 8
    assert profile.source == "derived from X: 24 SMs at 2460 MHz"


def test_silent_driver_leaves_rates_out() -> None:
    profile = derive_profile(Gpu("X", 8 * GIB, (8, 9)))
    assert profile.tflops == {} and profile.bandwidth_gbs == 0 and profile.strategies[0] == "bf16"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_figures_are_plausible(profiles: dict[str, HardwareProfile], name: str) -> None:
    profile = profiles[name]
    if profile.device == "cuda":
        assert profile.source
        assert 3 < profile.vram_gib <= 24 and 100 < profile.bandwidth_gbs < 1100
        assert ("bf16" in profile.tflops) == (profile.compute_capability >= (8, 0))
        assert "bf16" not in profile.tflops or profile.tflops["bf16"] == profile.tflops["fp16"]
        # Tensor rate is twice the fp32 rate on Ampere and Ada GeForce, within the data sheets' rounding.
        if profile.compute_capability >= (8, 0):
            assert profile.tflops["fp16"] == pytest.approx(2 * profile.tflops["fp32"], rel=0.02)


# ---- reading a machine through a faked driver


class FakeDriver:
    """NVML with three cards; `unanswered` questions raise NotSupported, as on laptops."""

    NAMES = ("card 0", "card 1", "card 2")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, unanswered: tuple[str, ...] = ()) -> None:
        def set_(name: str, answer: Any) -> None:
            def function(*args: Any) -> Any:
                if name in unanswered:
                    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
                return answer(*args) if callable(answer) else answer

            monkeypatch.setattr(pynvml, name, function)

        set_("nvmlInit", None)
        set_("nvmlShutdown", None)
        set_("nvmlDeviceGetCount", len(self.NAMES))
        set_("nvmlDeviceGetHandleByIndex", lambda i: i)
        set_("nvmlDeviceGetName", lambda i: self.NAMES[i])
        set_("nvmlDeviceGetMemoryInfo", lambda i: SimpleNamespace(total=(i + 1) * GIB))
        set_("nvmlDeviceGetCudaComputeCapability", [8, 6])
        set_("nvmlDeviceGetUUID", lambda i: f"GPU-{i}{i}{i}-of-four-parts")
        set_("nvmlDeviceGetNumGpuCores", 2048)
        set_("nvmlDeviceGetMaxClockInfo", lambda i, kind: 1500 if kind == pynvml.NVML_CLOCK_SM else 7000)
        set_("nvmlDeviceGetMemoryBusWidth", 128)


@pytest.mark.parametrize(
    ("setting", "cards"),
    [
        (None, [0, 1, 2]),
        ("0", [0]),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,-1,2", [0]),  # CUDA stops at the first entry that names no card
        ("0,7,1", [0]),
        ("GPU-111,0", [1, 0]),  # by the beginning of its identity
        ("GPU-8932f937", []),
    ],
)
def test_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch, setting: str | None, cards: list[int]) -> None:
    FakeDriver(monkeypatch)
    facts = read_facts({} if setting is None else {"CUDA_VISIBLE_DEVICES": setting})
    assert [g.name for g in facts.gpus] == [f"card {i}" for i in cards]
    assert facts.gpu == (facts.gpus[0] if cards else None)


def test_what_the_driver_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeDriver(monkeypatch)
    assert read_facts({}).gpus[1] == Gpu(
        "card 1", 2 * GIB, (8, 6), 16, 1500, 7000, 128, 1, "GPU-111-of-four-parts"
    )


def test_unanswered_questions_become_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeDriver(
        monkeypatch,
        (
            *("nvmlDeviceGetUUID", "nvmlDeviceGetNumGpuCores"),
            *("nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetMemoryBusWidth"),
        ),
    )
    assert read_facts({}).gpus[0] == Gpu("card 0", GIB, (8, 6))


@pytest.mark.parametrize("unanswered", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo"])
def test_card_that_does_not_answer_is_no_crash(monkeypatch: pytest.MonkeyPatch, unanswered: str) -> None:
    FakeDriver(monkeypatch, (unanswered,))
    read_facts({})


def test_no_driver_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeDriver(monkeypatch, ("nvmlInit",))
    assert read_facts({}).gpus == ()


def test_facts_of_this_machine_without_torch() -> None:
    code = (
        "import json, sys; from core.hardware import read_facts; f = read_facts()\n"
        "print(json.dumps([f.torch_version, f.cores, f.ram_bytes, f.os, 'torch' in sys.modules]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, encoding="utf-8", check=True
    )
    version, cores, ram, system, imported = json.loads(out.stdout)
    assert version[0].isdigit() and cores >= 1 and ram > GIB and not imported
    assert system in ("linux", "windows", "macos", "wsl")


@pytest.mark.parametrize(
    ("system", "release", "expected"),
    [
        ("Linux", "6.8.0-45-generic", "linux"),
        ("Linux", "5.15.153.1-microsoft-standard-WSL2", "wsl"),
        ("Linux", "4.4.0-19041-Microsoft", "wsl"),
        ("Windows", "11", "windows"),
        ("Darwin", "24.1.0", "macos"),
    ],
)
def test_operating_systems(monkeypatch: pytest.MonkeyPatch, system: str, release: str, expected: str) -> None:
    monkeypatch.setattr(hardware.platform, "system", lambda: system)
    monkeypatch.setattr(hardware.platform, "release", lambda: release)
    assert read_facts({}).os == expected


@pytest.mark.parametrize(
    ("line", "build"),
    [
        ("cuda: Optional[str] = '12.8'", "12.8"),
        ("cuda: str | None = '13.0'", "13.0"),
        ("cuda = '11.8'", "11.8"),
        ("cuda: Optional[str] = None", None),
        ("cuda_version_of_something_else = '9.9'", None),
        ("", None),
    ],
)
def test_torch_build_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, build: str | None
) -> None:
    (tmp_path / "version.py").write_text(
        f"__version__ = '2.13.0'\ndebug = False\n{line}\ngit_version = 'abc'\nhip: Optional[str] = None\n",
        encoding="utf-8",
    )
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert torch_cuda_build() == build


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)])
def test_no_torch_is_no_build(monkeypatch: pytest.MonkeyPatch, spec: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert torch_cuda_build() is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx512f avx512_bf16 amx_tile", True),
        ("flags : fpu amx_bf16", True),
        ("flags : fpu avx2 avx512f", False),
    ],
)
def test_cpu_flags(monkeypatch: pytest.MonkeyPatch, flags: str, expected: bool) -> None:
    monkeypatch.setattr(hardware.Path, "read_text", lambda *args, **kwargs: flags)
    assert hardware._cpu_multiplies_bf16() is expected
