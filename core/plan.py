"""Profile + strategies + model → Plan: what will run, in which order, and why. No torch here.

`resolve` reports every problem at once. `plan_json` is deterministic, so that DVC retrains when the plan changes and
not otherwise; it names the source hash of every plugin in use, and of no other.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pluggy

from core.errors import PluginError, Problems, UserError, did_you_mean
from core.hardware import choose_profile
from core.hookspecs import (
    GIB,
    PROJECT,
    Choice,
    Facts,
    HardwareProfile,
    Plan,
    RuntimeSpecs,
    Strategy,
)
from core.memory.forecast import Forecaster, memory_budget
from core.memory.ladder import climb, rungs_of
from core.model_config import ModelConfig
from core.params import HardwareParams, Params
from core.plugins import Registry

if TYPE_CHECKING:
    from core.hookspecs import Build

PLAN_FORMAT = 2
MAX_WORKERS = 64
"""Processes that read batches: more is a slip of the pen, and starting them takes minutes."""


def resolve(params: Params, facts: Facts, registry: Registry, forecaster: Forecaster | None = None) -> Plan:
    """Return the plan for `params` on the machine `facts`.

    forecaster: predicts memory, by which the micro-batch and what saves memory are chosen; see `Plan.fits`. None: the
    largest micro-batch, unseen. Raises PluginError for broken plugins and strategies that do not work together,
    UserError for sizes that do not fit together; all problems at once, as far as one can be looked at without the
    other.
    """
    problems = Problems()
    profile = model = None
    sequences = params.hardware.num_processes
    with problems:
        if registry.broken():  # what they would have declared is not missed besides
            raise PluginError(registry.broken(), title="plugins that do not load")
        profile, why = _profile(params.hardware, facts, registry)
    with problems:
        model = ModelConfig.resolve(params.model, params.tokenizer.n_vocab)
        sequences = _sequences(params, model)
    with problems:
        if params.train.max_minutes and params.hardware.num_processes > 1:
            raise UserError(
                "train.max_minutes needs one process, whose clock counts; set max_tokens or max_steps"
            )
    if profile is None or model is None:  # nothing else can be looked at
        raise problems.joined()
    budget, why_budget = memory_budget(
        profile, facts, params.hardware.memory_gib, params.hardware.num_processes
    )

    def draft(rungs: Sequence[Strategy] = ()) -> Plan:
        plan = Plan(
            profile=profile,
            profile_reason=why,
            model=model,
            sequences=sequences,
            num_processes=params.hardware.num_processes,
            memory_budget=budget,
            memory_reason=why_budget,
            micro_batch=None if params.train.micro_batch == "auto" else params.train.micro_batch,
        )
        _choose_strategies(plan, params.hardware, facts, registry, rungs)
        off = [name for name in plan.options if name not in {s.name for s in plan.active}]
        waiting = [registry.strategies[name] for name in off if name not in plan.skipped]
        _decide_values(plan, params, facts, waiting)
        return plan

    plan = None
    with problems:
        plan = draft()
    if plan is None or problems.found:
        raise problems.joined()
    if forecaster is None:
        return plan
    rungs = rungs_of(plan, facts, registry, params.hardware)
    plan, fit, plan.ladder = climb(
        draft, lambda tried: forecaster.fit(tried, params, registry, tried.micro_batches), rungs
    )
    plan.fit = fit
    plan.rungs_left = rungs_of(plan, facts, registry, params.hardware)
    for rung in plan.rungs_left:  # a run that is short of memory may take them later
        plan.options[rung.name] = _options(rung, profile, params.hardware, [])
    _take_micro_batch(plan)
    return plan


def _take_micro_batch(plan: Plan) -> None:
    """The micro-batch that fits, and what the ladder took for it."""
    n, steps = (
        plan.fit.forecast.micro_batch,
        plan.sequences // plan.num_processes // plan.fit.forecast.micro_batch,
    )
    if n != plan["micro_batch"]:
        needs, has = plan.fit.forecast.needed / GIB, plan.memory_budget / GIB
        reason = (
            f"the largest that fits: {needs:.2f} of {has:.2f} GiB" if plan.fits else "the smallest there is"
        )
        plan.set("micro_batch", n, reason=reason, by="core")
        reason = f"{n * steps} sequences per step / {n}: the batch in tokens does not change"
        plan.set("gradient_accumulation_steps", steps, reason=reason, by="core")
    before = plan.ladder[0]
    for rung in plan.ladder[1:]:
        if not rung.taken:
            continue
        saved = f"{rung.strategy} was switched on: it saves {(before.needed - rung.needed) / GIB:.2f} GiB"
        changes = next(s for s in plan.active if s.name == rung.strategy).affects == "recipe"
        plan.notes.append(f"{saved}; it changes the numbers of the run" if changes else saved)
        before = rung


def _profile(hardware: HardwareParams, facts: Facts, registry: Registry) -> tuple[HardwareProfile, str]:
    if hardware.profile == "auto":
        if "cpu" not in registry.profiles:
            raise PluginError("hardware.profile: auto needs the profile 'cpu', which no plugin declares")
        return choose_profile(registry.profiles, facts)
    return registry.profile(hardware.profile), "hardware.profile names it"


def _sequences(params: Params, model: ModelConfig) -> int:
    """Sequences per optimizer step, over all processes."""
    batch, block = params.train.batch_tokens, model.block_size
    processes = params.hardware.num_processes
    if batch % (block * processes):
        near = max(1, round(batch / (block * processes))) * block * processes
        each = f"{processes} processes x " if processes > 1 else ""
        raise UserError(
            f"train.batch_tokens: {batch} is not a multiple of {each}the context of {block} tokens; {near} is"
        )
    return batch // block


def _choose_strategies(
    plan: Plan, hardware: HardwareParams, facts: Facts, registry: Registry, rungs: Sequence[Strategy]
) -> None:
    """Fill plan.active (ordered), plan.skipped and plan.options, or raise PluginError with every problem.

    rungs: strategies of the memory ladder, besides those that profile and params ask for.
    """
    profile, choice, problems = plan.profile, hardware.strategies, []
    wanted: dict[str, tuple[bool, str]] = {}  # name → (optional, key that asked for it)
    for entry in profile.strategies:
        wanted.setdefault(entry.rstrip("?"), (entry.endswith("?"), f"hardware profile {profile.name!r}"))
    for entry in choice.add:
        wanted[entry.rstrip("?")] = (entry.endswith("?"), "hardware.strategies.add")
    for name in choice.remove:
        if name not in registry.strategies:
            problems.append(registry.unknown_strategy(name, "hardware.strategies.remove"))
        wanted.pop(name, None)
    for rung in rungs:
        wanted.setdefault(rung.name, (False, "the memory ladder"))

    chosen: list[Strategy] = []
    for name, (optional, key) in wanted.items():
        strategy = registry.strategies.get(name)
        if strategy is None:
            problems.append(registry.unknown_strategy(name, key))
            continue
        why_not = strategy.available(facts=facts, profile=profile)
        if why_not and optional:
            plan.skipped[name] = why_not
        elif why_not:
            problems.append(f"{name}: {why_not}")
        else:
            chosen.append(strategy)

    own = {name for name, (_, key) in wanted.items() if key.startswith("hardware profile")}
    gone = _gave_way(chosen, own, hardware)
    chosen = [s for s in chosen if s.name not in gone]
    plan.skipped |= gone
    named = {entry.rstrip("?") for entry in profile.strategies}
    for name in profile.options:
        if name not in named and not (name in registry.strategies and registry.strategies[name].rung):
            near = did_you_mean(name, named)
            problems.append(
                f"profile {profile.name!r} has options for {name!r}, which is none of its strategies.{near}"
            )
    for strategy in chosen:
        plan.options[strategy.name] = _options(strategy, profile, hardware, problems)
    for strategy in _off_with_options(plan, hardware, chosen, registry):
        plan.options[strategy.name] = _options(strategy, profile, hardware, problems)
    problems += _unused_options(hardware, plan, chosen, registry)
    problems += _clashes(chosen)
    plan.active = _in_order(chosen, problems)
    if problems:
        raise PluginError(problems, title=f"hardware profile {profile.name!r} cannot run as configured")


def _options(
    strategy: Strategy, profile: HardwareProfile, hardware: HardwareParams, problems: list[str]
) -> dict[str, Any]:
    """defaults < profile < params. A value must have its default's type; None as a default takes any."""
    merged = dict(strategy.defaults)
    sources = (
        (f"profile {profile.name!r}", profile.options.get(strategy.name, {})),
        (f"hardware.options.{strategy.name}", hardware.options.get(strategy.name, {})),
    )
    for source, given in sources:
        for key, value in given.items():
            if key not in strategy.defaults:
                near, known = did_you_mean(key, strategy.defaults), ", ".join(strategy.defaults) or "none"
                problems.append(f"{source}: unknown option {key!r}.{near} Options: {known}")
                continue
            default = strategy.defaults[key]
            kinds = (int, float) if isinstance(default, float) else (type(default),)
            right = default is None or (
                isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
            )
            if not right:
                problems.append(
                    f"{source}.{key}: {value!r} should be of type {type(default).__name__}, such as {default!r}"
                )
            merged[key] = value
    return merged


def _off_with_options(
    plan: Plan, hardware: HardwareParams, chosen: list[Strategy], registry: Registry
) -> list[Strategy]:
    """Strategies with options that are off now and may be on another time: rungs, and what does not work here."""
    named = dict.fromkeys((*hardware.options, *plan.profile.options))
    found = [registry.strategies[name] for name in named if name in registry.strategies]
    return [s for s in found if (s.rung or s.name in plan.skipped) and s not in chosen]


def _gave_way(chosen: list[Strategy], own: set[str], hardware: HardwareParams) -> dict[str, str]:
    """Which of the chosen strategies give their slot to another, and why.

    The profile's own give way to what the user adds and to the memory ladder, unless the user set options for them.
    """
    newcomers = {_role(s): s.name for s in chosen if _role(s) and s.name not in own}
    return {
        s.name: f"{newcomers[_role(s)]} takes its place as {_role(s)}"
        for s in chosen
        if _role(s) in newcomers and s.name in own and s.name not in hardware.options
    }


def _role(strategy: Strategy) -> str:
    """Its slot; one without that makes the optimizer has that role, and shall not be asked in vain."""
    return strategy.slot or ("optimizer" if hasattr(strategy, "make_optimizer") else "")


def _unused_options(
    hardware: HardwareParams, plan: Plan, chosen: list[Strategy], registry: Registry
) -> list[str]:
    active = {s.name for s in chosen}
    problems = []
    for name in hardware.options:
        if name not in registry.strategies:
            problems.append(registry.unknown_strategy(name, "hardware.options"))
        elif registry.strategies[name].rung:  # the memory ladder may yet switch it on
            if name in hardware.strategies.remove:
                problems.append(
                    f"hardware.options.{name}: hardware.strategies.remove switches {name} off; drop one"
                )
        elif name not in active and name not in plan.skipped:
            problems.append(
                f"hardware.options.{name}: {name} is not on; add it (hardware.strategies.add: [{name}])"
            )
    return problems


def _clashes(chosen: list[Strategy]) -> list[str]:
    names = {s.name for s in chosen}
    slots: dict[str, str] = {}
    problems = []
    for strategy in chosen:
        if strategy.slot and strategy.slot in slots:
            other = slots[strategy.slot]
            problems.append(
                f"{other} and {strategy.name} both set the {strategy.slot}: {_keep_one(other, strategy.name)}"
            )
        elif strategy.slot:
            slots[strategy.slot] = strategy.name
        for needed in strategy.requires:
            if needed not in names:
                problems.append(
                    f"{strategy.name} needs {needed}: add it (hardware.strategies.add: [{needed}])"
                )
        for other, reason in strategy.conflicts.items():
            if other in names:
                problems.append(
                    f"{strategy.name} does not work with {other}: {reason} "
                    f"(hardware.strategies.remove: [{other}] or [{strategy.name}])"
                )
    return problems


def _in_order(chosen: list[Strategy], problems: list[str]) -> list[Strategy]:
    """By phase, then `after`, then the order asked for (a stable topological sort)."""
    names = {s.name: s for s in chosen}
    for s in chosen:
        for other in s.after:
            if other in names and names[other].phase > s.phase:
                problems.append(
                    f"{s.name} wants to run after {other}, whose phase {names[other].phase.name} is later"
                )
    ordered: list[Strategy] = []
    for phase in sorted({s.phase for s in chosen}):
        left = [s for s in chosen if s.phase == phase]
        while left:
            waiting = {s.name for s in left}
            ready = next((s for s in left if not waiting & (set(s.after) - {s.name})), None)
            if ready is None:
                problems.append("strategies wait for each other: " + " → ".join(s.name for s in left))
                break
            ordered.append(ready)
            left.remove(ready)
    return ordered


def runtime(plan: Plan) -> pluggy.PluginManager:
    """Hooks of the active strategies, in plan order (pluggy calls the last registered first)."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(RuntimeSpecs)
    for strategy in reversed(plan.active):
        manager.register(strategy, strategy.name)
    manager.check_pending()
    return manager


def call(strategy: Strategy, hook: str, /, **given: Any) -> Any:
    """Call a hook of one strategy with those arguments that it takes; None where it has no such hook."""
    function: Any = getattr(strategy, hook, None)
    if not hasattr(function, f"{PROJECT}_impl"):
        return None
    return function(**{name: given[name] for name in inspect.signature(function).parameters})


def answers(plan: Plan, hook: str, /, **given: Any) -> Iterator[tuple[Strategy, Any]]:
    """Call a hook strategy by strategy, in plan order, so that each answer has an owner; None is left out."""
    for strategy in plan.active:
        answer = call(strategy, hook, **given)
        if answer is not None:
            yield strategy, answer


def saved_state(plan: Plan, build: Build) -> dict[str, dict[str, Any]]:
    """{strategy: what a checkpoint shall keep of it}, tensors and plain JSON values by name.

    Raises PluginError for what a checkpoint would not give back as it was.
    """
    return {strategy.name: state for strategy, state in answers(plan, "save_state", build=build)}


def load_state(plan: Plan, build: Build, states: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Give each active strategy what it saved. Returns the names of those that saved something and are off now."""
    active = {s.name: s for s in plan.active}
    for name, state in states.items():
        if name in active:
            call(active[name], "load_state", build=build, state=dict(state))
    return [name for name in states if name not in active]


def accelerator_kwargs(plan: Plan) -> dict[str, Any]:
    """What the strategies ask of accelerate.Accelerator: lists joined, other values agreed on. Raises PluginError."""
    merged: dict[str, Any] = {}
    by: dict[str, str] = {}
    for strategy, asked in answers(plan, "accelerator_kwargs", plan=plan):
        for key, value in asked.items():
            if isinstance(value, list) and isinstance(merged.get(key, []), list):
                merged[key] = [*merged.get(key, []), *value]
            elif merged.setdefault(key, value) != value:
                raise PluginError(
                    f"{by[key]} and {strategy.name} disagree on accelerate's {key}: {merged[key]!r} and {value!r}; "
                    f"{_keep_one(by[key], strategy.name)}"
                )
            by.setdefault(key, strategy.name)
    return merged


def _decide_values(plan: Plan, params: Params, facts: Facts, waiting: list[Strategy]) -> None:
    """Core's own values first, then the strategies' changes, environment and checks.

    waiting: rungs that are off and have options, which are checked too: they might go wrong in the middle of a run.
    """
    core = "core"
    plan.set("dtype", "fp32", reason="no precision strategy is on", by=core)
    plan.set("batch_tokens", params.train.batch_tokens, reason=params.train.reason("batch_tokens"), by=core)
    for key in ("lr", "warmup_steps"):
        if (reason := params.train.reason(key)) != f"train.{key}":
            plan.notes.append(f"train.{key}: {getattr(params.train, key):g}, {reason}")
    steps, warmup = params.train.steps, params.train.warmup_steps
    if steps is not None and warmup > steps:
        plan.notes.append(
            f"train.warmup_steps: {warmup} is more than the run's {steps} steps, which never reach train.lr; set it to "
            "auto"
        )
    per_process = plan.sequences // plan.num_processes
    if plan.micro_batch is not None:
        plan.set("micro_batch", plan.micro_batch, reason="train.micro_batch", by=core)
    else:
        plan.set("micro_batch", per_process, reason="the whole batch at once: accumulation is off", by=core)
    plan.micro_batches = (plan["micro_batch"],)
    plan.set("gradient_accumulation_steps", 1, reason="accumulation is off", by=core)
    plan.set("num_workers", 0, reason="loader is off: batches are read in the training process", by=core)
    plan.set("pin_memory", False, reason="loader is off", by=core)
    plan.set("persistent_workers", False, reason="loader is off", by=core)

    problems = _adjust(plan, facts)
    for strategy, variables in list(answers(plan, "configure_env", plan=plan, facts=facts)):
        for variable, (value, reason) in variables.items():
            _set_env(plan, facts, variable, value, reason, by=strategy.name)
    problems += [p for _, found in answers(plan, "check_plan", plan=plan, facts=facts) for p in found]
    problems += [p for s in waiting for p in call(s, "check_plan", plan=plan, facts=facts) or ()]
    keep, workers = plan.values["persistent_workers"], plan.values["num_workers"]
    if not 0 <= workers.value <= MAX_WORKERS:
        problems.append(f"{workers.by} sets num_workers to {workers.value}; it should be 0 to {MAX_WORKERS}")
    if keep.value and not workers.value:
        problems.append(
            f"{keep.by} sets persistent_workers, but {workers.by} sets num_workers to 0: there are none to keep"
        )
    if plan["micro_batch"] * plan["gradient_accumulation_steps"] != per_process:
        problems.append(
            f"train.micro_batch: {plan['micro_batch']} x {plan['gradient_accumulation_steps']} accumulation steps make "
            f"{plan['micro_batch'] * plan['gradient_accumulation_steps']} sequences, the batch has {per_process}; "
            + (
                "set it to auto"
                if any(s.name == "accumulation" for s in plan.active)
                else "add the strategy accumulation"
            )
        )
    if problems:
        raise PluginError(problems, title="the plan does not work" if len(problems) > 1 else "")


def _adjust(plan: Plan, facts: Facts) -> list[str]:
    """Let the strategies decide values. Returns as problems where two of equal rank want different ones.

    One of a later phase, or one that names the other in `after`, decides again; the reason says so.
    """
    problems: list[str] = []
    deciders: dict[str, Strategy] = {}
    for strategy in plan.active:
        before = dict(plan.values)
        call(strategy, "adjust_plan", plan=plan, facts=facts)
        for key, choice in plan.values.items():
            old, other = before[key], deciders.get(key)
            if choice is old:
                continue
            deciders[key] = strategy
            if other is None or choice.value == old.value:
                continue
            if other.phase == strategy.phase and not _follows(strategy, other, plan.active):
                problems.append(
                    f"{other.name} sets {key} to {old.value!r}, {strategy.name} to {choice.value!r}, both in the phase "
                    f"{strategy.phase.name}: {_keep_one(other.name, strategy.name)}, or let one name the other in "
                    "`after`"
                )
            plan.values[key] = replace(
                choice, reason=f"{choice.reason}; instead of {old.value!r} [{other.name}]"
            )
    return problems


def _follows(strategy: Strategy, other: Strategy, active: Sequence[Strategy]) -> bool:
    """Whether `after` says, maybe through others, that a strategy comes after the other."""
    return any(
        s is other or _follows(s, other, active)
        for s in active
        if s is not strategy and s.name in strategy.after
    )


def _keep_one(one: str, other: str) -> str:
    return f"keep one (hardware.strategies.remove: [{one}] or [{other}])"


def _set_env(plan: Plan, facts: Facts, variable: str, value: str, reason: str, by: str) -> None:
    """Add a variable to the plan. The user's own value wins; two strategies must agree."""
    theirs = facts.environ.get(variable, value)
    if theirs != value:
        plan.notes.append(f"{variable}={theirs} from your environment wins over {value} ({by})")
        return
    known = plan.env.get(variable)
    if known and known.value != value:
        raise PluginError(
            f"{known.by} wants {variable}={known.value}, {by} wants {value}: {_keep_one(known.by, by)}"
        )
    plan.env[variable] = Choice(value, reason, by)


def apply_env(plan: Plan, environ: MutableMapping[str, str] | None = None) -> None:
    """Put the plan's variables into the environment of this process. Call it before torch is imported."""
    environ = os.environ if environ is None else environ
    changed = [variable for variable, choice in plan.env.items() if environ.get(variable) != choice.value]
    if "torch" in sys.modules and any("ALLOC_CONF" in variable for variable in changed):
        raise AssertionError("the allocator's settings must be in the environment before torch is imported")
    environ.update({variable: choice.value for variable, choice in plan.env.items()})


def plan_dict(plan: Plan, registry: Registry) -> dict[str, Any]:
    """What `reports/plan.json` holds: recipe (changes the numbers), execution (does not), and a reason for each.

    No times, no free memory: equal params, plugins and machine give equal bytes.
    """

    def strategy(s: Strategy) -> dict[str, Any]:
        plugin = registry.owner("strategy", s.name)
        return {
            "name": s.name,
            "phase": s.phase.name,
            "affects": s.affects,
            "options": plan.options[s.name],
            "plugin": f"{plugin.name} {plugin.version}".strip(),
            "sha256": plugin.sha256,
        }

    profile = plan.profile
    return {
        "format": PLAN_FORMAT,
        "profile": {
            "name": profile.name,
            "device": profile.device,
            "reason": plan.profile_reason,
            "vram_gib": profile.vram_gib,
            "compute_capability": list(profile.compute_capability),
            "bandwidth_gbs": profile.bandwidth_gbs,
            "tflops": dict(profile.tflops),
            "source": profile.source,
        },
        "strategies": [strategy(s) for s in plan.active],
        "skipped": plan.skipped,
        "recipe": {
            "model": plan.model.to_dict(),
            **{key: plan[key] for key in Plan.RECIPE},
        },
        "execution": {
            "num_processes": plan.num_processes,
            **{key: choice.value for key, choice in plan.values.items() if key not in Plan.RECIPE},
        },
        "env": {variable: choice.value for variable, choice in plan.env.items()},
        "reasons": {
            **{key: f"{choice.reason} [{choice.by}]" for key, choice in plan.values.items()},
            **{key: f"{choice.reason} [{choice.by}]" for key, choice in plan.env.items()},
        },
        "memory": memory_dict(plan),
        "ladder": [asdict(rung) for rung in plan.ladder],
        "notes": plan.notes,
    }


def memory_dict(plan: Plan) -> dict[str, Any]:
    """What was predicted [bytes, seconds]; nothing where nobody looked."""
    if plan.fit is None:
        return {}
    return {"budget": plan.memory_budget, "budget_reason": plan.memory_reason, **asdict(plan.fit)}


def plan_json(plan: Plan, registry: Registry) -> str:
    """`plan_dict` as text: equal plans give equal bytes. Option values that JSON does not know are written as text."""
    document = plan_dict(plan, registry)
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, default=str) + "\n"


def recipe_strategies(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of a plan document: the strategies that change the numbers."""
    return [s for s in document["strategies"] if s["affects"] == "recipe"]
