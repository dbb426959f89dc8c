"""What a person watches: the card's state, the peak rate that a share is taken of, and the progress itself."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.hookspecs import GIB

if TYPE_CHECKING:
    from core.hookspecs import Plan


class CardMonitor:
    """Utilisation, temperature, power and memory of a card, through NVML. Empty where there is none."""

    def __init__(self, device: Any) -> None:
        self.device, self.card = device, None
        if device.type != "cuda":
            return
        import pynvml
        import torch

        try:
            pynvml.nvmlInit()
            # By UUID: NVML counts every card, torch those of CUDA_VISIBLE_DEVICES.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self.card = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
        except pynvml.NVMLError:
            self.card = None

    def read(self) -> dict[str, float]:
        """Current figures; those the driver does not tell are left out."""
        if self.device.type != "cuda":
            return {}
        import pynvml
        import torch

        free, total = torch.cuda.mem_get_info(self.device)
        found = {
            "vram_used_gib": (total - free) / GIB,
            "vram_total_gib": total / GIB,
            "vram_peak_gib": torch.cuda.max_memory_reserved(self.device) / GIB,
        }
        questions: dict[str, Callable[[Any], float]] = {
            "gpu_percent": lambda card: pynvml.nvmlDeviceGetUtilizationRates(card).gpu,
            "temperature_c": lambda card: pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU),
            "power_w": lambda card: pynvml.nvmlDeviceGetPowerUsage(card) / 1000,
        }
        for name, ask in questions.items():
            try:
                if self.card is not None:
                    found[name] = float(ask(self.card))
            except pynvml.NVMLError:
                pass
        return found


def peak_flops(plan: Plan, device: Any) -> tuple[float, str]:
    """Peak rate for the plan's dtype [FLOP/s], and where the figure comes from; 0 where it is unknown.

    A card's is in its profile. A CPU's is measured: the best of a few matrix products with the sizes of a step.
    """
    dtype = plan["dtype"]
    if device.type == "cuda":
        rate = plan.profile.tflops.get(dtype, 0.0) * 1e12
        return rate, f"{plan.profile.name}'s {dtype} peak" if rate else f"unknown for {plan.profile.name}"
    import torch

    n, best = 1024, float("inf")
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    a, b = torch.ones(n, n, dtype=kind), torch.ones(n, n, dtype=kind)
    until = time.perf_counter() + 0.2
    while time.perf_counter() < until:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, f"this CPU's measured {dtype} matrix product"


class MemoryWatch:
    """Predicted against measured memory while training, and warnings before it hurts.

    On a card the measured peak is what torch's allocator reserved. On a CPU it is the weights and the optimizer's
    state, and what the process grew by after they were made: libraries loaded before do not count. device:
    torch.device.
    """

    SLOW, FULL = 3.0, 0.95

    def __init__(self, device: Any, plan: Plan, say: Callable[[str], None]) -> None:
        self.device, self.say = device, say
        self.forecast = plan.fit.forecast if plan.fit else None
        kept = self.forecast.resident if self.forecast else 0
        self.start = 0 if device.type == "cuda" else resident() - kept
        self.peak = self.retries = self.looks = 0
        self.fastest = 0.0
        self.warned = False

    def read(self) -> int:
        """The peak so far [bytes]. Asked again and again, since a strategy may reset the card's own."""
        self.peak = max(self.peak, peak_memory(self.device) - self.start)
        return self.peak

    def look(self, step: int, record: dict[str, Any]) -> None:
        """Compare once, and warn where memory begins to cost time."""
        self.looks += 1
        if self.looks == 1 and self.forecast:
            self.say(self.compared())
        if self.device.type == "cuda":
            self._retries(step)
        rate = record["tokens_per_second"]
        if self.looks > 1:  # the first one pays for warming up
            self._spill(step, rate, record)
            self.fastest = max(self.fastest, rate)

    def predicted(self) -> int:
        assert self.forecast is not None
        return self.forecast.reserved if self.device.type == "cuda" else self.forecast.allocated

    def compared(self) -> str:
        measured, predicted = self.read() / GIB, self.predicted() / GIB
        if self.device.type == "cuda":
            ratio = measured / predicted
            return f"memory: {measured:.2f} GiB reserved at peak, {predicted:.2f} predicted (x{ratio:.2f})"
        # A process needs more than its tensors: scratch of the CPU's kernels, and what malloc keeps.
        return f"memory: the process needs {measured:.2f} GiB; {predicted:.2f} were predicted for its tensors"

    def forgive(self) -> None:
        """Running out of memory is itself a retry; it has been told, and something has been done about it."""
        if self.device.type == "cuda":
            self.retries = max(self.retries, self._count())

    def _count(self) -> int:
        import torch

        return torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)

    def _retries(self, step: int) -> None:
        retries = self._count()
        if retries > 2 * self.retries:  # the first, then each time they have doubled
            self.retries = retries
            self.say(
                f"warning: step {step}: the allocator had to give its cache back {retries} times to go on, which costs "
                "time: memory is nearly full. Set train.micro_batch to half, or hardware.memory_gib to less"
            )

    def _spill(self, step: int, rate: float, record: dict[str, Any]) -> None:
        full = record.get("vram_used_gib", 0.0) > self.FULL * record.get("vram_total_gib", float("inf"))
        if full and not self.warned and rate * self.SLOW < self.fastest:
            self.warned = True
            self.say(
                f"warning: step {step}: {self.fastest / rate:.0f} times slower than before, and the card's memory is "
                "full: Windows moves it into RAM (shared GPU memory) instead of failing. Close other programs, set "
                "hardware.memory_gib to less, or switch that off in NVIDIA's control panel (Sysmem Fallback Policy)"
            )

    def summary(self) -> dict[str, float]:
        """Peak and prediction [GiB]."""
        found = {"peak_memory_gib": self.read() / GIB}
        if self.forecast:
            found["predicted_memory_gib"] = self.predicted() / GIB
        return found


class Progress:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int | None, echo: Callable[[str], None], enabled: bool = True) -> None:
        self.echo, self.total, self.enabled = echo, total_steps, enabled
        self.bar: Any = None
        if enabled and sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total_steps, unit="step", file=sys.stdout, dynamic_ncols=True)

    def say(self, line: str) -> None:
        """One line that stays."""
        if not self.enabled:
            return
        if self.bar is not None:
            self._on_terminal(lambda: self.bar.write(line))
        else:
            self.echo(line)

    def advance(self, step: int, fields: list[str], logged: bool) -> None:
        """Show `step` of the total with its figures; plain lines only for logged steps."""
        if not self.enabled:
            return
        if self.bar is not None:
            self._on_terminal(lambda: self.bar.update(step - self.bar.n))
            if logged:
                self._on_terminal(lambda: self.bar.set_postfix_str("  ".join(fields)))
        elif logged:
            self.echo(f"step {step}/{self.total or '?'}  " + "  ".join(fields))

    def close(self) -> None:
        if self.bar is not None:
            self._on_terminal(lambda: self.bar.close())

    def _on_terminal(self, write: Callable[[], object]) -> None:
        """A terminal may be gone while the run goes on (nohup): then nothing is shown any more."""
        try:
            write()
        except OSError:
            self.enabled, self.bar = False, None


def clock_time(seconds: float) -> str:
    """75 → "1:15"; 3675 → "1:01:15"."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def card_line(card: dict[str, float]) -> list[str]:
    """The figures of `CardMonitor.read` as short fields."""
    if "vram_used_gib" not in card:
        return []
    fields = [
        f"{card['vram_used_gib']:.2f}/{card['vram_total_gib']:.1f} GiB (peak {card['vram_peak_gib']:.2f})"
    ]
    for key, unit in (("gpu_percent", "%"), ("temperature_c", "°C"), ("power_w", "W")):
        if key in card:
            fields.append(f"{card[key]:.0f} {unit}")
    return fields


def peak_memory(device: Any) -> int:
    """Peak memory of this process: reserved on the card, or resident on a CPU [bytes]."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_reserved(device)
    return peak_resident()


def resident() -> int:
    """Resident memory of this process [bytes]."""
    import psutil

    return psutil.Process().memory_info().rss


def peak_resident() -> int:
    """Peak resident memory of this process since it began [bytes]."""
    import psutil

    now = psutil.Process().memory_info()
    if sys.platform == "win32":
        return int(now.peak_wset)
    import resource

    if (
        sys.platform == "linux"
    ):  # getrusage there counts the parent's peak in, as it was when it started this process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return max(now.rss, int(status.partition("VmHWM:")[2].split()[0]) * 1024)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # getrusage(2): KiB; bytes on macOS
    return max(now.rss, peak if sys.platform == "darwin" else peak * 1024)
