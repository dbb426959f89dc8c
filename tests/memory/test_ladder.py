"""What is switched on to make a plan fit, and what is not: with made-up figures, and on a card of 4 GiB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from bench.memory import bundled
from core.hookspecs import GIB, Facts, HardwareProfile, Plan, Strategy
from core.memory.forecast import Fit, Forecast, Forecaster
from core.memory.ladder import Rung, climb, rungs_of
from core.model_config import ModelConfig
from core.params import HardwareParams, ModelParams, Params, StrategyChoice
from core.plan import resolve
from core.plugin_check import machine
from core.plugins import Registry

REGISTRY = bundled()
MODEL = ModelConfig.resolve(ModelParams(preset="nano"), 512)
CARD = HardwareProfile("a-card", vram_gib=4, compute_capability=(8, 6))


class Saves(Strategy):
    """A rung, or with rung 0 an ordinary strategy."""

    def __init__(self, name: str, rung: int = 0, **attributes: Any) -> None:
        self.name, self.rung = name, rung
        for key, value in attributes.items():
            setattr(self, key, value)


LOW, HIGH = Saves("low", 10), Saves("high", 20)
RECIPE = Saves("recipe", 30, affects="recipe")


class Drafts:
    """Plans of made-up strategies; `figures` says what fits with which of them: (micro_batch, seconds), None: nothing.

    `gain` is what a larger micro-batch promises.
    """

    def __init__(
        self,
        figures: Mapping[str, tuple[int, float | None] | None],
        on: Sequence[Strategy] = (),
        gain: float = 0.5,
    ) -> None:
        self.figures, self.on, self.gain = figures, on, gain
        self.asked: list[str] = []

    def draft(self, rungs: Sequence[Strategy]) -> Plan:
        return Plan(CARD, "", MODEL, 8, 1, 0, micro_batches=(8, 4, 2, 1), active=[*self.on, *rungs])

    def fit(self, plan: Plan) -> Fit:
        names = " ".join(s.name for s in plan.active if s not in self.on)
        self.asked.append(names)
        found = self.figures[names]
        n, seconds = found or (1, None)
        forecast = Forecast(
            micro_batch=n,
            needed=(100 - 10 * len(plan.active)) * n,
            allocated=0,
            reserved=0,
            parts={},
            op="",
            phase="",
            resident=0,
            seconds=(seconds, 2 * seconds) if seconds else None,
            gain=self.gain if seconds else 0.0,
        )
        smallest = Forecast(1, 100 - 10 * len(plan.active), 0, 0, {}, "", "", 0)
        return Fit(found is not None, forecast, smallest)

    def climb(self, *rungs: Strategy) -> tuple[list[str], bool, list[Rung]]:
        """Names of what is on besides `on`; whether it fits; the record."""
        plan, answer, record = climb(self.draft, self.fit, rungs)
        return [s.name for s in plan.active if s not in self.on], answer.fits, record


# ---- climbing


def test_what_fits_as_it_is_climbs_nothing() -> None:
    drafts = Drafts({"": (4, None)})
    assert drafts.climb(LOW, HIGH, RECIPE)[:2] == ([], True)
    assert drafts.asked == [""]


def test_without_rates_the_first_that_fits_is_taken() -> None:
    drafts = Drafts({"": None, "low": (1, None), "low high": (8, None)})
    names, fits, record = drafts.climb(LOW, HIGH)
    assert (names, fits, drafts.asked) == (["low"], True, ["", "low"])
    assert [(r.strategy, r.taken, r.micro_batch) for r in record] == [("", True, 0), ("low", True, 1)]
    assert [r.needed for r in record] == [100, 90]


@pytest.mark.parametrize(("seconds", "taken"), [(0.9, True), (1.0, False), (1.1, False)])
def test_a_rung_is_taken_where_it_makes_the_step_faster(seconds: float, taken: bool) -> None:
    drafts = Drafts({"": (2, 1.0), "low": (8, seconds)})
    names, fits, record = drafts.climb(LOW)
    assert fits and names == (["low"] if taken else []) and drafts.asked == ["", "low"]
    assert record[1] == Rung("low", taken, 90, 8, seconds, "" if taken else "not faster")


def test_a_higher_rung_may_pay_where_a_lower_one_alone_does_not() -> None:
    drafts = Drafts({"": (2, 1.0), "low": (2, 1.1), "low high": (8, 0.8)})
    names, _, record = drafts.climb(LOW, HIGH)
    assert names == ["low", "high"] and all(rung.taken for rung in record)


def test_nothing_is_tried_for_a_gain_that_is_not_worth_it() -> None:
    drafts = Drafts({"": (2, 1.0)}, gain=0.01)
    assert drafts.climb(LOW, HIGH)[0] == [] and drafts.asked == [""]


def test_nothing_is_tried_where_the_largest_micro_batch_fits() -> None:
    drafts = Drafts({"": (8, 1.0), "low": (8, 0.9)})
    assert drafts.climb(LOW)[0] == [] and drafts.asked == [""]


def test_a_recipe_rung_only_where_nothing_else_fits() -> None:
    faster = Drafts({"": (1, 1.0), "low": (1, 1.1), "low recipe": (8, 0.1)})
    assert faster.climb(LOW, RECIPE)[0] == [] and faster.asked == ["", "low"]
    drafts = Drafts({"": None, "low": None, "low recipe": (2, 1.0)})
    names, fits, record = drafts.climb(LOW, RECIPE)
    assert (names, fits) == (["low", "recipe"], True)
    assert [rung.taken for rung in record] == [True, True, True]


def test_the_first_recipe_rung_that_fits_is_the_last() -> None:
    further = Saves("further", 40, affects="recipe")
    drafts = Drafts({"": None, "recipe": (2, 1.0), "recipe further": (8, 0.1)})
    assert drafts.climb(RECIPE, further)[0] == ["recipe"] and drafts.asked == ["", "recipe"]


def test_where_nothing_fits_the_plan_has_every_rung() -> None:
    drafts = Drafts({"": None, "low": None, "low high": None})
    names, fits, record = drafts.climb(LOW, HIGH)
    assert (names, fits) == (["low", "high"], False)
    assert [rung.micro_batch for rung in record] == [0, 0, 0]


def test_a_rung_takes_the_place_of_another_in_its_slot() -> None:
    first = Saves("first", 30, slot="optimizer", affects="recipe")
    second = Saves("second", 40, slot="optimizer", affects="recipe")
    drafts = Drafts({"": None, "first": None, "low": None, "low first": None, "low second": (1, 1.0)})
    names, fits, record = drafts.climb(LOW, first, second)
    assert (names, fits) == (["low", "second"], True)
    assert drafts.asked == ["", "low", "low first", "low second"]
    assert [(rung.strategy, rung.taken) for rung in record] == [
        *(("", True), ("low", True)),
        *(("first", False), ("second", True)),
    ]


def test_a_rung_without_what_it_requires_is_passed_over() -> None:
    needy = Saves("needy", 30, requires=("bf16",))
    assert Drafts({"": None}).climb(needy)[0] == []
    on = [Saves("bf16")]
    assert Drafts({"": None, "needy": (1, None)}, on).climb(needy)[0] == ["needy"]
    further = Saves("further", 40, requires=("low",))
    drafts = Drafts({"": None, "low": None, "low further": (1, None)})
    assert drafts.climb(LOW, further)[0] == ["low", "further"]


# ---- which rungs there are


def registry_of(*strategies: Strategy) -> Registry:
    registry = Registry()
    registry.strategies = {s.name: s for s in strategies}
    return registry


def names_of(strategies: Sequence[Strategy]) -> list[str]:
    return [s.name for s in strategies]


def test_rungs_in_their_order_and_nothing_else() -> None:
    registry = registry_of(HIGH, Saves("plain"), Saves("also", 10), LOW)
    plan = Drafts({}).draft([])
    assert names_of(rungs_of(plan, Facts(), registry, HardwareParams())) == ["also", "low", "high"]
    assert names_of(
        rungs_of(plan, Facts(), registry, HardwareParams(strategies=StrategyChoice(remove=["low", "plain"])))
    ) == [*("also", "high")]


def test_what_is_on_taken_in_conflict_or_does_not_work_here_is_no_rung() -> None:
    class Missing(Saves):
        def available(self, facts: Facts, profile: HardwareProfile) -> str | None:
            return "install it"

    mine = Saves("mine", conflicts={"shunned": "it is louder still"})
    on = [Saves("sgd", slot="optimizer"), mine, LOW]
    registry = registry_of(
        *on,
        HIGH,
        Saves("adam", 30, slot="optimizer"),
        Saves("shy", 40, conflicts={"mine": "it is loud"}),
        Saves("shunned", 45),
        Missing("missing", 50),
    )
    added = HardwareParams(strategies=StrategyChoice(add=["sgd"]))
    assert names_of(rungs_of(Drafts({}, on).draft([]), Facts(), registry, added)) == ["high"]
    profiles_own = rungs_of(Drafts({}, on).draft([]), Facts(), registry, HardwareParams())
    assert names_of(profiles_own) == ["high", "adam"], "what a profile brings gives way"
    set_up = HardwareParams(options={"sgd": {"lr": 1}})
    assert names_of(rungs_of(Drafts({}, on).draft([]), Facts(), registry, set_up)) == ["high"]


# ---- a card of 4 GiB


def plan_for(preset: str, add: Sequence[str] = (), remove: Sequence[str] = ()) -> Plan:
    """On an RTX 2050, with GPT-2's 50,257 ids and 32 sequences of 1,024 tokens in a step."""
    params = Params.model_validate(
        {
            "hardware": {"profile": "rtx2050", "strategies": {"add": list(add), "remove": list(remove)}},
            "tokenizer": {"kind": "gpt2"},
            "model": {"preset": preset},
            "train": {"max_steps": 1, "batch_tokens": 32768},
        }
    )
    return resolve(params, machine(REGISTRY.profile("rtx2050")), REGISTRY, FORECASTER)


FORECASTER = Forecaster()


def recipe(plan: Plan) -> list[str]:
    return [s.name for s in plan.active if s.affects == "recipe"]


def test_124m_with_checkpointing_and_chunked_head_at_16_sequences() -> None:
    plan = plan_for("124m", add=["chunked_head", "checkpointing"])
    assert plan.fits and plan["micro_batch"] >= 16
    assert plan.fit.forecast.needed <= plan.memory_budget < 3.51 * GIB
    assert recipe(plan) == ["bf16", "muon"]
    assert optimizer_of_muon(plan)


def optimizer_of_muon(plan: Plan) -> bool:
    """Two numbers for embeddings and head, one for a hidden matrix, and what the update works in."""
    hidden = plan.model.matmul_params - plan.model.vocab_size * plan.model.n_embd
    state = 8 * plan.model.n_params - 4 * hidden
    return 0 < plan.fit.forecast.parts["optimizer"] - state < 64 << 20


def test_124m_fits_with_its_recipe_unchanged() -> None:
    plan = plan_for("124m")
    assert plan.fits and recipe(plan) == ["bf16", "muon"]
    assert optimizer_of_muon(plan)
    ground = plan.ladder[0]
    assert ground.taken and ground.needed <= plan.memory_budget


def test_350m_fits_by_the_ladder() -> None:
    plan = plan_for("350m")
    assert plan.fits and plan.fit.forecast.needed <= plan.memory_budget
    assert len(recipe(plan)) > 1
    ladder = {rung.strategy: rung for rung in plan.ladder}
    assert list(ladder)[:3] == ["", "chunked_head", "checkpointing"]
    assert (
        not ladder[""].micro_batch and not ladder["checkpointing"].micro_batch
    )  # what changes nothing is not enough
    taken = [rung for rung in plan.ladder if rung.taken]
    assert [rung.needed for rung in taken] == sorted((rung.needed for rung in taken), reverse=True)
    notes = [note for note in plan.notes if "switched on" in note]
    assert sum("changes the numbers of the run" in note for note in notes) == len(recipe(plan)) - 1
    assert len(notes) == len(taken) - 1


def test_a_removed_strategy_is_never_climbed() -> None:
    lost = ["adamw8bit", "bf16_weights"]
    plan = plan_for("350m", remove=lost)
    assert not plan.fits and not set(lost) & {rung.strategy for rung in plan.ladder}
    assert {s.name for s in plan.active if s.rung} == {"checkpointing", "chunked_head"}
    assert plan["micro_batch"] == 1 and plan.rungs_left == []
