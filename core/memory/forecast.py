"""Does a plan fit, with which micro-batch, and how fast will it be? Answers are kept, so that asking again is free.

torch is imported only for a question that was not asked before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import PluginError, TightfitError, UserError
from core.files import write_text
from core.hookspecs import GIB, Facts, HardwareProfile, Plan
from core.memory.allocator import KINDS, MIB, AllocatorSettings, OutOfMemory
from core.params import Params
from core.plugins import Registry

if TYPE_CHECKING:
    from core.memory.tape import Tape

MARGIN = 0.03
"""Kept free of the budget: three times the largest error against published figures (python -m bench.memory)."""
CONTEXT_BYTES = int(0.4 * GIB)
"""CUDA's own memory on a card, with kernels loaded lazily: "around 400MB" from CUDA 11.7 on (pytorch#109888)."""
DESKTOP_BYTES = {"linux": int(0.1 * GIB), "windows": int(0.5 * GIB), "wsl": int(0.5 * GIB)}
"""What the desktop keeps of a card. Windows never hands out everything, and spills silently into RAM beyond it."""
CPU_SHARE = 0.5
"""Of the machine's RAM, for one step; the rest is everything else's."""
ROOFLINE_SHARE = (0.4, 0.9)
"""Real steps reach this share of the roofline's rate: launch overheads and imperfect kernels take the rest."""
CACHE_FORMAT, CACHE_ENTRIES = 1, 2000
# What a forecast depends on, besides the plugins in use.
CODE = (
    *(
        f"{name}.py"
        for name in ("fused", "loss", "model", "model_config", "muon", "numbers", "optim", "optim8bit")
    ),
    "trainer.py",
    *(f"memory/{name}.py" for name in ("allocator", "deepen", "forecast", "simulate", "tape", "trace")),
)


BUDGET_STEP = 1 << 26
"""Budgets are whole multiples of it [bytes]: what a system shows of its memory varies a little from boot to boot."""


def memory_budget(
    profile: HardwareProfile, facts: Facts, asked_gib: float | None, num_processes: int = 1
) -> tuple[int, str]:
    """Bytes that a step may use in each process, and why: what is free on its card, or its share of the RAM."""
    if asked_gib is not None:
        return int(asked_gib * GIB), "hardware.memory_gib"
    if profile.device == "cpu":
        why = f"{CPU_SHARE:.0%} of {facts.ram_bytes / GIB:.1f} GiB RAM"
        why += f", shared by {num_processes} processes" if num_processes > 1 else ""
        return _whole_steps(facts.ram_bytes * CPU_SHARE / num_processes), why
    total = int(profile.vram_gib * GIB)
    if facts.gpu is not None:  # drivers show a few percent less than the nominal size
        total = min(total, facts.gpu.vram_bytes)
    desktop = DESKTOP_BYTES.get(facts.os, DESKTOP_BYTES["linux"])
    free = _whole_steps((total - CONTEXT_BYTES - desktop) * profile.vram_budget)
    why = (
        f"{total / GIB:.2f} GiB less {CONTEXT_BYTES / GIB:.1f} for CUDA's context and {desktop / GIB:.1f} for the "
        f"desktop on {facts.os}"
    )
    return free, why + (f", of that {profile.vram_budget:.0%}" if profile.vram_budget != 1 else "")


def _whole_steps(nbytes: float) -> int:
    return int(nbytes // BUDGET_STEP * BUDGET_STEP)


@dataclass(frozen=True)
class Forecast:
    """What a plan's step will take at one micro-batch. Sizes in bytes, for one process."""

    micro_batch: int
    needed: int
    """The smallest budget in which the step runs: above `allocated` by what the allocator cannot use."""
    allocated: int
    """Peak of torch.cuda.max_memory_allocated(); on a CPU the sum of all tensors."""
    reserved: int
    """Peak of torch.cuda.max_memory_reserved() where nothing limits it."""
    parts: dict[str, int]
    """What is in use at the peak, by kind."""
    op: str
    """The operation at the peak."""
    phase: str
    resident: int
    """Weights and the optimizer's state."""
    flops: float = 0.0
    """Per optimizer step."""
    seconds: tuple[float, float] | None = None
    """An optimizer step, at best and at worst; None where the device's rates are unknown."""
    gain: float = 0.0
    """Share of that time which a larger micro-batch could save at most."""


@dataclass(frozen=True)
class Fit:
    """The answer for a plan: its forecast at the largest micro-batch that fits, else at the smallest there is."""

    fits: bool
    forecast: Forecast
    smallest: Forecast
    """At the smallest micro-batch, by which plans compare."""


@dataclass
class Forecaster:
    """Asks the simulator, and remembers. cache: a JSON file; None remembers in this process only.

    simulates: False answers from the cache alone, and raises UserError where that has no answer.
    """

    cache: Path | None = None
    simulates: bool = True
    rates: tuple[float, float] | None = None
    """The device's own rates where its profile has none: FLOP/s and bytes/s."""
    _answers: dict[str, Any] | None = None
    _tapes: dict[str, Tape] = field(default_factory=dict)

    def fit(self, plan: Plan, params: Params, registry: Registry, candidates: Sequence[int]) -> Fit:
        """The largest of `candidates` (largest first) whose step fits into plan.memory_budget, and its forecast."""
        step = self._step_identity(plan, params, registry)
        question = {
            "step": step,
            "candidates": list(candidates),
            "batch": plan.sequences // plan.num_processes,
            "processes": plan.num_processes,
            "budget": plan.memory_budget,
            "allocator": asdict(allocator_settings(plan)),
            "rates": self._rates(plan),
        }
        key = _sha256(question)
        known = _fit(self._read().get(key))
        if known is None:
            if not self.simulates:
                raise UserError("the memory plan is not there any more: run `python -m stages.env_check`")
            with _blaming_plugins(registry):
                known = self._answer(plan, params, step, candidates)
            self._keep(key, known)
        return known

    def _answer(self, plan: Plan, params: Params, step: Any, candidates: Sequence[int]) -> Fit:
        tape = self._tape(plan, params, step)
        limit = int(plan.memory_budget * (1 - MARGIN)) - processes_bytes(plan)
        chosen = next((n for n in candidates if self._fits(tape, plan, n, limit)), 0)
        smallest = self._forecast(tape, plan, candidates[-1])
        same = chosen in (0, candidates[-1])
        return Fit(bool(chosen), smallest if same else self._forecast(tape, plan, chosen), smallest)

    def _tape(self, plan: Plan, params: Params, step: Any) -> Tape:
        key = _sha256(step)
        if key not in self._tapes:
            from core.memory.simulate import tape_of

            self._tapes[key] = tape_of(plan, params)
        return self._tapes[key]

    def _fits(self, tape: Tape, plan: Plan, n: int, limit: int) -> bool:
        accumulates = n < plan.sequences // plan.num_processes
        if plan.profile.device == "cpu":
            return tape.peak(n, accumulates).bytes <= limit
        return tape.fits(n, accumulates, allocator_settings(plan), limit)

    def _forecast(self, tape: Tape, plan: Plan, n: int) -> Forecast:
        steps = plan.sequences // plan.num_processes // n
        peak, extra = tape.peak(n, steps > 1), processes_bytes(plan)
        if plan.profile.device == "cpu":
            needed = allocated = reserved = peak.bytes
        else:
            settings = allocator_settings(plan)
            free = tape.play(n, steps > 1, settings)
            allocated, reserved = free.peak_allocated, free.peak_reserved
            needed = smallest_limit(tape, n, steps > 1, settings, allocated, reserved)
        rates, seconds, gain = self._rates(plan), None, 0.0
        if rates:
            ideal, endless = tape.seconds(n, steps, *rates), tape.seconds(64 * n, steps / 64, *rates)
            seconds, gain = (ideal / ROOFLINE_SHARE[1], ideal / ROOFLINE_SHARE[0]), 1 - endless / ideal
        return Forecast(
            micro_batch=n,
            needed=needed + extra,
            allocated=allocated + extra,
            reserved=reserved + extra,
            parts={**peak.parts, "gradients": peak.parts["gradients"] + extra},
            op=peak.op,
            phase=peak.phase,
            resident=peak.resident,
            flops=tape.flops(n, steps),
            seconds=seconds,
            gain=gain,
        )

    def _rates(self, plan: Plan) -> tuple[float, float] | None:
        profile = plan.profile
        flops, moved = profile.tflops.get(plan["dtype"], 0.0) * 1e12, profile.bandwidth_gbs * 1e9
        if flops and moved:
            return flops, moved
        return self.rates if profile.device == "cpu" else None

    def _step_identity(self, plan: Plan, params: Params, registry: Registry) -> dict[str, Any]:
        profile = plan.profile
        return {
            "model": plan.model.to_dict(),
            "dtype": plan["dtype"],
            "strategies": [
                [s.name, plan.options[s.name], registry.owner("strategy", s.name).sha256] for s in plan.active
            ],
            "clips": bool(params.train.grad_clip),
            "device": [profile.device, list(profile.compute_capability)],
            "torch": _torch_version(),
            "code": _code_sha256(),
        }

    def _read(self) -> dict[str, Any]:
        if self._answers is None:
            self._answers = {}
            try:
                known = json.loads(self.cache.read_text(encoding="utf-8")) if self.cache else {}
            except (OSError, ValueError):
                known = {}
            if isinstance(known, dict) and known.get("format") == CACHE_FORMAT:
                answers = known.get("answers")
                self._answers = answers if isinstance(answers, dict) else {}
        return self._answers

    def _keep(self, key: str, answer: Fit) -> None:
        if self.cache is not None:
            self._answers = None  # another process may have written meanwhile
        answers = self._read()
        answers[key] = asdict(answer)
        if self.cache is not None:
            newest = dict(list(answers.items())[-CACHE_ENTRIES:])
            # Not sorted: the order says which answer is the newest.
            write_text(self.cache, json.dumps({"format": CACHE_FORMAT, "answers": newest}) + "\n")


def processes_bytes(plan: Plan) -> int:
    """What DistributedDataParallel adds [bytes].

    Its buckets hold every gradient a second time (torch's docs of `gradient_as_bucket_view`), and the gradient of the
    chunked head waits in autograd for that of a tied embedding.
    """
    head = plan.model.vocab_size * plan.model.n_embd
    return (plan.model.n_params + head) * 4 if plan.num_processes > 1 else 0


def allocator_settings(plan: Plan) -> AllocatorSettings:
    choice = plan.env.get("PYTORCH_ALLOC_CONF")
    return AllocatorSettings.parse(choice.value) if choice else AllocatorSettings()


def smallest_limit(
    tape: Tape, n: int, accumulates: bool, settings: AllocatorSettings, allocated: int, reserved: int
) -> int:
    """The smallest limit under which the tape plays, to 8 MiB [bytes]."""
    low, high = allocated - 1, reserved
    while high - low > 8 * MIB:
        middle = (low + high) // 2
        try:
            tape.play(n, accumulates, settings, middle)
            high = middle
        except OutOfMemory:
            low = middle
    return high


@contextlib.contextmanager
def _blaming_plugins(registry: Registry) -> Iterator[None]:
    """What fails while the step runs on tensors without data is a plugin's doing: name the file and the line."""
    try:
        yield
    except TightfitError:
        raise
    except Exception as error:
        files = {str(Path(p.file).resolve()): p.name for p in registry.plugins if p.file}
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if str(Path(f.filename).resolve()) in files]
        if not theirs:
            raise
        where = f"{files[str(Path(theirs[-1].filename).resolve())]}:{theirs[-1].lineno}"
        raise PluginError(
            f"{where}: {theirs[-1].name}() does not run on tensors without data, with which memory is planned "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); where build.simulated is true, stand in "
            "for what needs values (docs/plugins.md)"
        ) from error


def _fit(answer: Any) -> Fit | None:
    """A kept answer; None where there is none, or where it is damaged."""
    try:
        return Fit(answer["fits"], _forecast(answer["forecast"]), _forecast(answer["smallest"]))
    except (KeyError, TypeError):
        return None


def _forecast(values: dict[str, Any]) -> Forecast:
    seconds = tuple(values["seconds"]) if values["seconds"] else None
    return Forecast(
        **{**values, "seconds": seconds, "parts": {kind: values["parts"][kind] for kind in KINDS}}
    )


def _torch_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def _code_sha256() -> str:
    root = Path(__file__).parents[1]
    return hashlib.sha256(b"".join((root / name).read_bytes() for name in CODE)).hexdigest()


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode("utf-8")).hexdigest()
