"""The memory there is, the micro-batch that fits into it, and answers that are kept."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import core
from bench.memory import bundled
from core.errors import PluginError, UserError
from core.hookspecs import GIB, Facts, HardwareProfile, Plan
from core.memory import simulate as planner
from core.memory.allocator import MIB, AllocatorSettings
from core.memory.forecast import BUDGET_STEP, CODE, MARGIN, Forecaster, allocator_settings, memory_budget
from core.memory.tape import KINDS, Tape
from core.params import Params
from core.plan import resolve
from core.plugin_check import machine
from core.plugins import Registry
from core.run import NUMERICS

REGISTRY = bundled()
REPO = Path(core.__file__).parents[1]
CARD = HardwareProfile("a-card", vram_gib=8, compute_capability=(8, 6))
CPU = HardwareProfile("a-cpu", device="cpu")
NO_ANSWER = r"the memory plan is not there any more: run `python -m stages.env_check`"


def params_of(profile: str = "cpu", **sections: dict[str, Any]) -> Params:
    """A network of two layers, 16 sequences of 64 tokens in a step."""
    given: dict[str, Any] = {
        "hardware": {"profile": profile, **sections.pop("hardware", {})},
        "tokenizer": {"kind": "bpe", "vocab_size": 1024},
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, **sections.pop("model", {})},
        "train": {"max_steps": 1, "batch_tokens": 1024, **sections.pop("train", {})},
    }
    return Params.model_validate(given | sections)


def unseen(params: Params) -> Plan:
    """The plan without a look at memory."""
    return resolve(params, machine(REGISTRY.profile(params.hardware.profile)), REGISTRY)


TAPES: dict[Any, Tape] = {}


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that were simulated; one that an earlier test has simulated is counted without the work."""
    plans: list[Plan] = []
    real = planner.tape_of

    def tape_of(plan: Plan, params: Params) -> Tape:
        plans.append(plan)
        names = tuple(s.name for s in plan.active)
        key = plan.model, plan.profile.name, plan["dtype"], names, str(plan.options), params.train.grad_clip
        if key not in TAPES:
            TAPES[key] = real(plan, params)
        return TAPES[key]

    monkeypatch.setattr(planner, "tape_of", tape_of)
    return plans


# ---- the memory there is


@pytest.mark.parametrize(
    ("system", "free"), [("linux", 7.5), ("windows", 7.1), ("wsl", 7.1), ("something else", 7.5)]
)
def test_a_card_less_cuda_and_the_desktop(system: str, free: float) -> None:
    budget, why = memory_budget(CARD, machine(CARD, system), None)
    assert budget % BUDGET_STEP == 0 and 0 <= free * GIB - budget < BUDGET_STEP
    assert why.startswith("8.00 GiB less 0.4 for CUDA's context and 0.") and why.endswith(
        f"desktop on {system}"
    )


def test_the_profiles_share_of_it() -> None:
    facts = machine(CARD)
    budget, why = memory_budget(replace(CARD, vram_budget=0.8), facts, None)
    assert budget == pytest.approx(0.8 * 7.5 * GIB, abs=2) and why.endswith(", of that 80%")
    assert "of that" not in memory_budget(CARD, facts, None)[1]


def test_the_smaller_of_card_and_profile() -> None:
    small = machine(replace(CARD, vram_gib=7.6))
    large = machine(replace(CARD, vram_gib=139))
    assert memory_budget(CARD, small, None)[0] == pytest.approx(7.1 * GIB, abs=BUDGET_STEP)
    assert memory_budget(CARD, large, None) == memory_budget(CARD, machine(CARD), None)
    assert memory_budget(CARD, Facts(), None)[0] == pytest.approx(
        7.5 * GIB, abs=BUDGET_STEP
    )  # planned elsewhere


def test_half_of_the_ram() -> None:
    facts = Facts(ram_bytes=12 * GIB)
    assert memory_budget(CPU, facts, None) == (6 * GIB, "50% of 12.0 GiB RAM")
    assert memory_budget(CPU, facts, None, 3) == (2 * GIB, "50% of 12.0 GiB RAM, shared by 3 processes")
    assert memory_budget(CARD, machine(CARD), None, 3) == memory_budget(CARD, machine(CARD), None)


def test_the_plan_of_several_processes_shares_the_ram() -> None:
    params = params_of()
    several = params.model_copy(update={"hardware": params.hardware.model_copy(update={"num_processes": 2})})
    alone, both = (resolve(p, machine(CPU), REGISTRY).memory_budget for p in (params, several))
    assert both == pytest.approx(alone / 2, abs=BUDGET_STEP)


def test_forecasts_are_of_all_code_that_decides_numbers() -> None:
    """Which is nearly all that decides memory too; only reading batches and measuring allocates nothing in a step."""
    assert {*NUMERICS} - {*CODE} == {"batches.py", "measure.py"}


@pytest.mark.parametrize("profile", [CARD, CPU], ids=lambda profile: profile.name)
def test_what_the_user_says(profile: HardwareProfile) -> None:
    assert memory_budget(profile, machine(profile), 1.5) == (int(1.5 * GIB), "hardware.memory_gib")


# ---- the micro-batch


@pytest.mark.parametrize("profile", ["cpu", "rtx2050"])
def test_the_largest_that_fits_and_the_next_does_not(profile: str) -> None:
    params, forecaster = params_of(profile), Forecaster()
    plan = unseen(params)
    candidates = plan.micro_batches
    assert candidates == (16, 8, 4, 2, 1)
    needed = {n: forecaster.fit(plan, params, REGISTRY, [n]).forecast.needed for n in candidates}
    assert list(needed.values()) == sorted(needed.values(), reverse=True)
    for n, larger in zip(candidates[1:], candidates, strict=False):
        if needed[larger] - needed[n] < 16 * MIB * (profile != "cpu"):
            continue  # both need the same segments
        plan.memory_budget = int(needed[n] / (1 - MARGIN)) + 1
        fit = forecaster.fit(plan, params, REGISTRY, candidates)
        assert fit.fits and fit.forecast.micro_batch == n
        assert fit.forecast.needed <= plan.memory_budget * (1 - MARGIN) < needed[larger]
        assert (fit.smallest.micro_batch, fit.smallest.needed) == (1, needed[1])
        assert not forecaster.fit(plan, params, REGISTRY, [larger]).fits
    plan.memory_budget = needed[1] // 2
    fit = forecaster.fit(plan, params, REGISTRY, candidates)
    assert not fit.fits and fit.forecast == fit.smallest and fit.forecast.micro_batch == 1


def test_the_users_micro_batch_is_the_only_candidate() -> None:
    params = params_of(train={"micro_batch": 4})
    facts = machine(REGISTRY.profile("cpu"))
    plan = resolve(params, facts, REGISTRY, Forecaster())
    assert plan.micro_batches == (4,) and plan.fits
    assert plan["micro_batch"] == plan.fit.forecast.micro_batch == plan.fit.smallest.micro_batch == 4
    no_rungs = {"remove": ["checkpointing", "adamw8bit", "bf16_weights"]}
    tight = {"memory_gib": plan.fit.forecast.needed / GIB / 1.05, "strategies": no_rungs}
    plan = resolve(params_of(train={"micro_batch": 4}, hardware=tight), facts, REGISTRY, Forecaster())
    assert not plan.fits and plan["micro_batch"] == 4
    plan = resolve(params_of(hardware=tight), facts, REGISTRY, Forecaster())
    assert plan.fits and plan["micro_batch"] < 4


def test_one_simulation_for_every_micro_batch_and_budget(simulated: list[Plan]) -> None:
    params, forecaster = params_of("rtx2050"), Forecaster()
    plan = unseen(params)
    for budget in (GIB, 2 * GIB):
        for candidates in ((16, 8), (4,)):
            plan.memory_budget = budget
            forecaster.fit(plan, params, REGISTRY, candidates)
    assert len(simulated) == 1


# ---- what a forecast says


def test_parts_of_the_peak() -> None:
    params = params_of("rtx2050")
    plan = unseen(params)
    f = Forecaster().fit(plan, params, REGISTRY, [8]).forecast
    assert tuple(f.parts) == KINDS and f.op and f.phase == "forward and backward"
    assert sum(f.parts.values()) <= f.allocated <= f.needed <= f.reserved
    hidden = plan.model.matmul_params - plan.model.vocab_size * plan.model.n_embd
    state = 8 * plan.model.n_params - 4 * hidden  # Muon keeps one number where AdamW keeps two
    room = f.parts["optimizer"] - state
    assert 0 < room < 1 << 20
    assert f.resident == pytest.approx(
        4 * plan.model.n_params + state + room, rel=0.02
    )  # and rotary embeddings
    assert f.seconds and 0 < f.seconds[0] < f.seconds[1]
    tokens = plan.sequences * plan.model.block_size
    assert f.flops == pytest.approx(plan.model.flops_per_token * tokens, rel=0.1)


def test_a_cpu_has_no_allocator_and_no_rates_but_those_given() -> None:
    params = params_of()
    plan = unseen(params)
    f = Forecaster().fit(plan, params, REGISTRY, [8]).forecast
    assert f.needed == f.allocated == f.reserved == sum(f.parts.values()) and f.seconds is None
    measured = Forecaster(rates=(1e11, 2e10)).fit(plan, params, REGISTRY, [8]).forecast
    assert measured.seconds and measured.seconds[0] >= f.flops / 1e11
    assert replace(measured, seconds=None, gain=f.gain) == f


def test_what_several_processes_add() -> None:
    alone, two = params_of("rtx2050"), params_of("rtx2050", hardware={"num_processes": 2})
    plans = [unseen(params) for params in (alone, two)]
    fits = [Forecaster().fit(p, alone, REGISTRY, [4]).forecast for p in plans]
    model = plans[0].model
    extra = 4 * (model.n_params + model.vocab_size * model.n_embd)
    assert fits[1].needed - fits[0].needed == extra
    assert fits[1].parts == {**fits[0].parts, "gradients": fits[0].parts["gradients"] + extra}


def test_allocator_as_the_plan_sets_it_up() -> None:
    profile = REGISTRY.profile("rtx2050")
    for system, settings in {
        "linux": AllocatorSettings(expandable_segments=True),
        "windows": AllocatorSettings(max_split_bytes=64 * MIB),
    }.items():
        plan = resolve(params_of("rtx2050"), machine(profile, system), REGISTRY)
        assert allocator_settings(plan) == settings
    assert allocator_settings(unseen(params_of())) == AllocatorSettings()


# ---- answers that are kept


@pytest.fixture
def cache(tmp_path: Path, simulated: list[Plan]) -> Path:
    """A file with the answer for params_of()."""
    path = tmp_path / "reports" / "forecasts.json"
    path.parent.mkdir()
    ask(path)
    assert simulated.pop() and not simulated
    return path


def ask(
    path: Path, params: Params | None = None, simulates: bool = True, registry: Any = REGISTRY, **changes: Any
) -> Any:
    params = params or params_of()
    plan = unseen(params)
    for name, value in changes.items():
        setattr(plan, name, value)
    return Forecaster(path, simulates=simulates).fit(plan, params, registry, plan.micro_batches)


def test_a_second_forecaster_answers_from_the_file(cache: Path, simulated: list[Plan]) -> None:
    before = cache.read_bytes()
    kept = ask(cache, simulates=False)
    assert kept == ask(cache) and not simulated
    assert kept == Forecaster().fit(unseen(params_of()), params_of(), REGISTRY, (16, 8, 4, 2, 1))
    assert len(simulated) == 1 and cache.read_bytes() == before


CHANGES: dict[str, Callable[[Path], Any]] = {
    "model": lambda path: ask(path, params_of(model={"n_layer": 3}), simulates=False),
    "batch": lambda path: ask(path, params_of(train={"batch_tokens": 2048}), simulates=False),
    "micro-batch": lambda path: ask(path, params_of(train={"micro_batch": 4}), simulates=False),
    "clipping": lambda path: ask(path, params_of(train={"grad_clip": 0.0}), simulates=False),
    "profile": lambda path: ask(path, params_of("rtx2050"), simulates=False),
    "budget": lambda path: ask(path, simulates=False, memory_budget=12345678),
    "strategies": lambda path: ask(
        path, params_of(hardware={"strategies": {"add": ["checkpointing"]}}), simulates=False
    ),
    "options": lambda path: ask(
        path, params_of(hardware={"options": {"chunked_head": {"tokens": 64}}}), simulates=False
    ),
    "precision": lambda path: ask(
        path, params_of(hardware={"strategies": {"remove": ["bf16"]}}), simulates=False
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_plan_is_asked_again(cache: Path, what: str) -> None:
    with pytest.raises(UserError, match=NO_ANSWER):
        CHANGES[what](cache)


def test_an_edited_plugin_is_asked_again(cache: Path) -> None:
    registry = copy.copy(REGISTRY)
    owners = registry._owner = dict(REGISTRY._owner)
    for name, again in {"debug": False, "accumulation": True}.items():  # off, on
        owners["strategy", name] = replace(owners["strategy", name], sha256="edited")
        if again:
            with pytest.raises(UserError, match=NO_ANSWER):
                ask(cache, simulates=False, registry=registry)
        else:
            assert ask(cache, simulates=False, registry=registry).fits


def test_what_changes_no_step_is_not_asked_again(cache: Path, simulated: list[Plan]) -> None:
    params = params_of(train={"lr": 1e-5, "max_steps": 77})
    assert ask(cache, params, simulates=False) == ask(cache, simulates=False) and not simulated


DAMAGED = [b"", b"{", b"[]", b"null", b'{"format": 0, "answers": {}}', b"\xff\xfe"]
DAMAGED += [b'{"format": 1}', b'{"format": 1, "answers": null}', b'{"format": 1, "answers": []}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_asked_again_and_written_anew(
    cache: Path, simulated: list[Plan], content: bytes
) -> None:
    before = cache.read_bytes()
    cache.write_bytes(content)
    with pytest.raises(UserError, match=NO_ANSWER):
        ask(cache, simulates=False)
    ask(cache)
    assert len(simulated) == 1 and cache.read_bytes() == before


@pytest.mark.parametrize("entry", [None, 3, {"fits": True}, {"fits": True, "forecast": {}, "smallest": {}}])
def test_a_damaged_answer_is_asked_again(cache: Path, simulated: list[Plan], entry: Any) -> None:
    before = cache.read_bytes()
    kept = json.loads(before)
    cache.write_text(json.dumps({**kept, "answers": dict.fromkeys(kept["answers"], entry)}), encoding="utf-8")
    ask(cache)
    assert len(simulated) == 1 and cache.read_bytes() == before


READS_DATA = """
from core.hookspecs import Phase, Strategy, hookimpl


class Reads(Strategy):
    name, phase = "reads", Phase.MODEL

    @hookimpl
    def prepare_model(self, build):
        next(build.network.parameters()).sum().item()


@hookimpl
def strategies():
    return Reads()
"""


def test_a_plugin_that_needs_values_is_named_with_its_line(tmp_path: Path) -> None:
    from helpers import make_project

    shutil.copytree(REPO / "plugins", tmp_path / "plugins", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "plugins" / "strategies" / "reads.py").write_text(READS_DATA, encoding="utf-8")
    hardware = {"profile": "cpu", "strategies": {"add": ["reads"], "remove": []}}
    project = make_project(tmp_path, hardware=hardware)
    registry = Registry.load(project, entry_points=False)
    facts = machine(registry.profile("cpu"))
    with pytest.raises(
        PluginError, match=r"reads\.py:10: prepare_model\(\) does not run on tensors without data"
    ):
        resolve(project.params, facts, registry, Forecaster())


def test_a_missing_file_is_asked_again(cache: Path) -> None:
    cache.unlink()
    with pytest.raises(UserError, match=NO_ANSWER):
        ask(cache, simulates=False)
    assert not cache.exists()
    ask(cache)
    assert cache.exists()


def test_the_file_holds_what_was_asked_last(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.memory import forecast

    monkeypatch.setattr(forecast, "CACHE_ENTRIES", 3)
    params, plan = params_of(), unseen(params_of())
    forecaster = Forecaster(cache)
    for n in (16, 8, 4, 2):
        forecaster.fit(plan, params, REGISTRY, [n])
    assert len(json.loads(cache.read_text(encoding="utf-8"))["answers"]) == 3
    for n in (8, 4, 2):
        assert Forecaster(cache, simulates=False).fit(plan, params, REGISTRY, [n]).forecast.micro_batch == n
    with pytest.raises(UserError, match=NO_ANSWER):
        Forecaster(cache, simulates=False).fit(plan, params, REGISTRY, [16])
