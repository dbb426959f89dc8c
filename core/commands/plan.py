"""`tightfit plan`: does it fit, with which micro-batch, and how long will it take? For any card, on any machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from core.cli import command
from core.errors import TightfitError, UserError
from core.files import write_json, write_text
from core.hookspecs import GIB, Facts, HardwareProfile, Plan
from core.memory.forecast import MARGIN, Fit, Forecaster
from core.memory.outlook import (
    SIZES,
    between,
    changed,
    climbed,
    columns,
    does_not_fit,
    duration,
    ladder_table,
    memory_table,
    remedies,
    run_lines,
    tokens_per_second,
    usable,
    whole_run,
)
from core.model_config import PRESETS, ModelConfig, round_up
from core.params import MAX_BLOCK_SIZE, Params, TokenizerParams
from core.plan import plan_dict, resolve
from core.plugins import Registry
from core.project import Project

SYSTEMS = ("linux", "windows", "wsl")
RATES_FORMAT = 1
COPY_MIB = 64


@dataclass(frozen=True)
class Asked:
    """What a question changes in params.yaml; None leaves it as it is."""

    profile: str | None = None
    preset: str | None = None
    system: str | None = None
    context: int | None = None
    vocab_size: int | None = None
    batch_tokens: int | None = None


@dataclass(frozen=True)
class Answer:
    """A plan, what it was made of, and the fit of each rung that was tried."""

    plan: Plan
    params: Params
    facts: Facts
    notes: list[str]
    """How the params that were planned differ from params.yaml."""
    tried: list[Fit]


@dataclass
class Witness(Forecaster):
    """A forecaster that remembers what it said."""

    said: list[Fit] = field(default_factory=list)

    def fit(self, plan: Plan, params: Params, registry: Registry, candidates: Sequence[int]) -> Fit:
        """As Forecaster's; the answer is also kept."""
        self.said.append(super().fit(plan, params, registry, candidates))
        return self.said[-1]


@command("plan")
@click.option("--profile", help="A hardware profile (tightfit plugins list); default: that of params.yaml.")
@click.option("--preset", help=f"A model: {', '.join(PRESETS)}; default: that of params.yaml.")
@click.option(
    "--os", "system", type=click.Choice(SYSTEMS), help="For a card on another system than this one."
)
@click.option("--context", type=click.IntRange(8, MAX_BLOCK_SIZE), help="Context length [tokens].")
@click.option("--vocab-size", type=click.IntRange(257, 1 << 20), help="Ids, in place of the tokenizer's.")
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Tokens per optimizer step.")
@click.option("--all", "everything", is_flag=True, help="Every profile with every preset, in one table.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable; sizes in bytes, times in seconds.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Draw where the memory goes.")
def main(project: Project, everything: bool, as_json: bool, svg: Path | None, **asked: Any) -> None:
    """Does it fit, how, and how fast? Exit code 2 where it does not."""
    planner = Planner(project)
    if everything:
        show_all(planner, Asked(**asked), as_json, svg)
    else:
        show_one(planner, Asked(**asked), as_json, svg)


def show_one(planner: Planner, asked: Asked, as_json: bool, svg: Path | None) -> None:
    """Print one plan. Raises UserError, after that, where it does not fit."""
    answer = planner.answer(asked)
    if asked.system and answer.plan.profile.device == "cpu":
        raise UserError("--os is for a card; the CPU is this machine's own")
    plan, context = answer.plan, (answer.params, answer.facts, planner.registry, planner.forecaster)
    if as_json:
        document = describe(answer, planner.registry)
        document["would_fit"] = [] if plan.fits else remedies(plan, *context)
        click.echo(json.dumps(document, indent=2, default=str))
    else:
        click.echo("\n".join(lines(answer)))
    if svg:
        draw(svg, [panel_of_rungs(answer)], quiet=as_json)
    if not plan.fits:
        raise UserError(does_not_fit(plan, *context))


def show_all(planner: Planner, asked: Asked, as_json: bool, svg: Path | None) -> None:
    """Print a table of plans: of all profiles or the one asked for, with all presets or the one asked for."""
    planner.adapted(asked)  # a name that nobody knows is an error; what cannot be planned is a row
    planner.facts(asked)
    answers: dict[tuple[str, str], Answer | TightfitError] = {}
    presets, profiles = [asked.preset] if asked.preset else PRESETS, planner.profiles(asked.profile)
    for preset in presets:
        planner.forget_tapes()  # cards share those of a preset; all of them at once would take a lot of memory
        for profile in profiles:
            try:
                answers[preset, profile] = planner.answer(replace(asked, preset=preset, profile=profile))
            except TightfitError as error:
                answers[preset, profile] = error
    found = [answer for answer in answers.values() if isinstance(answer, Answer)]
    if as_json:
        click.echo(json.dumps([row_dict(*key, answer) for key, answer in answers.items()], indent=2))
    else:
        notes = dict.fromkeys(note for answer in found for note in answer.notes)
        click.echo("\n".join([*(f"note: {note}" for note in notes), *columns(rows(answers))]))
    if svg and found:
        draw(svg, [panel_of_presets(name, found) for name in profiles], quiet=as_json)


# ---- questions and answers


class Planner:
    """Answers questions in one project on one machine."""

    def __init__(self, project: Project) -> None:
        from core.hardware import choose_profile, read_facts

        self.project, self.registry, self.here = project, Registry.load(project), read_facts()
        self.forecaster = Witness(project.forecasts)
        self.own = (
            choose_profile(self.registry.profiles, self.here)[0] if "cpu" in self.registry.profiles else None
        )

    def profiles(self, asked: str | None) -> list[str]:
        """Names of all profiles, or of the one that was asked for; this machine's own may be in no plugin."""
        own = [self.own.name] if self.own else []
        return [asked] if asked else sorted({*self.registry.profiles, *own})

    def forget_tapes(self) -> None:
        self.forecaster = Witness(self.project.forecasts)

    def answer(self, asked: Asked) -> Answer:
        """The plan for a question. Raises UserError or PluginError where there is none."""
        params, notes = self.adapted(asked)
        facts = self.facts(asked)
        self.forecaster.said.clear()
        plan = resolve(params, facts, self.registry, self.forecaster)
        tried = list(self.forecaster.said)
        if plan.profile.device == "cpu":
            self.measure_speed(plan, params)
        return Answer(plan, params, facts, notes, tried)

    def adapted(self, asked: Asked) -> tuple[Params, list[str]]:
        """The project's params for a question, and what had to change for it."""
        params, notes = self.project.params, []
        if asked.profile:
            params, dropped = on_profile(params, asked.profile, self.own)
            notes += dropped
        if asked.vocab_size:
            tokenizer = TokenizerParams(kind="bpe", vocab_size=asked.vocab_size)
            params = params.model_copy(update={"tokenizer": tokenizer})
        if asked.preset:
            params, dropped = with_preset(params, asked.preset)
            notes += dropped
        if asked.context:
            params = changed(params, model={"block_size": asked.context})
        if asked.batch_tokens:
            params = changed(params, train={"batch_tokens": asked.batch_tokens})
        if asked.preset or asked.context or asked.batch_tokens:
            params, rounded = whole_batch(params)
            notes += rounded
        return params, notes

    def facts(self, asked: Asked) -> Facts:
        """This machine, or one that has the card asked for."""
        from core.plugin_check import machine

        name = asked.profile or self.project.params.hardware.profile
        profile = self.own if self.own and name in ("auto", self.own.name) else self.registry.profile(name)
        system = asked.system or (self.here.os if self.here.os in SYSTEMS else "linux")
        if profile.device == "cpu" or (profile is self.own and not asked.system):
            return self.here
        return replace(self.here, os=system) if profile is self.own else machine(profile, system)

    def measure_speed(self, plan: Plan, params: Params) -> None:
        """Add the time of a step to a CPU's plan, whose profile has no rates. The plan itself stays env-check's."""
        timing = replace(self.forecaster, rates=cpu_rates(self.project, plan, self.here))
        timed = timing.fit(plan, params, self.registry, [plan["micro_batch"]])
        plan.fit = replace(plan.fit, forecast=timed.forecast)


def on_profile(params: Params, name: str, own: HardwareProfile | None) -> tuple[Params, list[str]]:
    """Params for a profile. What the user set for another card's memory does not hold for this one."""
    hardware = params.hardware
    same = own is not None and name == own.name
    params = changed(params, hardware={"profile": "auto" if same else name})
    if name == hardware.profile or (same and hardware.profile == "auto"):
        return params, []
    own_card: list[tuple[str, str, Any, Any]] = [
        ("hardware", "memory_gib", hardware.memory_gib, None),
        ("hardware", "options", hardware.options, {}),
        ("train", "micro_batch", params.train.micro_batch, "auto"),
    ]
    notes = []
    for section, key, value, otherwise in own_card:
        if value != otherwise:
            params = changed(params, **{section: {key: otherwise}})
            notes.append(f"{section}.{key}: {value} is for your own profile and is not used for others")
    return params, notes


def with_preset(params: Params, preset: str) -> tuple[Params, list[str]]:
    """Params for a preset as it is, its context included."""
    own = [
        f"{key}: {value}"
        for key in (*SIZES, "block_size")
        if (value := getattr(params.model, key)) is not None
    ]
    notes = [f"params.yaml's own {', '.join(own)} are not used with --preset"] if own else []
    if params.train.micro_batch != "auto":
        notes.append(
            f"train.micro_batch: {params.train.micro_batch} is for your own model; it is auto with --preset"
        )
    model = {"preset": preset, "block_size": None, **dict.fromkeys(SIZES)}
    return changed(params, model=model, train={"micro_batch": "auto"}), notes


def whole_batch(params: Params) -> tuple[Params, list[str]]:
    """Params whose batch is a multiple of the context, over all processes."""
    context = ModelConfig.resolve(params.model, params.tokenizer.n_vocab).block_size
    batch, whole = params.train.batch_tokens, context * params.hardware.num_processes
    rounded = round_up(batch, whole)
    if rounded == batch:
        return params, []
    note = (
        f"train.batch_tokens: {batch} is not a multiple of the context of {context} tokens"
        + (f" in {params.hardware.num_processes} processes" if whole != context else "")
        + f"; planned with {rounded}"
    )
    return changed(params, train={"batch_tokens": rounded}), [note]


# ---- the CPU's rates


def cpu_rates(project: Project, plan: Plan, facts: Facts) -> tuple[float, float]:
    """FLOP/s of a matrix product in the plan's dtype and bytes/s of a copy, on this CPU.

    Measured once and kept in reports/rates.json; delete it to measure again.
    """
    path = project.reports / "rates.json"
    machine = [RATES_FORMAT, facts.torch_version, facts.cores, facts.ram_bytes]
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        usable = known["machine"] == machine and isinstance(known["rates"], dict)
    except (OSError, ValueError, LookupError, TypeError):
        usable = False
    if not usable:
        known = {"machine": machine, "rates": {}}
    if plan["dtype"] not in known["rates"]:
        import torch

        from core.monitor import peak_flops

        known["rates"][plan["dtype"]] = [peak_flops(plan, torch.device("cpu"))[0], copy_rate()]
        write_json(path, known)
    flops, moved = known["rates"][plan["dtype"]]
    return flops, moved


def copy_rate() -> float:
    """Bytes that this CPU reads and writes in a second: the best of a few copies."""
    import torch

    source = torch.ones(COPY_MIB << 18)
    target, best = torch.empty_like(source), float("inf")
    until = time.perf_counter() + 0.5
    while time.perf_counter() < until:
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


# ---- in words


def lines(answer: Answer) -> list[str]:
    """All about one plan."""
    plan, params = answer.plan, answer.params
    f, model = plan.fit.forecast, plan.model
    steps, system = plan["gradient_accumulation_steps"], answer.facts.os
    where = f"{plan.profile.name}, {plan.profile.device}, {plan['dtype']} on {system}"
    state = "fits" if plan.fits else "does NOT fit"
    return [
        f"{params.model.preset} on {where}: {state}",
        *(f"note         {note}" for note in answer.notes),
        f"model        {model.n_params / 1e6:,.1f}M parameters, {model.block_size} tokens of context, "
        f"vocabulary {model.vocab_size}",
        f"batch        {plan['batch_tokens']:,} tokens: micro-batch {f.micro_batch} x {steps} accumulation steps"
        + (f" x {plan.num_processes} processes" if plan.num_processes > 1 else ""),
        f"strategies   {' → '.join(s.name for s in plan.active) or 'none'}",
        *(f"  skipped    {name}: {why}" for name, why in plan.skipped.items()),
        f"budget       {plan.memory_budget / GIB:.2f} GiB: {plan.memory_reason}",
        f"             {MARGIN:.0%} stay free for what a forecast misses: {usable(plan) / GIB:.2f} GiB may be used",
        "",
        *memory_table(plan),
        "",
        *ladder_table(plan),
        "",
        *(run_lines(plan, params) if plan.fits else []),
    ]


def rows(answers: dict[tuple[str, str], Answer | TightfitError]) -> list[tuple[str, ...]]:
    """The table of --all."""
    head = ("preset", "profile", "fits", "micro-batch", "GiB of budget", "switched on", "tokens/s", "run")
    return [head, *(row(*key, answer) for key, answer in answers.items())]


def row(preset: str, profile: str, answer: Answer | TightfitError) -> tuple[str, ...]:
    if isinstance(answer, TightfitError):
        return preset, profile, "cannot", "-", "-", answer.problems[0], "-", "-"
    plan, f = answer.plan, answer.plan.fit.forecast
    rates, run = tokens_per_second(plan), whole_run(plan, answer.params)
    seconds = run.seconds if run else None
    batch = f"{f.micro_batch} x {plan['gradient_accumulation_steps']}"
    return (
        preset,
        profile,
        "yes" if plan.fits else "no",
        batch if plan.fits else "-",
        f"{f.needed / GIB:.2f} of {usable(plan) / GIB:.2f}",
        ", ".join(taken(plan)) or "-",
        between(rates) if rates and plan.fits else "-",
        " to ".join(map(duration, seconds)) if seconds and plan.fits else "-",
    )


def taken(plan: Plan) -> list[str]:
    """What the ladder switched on."""
    return [rung.strategy for rung in plan.ladder if rung.strategy and rung.taken]


# ---- for machines


def describe(answer: Answer, registry: Registry) -> dict[str, Any]:
    """All about one plan."""
    plan = answer.plan
    return {
        "profile": plan.profile.name,
        "preset": answer.params.model.preset,
        **figures(answer),
        "changed": answer.notes,
        "ladder": [asdict(rung) for rung in climbed(plan)],
        "plan": plan_dict(plan, registry),
    }


def figures(answer: Answer) -> dict[str, Any]:
    """What the table of --all shows of a plan [bytes, seconds]."""
    plan, f = answer.plan, answer.plan.fit.forecast
    run = whole_run(plan, answer.params)
    return {
        "os": answer.facts.os,
        "fits": plan.fits,
        "micro_batch": f.micro_batch,
        "gradient_accumulation_steps": plan["gradient_accumulation_steps"],
        "batch_tokens": plan["batch_tokens"],
        "budget": plan.memory_budget,
        "usable": usable(plan),
        "needed": f.needed,
        "allocated": f.allocated,
        "reserved": f.reserved,
        "parts": f.parts,
        "peak_operation": f.op,
        "peak_phase": f.phase,
        "switched_on": taken(plan),
        "tokens_per_second": tokens_per_second(plan) if plan.fits else None,
        "run": asdict(run) if run and plan.fits else None,
    }


def row_dict(preset: str, profile: str, answer: Answer | TightfitError) -> dict[str, Any]:
    """A row of the table of --all."""
    known = {"preset": preset, "profile": profile}
    if isinstance(answer, TightfitError):
        return {**known, "error": str(answer)}
    return {**known, **figures(answer), "changed": answer.notes}


# ---- in pictures


def draw(path: Path, panels: list[Any], quiet: bool) -> None:
    """Write the picture. panels: core.memory.picture.Panel."""
    from core.memory.picture import picture

    write_text(path, picture([panel for panel in panels if panel]))
    if not quiet:
        click.echo(f"\nwrote {path}")


def panel_of_rungs(answer: Answer) -> Any:
    """A bar for each rung that was tried, at the smallest micro-batch, and one for the plan as it will run."""
    from core.memory.picture import Bar, Panel

    plan = answer.plan
    title = f"{answer.params.model.preset} on {plan.profile.name}"
    bars = []
    for rung, fit in zip(plan.ladder, answer.tried, strict=True):
        small = fit.smallest
        label = f"+ {rung.strategy}" if rung.strategy else "nothing added"
        label += "" if rung.taken else " (off)"
        bars.append(Bar(f"{label}\nmicro-batch {small.micro_batch}", small.parts, small.needed))
    if plan.fits:
        f = plan.fit.forecast
        bars.append(Bar(f"the plan\nmicro-batch {f.micro_batch}", f.parts, f.needed))
    return Panel(title, bars, plan.memory_budget)


def panel_of_presets(profile: str, answers: Iterable[Answer]) -> Any:
    """A bar for each preset on a profile; None where there is none."""
    from core.memory.picture import Bar, Panel

    bars, budget = [], 0
    for answer in answers:
        plan, f = answer.plan, answer.plan.fit.forecast
        if plan.profile.name == profile:
            bars.append(Bar(f"{answer.params.model.preset}\n{f.micro_batch}", f.parts, f.needed))
            budget = plan.memory_budget
    return Panel(f"{profile}, by preset and micro-batch", bars, budget) if bars else None
