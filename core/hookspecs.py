"""The whole public plugin API. Importing it never imports torch.

A plugin is one Python file in `plugins/hardware/` or `plugins/strategies/`, or a pip package with an entry point in
the group `tightfit`. `docs/plugins.md` shows each hook at work.

API_VERSION follows the hooks: the minor number rises when a hook or an argument is added, the major one when one is
removed or renamed. A plugin may say `PLUGIN_API = (1, 1)`; it is refused where that cannot be met.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import pluggy

from core.errors import did_you_mean
from core.model_config import ModelConfig

PROJECT = "tightfit"
API_VERSION = (1, 1)
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

GIB = 1024**3


class Phase(enum.IntEnum):
    """When a strategy acts. Lower runs first; within a phase `after` decides, then the order it was asked for in."""

    ENV = 0  # environment variables, before torch is imported
    PRECISION = 10  # dtype, autocast, loss scaling
    BATCH = 20  # micro-batch, accumulation
    MODEL = 30  # wraps modules
    OPTIMIZER = 40
    COMPILE = 50  # must see the final module
    DATA = 60  # data loader settings
    LOOP = 70  # step callbacks, logging, clean-up


@dataclass(frozen=True)
class HardwareProfile:
    """Plain data about a card, and the strategies that suit it."""

    name: str
    """Lower case letters, digits, "_", "-" and "."; the value of `hardware.profile`."""
    device: str = "cuda"
    """"cuda" or "cpu"."""
    match: str = ""
    """Regular expression on the GPU's name, for `hardware.profile: auto`. Case does not count."""
    vram_gib: float = 0.0
    """Nominal memory [GiB]."""
    compute_capability: tuple[int, int] = (0, 0)
    bandwidth_gbs: float = 0.0
    """Memory bandwidth [1e9 bytes/s]."""
    tflops: Mapping[str, float] = field(default_factory=dict)
    """Peak dense rate by dtype ("bf16", "fp16", "fp32"), with fp32 accumulation [1e12 FLOP/s]."""
    strategies: tuple[str, ...] = ("bf16?", "muon", "accumulation", "allocator", "loader", "cleanup")
    """Switched on by default. A trailing "?" means: if it works on this machine, else skipped with its reason."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of those strategies: {strategy: {option: value}}."""
    vram_budget: float = 1.0
    """Share of the free memory that a plan may fill. Free is the card less CUDA's context and the desktop."""
    source: str = ""
    """Where the figures come from."""


@dataclass(frozen=True)
class Gpu:
    name: str
    vram_bytes: int
    compute_capability: tuple[int, int]
    sm_count: int = 0
    clock_mhz: int = 0
    memory_clock_mhz: int = 0
    memory_bus_bits: int = 0
    nvml_index: int = 0
    """NVML counts every card, whatever CUDA_VISIBLE_DEVICES says."""
    uuid: str = ""


@dataclass(frozen=True)
class Facts:
    """What this machine is: plain data that does not change from run to run, so that a plan made of it is stable.

    A plan for a machine you do not have is made by filling in another one.
    """

    os: str = "linux"
    """"linux", "windows", "macos" or "wsl"."""
    gpus: tuple[Gpu, ...] = ()
    torch_version: str = ""
    torch_cuda: str | None = None
    """CUDA version that torch was built with; None for a CPU-only build."""
    cores: int = 1
    ram_bytes: int = 0
    cpu_bf16: bool = False
    """The CPU multiplies bf16 in hardware (AVX512_BF16 or AMX)."""
    modules: frozenset[str] = frozenset()
    """Optional packages that are installed, such as "triton"; "c++" is a C++ compiler."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """The user's own environment variables, before the plan's are added."""

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that a run uses, if there is one."""
        return self.gpus[0] if self.gpus else None


@dataclass(frozen=True)
class Choice:
    """A planned value, why it is what it is, and who decided."""

    value: Any
    reason: str
    by: str


def _count(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _switch(value: Any) -> bool:
    return isinstance(value, bool)


PLAN_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dtype": (lambda value: value in ("fp32", "fp16", "bf16"), "'fp32', 'fp16' or 'bf16'"),
    "batch_tokens": (_count(1), "a whole number, 1 or more"),
    "micro_batch": (_count(1), "a whole number, 1 or more"),
    "gradient_accumulation_steps": (_count(1), "a whole number, 1 or more"),
    "num_workers": (_count(0), "a whole number, 0 or more"),
    "pin_memory": (_switch, "True or False"),
    "persistent_workers": (_switch, "True or False"),
}
"""{what a plan decides: (whether a value makes sense, what does)}."""


def check_value(key: str, value: Any) -> None:
    """Raise ValueError where a plan has no such value."""
    if key not in PLAN_VALUES:
        known = ", ".join(PLAN_VALUES)
        raise ValueError(f"a plan decides no {key!r}.{did_you_mean(key, PLAN_VALUES)} Known: {known}")
    right, what = PLAN_VALUES[key]
    if not right(value):
        raise ValueError(f"{key} {value!r} must be {what}")


@dataclass
class Plan:
    """Profile + strategies + model, resolved. Strategies read and change it in `adjust_plan`.

    `values` holds what the trainer reads, the keys of PLAN_VALUES. `RECIPE` names those that change the numbers; the
    others change speed and memory only.
    """

    RECIPE = ("dtype", "batch_tokens")

    profile: HardwareProfile
    profile_reason: str
    model: ModelConfig
    sequences: int
    """Sequences per optimizer step: train.batch_tokens / block_size. It never changes to save memory."""
    num_processes: int
    memory_budget: int
    """Bytes that a step may use on this profile."""
    memory_reason: str = ""
    micro_batch: int | None = None
    """The user's train.micro_batch; None when it says auto."""
    micro_batches: tuple[int, ...] = ()
    """What the micro-batch is chosen from, largest first: the largest whose step fits into the memory budget."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, Choice] = field(default_factory=dict)
    env: dict[str, Choice] = field(default_factory=dict)
    active: list[Strategy] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Sentences that env-check prints, such as a value of the user's that won."""
    fit: Any = None
    """core.memory.forecast.Fit: the memory and time that were predicted; None where nobody looked."""
    ladder: list[Any] = field(default_factory=list)
    """core.memory.ladder.Rung: what was tried to make it fit."""
    rungs_left: list[Strategy] = field(default_factory=list)
    """What could still be switched on to save memory, cheapest first."""

    def __getitem__(self, key: str) -> Any:
        return self.values[key].value

    def set(self, key: str, value: Any, *, reason: str, by: str) -> None:
        """Decide a value; raises ValueError for one that makes no sense.

        A later strategy may decide again: one of a later phase, or one that names the other in `after`.
        """
        check_value(key, value)
        self.values[key] = Choice(value, reason, by)

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory budget; True where nobody looked."""
        return self.fit is None or self.fit.fits


@dataclass
class Build:
    """What the torch-time hooks see and change."""

    plan: Plan
    accelerator: Any
    """The accelerate.Accelerator of this run."""
    network: Any
    """The bare network: its config is read and its weights are saved, whatever wraps it."""
    model: Any
    """What is trained: the network, wrapped by strategies and accelerate."""
    optimizer: Any = None
    lr: float = 0.0
    """Peak learning rate, from params."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    say: Callable[[str], None] = print
    """Prints one line without breaking the progress bar."""
    updating: bool = False
    """The optimizer is changing the weights: what fails now cannot be done again."""
    simulated: bool = False
    """The memory planner runs the step on tensors without data: a kernel that cannot needs a stand-in."""


class Strategy:
    """One optimisation. Subclass it, set the attributes, and mark runtime hooks with @hookimpl."""

    name: str = ""
    phase: Phase = Phase.LOOP
    slot: str = ""
    """A role that only one strategy can fill, such as "precision" or "optimizer"."""
    affects: str = "execution"
    """"recipe" when it changes the numbers a run computes, "execution" when it changes speed or memory only."""
    requires: tuple[str, ...] = ()
    """Strategies that must be on as well."""
    conflicts: Mapping[str, str] = {}
    """{other strategy: why the two do not work together}."""
    after: tuple[str, ...] = ()
    """Strategies of the same or an earlier phase that must come first."""
    rung: int = 0
    """Place on the ladder of what saves memory, cheapest in speed first; 0: never switched on by itself."""
    mid_run: bool = False
    """A rung whose prepare_model() may also be called in the middle of a run, on a model without it."""
    defaults: Mapping[str, Any] = {}
    """Every option with its default value; other option names are errors."""

    def available(self, facts: Facts, profile: HardwareProfile) -> str | None:
        """Return None where this works, else one sentence that says why not and what to do."""
        return None

    def opts(self, plan: Plan) -> dict[str, Any]:
        """This strategy's options: its defaults, over them the profile's, over them the user's."""
        return plan.options[self.name]


class DiscoverySpecs:
    """Called once on every plugin, before torch is imported."""

    @hookspec
    def hardware_profiles(self) -> HardwareProfile | Mapping | Iterable[HardwareProfile | Mapping]:
        """Declare hardware profiles: a HardwareProfile, a dict with its fields, or a list of them."""

    @hookspec
    def strategies(self) -> Strategy | Iterable[Strategy]:
        """Declare strategies: instances, not classes."""


class RuntimeSpecs:
    """Called on the active strategies, in the order that env-check prints."""

    @hookspec
    def adjust_plan(self, plan: Plan, facts: Facts) -> None:
        """Decide values with `plan.set(key, value, reason=..., by=self.name)`. No torch here."""

    @hookspec
    def configure_env(self, plan: Plan, facts: Facts) -> Mapping[str, tuple[str, str]] | None:
        """Return {variable: (value, reason)} to set before torch is imported. The user's own value wins."""

    @hookspec
    def check_plan(self, plan: Plan, facts: Facts) -> str | Iterable[str] | None:
        """Return what must stop the run, with the remedy."""

    @hookspec
    def accelerator_kwargs(self, plan: Plan) -> Mapping[str, Any] | None:
        """Return keyword arguments for accelerate.Accelerator. Lists are joined; other values must agree."""

    @hookspec
    def prepare_model(self, build: Build) -> None:
        """Wrap or edit build.model before it moves to its device and the optimizer exists."""

    @hookspec(firstresult=True)
    def make_optimizer(self, build: Build) -> Any:
        """Return the optimizer; the first strategy that returns one wins, else it is AdamW."""

    @hookspec
    def finalize_model(self, build: Build) -> None:
        """Last change of build.model, after the optimizer and accelerate."""

    @hookspec
    def step_context(self, build: Build) -> AbstractContextManager | None:
        """Return a context manager entered around each micro-batch's forward and backward."""

    @hookspec
    def save_state(self, build: Build) -> Mapping[str, Any] | None:
        """Return what a checkpoint shall keep of this strategy: tensors and plain JSON values."""

    @hookspec
    def load_state(self, build: Build, state: Mapping[str, Any]) -> None:
        """Take back what save_state returned, before the next step of a resumed run."""

    @hookspec
    def on_step_end(self, build: Build, step: int, metrics: dict[str, float]) -> None:
        """After a logged optimizer step. May add to `metrics`, and changes nothing that is there."""

    @hookspec
    def on_evaluate_end(self, build: Build, step: int, metrics: dict[str, float]) -> None:
        """After an evaluation on held-out text. May add to `metrics`."""

    @hookspec
    def on_train_end(self, build: Build) -> None:
        """After the last step, or when the run stops early."""
