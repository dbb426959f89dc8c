"""Each bundled strategy by itself, its training hooks included where a CPU can call them."""

from __future__ import annotations

import gc
import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import make_project

import core
from core.errors import PluginError
from core.hardware import OPTIONAL_MODULES
from core.hookspecs import GIB, Build, Facts, Gpu, HardwareProfile, Phase, Plan, Strategy
from core.optim import check_groups
from core.plan import resolve, runtime
from core.plugins import Registry
from core.project import Project

REPO = Path(core.__file__).parents[1]
BUNDLED = sorted(p.stem for p in (REPO / "plugins" / "strategies").glob("*.py"))
CPU = HardwareProfile("a-cpu", device="cpu")
RECIPE = {"bf16", "fp16", "muon", "adamw8bit", "bf16_weights"}
LADDER = ["chunked_head", "checkpointing", "adamw8bit", "bf16_weights"]
COMPLETE = frozenset(OPTIONAL_MODULES)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load(Project(REPO), entry_points=False)


def card(capability: tuple[int, int], vram_gib: float = 8) -> HardwareProfile:
    return HardwareProfile("a-card", vram_gib=vram_gib, compute_capability=capability)


def plan_with(
    tmp_path: Path,
    registry: Registry,
    profile: HardwareProfile,
    *names: str,
    os: str = "linux",
    **options: Any,
) -> Plan:
    """A plan with these strategies and no others."""
    registry.profiles["made-up"] = HardwareProfile(
        **{**vars(profile), "name": "made-up", "strategies": names}
    )
    params = make_project(tmp_path, hardware={"profile": "made-up", "options": options}).params
    gpus = (Gpu("card", 8 * GIB, profile.compute_capability),) if profile.device == "cuda" else ()
    facts = Facts(os=os, gpus=gpus, cores=8, ram_bytes=8 * GIB, cpu_bf16=True, modules=COMPLETE)
    try:
        return resolve(params, facts, registry)
    finally:
        del registry.profiles["made-up"]


# ---- all of them


@pytest.mark.parametrize("name", BUNDLED)
def test_declaration(registry: Registry, name: str) -> None:
    strategy = registry.strategies[name]
    assert isinstance(strategy, Strategy) and isinstance(strategy.phase, Phase)
    assert strategy.affects == ("recipe" if name in RECIPE else "execution")
    json.dumps(dict(strategy.defaults))
    for other in (*strategy.requires, *strategy.conflicts, *strategy.after):
        assert other in registry.strategies
    for profile in registry.profiles.values():
        why_not = strategy.available(Facts(), profile)
        assert why_not is None or len(why_not) > 10


@pytest.mark.parametrize("name", BUNDLED)
def test_works_alone_somewhere(tmp_path: Path, registry: Registry, name: str) -> None:
    strategy = registry.strategies[name]
    facts = Facts(cpu_bf16=True, modules=COMPLETE)
    profile = next(p for p in (card((8, 6)), CPU) if strategy.available(facts, p) is None)
    plan = plan_with(tmp_path, registry, profile, *strategy.requires, name)
    assert [s.name for s in plan.active] == [*strategy.requires, name]
    assert plan["micro_batch"] * plan["gradient_accumulation_steps"] == 8
    runtime(plan)  # pluggy accepts its hooks


# ---- precision


@pytest.mark.parametrize(
    ("capability", "works"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)]
)
def test_bf16_by_real_capability(registry: Registry, capability: tuple[int, int], works: bool) -> None:
    why_not = registry.strategies["bf16"].available(Facts(), card(capability))
    assert (why_not is None) == works
    assert works or "needs compute capability 8.0, a-card has 7.5; use fp16 or neither" in why_not


def test_bf16_on_cpus(registry: Registry) -> None:
    bf16 = registry.strategies["bf16"]
    assert bf16.available(Facts(cpu_bf16=True), CPU) is None
    assert "AVX512_BF16 or AMX" in bf16.available(Facts(cpu_bf16=False), CPU)


@pytest.mark.parametrize(
    ("capability", "works"), [((5, 2), False), ((5, 3), True), ((7, 5), True), ((8, 6), True)]
)
def test_fp16_by_capability(registry: Registry, capability: tuple[int, int], works: bool) -> None:
    assert (registry.strategies["fp16"].available(Facts(), card(capability)) is None) == works


def test_bf16_tells_accelerate(tmp_path: Path, registry: Registry) -> None:
    plan = plan_with(tmp_path, registry, card((8, 6)), "bf16")
    assert plan["dtype"] == "bf16" and plan.values["dtype"].by == "bf16"
    assert runtime(plan).hook.accelerator_kwargs(plan=plan) == [{"mixed_precision": "bf16"}]


def test_fp16_scales_the_loss_with_its_options(tmp_path: Path, registry: Registry) -> None:
    plan = plan_with(tmp_path, registry, card((7, 5)), "fp16", fp16={"init_scale": 1024.0})
    (kwargs,) = runtime(plan).hook.accelerator_kwargs(plan=plan)
    assert plan["dtype"] == "fp16" and kwargs["mixed_precision"] == "fp16"
    (handler,) = kwargs["kwargs_handlers"]
    assert type(handler).__name__ == "GradScalerKwargs"
    assert (handler.init_scale, handler.growth_interval, handler.enabled) == (1024.0, 2000, True)


def test_fp16_defaults_are_torchs_own(registry: Registry) -> None:
    import inspect

    from torch.amp import GradScaler

    own = {name: p.default for name, p in inspect.signature(GradScaler).parameters.items()}
    for name, value in registry.strategies["fp16"].defaults.items():
        assert own[name] == value


# ---- accumulation


@pytest.mark.parametrize(("limit", "micro_batch"), [(0, 8), (255, 4), (64, 2), (1, 1)])
def test_accumulation_keeps_to_its_limit(
    tmp_path: Path, registry: Registry, limit: int, micro_batch: int
) -> None:
    options = {"max_micro_batch_tokens": limit}  # 8 sequences of 32 tokens
    plan = plan_with(tmp_path, registry, CPU, "accumulation", accumulation=options)
    assert (
        plan["micro_batch"] == micro_batch and plan["micro_batch"] * plan["gradient_accumulation_steps"] == 8
    )


# ---- the allocator


@pytest.mark.parametrize(
    ("vram_gib", "split"),
    [(2, 64), (6, 64), (6.5, 64), (8, 128), (10, 128), (16, 256), (20, 256), (24, 512), (80, 512)],
)
def test_allocator_splits_by_memory(tmp_path: Path, registry: Registry, vram_gib: float, split: int) -> None:
    plan = plan_with(tmp_path, registry, card((8, 6), vram_gib), "allocator", os="windows")
    assert {choice.value for choice in plan.env.values()} == {f"max_split_size_mb:{split}"}
    assert f"for {vram_gib:g} GiB" in plan.env["PYTORCH_ALLOC_CONF"].reason
    assert "windows does not support it" in plan.env["PYTORCH_ALLOC_CONF"].reason


@pytest.mark.parametrize("name", ["allocator", "cleanup", "debug", "deterministic"])
def test_card_strategies_say_so_on_a_cpu(registry: Registry, name: str) -> None:
    assert "CPU" in registry.strategies[name].available(Facts(), CPU)


# ---- threads


def test_threads_spin_less_on_a_cpu_only(tmp_path: Path, registry: Registry) -> None:
    plan = plan_with(tmp_path, registry, CPU, "threads", threads={"spin_count": 5})
    env = {variable: choice.value for variable, choice in plan.env.items()}
    assert env == {"GOMP_SPINCOUNT": "5"}
    plan = plan_with(tmp_path, registry, CPU, "threads", os="windows", threads={"threads": 3})
    env = {variable: choice.value for variable, choice in plan.env.items()}
    assert env == {"OMP_NUM_THREADS": "3", "KMP_BLOCKTIME": "1"}
    assert registry.strategies["threads"].available(Facts(), card((8, 6)))


# ---- malloc


@pytest.mark.parametrize(("simulated", "answer"), [(False, 1), (False, 0), (True, 1)])
def test_malloc_is_told_to_keep_memory_and_says_where_it_will_not(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, simulated: bool, answer: int
) -> None:
    import torch  # it calls ctypes.CDLL, too

    told: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *setting: told.append(setting) or answer)
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    said: list[str] = []
    model = torch.nn.Linear(1, 1)
    build = Build(
        plan=None,  # type: ignore[arg-type]
        accelerator=None,
        network=model,
        model=model,
        simulated=simulated,
        say=said.append,
    )
    registry.strategies["malloc"].prepare_model(build=build)  # type: ignore[attr-defined]
    assert told == ([] if simulated else [(-3, 1 << 25), (-1, -1)][: 1 + answer])
    assert bool(said) == (answer == 0)


KEEPS = """
import ctypes
import torch
from core.hookspecs import Build
from core.plugins import Registry
from core.project import Project

registry = Registry.load(Project.find(), entry_points=False)
registry.strategies["malloc"].prepare_model(build=Build(None, None, None, torch.nn.Linear(1, 1)))
libc = ctypes.CDLL(None)
libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
start = libc.sbrk(0)
blocks = [libc.malloc(24 << 20) for _ in range(128)]  # 3 GiB of addresses, of which nothing is used
grown = libc.sbrk(0) - start
for block in blocks:
    libc.free(block)
assert grown > 2 << 30, grown  # beyond what an int holds
assert libc.sbrk(0) - start == grown
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of the GNU C library")
def test_malloc_hands_nothing_back_however_much_is_free() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KEEPS], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_malloc_where_it_works(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    malloc = registry.strategies["malloc"]
    assert malloc.available(Facts(), card((8, 6))) == "a card's memory has its own allocator"
    for library, works in (("glibc", True), ("", False)):
        monkeypatch.setattr("platform.libc_ver", lambda name=library: (name, "2.36"))
        assert (malloc.available(Facts(), CPU) is None) == works


# ---- compile


@pytest.mark.parametrize(
    ("profile", "os", "modules", "why_not"),
    [
        (CPU, "linux", {"c++"}, None),
        (CPU, "linux", {"triton"}, "no C++ compiler found: install g++"),
        (CPU, "windows", set(), "on Windows Visual Studio's"),
        (card((8, 6)), "linux", {"triton"}, None),
        (card((7, 5)), "linux", {"c++"}, "pip install triton"),
        (card((8, 6)), "windows", {"c++"}, "pip install triton-windows"),
        (card((6, 1)), "linux", {"triton"}, "a-card has less"),
    ],
)
def test_compile_needs_a_compiler(
    registry: Registry, profile: HardwareProfile, os: str, modules: set[str], why_not: str | None
) -> None:
    said = registry.strategies["compile"].available(Facts(os=os, modules=frozenset(modules)), profile)
    assert said == why_not or (why_not and why_not in said)


# ---- the data loader


@pytest.mark.parametrize(
    ("profile", "system", "options", "expected"),
    [
        (card((8, 6)), "linux", {}, (2, True, True)),
        (card((8, 6)), "windows", {}, (0, True, False)),
        (card((8, 6)), "wsl", {}, (0, True, False)),
        (CPU, "linux", {}, (0, False, False)),
        (CPU, "linux", {"workers": 3}, (3, False, True)),
        (card((8, 6)), "linux", {"workers": 0}, (0, True, False)),
        (card((8, 6)), "windows", {"workers": 1, "persistent_workers": False}, (1, True, False)),
        (card((8, 6)), "linux", {"pin_memory": False}, (2, False, True)),
    ],
)
def test_loader(
    tmp_path: Path, registry: Registry, profile: HardwareProfile, system: str, options: dict, expected: tuple
) -> None:
    plan = plan_with(tmp_path, registry, profile, "loader", os=system, loader=options)
    assert tuple(plan[key] for key in ("num_workers", "pin_memory", "persistent_workers")) == expected
    for key in options:
        value = {"workers": "num_workers"}.get(key, key)
        assert plan.values[value].reason in (f"loader.{key}", "starting workers again costs seconds")


# ---- cleanup, with a stand-in for the card


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    import torch

    made: list[str] = []

    def record(name: str, answer: Any = None) -> Any:
        def function(*args: Any) -> Any:
            made.append(name)
            return answer

        return function

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", record("allocated", 3 * GIB))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", record("reserved", 4 * GIB))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", record("reset"))
    monkeypatch.setattr(torch.cuda, "empty_cache", record("empty"))
    monkeypatch.setattr(gc, "collect", record("collect", 0))
    return made


def test_cleanup_logs_the_peak_and_then_resets_it(
    tmp_path: Path, registry: Registry, calls: list[str]
) -> None:
    plan = plan_with(tmp_path, registry, card((8, 6)), "cleanup")
    metrics: dict[str, float] = {}
    build = SimpleNamespace(accelerator=SimpleNamespace(device="cuda:0"), say=lambda line: calls.append(line))
    runtime(plan).hook.on_evaluate_end(build=build, step=7, metrics=metrics)
    assert metrics == {"peak_allocated_gib": 3.0, "peak_reserved_gib": 4.0}
    assert calls.index("reset") > max(calls.index("allocated"), calls.index("reserved"))
    (line,) = [call for call in calls if call.startswith("step 7")]
    assert "3.00 GiB allocated, 4.00 GiB reserved" in line


def test_cleanup_collects_before_it_empties(tmp_path: Path, registry: Registry, calls: list[str]) -> None:
    plan = plan_with(tmp_path, registry, card((8, 6)), "cleanup")
    runtime(plan).hook.on_train_end(build=SimpleNamespace())
    assert [call for call in calls if call in ("collect", "empty")] == ["collect", "empty"]


# ---- debug


def test_debug_reminds_at_every_evaluation(tmp_path: Path, registry: Registry) -> None:
    plan = plan_with(tmp_path, registry, card((8, 6)), "debug")
    said: list[str] = []
    runtime(plan).hook.on_evaluate_end(build=SimpleNamespace(say=said.append), step=5, metrics={})
    assert said == ["step 5: SLOW, the strategy debug is on"]


# ---- deterministic


def test_deterministic_switches_torch_and_cublas_while_it_trains(tmp_path: Path, registry: Registry) -> None:
    import torch

    plan = plan_with(tmp_path, registry, card((8, 6)), "deterministic")
    assert plan.env["CUBLAS_WORKSPACE_CONFIG"].value == ":4096:8"
    hook = runtime(plan).hook
    build = SimpleNamespace(simulated=True, model=torch.nn.Linear(1, 1), network=None)
    try:
        hook.prepare_model(build=build)
        assert not torch.are_deterministic_algorithms_enabled()
        build.simulated = False
        hook.prepare_model(build=build)
        assert torch.are_deterministic_algorithms_enabled()
        hook.on_train_end(build=build)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


# ---- what saves memory


def test_the_ladder_cheapest_first(registry: Registry) -> None:
    rungs = sorted((s for s in registry.strategies.values() if s.rung), key=lambda s: s.rung)
    assert [s.name for s in rungs] == LADDER
    assert [s.affects for s in rungs] == ["execution", "execution", "recipe", "recipe"]
    for strategy in registry.strategies.values():
        assert not strategy.mid_run or strategy.rung, strategy.name
        assert not strategy.mid_run or strategy.affects == "execution", strategy.name
    assert [s.name for s in rungs if s.mid_run] == LADDER[:2]


@pytest.mark.parametrize("name", ["adamw8bit", "bf16_weights"])
def test_what_needs_bitsandbytes_says_so(registry: Registry, name: str) -> None:
    strategy = registry.strategies[name]
    assert strategy.available(Facts(), card((8, 6))) == "install it: pip install bitsandbytes"
    assert strategy.available(Facts(modules=frozenset({"bitsandbytes"})), card((8, 6))) is None


def network(**sizes: Any) -> Any:
    from core.model import build_model
    from core.model_config import ModelConfig

    given = {"architecture": "qwen3", "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 64}
    given |= {"n_inner": 128, "block_size": 16, "vocab_size": 128}
    return build_model(ModelConfig(**{**given, **sizes}), seed=1)


def build_of(plan: Plan, model: Any) -> Build:
    return Build(plan, SimpleNamespace(), model, model, lr=1e-3)


def losses_and_gradients(model: Any) -> tuple[float, list[Any]]:
    import torch

    tokens = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(0))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
@pytest.mark.parametrize("name", ["checkpointing", "chunked_head"])
def test_execution_rungs_change_no_gradient(
    tmp_path: Path, registry: Registry, name: str, architecture: str
) -> None:
    import torch

    plain = losses_and_gradients(network(architecture=architecture))
    options = {"chunked_head": {"tokens": 16}} if name == "chunked_head" else {}
    plan = plan_with(tmp_path, registry, CPU, name, **options)
    model = network(architecture=architecture)
    runtime(plan).hook.prepare_model(build=build_of(plan, model))
    torch.testing.assert_close(losses_and_gradients(model), plain, rtol=1e-4, atol=1e-5)


def test_checkpointing_keeps_no_cast_weights(tmp_path: Path, registry: Registry) -> None:
    """Autocast's cache is off inside a layer, the first time and when it is computed again."""
    import torch

    plan, model = plan_with(tmp_path, registry, CPU, "checkpointing"), network()
    seen, plain = [], model.layers[1].forward

    def watched(*args: Any) -> Any:
        seen.append(torch.is_autocast_cache_enabled())
        return plain(*args)

    model.layers[1].forward = watched
    registry.strategies["checkpointing"].prepare_model(build_of(plan, model))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(tokens, tokens)
    loss.backward()
    assert seen == [False, False] and torch.is_autocast_cache_enabled()


def test_chunked_head_takes_its_option(tmp_path: Path, registry: Registry) -> None:
    strategy, model = registry.strategies["chunked_head"], network()
    plan = plan_with(tmp_path, registry, CPU, "chunked_head")
    strategy.prepare_model(build_of(plan, model))
    assert model.loss_chunk == strategy.defaults["tokens"]
    plan = plan_with(tmp_path, registry, CPU, "chunked_head", chunked_head={"tokens": 70})
    strategy.prepare_model(build_of(plan, model))
    assert model.loss_chunk == 70
    with pytest.raises(PluginError, match=r"chunked_head\.tokens: 0 should be 16 to 4096"):
        plan_with(tmp_path, registry, CPU, "chunked_head", chunked_head={"tokens": 0})


def state_bytes(optimizer: Any) -> int:
    values = [v for state in optimizer.state.values() for k, v in state.items() if not k.startswith("qmap")]
    return sum(v.numel() * v.element_size() for v in values if hasattr(v, "numel"))


@pytest.mark.parametrize("name", ["adamw8bit", "bf16_weights"])
def test_eight_bit_moments_and_their_stand_in_are_as_large(
    tmp_path: Path, registry: Registry, name: str
) -> None:
    import torch

    pytest.importorskip("bitsandbytes")
    strategy, sizes = registry.strategies[name], []
    plan = plan_with(tmp_path, registry, CPU, *strategy.requires, name)
    for simulated in (False, True):
        model = network()
        build = build_of(plan, model)
        build.simulated = simulated
        runtime(plan).hook.prepare_model(build=build)
        half = {p.dtype for p in model.parameters() if p.dim() > 1}
        assert half == {torch.bfloat16 if name == "bf16_weights" else torch.float32}
        assert model.lm_head.weight is model.model.embed_tokens.weight  # tied as before
        optimizer = runtime(plan).hook.make_optimizer(build=build)
        check_groups(model, optimizer)
        sizes.append(state_bytes(optimizer))
    n_params = sum(p.numel() for p in model.parameters())
    assert sizes[0] == sizes[1] and 2 * n_params < sizes[0] < 3 * n_params


def test_accumulation_refuses_a_limit_below_zero(tmp_path: Path, registry: Registry) -> None:
    from core.errors import UserError

    with pytest.raises(UserError, match=r"accumulation\.max_micro_batch_tokens: -5 is below 0"):
        plan_with(tmp_path, registry, CPU, "accumulation", accumulation={"max_micro_batch_tokens": -5})


def test_accumulation_of_a_huge_batch_is_no_search(registry: Registry) -> None:
    """Every divisor, largest first, of a batch whose sequences nobody could count through."""
    sequences = 2**20 * 3**10
    plan = SimpleNamespace(
        sequences=sequences,
        num_processes=1,
        micro_batch=None,
        micro_batches=(),
        values={},
        options={"accumulation": {}},
    )
    plan.options["accumulation"] = {"max_micro_batch_tokens": 0}
    plan.set = lambda *args, **kwargs: None
    registry.strategies["accumulation"].adjust_plan(plan)
    assert plan.micro_batches[0] == sequences and plan.micro_batches[-1] == 1
    assert len(plan.micro_batches) == 21 * 11 and all(sequences % n == 0 for n in plan.micro_batches)
