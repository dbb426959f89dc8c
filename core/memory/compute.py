"""Where work goes (GPU or CPU) and what memory it takes, measured on the first card or on this process.

Importing this never imports torch, and nothing here changes settings such as thread counts. The first GPU is meant
throughout, as everywhere in Tightfit; CUDA_VISIBLE_DEVICES says which that is.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from core.errors import UserError, did_you_mean
from core.hookspecs import GIB, HardwareProfile, Phase, Plan, Strategy, hookimpl
from core.memory.allocator import AllocatorSettings
from core.memory.forecast import CPU_SHARE, smallest_limit
from core.model_config import PRESETS, ModelConfig
from core.monitor import peak_resident
from core.params import ModelParams, Params

if TYPE_CHECKING:
    import torch

    from core.memory.tape import Tape

MODES = ("auto", "cpu", "gpu", "hybrid")
WORKLOADS = {"train": "gpu", "evaluate": "gpu", "generate": "gpu", "data": "cpu", "tokenize": "cpu"}
"""Where hybrid sends each workload."""
DTYPES = ("bf16", "fp16", "fp32")


def gpu_problem() -> str | None:
    """Why torch cannot use the first GPU, with the remedy; None where it can."""
    import torch

    from core.env_check import supports
    from core.hardware import TORCH_HELP

    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA; with an NVIDIA GPU install another ({TORCH_HELP})"
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and finds no GPU: "
            "look whether nvidia-smi shows one, and update its driver"
        )
    architectures, capability = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(0)
    if architectures and not supports(architectures, capability):
        return (
            f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(0)} (it has "
            f"{', '.join(architectures)}); install another build ({TORCH_HELP})"
        )
    return None


class Compute:
    """Which workload goes where, and the memory of the device that trains.

    auto: everything on the GPU when torch can use one, else on the CPU.
    cpu: everything on the CPU.
    gpu: everything on the GPU; UserError with the remedy where torch can use none.
    hybrid: train, evaluate and generate on the GPU, data and tokenize on the CPU; without a GPU everything on the
    CPU. `reason` says which it became, and why.
    """

    def __init__(self, mode: str = "auto") -> None:
        if mode not in MODES:
            raise UserError(f"mode: {mode!r} is none of {', '.join(MODES)}.{did_you_mean(mode, MODES)}")
        import torch

        self.mode = mode
        self.gpu: torch.device | None = None
        """The card in use; None when all work is the CPU's."""
        if mode == "cpu":
            self.reason = "everything on the CPU: mode cpu"
            return
        problem = gpu_problem()
        if problem and mode == "gpu":
            raise UserError(f"mode: gpu needs a GPU that torch can use: {problem}, or take mode auto or cpu")
        if problem:
            self.reason = f"everything on the CPU: {problem}"
            return
        self.gpu = torch.device("cuda", 0)
        name = torch.cuda.get_device_name(self.gpu)
        if mode == "hybrid":
            on = {place: ", ".join(w for w, p in WORKLOADS.items() if p == place) for place in ("gpu", "cpu")}
            self.reason = f"{on['gpu']} on {name}; {on['cpu']} on the CPU: mode hybrid"
        else:
            self.reason = f"everything on {name}: " + ("torch can use it" if mode == "auto" else "mode gpu")

    def __repr__(self) -> str:
        return f"Compute({self.mode!r}): {self.reason}"

    def device(self, workload: str = "train") -> torch.device:
        """Where `workload` goes: train, evaluate, generate, data or tokenize. Raises UserError for another."""
        import torch

        if workload not in WORKLOADS:
            near = did_you_mean(workload, WORKLOADS)
            raise UserError(f"workload: no workload {workload!r}.{near} Known: {', '.join(WORKLOADS)}")
        if self.gpu is None or (self.mode == "hybrid" and WORKLOADS[workload] == "cpu"):
            return torch.device("cpu")
        return self.gpu

    def amp_dtype(self) -> str:
        """What training computes in: "bf16", "fp16" or "fp32". By real capability, as the shipped profiles choose."""
        from core.hardware import best_precision, read_facts

        if self.gpu is None:
            return "bf16" if read_facts().cpu_bf16 else "fp32"
        import torch

        return best_precision(
            torch.cuda.get_device_name(self.gpu), torch.cuda.get_device_capability(self.gpu)
        )

    def vram_usage_gib(self) -> tuple[float, float]:
        """(used, reserved) by this process [GiB]: its tensors, and with them what torch keeps for the next ones.

        On the CPU both are the process's resident memory.
        """
        if self.gpu is None:
            import psutil

            resident = psutil.Process().memory_info().rss / GIB
            return resident, resident
        import torch

        return torch.cuda.memory_allocated(self.gpu) / GIB, torch.cuda.memory_reserved(self.gpu) / GIB

    def get_memory_stats(self) -> dict[str, float]:
        """Memory now: allocated_gib, reserved_gib, peak_gib, total_gib, free_gib [GiB], utilization_percent.

        allocated, reserved and the peak of allocated are this process's. total and free are the driver's, so that
        CUDA's own context, the desktop and other processes count; utilization_percent is what all of them use.
        On the CPU: resident memory and its peak since the process began, the machine's RAM and what is available.
        """
        allocated, reserved = self.vram_usage_gib()
        if self.gpu is None:
            import psutil

            ram = psutil.virtual_memory()
            peak, total, free = peak_resident(), ram.total, ram.available
        else:
            import torch

            peak = torch.cuda.max_memory_allocated(self.gpu)
            free, total = torch.cuda.mem_get_info(self.gpu)
        return {
            "allocated_gib": allocated,
            "reserved_gib": reserved,
            "peak_gib": peak / GIB,
            "total_gib": total / GIB,
            "free_gib": free / GIB,
            "utilization_percent": 100 * (total - free) / total,
        }

    def log_memory_stats(self, label: str = "memory", say: Callable[[str], None] = print) -> dict[str, float]:
        """Say `get_memory_stats()` in one line, and return it."""
        stats = self.get_memory_stats()
        if self.gpu is None:
            own = f"process {stats['allocated_gib']:.2f} GiB, peak {stats['peak_gib']:.2f}"
            where = "of RAM available"
        else:
            own = (
                f"{stats['allocated_gib']:.2f} GiB allocated, {stats['reserved_gib']:.2f} reserved, "
                f"peak {stats['peak_gib']:.2f}"
            )
            where = "free on the card"
        say(
            f"{label}: {own}; {stats['free_gib']:.2f} of {stats['total_gib']:.2f} GiB {where}, "
            f"{stats['utilization_percent']:.0f} % in use"
        )
        return stats

    def reset_peak_memory_stats(self) -> None:
        """Begin a new peak. On the CPU nothing happens: the system keeps a process's peak as long as it lives."""
        if self.gpu is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self.gpu)

    def optimize_memory(self, aggressive: bool = False) -> float:
        """Free what nobody holds and hand torch's cache back to the driver; return what was given back [GiB].

        Garbage collection comes first: empty_cache() can only return blocks that no tensor holds any more.
        aggressive: waits for the card, and frees what other processes have returned, before the cache is emptied.
        It makes nothing faster: the next allocations ask the driver again. On the CPU it is garbage collection only.
        """
        _, before = self.vram_usage_gib()
        gc.collect()
        if self.gpu is not None:
            import torch

            if aggressive:
                torch.cuda.synchronize(self.gpu)
                torch.cuda.ipc_collect()
            torch.cuda.empty_cache()
        _, after = self.vram_usage_gib()
        return max(0.0, before - after)

    def cleanup_after_training(self, say: Callable[[str], None] = print) -> dict[str, float]:
        """Log the peak, free memory, then begin a new peak. Returns the statistics from before.

        Delete your own references first (`del model, optimizer`): memory that is still named cannot be freed.
        """
        stats = self.log_memory_stats("after training", say)
        freed = self.optimize_memory(aggressive=True)
        self.reset_peak_memory_stats()
        say(f"given back: {freed:.2f} GiB")
        return stats

    def suggest_batch_size(self, vram_usage_multiplier: float = 1.0, model: ModelConfig | None = None) -> int:
        """The largest power of two of sequences whose training step fits into what is free now.

        vram_usage_multiplier: share of the free memory to fill, above 0 and at most 1. Free is what the driver says
        (torch's own cache counts as used: `optimize_memory()` first); on the CPU half the available RAM.
        model: default is the one that the current folder's params.yaml describes.

        The step is that of `step_memory`, on a card with what torch's allocator takes beyond it. This is a
        micro-batch; it may be larger than your train.batch_tokens. Never 0: raises UserError naming a smaller preset
        where not even one sequence fits, and for a multiplier out of range.
        """
        if not isinstance(vram_usage_multiplier, (int, float)) or not 0 < vram_usage_multiplier <= 1:
            raise UserError(
                f"vram_usage_multiplier: {vram_usage_multiplier!r} should be above 0 and at most 1, such as 0.9"
            )
        dtype = self.amp_dtype()
        if model is None:
            params = _current_params()
            model = ModelConfig.resolve(params.model, params.tokenizer.n_vocab)
            if dtype in params.hardware.strategies.remove:
                dtype = "fp32"
        free = self.get_memory_stats()["free_gib"] * GIB * (CPU_SHARE if self.gpu is None else 1)
        budget = int(free * vram_usage_multiplier)
        tape = self._tape(model, dtype)
        if not self._fits(tape, 1, budget):
            raise UserError(self._too_large(model, dtype, budget))
        n = 1
        while self._fits(tape, 2 * n, budget):
            n *= 2
        return n

    def _tape(self, model: ModelConfig, dtype: str) -> Tape:
        if self.gpu is None:
            return _tape_of(model, dtype, "cpu")
        import torch

        return _tape_of(model, dtype, "cuda", torch.cuda.get_device_capability(self.gpu))

    def _fits(self, tape: Tape, n: int, budget: int) -> bool:
        if self.gpu is None:
            return tape.peak(n, accumulates=True).bytes <= budget
        return tape.fits(n, True, _allocator_settings(), budget)

    def _too_large(self, model: ModelConfig, dtype: str, budget: int) -> str:
        """Say that one sequence does not fit into `budget` [bytes], and name the largest preset of which one does."""
        own = ModelParams(
            architecture=model.architecture,  # type: ignore[arg-type]
            tie_embeddings=model.tie_embeddings,
            dropout=model.dropout,
        )
        presets = {
            name: ModelConfig.resolve(own.model_copy(update={"preset": name}), model.vocab_size)
            for name in PRESETS
        }
        smaller = [name for name in reversed(PRESETS) if presets[name].n_params < model.n_params]
        fits = next(
            (name for name in smaller if self._fits(self._tape(presets[name], dtype), 1, budget)), None
        )
        remedy = (
            f"set model.preset to {fits} without sizes of your own"
            if fits
            else "no preset fits either: lower model.block_size, n_layer or tokenizer.vocab_size"
        )
        tape, settings = self._tape(model, dtype), _allocator_settings()
        needed = tape.peak(1, accumulates=True).bytes
        if self.gpu is not None:
            free = tape.play(1, True, settings)
            needed = smallest_limit(tape, 1, True, settings, free.peak_allocated, free.peak_reserved)
        return (
            f"model: one sequence of {model.block_size} tokens needs {needed / GIB:.2f} GiB "
            f"({model.n_params:,} parameters, {dtype}), and {budget / GIB:.2f} GiB may be filled: {remedy}, "
            "or close what else uses the memory"
        )


def step_memory(model: ModelConfig, micro_batch: int, dtype: str, device: str = "cuda") -> dict[str, int]:
    """What is in memory at the peak of a training step, by kind [bytes]; their sum is the peak.

    weights, gradients, optimizer, activations, logits, temporaries. dtype: "bf16" or "fp16" by autocast, or "fp32".
    device: "cuda" or "cpu"; nothing is needed of either, since the step runs on tensors without data. With AdamW,
    gradients of an earlier micro-batch present, and no strategy that saves memory.
    """
    for key, value, known in (("dtype", dtype, DTYPES), ("device", device, ("cuda", "cpu"))):
        if value not in known:
            raise UserError(f"{key}: {value!r} is none of {', '.join(known)}.{did_you_mean(value, known)}")
    if not isinstance(micro_batch, int) or micro_batch < 1:
        raise UserError(f"micro_batch: {micro_batch!r} should be a whole number, 1 or more")
    return _tape_of(model, dtype, device).peak(micro_batch, accumulates=True).parts


class _Autocast(Strategy):
    """What the strategies bf16 and fp16 ask of accelerate, without a plugin."""

    name, phase = "autocast", Phase.PRECISION

    @hookimpl
    def accelerator_kwargs(self, plan: Plan) -> dict[str, str]:
        return {"mixed_precision": "no" if plan["dtype"] == "fp32" else plan["dtype"]}


@lru_cache(maxsize=8)
def _tape_of(model: ModelConfig, dtype: str, device: str, capability: tuple[int, int] = (8, 0)) -> Tape:
    """The tape of a training step with AdamW and nothing switched on but mixed precision."""
    from core.memory.simulate import tape_of

    plan = Plan(
        profile=HardwareProfile("any", device=device, compute_capability=capability),
        profile_reason="",
        model=model,
        sequences=1,
        num_processes=1,
        memory_budget=0,
        active=[_Autocast()],
    )
    plan.set("dtype", dtype, reason="as asked", by="core")
    return tape_of(plan, Params.model_validate({"train": {"max_steps": 1}}))


def _allocator_settings() -> AllocatorSettings:
    """What torch's allocator has read from this process's environment."""
    return AllocatorSettings.parse(
        os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    )


def _current_params() -> Params:
    from core.project import Project

    return Project.find().params


# ---- under the guides' names, for the Compute in force

_current: Compute | None = None


def initialize_compute(mode: str = "auto") -> Compute:
    """Decide which workload goes where (see `Compute`), for all functions below. A later call decides again."""
    global _current
    _current = Compute(mode)
    return _current


def get_compute() -> Compute:
    """The Compute in force; before any initialize_compute() that is auto."""
    return _current or initialize_compute()


def vram_usage_gib() -> tuple[float, float]:
    """(used, reserved) [GiB]; see `Compute.vram_usage_gib`."""
    return get_compute().vram_usage_gib()


def get_memory_stats() -> dict[str, float]:
    """See `Compute.get_memory_stats`."""
    return get_compute().get_memory_stats()


def log_memory_stats(label: str = "memory", say: Callable[[str], None] = print) -> dict[str, float]:
    """See `Compute.log_memory_stats`."""
    return get_compute().log_memory_stats(label, say)


def reset_peak_memory_stats() -> None:
    """See `Compute.reset_peak_memory_stats`."""
    get_compute().reset_peak_memory_stats()


def optimize_memory(aggressive: bool = False) -> float:
    """See `Compute.optimize_memory`."""
    return get_compute().optimize_memory(aggressive)


def cleanup_after_training(say: Callable[[str], None] = print) -> dict[str, float]:
    """See `Compute.cleanup_after_training`."""
    return get_compute().cleanup_after_training(say)


def suggest_batch_size(vram_usage_multiplier: float = 1.0, model: ModelConfig | None = None) -> int:
    """See `Compute.suggest_batch_size`."""
    return get_compute().suggest_batch_size(vram_usage_multiplier, model)
