"""resolve(): profile + strategies + model → plan, for machines that nobody needs to have."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import make_project

import core
from core.env_check import plan_lines
from core.errors import PluginError, TightfitError, UserError
from core.hookspecs import GIB, Facts, Gpu, HardwareProfile, Phase, Plan
from core.memory.forecast import BUDGET_STEP, Forecaster
from core.plan import apply_env, plan_dict, plan_json, recipe_strategies, resolve, runtime
from core.plugins import Registry
from core.project import Project

REPO = Path(core.__file__).parents[1]
SHIPPED = sorted(p.stem for p in (REPO / "plugins" / "hardware").glob("*.py"))
GPUS = [name for name in SHIPPED if name != "cpu"]
ALLOC = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
WritePlugin = Callable[[str, str], str]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load(Project(REPO), entry_points=False)


@pytest.fixture(scope="module")
def forecaster() -> Forecaster:
    """One for all tests: what it has simulated once it knows."""
    return Forecaster()


def machine_of(profile: HardwareProfile, **facts: Any) -> Facts:
    gpus = (Gpu(f"NVIDIA {profile.name}", int(profile.vram_gib * GIB), profile.compute_capability),)
    given = {
        "gpus": gpus if profile.device == "cuda" else (),
        "torch_version": "2.13.0",
        "torch_cuda": "13.0",
    }
    return Facts(**{**given, "cores": 8, "ram_bytes": 16 * GIB, "cpu_bf16": True, **facts})


def plan_for(
    project: Project,
    registry: Registry,
    profile: str = "rtx4060",
    hardware: dict[str, Any] | None = None,
    facts: Facts | dict[str, Any] | None = None,
    forecaster: Forecaster | None = None,
    **sections: Any,
) -> Plan:
    """The plan for a profile on a machine made up for it; `facts` change that machine, or are another one.

    Without a forecaster nobody looks at memory.
    """
    params = make_project(project.root, hardware={"profile": profile, **(hardware or {})}, **sections).params
    if not isinstance(facts, Facts):
        facts = machine_of(registry.profiles.get(profile, registry.profiles["cpu"]), **(facts or {}))
    return resolve(params, facts, registry, forecaster)


def refusal(*args: Any, error: type[TightfitError] = PluginError, **kwargs: Any) -> str:
    with pytest.raises(error) as caught:
        plan_for(*args, **kwargs)
    assert caught.value.exit_code == {PluginError: 3, UserError: 2}[error]
    return str(caught.value)


def names(plan: Plan) -> list[str]:
    return [s.name for s in plan.active]


def load(project: Project) -> Registry:
    return Registry.load(project, entry_points=False)


def add(*strategies: str, remove: tuple[str, ...] = (), **options: dict[str, Any]) -> dict[str, Any]:
    return {"strategies": {"add": list(strategies), "remove": list(remove)}, "options": options}


# ---- every shipped profile


@pytest.mark.parametrize("system", ["linux", "windows", "wsl"])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_profile_has_a_plan(
    project: Project, registry: Registry, forecaster: Forecaster, name: str, system: str
) -> None:
    plan = plan_for(project, registry, name, facts={"os": system}, forecaster=forecaster)
    profile = registry.profiles[name]
    assert plan.profile is profile and plan.profile_reason == "hardware.profile names it"
    rungs = {rung.strategy for rung in plan.ladder[1:] if rung.taken}
    assert set(names(plan)) | plan.skipped.keys() == {s.rstrip("?") for s in profile.strategies} | rungs
    assert not any(s.affects == "recipe" for s in plan.active if s.name in rungs)  # a small network
    assert [s.phase for s in plan.active] == sorted(s.phase for s in plan.active)
    assert plan["dtype"] == next((s for s in names(plan) if s in ("bf16", "fp16")), "fp32")
    assert plan["micro_batch"] * plan["gradient_accumulation_steps"] * plan.num_processes == plan.sequences
    assert plan.fits and plan.fit.forecast.micro_batch == plan["micro_batch"]
    assert plan.fit.forecast.needed <= plan.memory_budget
    workers = 2 if (name, system) in {(gpu, "linux") for gpu in GPUS} else 0
    assert plan["num_workers"] == workers and plan["pin_memory"] == (name != "cpu")
    assert plan["persistent_workers"] == bool(workers)
    assert not set(ALLOC) & plan.env.keys() if name == "cpu" else set(plan.env) == set(ALLOC)
    for key, choice in {**plan.values, **plan.env}.items():
        assert choice.reason and choice.by, key
    lines = plan_lines(plan)
    assert lines[0] == f"profile      {name}: hardware.profile names it"
    assert lines[1] == "strategies   " + " → ".join(names(plan))
    json.loads(plan_json(plan, registry))


@pytest.mark.parametrize("name", GPUS)
def test_memory_budget_is_the_profiles_whatever_the_card(
    project: Project, registry: Registry, name: str
) -> None:
    profile = registry.profiles[name]
    large = Gpu("NVIDIA H200", 139 * GIB, (9, 0))
    plan = plan_for(project, registry, name, facts={"gpus": (large,)})
    assert plan.memory_budget == pytest.approx((profile.vram_gib - 0.4 - 0.1) * GIB, abs=BUDGET_STEP)
    assert (
        plan.memory_reason
        == f"{profile.vram_gib:.2f} GiB less 0.4 for CUDA's context and 0.1 for the desktop on linux"
    )
    small = replace(large, vram_bytes=int(0.97 * profile.vram_gib * GIB))  # what a driver shows
    shown = plan_for(project, registry, name, facts={"gpus": (small,)}).memory_budget
    assert shown == pytest.approx((0.97 * profile.vram_gib - 0.4 - 0.1) * GIB, abs=BUDGET_STEP)


def test_memory_budget_of_the_users_own(project: Project, registry: Registry) -> None:
    plan = plan_for(project, registry, hardware={"memory_gib": 2.5})
    assert (plan.memory_budget, plan.memory_reason) == (int(2.5 * GIB), "hardware.memory_gib")


def test_cpu_may_use_half_of_the_memory(project: Project, registry: Registry) -> None:
    assert plan_for(project, registry, "cpu", facts={"ram_bytes": 6 * GIB}).memory_budget == 3 * GIB


def test_auto_chooses_and_says_why(project: Project, registry: Registry) -> None:
    card = Gpu("NVIDIA GeForce RTX 2050", 4 * GIB, (8, 6))
    plan = plan_for(project, registry, "auto", facts=Facts(gpus=(card,), torch_cuda="13.0"))
    assert plan.profile.name == "rtx2050" and "RTX 2050 matches" in plan.profile_reason
    unknown = replace(card, name="NVIDIA GeForce RTX 5070", vram_bytes=12 * GIB, sm_count=48, clock_mhz=2500)
    plan = plan_for(project, registry, "auto", facts=Facts(gpus=(unknown,), torch_cuda="13.0"))
    assert plan.profile.name == "derived" and plan["dtype"] == "bf16"


def test_auto_without_the_cpu_profile(
    project: Project, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.plugins / "hardware" / "cpu.py").unlink()
    assert "needs the profile 'cpu'" in refusal(project, load(project), "auto", facts=Facts())


def test_unknown_profile(project: Project, registry: Registry) -> None:
    message = refusal(project, registry, "rtx-4060")
    assert message.startswith(
        "hardware.profile: unknown hardware profile 'rtx-4060'. Did you mean 'rtx4060'?"
    )


def test_broken_plugin_stops_planning(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("strategies/a.py", "import nothing_of_that_name\n")
    write_plugin("strategies/b.py", "def f(:\n")
    message = refusal(project, load(project))
    assert "plugins that do not load" in message
    assert "strategies/a.py:1: " in message and "strategies/b.py:1: SyntaxError" in message


# ---- order


THREE = """
from core.hookspecs import Phase, Strategy, hookimpl

class A(Strategy):
    name, phase, after = "a", Phase.MODEL, ("c",)

class B(Strategy):
    name, phase = "b", Phase.MODEL

class C(Strategy):
    name, phase, after = "c", Phase.MODEL, ("bf16", "not-on")

class Early(Strategy):
    name, phase = "early", Phase.ENV

@hookimpl
def strategies():
    return [A(), B(), C(), Early()]
"""


def test_phase_then_after_then_the_order_asked_for(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("strategies/three.py", THREE)
    registry = load(project)
    plan = plan_for(project, registry, hardware=add("a", "b", "c", "early"))
    assert names(plan) == [
        *("allocator", "early", "bf16", "accumulation", "b", "c", "a", "muon", "loader", "cleanup")
    ]
    plan = plan_for(project, registry, hardware=add("c", "b", "a"))
    assert [n for n in names(plan) if len(n) == 1] == ["c", "b", "a"]


def test_runtime_hooks_run_in_that_order(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin(
        "strategies/noisy.py",
        """
        from core.hookspecs import Phase, Strategy, hookimpl

        class Noisy(Strategy):
            def __init__(self, name, phase):
                self.name, self.phase = name, phase

            @hookimpl
            def on_train_end(self, build):
                build.say(self.name)

            @hookimpl
            def make_optimizer(self, build):
                import torch

                lr = {"first": 0, "middle": 0.1, "last": 0.2}[self.name]
                return torch.optim.SGD(build.model.parameters(), lr) if lr else None

        @hookimpl
        def strategies():
            return [Noisy("last", Phase.LOOP), Noisy("first", Phase.ENV), Noisy("middle", Phase.MODEL)]
        """,
    )
    import torch

    plan = plan_for(project, load(project), "cpu", hardware=add("last", "middle", "first"))
    said: list[str] = []
    hook = runtime(plan).hook
    hook.on_train_end(build=SimpleNamespace(say=said.append))
    assert said == ["first", "middle", "last"]
    optimizer = hook.make_optimizer(build=SimpleNamespace(model=torch.nn.Linear(1, 1), simulated=False))
    assert optimizer.defaults["lr"] == 0.1  # the first that returns one


def test_cycle(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("strategies/three.py", THREE.replace('("bf16", "not-on")', '("a",)'))
    message = refusal(project, load(project), hardware=add("a", "b", "c"))
    assert "strategies wait for each other: a → c" in message


def test_after_a_later_phase(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("strategies/three.py", THREE.replace('("bf16", "not-on")', '("cleanup",)'))
    message = refusal(project, load(project), hardware=add("c"))
    assert "c wants to run after cleanup, whose phase LOOP is later" in message


# ---- strategies that do not work together


def test_slot_conflict(project: Project, registry: Registry) -> None:
    message = refusal(project, registry, hardware=add("fp16", "bf16"))
    assert "bf16 and fp16 both set the precision: keep one" in message
    assert "(hardware.strategies.remove: [bf16] or [fp16])" in message
    assert plan_for(project, registry, hardware=add("fp16", remove=("bf16",)))["dtype"] == "fp16"


def test_what_a_user_adds_takes_the_place_of_the_profiles_own(project: Project, registry: Registry) -> None:
    plan = plan_for(project, registry, hardware=add("fp16"))
    assert plan["dtype"] == "fp16" and "bf16" not in {s.name for s in plan.active}
    assert plan.skipped["bf16"] == "fp16 takes its place as precision"
    message = refusal(project, registry, hardware=add("fp16") | {"options": {"bf16": {}}})
    assert "bf16 and fp16 both set the precision" in message, "both were asked for"


def test_conflict_names_its_reason(project: Project, registry: Registry) -> None:
    message = refusal(project, registry, hardware=add("debug"))
    assert "debug does not work with allocator: without a cache its settings do nothing" in message
    assert "hardware.strategies.remove: [allocator]" in message


def test_requires(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin(
        "strategies/three.py", THREE.replace('("bf16", "not-on")', '()\n    requires = ("b", "loader")')
    )
    registry = load(project)
    message = refusal(project, registry, hardware=add("c"))
    assert message.count("\n  - ") == 1 and "c needs b: add it (hardware.strategies.add: [b])" in message
    assert {"b", "c"} <= set(names(plan_for(project, registry, hardware=add("c", "b"))))


@pytest.mark.parametrize(
    ("key", "choice", "word"),
    [
        ("hardware.strategies.add", {"add": ["bf61"]}, "bf61"),
        ("hardware.strategies.remove", {"remove": ["alocator"]}, "alocator"),
    ],
)
def test_unknown_strategy(project: Project, registry: Registry, key: str, choice: dict, word: str) -> None:
    message = refusal(project, registry, hardware={"strategies": choice})
    assert f"{key}: unknown strategy '{word}'. Did you mean" in message and "Known: accumulation" in message


def test_unknown_strategy_in_a_profile(project: Project, write_plugin: WritePlugin) -> None:
    path = project.plugins / "hardware" / "rtx4060.py"
    path.write_text(path.read_text(encoding="utf-8").replace('"loader"', '"lodaer"'), encoding="utf-8")
    message = refusal(project, load(project))
    assert "hardware profile 'rtx4060': unknown strategy 'lodaer'. Did you mean 'loader'?" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"loader": {"worker": 2}},
            ["hardware.options.loader: unknown option 'worker'", "Did you mean 'workers'?", "pin_memory"],
        ),
        ({"cleanup": {"x": 1}}, ["hardware.options.cleanup: unknown option 'x'.", "Options: none"]),
        (
            {"loader": {"workers": "two"}},
            ["hardware.options.loader.workers: 'two' should be of type int, such as -1"],
        ),
        ({"loader": {"workers": 300}}, ["loader sets num_workers to 300; it should be 0 to 64"]),
        ({"loader": {"workers": True}}, ["hardware.options.loader.workers: True should be of type int,"]),
        ({"loader": {"pin_memory": 1}}, ["hardware.options.loader.pin_memory: 1 should be of type bool"]),
        ({"fp16": {"init_scale": 1.0}}, ["hardware.options.fp16: fp16 is not on; add it", "add: [fp16]"]),
        # rungs of the memory ladder, which are off now
        ({"checkpointing": {"typo": 3}}, ["hardware.options.checkpointing: unknown option 'typo'"]),
        (
            {"chunked_head": {"tokens": "8"}},
            ["hardware.options.chunked_head.tokens: '8' should be of type int"],
        ),
        ({"chunked_head": {"tokens": 8}}, ["hardware.options.chunked_head.tokens: 8 should be 16 to 4096"]),
        ({"lodaer": {}}, ["hardware.options: unknown strategy 'lodaer'. Did you mean 'loader'?"]),
    ],
)
def test_bad_options(project: Project, registry: Registry, options: dict, words: list[str]) -> None:
    message = refusal(project, registry, hardware={"options": options})
    for word in words:
        assert word in message, message


def test_options_of_a_strategy_that_is_skipped(project: Project, registry: Registry) -> None:
    hardware = {"strategies": {"add": ["bf16?"]}, "options": {"bf16": {"nonsense": 1}}}
    message = refusal(project, registry, "cpu", hardware=hardware, facts={"cpu_bf16": False})
    assert "hardware.options.bf16: unknown option 'nonsense'. Options: none" in message


@pytest.mark.parametrize("budget", [{"max_steps": 5, "max_tokens": None}, {"max_tokens": 5 * 1024}])
def test_a_warm_up_longer_than_the_run(project: Project, registry: Registry, budget: dict[str, Any]) -> None:
    given = {"max_steps": None, "batch_tokens": 1024, **budget}
    for warmup, told in ((6, True), (5, False)):
        plan = plan_for(project, registry, "cpu", train={**given, "warmup_steps": warmup})
        assert any("warmup_steps: 6 is more than the run's 5 steps" in note for note in plan.notes) == told


def test_options_of_a_rung_that_is_removed(project: Project, registry: Registry) -> None:
    message = refusal(project, registry, hardware=add(remove=("checkpointing",), checkpointing={}))
    assert "hardware.options.checkpointing: hardware.strategies.remove switches checkpointing off" in message


def test_options_defaults_then_profile_then_params(project: Project, registry: Registry) -> None:
    of_profile = registry.profiles["cpu"].options["accumulation"]
    assert plan_for(project, registry, "cpu").options["accumulation"] == of_profile
    assert of_profile != registry.strategies["accumulation"].defaults
    plan = plan_for(
        project, registry, "cpu", hardware={"options": {"accumulation": {"max_micro_batch_tokens": 64}}}
    )
    assert plan["micro_batch"] == 2  # of 32 tokens each
    assert plan_for(project, registry).options["accumulation"] == {"max_micro_batch_tokens": 0}


def test_float_options_take_integers_and_none_takes_anything(
    project: Project, write_plugin: WritePlugin
) -> None:
    turing = add("fp16", remove=("bf16",), fp16={"init_scale": 1024})
    assert plan_for(project, load(project), hardware=turing).options["fp16"]["init_scale"] == 1024
    write_plugin(
        "strategies/three.py",
        THREE.replace('name, phase = "b"', 'defaults = {"x": None}\n    name, phase = "b"'),
    )
    registry = load(project)
    for value in (3, "three", [3], None):
        plan = plan_for(project, registry, hardware=add("b", b={"x": value}))
        assert plan.options["b"] == {"x": value}


def test_profile_option_of_the_wrong_type(project: Project) -> None:
    path = project.plugins / "hardware" / "cpu.py"
    source = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r'("max_micro_batch_tokens": )\d+', r'\1"many"', source), encoding="utf-8")
    message = refusal(project, load(project), "cpu")
    assert "profile 'cpu'" in message and "max_micro_batch_tokens: 'many' should be of type int," in message


def test_profile_options_of_a_misspelt_strategy(project: Project) -> None:
    path = project.plugins / "hardware" / "cpu.py"
    path.write_text(
        path.read_text(encoding="utf-8").replace('{"accumulation"', '{"acumulation"'), encoding="utf-8"
    )
    assert "'acumulation'" in refusal(project, load(project), "cpu")


def test_every_problem_at_once(project: Project, registry: Registry) -> None:
    message = refusal(
        project,
        registry,
        "t4",
        hardware=add("bf16", "debug", "nothing", remove=("noone",), loader={"x": 1}, lodaer={}),
    )
    assert message.startswith("hardware profile 't4' cannot run as configured:")
    for words in (
        "bf16: bf16 needs compute capability 8.0",
        "debug does not work with allocator",
        "hardware.strategies.add: unknown strategy 'nothing'",
        "hardware.strategies.remove: unknown strategy 'noone'",
        "hardware.options.loader: unknown option 'x'",
        "hardware.options: unknown strategy 'lodaer'",
    ):
        assert words in message, message
    assert message.count("\n  - ") == 6


# ---- precision


def test_bf16_on_turing(project: Project, registry: Registry) -> None:
    message = refusal(project, registry, "t4", hardware=add("bf16", remove=("fp16",)))
    assert "bf16 needs compute capability 8.0, t4 has 7.5; use fp16 or neither" in message


def test_capability_as_a_list_is_a_pair_or_an_error(project: Project, write_plugin: WritePlugin) -> None:
    fields = "{'name': 'card', 'vram_gib': 8, 'compute_capability': [8, 6]}"
    source = (
        f"from core.hookspecs import hookimpl\n@hookimpl\ndef hardware_profiles():\n    return {fields}\n"
    )
    write_plugin("hardware/card.py", source)
    registry = load(project)
    if registry.broken():
        assert "compute_capability" in registry.broken()[0]
    else:
        assert plan_for(project, registry, "card")["dtype"] == "bf16"


def test_fp16_on_a_cpu(project: Project, registry: Registry) -> None:
    message = refusal(project, registry, "cpu", hardware=add("fp16", remove=("bf16",)))
    assert "fp16 needs a CUDA card; on a CPU use bf16 or neither" in message


def test_question_mark_skips_with_the_reason(project: Project, registry: Registry) -> None:
    plan = plan_for(project, registry, "cpu", facts={"cpu_bf16": False})
    assert "bf16" not in names(plan) and plan["dtype"] == "fp32"
    assert "AVX512_BF16" in plan.skipped["bf16"]
    assert any("skipped    bf16: " in line for line in plan_lines(plan))
    assert plan_dict(plan, registry)["skipped"] == plan.skipped


def test_question_mark_in_params(project: Project, registry: Registry) -> None:
    plan = plan_for(project, registry, "t4", hardware=add("bf16?"))
    assert "bf16" in plan.skipped and plan["dtype"] == "fp16"
    plan = plan_for(project, registry, "t4", hardware=add("debug?", remove=("allocator",)))
    assert "debug" in names(plan)


def test_options_of_a_skipped_strategy_are_no_error(project: Project, registry: Registry) -> None:
    hardware = {**add("cleanup?"), "options": {"cleanup": {}}}
    assert "cleanup" in plan_for(project, registry, "cpu", hardware=hardware).skipped


# ---- the batch


@pytest.mark.parametrize(("micro_batch", "steps"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_batch_is_fixed_for_every_micro_batch(
    project: Project, registry: Registry, micro_batch: int, steps: int
) -> None:
    plan = plan_for(project, registry, train={"micro_batch": micro_batch})  # 256 tokens, context 32
    assert (plan.sequences, plan["batch_tokens"]) == (8, 256)
    assert (plan["micro_batch"], plan["gradient_accumulation_steps"]) == (micro_batch, steps)
    assert plan.values["micro_batch"].reason == "train.micro_batch"


def test_automatic_micro_batch_is_the_largest_that_fits(
    project: Project, registry: Registry, forecaster: Forecaster
) -> None:
    sizes = {
        "model": {"preset": "124m", "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},
        "train": {"batch_tokens": 65536},
        "tokenizer": {"kind": "gpt2", "vocab_size": None},
    }
    plan = plan_for(project, registry, "rtx2050", forecaster=forecaster, **sizes)
    n = plan["micro_batch"]
    assert 64 % n == 0 and plan.sequences == 64 and n < 64
    assert plan.micro_batches == (64, 32, 16, 8, 4, 2, 1)
    assert plan.fits and plan.fit.forecast.needed <= plan.memory_budget
    params = Project(project.root).params
    assert not forecaster.fit(plan, params, registry, [2 * n]).fits
    assert plan.values["micro_batch"].reason.startswith("the largest that fits: ")
    assert "of 3.50 GiB" in plan.values["micro_batch"].reason
    assert plan["gradient_accumulation_steps"] == 64 // n
    assert plan_for(project, registry, "rtx2050", **sizes)["micro_batch"] == 64  # where nobody looks


def test_automatic_micro_batch_where_nothing_fits_is_one(
    project: Project, registry: Registry, forecaster: Forecaster
) -> None:
    plan = plan_for(project, registry, "cpu", facts={"ram_bytes": 0}, forecaster=forecaster)
    assert plan["micro_batch"] == 1 and "smallest there is" in plan.values["micro_batch"].reason
    assert not plan.fits and plan["gradient_accumulation_steps"] == plan.sequences


def test_the_users_micro_batch_is_kept_whether_it_fits_or_not(
    project: Project, registry: Registry, forecaster: Forecaster
) -> None:
    for ram, fits in ((16 * GIB, True), (0, False)):
        facts = {"ram_bytes": ram}
        plan = plan_for(
            project, registry, "cpu", facts=facts, forecaster=forecaster, train={"micro_batch": 4}
        )
        assert plan.micro_batches == (4,) and plan.fits == fits
        assert plan["micro_batch"] == plan.fit.forecast.micro_batch == 4
        assert plan.values["micro_batch"].reason == "train.micro_batch"


def test_micro_batch_that_does_not_divide(project: Project, registry: Registry) -> None:
    message = refusal(project, registry, train={"micro_batch": 3}, error=UserError)
    assert "train.micro_batch: 3 does not divide the 8 sequences of a step; 4 does" in message
    message = refusal(project, registry, train={"micro_batch": 100}, error=UserError)
    assert "100 does not divide the 8 sequences of a step; 8 does" in message


@pytest.mark.parametrize(("batch_tokens", "near"), [(250, 256), (16, 32), (300, 288)])
def test_batch_that_is_no_multiple_of_the_context(
    project: Project, registry: Registry, batch_tokens: int, near: int
) -> None:
    message = refusal(project, registry, train={"batch_tokens": batch_tokens}, error=UserError)
    assert (
        f"train.batch_tokens: {batch_tokens} is not a multiple of the context of 32 tokens; {near} is"
        in message
    )


def test_several_processes_share_the_batch(project: Project, registry: Registry) -> None:
    plan = plan_for(project, registry, hardware={"num_processes": 2}, train={"micro_batch": 2})
    assert (plan.sequences, plan["micro_batch"], plan["gradient_accumulation_steps"]) == (8, 2, 2)
    message = refusal(
        project, registry, hardware={"num_processes": 3}, train={"batch_tokens": 256}, error=UserError
    )
    assert "256 is not a multiple of 3 processes x the context of 32 tokens; 288 is" in message


def test_accumulation_removed_takes_the_whole_batch_at_once(project: Project, registry: Registry) -> None:
    plan = plan_for(project, registry, hardware=add(remove=("accumulation",)))
    assert (plan["micro_batch"], plan["gradient_accumulation_steps"]) == (8, 1)
    assert "accumulation is off" in plan.values["micro_batch"].reason


def test_micro_batch_needs_accumulation(project: Project, registry: Registry) -> None:
    message = refusal(project, registry, hardware=add(remove=("accumulation",)), train={"micro_batch": 2})
    assert (
        "train.micro_batch: 2 x 1 accumulation steps" in message
        and "add the strategy accumulation" in message
    )


# ---- the allocator


SPLITS = {
    **dict.fromkeys(("rtx2050", "rtx3050", "gtx1650"), 64),
    "rtx4060": 128,
    **dict.fromkeys(("rtx3060", "t4"), 256),
    **dict.fromkeys(("rtx3090", "rtx4090"), 512),
}


@pytest.mark.parametrize(
    ("system", "name", "value"),
    [
        *[("linux", name, "expandable_segments:True") for name in GPUS],
        *[
            (system, name, f"max_split_size_mb:{mb}")
            for system in ("windows", "wsl")
            for name, mb in SPLITS.items()
        ],
    ],
)
def test_allocator_by_os_and_size(
    project: Project, registry: Registry, system: str, name: str, value: str
) -> None:
    plan = plan_for(project, registry, name, facts={"os": system})
    assert {variable: choice.value for variable, choice in plan.env.items()} == dict.fromkeys(ALLOC, value)


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"max_split_size_mb": 32}, "max_split_size_mb:32"),  # expandable segments would ignore it
        ({"expandable_segments": False}, "max_split_size_mb:128"),
        ({"expandable_segments": False, "max_split_size_mb": 512}, "max_split_size_mb:512"),
    ],
)
def test_allocator_options_are_never_combined(
    project: Project, registry: Registry, options: dict, value: str
) -> None:
    plan = plan_for(project, registry, hardware={"options": {"allocator": options}})
    assert [choice.value for choice in plan.env.values()] == [value, value]


def test_allocator_below_torchs_limit(project: Project, registry: Registry) -> None:
    message = refusal(project, registry, hardware={"options": {"allocator": {"max_split_size_mb": 8}}})
    assert "allocator.max_split_size_mb: 8 is too small; torch takes 20 or more" in message


def test_users_environment_wins_and_is_noted(project: Project, registry: Registry) -> None:
    environ = dict.fromkeys(ALLOC, "backend:cudaMallocAsync")
    plan = plan_for(project, registry, facts={"environ": environ})
    assert {variable: choice.value for variable, choice in plan.env.items()} == environ
    note = "PYTORCH_ALLOC_CONF=backend:cudaMallocAsync from your environment wins over"
    assert [n.startswith(note) for n in plan.notes if "train.lr" not in n] == [True]
    assert any("note       PYTORCH_ALLOC_CONF" in line for line in plan_lines(plan))
    result = dict(environ)
    apply_env(replace(plan), result)
    assert result == environ


@pytest.mark.parametrize("variable", ALLOC)
def test_users_value_under_one_name_is_not_contradicted_under_the_other(
    project: Project, registry: Registry, variable: str
) -> None:
    environ = {variable: "max_split_size_mb:32"}
    plan = plan_for(project, registry, facts={"environ": environ})
    assert {name: plan.env[name].value for name in ALLOC} == dict.fromkeys(ALLOC, "max_split_size_mb:32")


def test_plan_is_the_same_in_a_process_that_inherits_its_environment(
    project: Project, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    parent = plan_for(project, registry)
    environ: dict[str, str] = {}
    apply_env(parent, environ)
    child = plan_for(project, registry, facts={"environ": environ})
    assert plan_dict(child, registry) == plan_dict(parent, registry)


SETTER = """
from core.hookspecs import Phase, Strategy, hookimpl

class Setter(Strategy):
    name, phase = "setter", Phase.ENV

    @hookimpl
    def configure_env(self, plan):
        return {"CUDA_LAUNCH_BLOCKING": VALUE}

@hookimpl
def strategies():
    return Setter()
"""


def test_two_strategies_that_want_different_values(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("strategies/setter.py", SETTER.replace("VALUE", '("0", "because")'))
    hardware = add("debug", "setter", remove=("allocator",))
    message = refusal(project, load(project), hardware=hardware)
    assert "debug wants CUDA_LAUNCH_BLOCKING=1, setter wants 0: keep one" in message
    write_plugin("strategies/setter.py", SETTER.replace("VALUE", '("1", "because")'))
    assert plan_for(project, load(project), hardware=hardware).env["CUDA_LAUNCH_BLOCKING"].value == "1"


@pytest.mark.parametrize("value", ['"10"', '"1"', "1", '(1, "a number")'])
def test_environment_value_that_is_no_pair_of_strings(
    project: Project, write_plugin: WritePlugin, value: str
) -> None:
    write_plugin("strategies/setter.py", SETTER.replace("VALUE", value))
    message = refusal(project, load(project), hardware=add("setter"))
    assert "plugins/strategies/setter.py:6: configure_env() must return" in message
    assert "CUDA_LAUNCH_BLOCKING" in message and "remove: [setter]" in message


def test_debug_is_loud(project: Project, registry: Registry) -> None:
    plan = plan_for(project, registry, hardware=add("debug", remove=("allocator",)))
    assert {v: c.value for v, c in plan.env.items()} == {
        "CUDA_LAUNCH_BLOCKING": "1",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    assert any("SLOW" in note and "debug" in note for note in plan.notes)


# ---- hooks that fail


def failing(hook: str, body: str) -> str:
    return (
        "from core.hookspecs import Phase, Strategy, hookimpl\n\nclass Bad(Strategy):\n    name = 'bad'\n"
        f"    @hookimpl\n    def {hook}(self, plan, facts):\n        {body}\n\n@hookimpl\ndef strategies():\n"
        "    return Bad()\n"
    )


@pytest.mark.parametrize("hook", ["adjust_plan", "configure_env", "check_plan"])
def test_failing_hook_names_its_strategy(project: Project, write_plugin: WritePlugin, hook: str) -> None:
    write_plugin("strategies/bad.py", failing(hook, "return plan.nothing"))
    message = refusal(project, load(project), hardware=add("bad"))
    assert message.startswith(f"plugins/strategies/bad.py:7: {hook}() failed: AttributeError"), message
    assert "'nothing'" in message and "hardware.strategies.remove: [bad]" in message


def test_failing_available_names_its_strategy(project: Project, write_plugin: WritePlugin) -> None:
    source = "from core.hookspecs import Strategy, hookimpl\n\nclass Bad(Strategy):\n    name = 'bad'\n"
    source += "    def available(self, facts, profile):\n        return facts.nothing\n\n"
    write_plugin("strategies/bad.py", source + "@hookimpl\ndef strategies():\n    return Bad()\n")
    message = refusal(project, load(project), hardware=add("bad"))
    assert message.startswith("plugins/strategies/bad.py:6: available() failed: AttributeError"), message


def test_checks_are_collected(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("strategies/bad.py", failing("check_plan", "return ['too hot', 'too slow']"))
    message = refusal(project, load(project), hardware=add("bad", allocator={"max_split_size_mb": 8}))
    assert message.startswith("the plan does not work:") and message.count("\n  - ") == 3
    assert "too hot" in message and "too slow" in message and "8 is too small" in message


def test_strategy_that_breaks_the_batch_is_caught(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin(
        "strategies/bad.py", failing("adjust_plan", "plan.set('micro_batch', 3, reason='x', by='bad')")
    )
    message = refusal(project, load(project), hardware=add("bad"))
    assert "train.micro_batch: 3 x 1 accumulation steps make 3 sequences, the batch has 8" in message


# ---- plan.json


def test_plan_json_is_deterministic(project: Project) -> None:
    first, second = (plan_json(plan_for(project, r), r) for r in (load(project), load(project)))
    assert first == second and first.endswith("}\n") and "\r" not in first
    assert str(project.root) not in first


def test_plan_json_holds_the_forecast(project: Project, registry: Registry, forecaster: Forecaster) -> None:
    unseen = plan_dict(plan_for(project, registry), registry)
    assert (unseen["format"], unseen["memory"], unseen["ladder"]) == (2, {}, [])
    plan = plan_for(project, registry, forecaster=forecaster)
    document = plan_dict(plan, registry)
    memory = document["memory"]
    assert memory["fits"] is True and memory["budget"] == plan.memory_budget
    assert memory["budget_reason"] == plan.memory_reason
    assert memory["forecast"]["needed"] == plan.fit.forecast.needed
    assert document["ladder"][0]["strategy"] == "" and document["ladder"][0]["taken"] is True
    again = plan_for(project, load(project), forecaster=Forecaster())
    assert plan_json(again, registry) == plan_json(plan, registry)


def test_plan_json_ignores_what_changes_from_day_to_day(project: Project, registry: Registry) -> None:
    plain = plan_json(plan_for(project, registry), registry)
    other = plan_for(project, registry, facts={"environ": {"HOME": "/somewhere", "TERM": "dumb"}})
    assert plan_json(other, registry) == plain


def test_plan_json_names_the_source_of_plugins_in_use_only(project: Project) -> None:
    registry = load(project)
    document = plan_dict(plan_for(project, registry), registry)
    used = {s["name"]: s["sha256"] for s in document["strategies"]}
    hashes = {Path(p.name).stem: p.sha256 for p in registry.plugins}
    assert used == {
        name: hashes[name] for name in ("allocator", "bf16", "accumulation", "muon", "loader", "cleanup")
    }
    text = json.dumps(document)
    assert hashes["fp16"] not in text and hashes["rtx4090"] not in text
    assert [s["name"] for s in recipe_strategies(document)] == ["bf16", "muon"]
    assert document["recipe"]["dtype"] == "bf16" and "dtype" not in document["execution"]
    assert document["recipe"]["batch_tokens"] == 256 and "micro_batch" in document["execution"]


def test_editing_a_plugin_changes_the_plan_only_where_it_is_used(
    project: Project, write_plugin: WritePlugin
) -> None:
    def plan() -> str:
        registry = load(project)
        return plan_json(plan_for(project, registry), registry)

    def edit(file: str) -> None:
        with (project.plugins / file).open("a", encoding="utf-8") as f:
            f.write("\n# edited\n")

    before = plan()
    for unused in ("strategies/fp16.py", "strategies/debug.py", "hardware/rtx4090.py"):
        edit(unused)
    write_plugin("strategies/three.py", THREE)
    assert plan() == before
    edit("strategies/loader.py")
    after = plan()
    assert after != before
    path = project.plugins / "hardware" / "rtx4060.py"
    path.write_text(path.read_text(encoding="utf-8").replace("vram_gib=8", "vram_gib=7"), encoding="utf-8")
    assert plan() != after


# ---- torch and the environment


def test_planning_does_not_import_torch(project: Project) -> None:
    make_project(project.root, hardware={"profile": "rtx4060"})
    code = (
        "import sys; from core.plugin_check import machine; from core.plan import apply_env, resolve, plan_json\n"
        "from core.plugins import Registry; from core.project import Project\n"
        "p = Project.find(); r = Registry.load(p); plan = resolve(p.params, machine(r.profiles['rtx4060']), r)\n"
        "apply_env(plan); plan_json(plan, r)\n"
        "import os; print(os.environ['PYTORCH_ALLOC_CONF'], os.environ['PYTORCH_CUDA_ALLOC_CONF'])\n"
        "print(sorted({'torch', 'accelerate', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project.root,
        env=environ,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert out.stdout.splitlines() == ["expandable_segments:True expandable_segments:True", "[]"], out


def test_environment_after_torch_is_refused(
    project: Project, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, environ = plan_for(project, registry), {"KEPT": "1"}
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    with pytest.raises(AssertionError, match="before torch is imported"):
        apply_env(plan, environ)
    assert environ == {"KEPT": "1"}
    apply_env(plan_for(project, registry, hardware=add(remove=("allocator",))), environ)  # has none to set
    monkeypatch.delitem(sys.modules, "torch")
    apply_env(plan, environ)
    assert environ == {"KEPT": "1", **dict.fromkeys(ALLOC, "expandable_segments:True")}


def test_phases_are_in_the_order_of_a_run() -> None:
    assert list(Phase) == sorted(Phase) and Phase.ENV < Phase.PRECISION < Phase.OPTIMIZER < Phase.LOOP
