"""What a forecast means to a person: where the memory goes, how long the run takes, and what would fit instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from core.errors import TightfitError
from core.hardware import OPTIONAL_MODULES
from core.hookspecs import GIB, Facts, Plan
from core.laws import settled
from core.memory.allocator import KINDS
from core.memory.forecast import MARGIN, Forecaster
from core.model_config import PRESETS, ModelConfig

if TYPE_CHECKING:
    from core.params import Params
    from core.plugins import Registry

MIN_CONTEXT = 128
"""The shortest context that is proposed [tokens]."""
SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_inner")
"""Keys of `model` that a preset stands for."""


@dataclass(frozen=True)
class Climbed:
    """A rung of a plan's ladder as a person reads it."""

    strategy: str
    """Empty for the ground."""
    needed: int
    """At the smallest micro-batch [bytes]."""
    saved: int
    """Against what the plan would be without it [bytes]."""
    micro_batch: int
    """The largest that fits; 0: none does."""
    seconds: float | None
    """An optimizer step at that micro-batch, at best."""
    verdict: str


def climbed(plan: Plan) -> list[Climbed]:
    """The plan's ladder, from the ground up, with what each rung saved and why it is on or not."""
    rows: list[Climbed] = []
    kept = None
    for i, rung in enumerate(plan.ladder):
        below = kept if rung.taken else plan.ladder[i - 1]  # what is not taken was tried on top of all below
        above = next((r.strategy for r in plan.ladder[i + 1 :] if r.taken), "")
        off = f"off: {rung.note or f'{above} takes its place'}"
        rows.append(
            Climbed(
                strategy=rung.strategy,
                needed=rung.needed,
                saved=below.needed - rung.needed if below and rung.strategy else 0,
                micro_batch=rung.micro_batch,
                seconds=rung.seconds,
                verdict="" if not rung.strategy else "on" if rung.taken else off,
            )
        )
        kept = rung if rung.taken else kept
    return rows


def usable(plan: Plan) -> int:
    """Of the memory budget, what a plan may count on: the budget less the margin for what a forecast misses [bytes]."""
    return int(plan.memory_budget * (1 - MARGIN))


def memory_lines(plan: Plan) -> list[str]:
    """The forecast of a plan in a few lines."""
    f = plan.fit.forecast
    verdict = "" if plan.fits else "DOES NOT FIT: "
    parts = ", ".join(f"{kind} {f.parts[kind] / GIB:.2f}" for kind in KINDS)
    lines = [
        f"memory       {verdict}{f.needed / GIB:.2f} of {usable(plan) / GIB:.2f} GiB at micro-batch {f.micro_batch}",
        f"  budget     {plan.memory_budget / GIB:.2f} GiB, of which {MARGIN:.0%} stay free: {plan.memory_reason}",
        f"  peak       {parts}; in {f.op}, {f.phase}",
    ]
    for rung in climbed(plan)[1:]:
        fits = f"micro-batch {rung.micro_batch}" if rung.micro_batch else "does not fit"
        lines.append(
            f"  ladder     {rung.strategy}: saves {rung.saved / GIB:.2f} GiB, {fits} ({rung.verdict})"
        )
    if plan.fits and tokens_per_second(plan):
        lines.append(f"speed        {speed(plan)}")
    return lines


def tokens_per_second(plan: Plan) -> tuple[float, float] | None:
    """At worst and at best; None where the device's rates are unknown."""
    seconds = plan.fit.forecast.seconds if plan.fit else None
    if not seconds:
        return None
    tokens = plan["batch_tokens"]
    return tokens / seconds[1], tokens / seconds[0]


def speed(plan: Plan) -> str:
    """The tokens per second as a sentence."""
    worst, best = tokens_per_second(plan) or (0.0, 0.0)
    return f"{worst:,.0f} to {best:,.0f} tokens/s expected, from bandwidth and FLOP/s"


@dataclass(frozen=True)
class Run:
    """A whole run, as ranges from the least to the most."""

    tokens: tuple[int, int]
    seconds: tuple[float, float] | None
    """None where the device's rates are unknown."""


def whole_run(plan: Plan, params: Params) -> Run | None:
    """What the budget of `train` comes to; None where it is in minutes and the device's rates are unknown."""
    rates, train = tokens_per_second(plan), params.train
    if train.max_minutes:
        seconds = train.max_minutes * 60
        return Run((int(rates[0] * seconds), int(rates[1] * seconds)), (seconds, seconds)) if rates else None
    assert train.steps is not None
    tokens = train.steps * train.batch_tokens
    return Run((tokens, tokens), (tokens / rates[1], tokens / rates[0]) if rates else None)


# ---- tables


def memory_table(plan: Plan) -> list[str]:
    """The peak by kind, and as the allocator has it [GiB]."""
    f = plan.fit.forecast
    cells = [(kind, f"{f.parts[kind] / GIB:.2f}", "") for kind in KINDS]
    cells += [
        ("in use", f"{sum(f.parts.values()) / GIB:.2f}", f"at the peak: {f.op}, in {f.phase}"),
        ("allocated", f"{f.allocated / GIB:.2f}", "torch.cuda.max_memory_allocated()"),
        ("reserved", f"{f.reserved / GIB:.2f}", "torch.cuda.max_memory_reserved(), where nothing limits it"),
        ("needed", f"{f.needed / GIB:.2f}", "the smallest budget in which the step runs"),
    ]
    if plan.profile.device == "cpu":
        del cells[-3:]
    return columns([("memory", "GiB", ""), *cells], numbers=(1,))


def ladder_table(plan: Plan) -> list[str]:
    """What was tried to make it fit, cheapest in speed first."""
    smallest = f"GiB at {plan.fit.smallest.micro_batch}"
    cells = [("ladder", smallest, "saved", "largest micro-batch", "tokens/s at best", "")]
    for rung in climbed(plan):
        rate = f"{plan['batch_tokens'] / rung.seconds:,.0f}" if rung.seconds else "-"
        saved = f"{rung.saved / GIB:.2f}" if rung.strategy else "-"
        name = rung.strategy or "nothing added"
        cells.append(
            (name, f"{rung.needed / GIB:.2f}", saved, str(rung.micro_batch or "none"), rate, rung.verdict)
        )
    tried = {rung.strategy for rung in plan.ladder}
    left = [s.name for s in plan.rungs_left if s.name not in tried]
    return [*columns(cells, numbers=(1, 2, 3, 4)), *([f"not needed: {', '.join(left)}"] if left else [])]


def run_lines(plan: Plan, params: Params) -> list[str]:
    """Speed, and the length of the whole run."""
    rates, run = tokens_per_second(plan), whole_run(plan, params)
    if rates is None or run is None or run.seconds is None:
        return [f"speed        unknown: {plan.profile.name} has no bandwidth or no rate for {plan['dtype']}"]
    cpu = plan.profile.device == "cpu"
    source = "measured here (reports/rates.json; delete it to measure again)" if cpu else "of the profile"
    tokens = " to ".join(f"{n:,}" for n in dict.fromkeys(run.tokens))
    return [
        f"speed        {between(rates)} tokens/s, from bandwidth and FLOP/s {source}",
        f"run          {tokens} tokens in {' to '.join(dict.fromkeys(map(duration, run.seconds)))}",
    ]


def between(rates: tuple[float, float]) -> str:
    """(1234.5, 5678.9) → "1,234 to 5,679"."""
    return f"{rates[0]:,.0f} to {rates[1]:,.0f}"


def duration(seconds: float) -> str:
    """90 → "90 s"; 400 → "6.7 min"; 9000 → "2.5 h"; 300,000 → "3.5 days"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    size, unit = (60, "min") if seconds < 7200 else (3600, "h") if seconds < 72 * 3600 else (86400, "days")
    n = seconds / size
    return f"{n:.0f} {unit}" if n >= 10 else f"{n:.1f} {unit}"


def columns(cells: Iterable[tuple[str, ...]], numbers: Sequence[int] = ()) -> list[str]:
    """Rows as lines whose columns are aligned, those in `numbers` to the right."""
    cells = list(cells)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


# ---- what does not fit


def does_not_fit(
    plan: Plan, params: Params, facts: Facts, registry: Registry, forecaster: Forecaster | None
) -> list[str]:
    """Why the plan cannot run, and what would fit."""
    f = plan.fit.forecast
    what = f"{plan.model.n_params / 1e6:,.0f}M parameters, {f.micro_batch} x {plan.model.block_size} tokens"
    has = f"{usable(plan) / GIB:.2f} may be used ({plan.memory_reason}; {MARGIN:.0%} stay free)"
    found = remedies(plan, params, facts, registry, forecaster)
    larger = f"nothing that was tried; it takes a card with {f.needed / (1 - MARGIN) / GIB:.1f} GiB free"
    return [
        f"out of memory before it starts: {what} need {f.needed / GIB:.2f} GiB, and {has}; "
        f"what would fit: {'; or '.join(found) or larger}"
    ]


def remedies(
    plan: Plan, params: Params, facts: Facts, registry: Registry, forecaster: Forecaster | None
) -> list[str]:
    """Changes of params.yaml with which it fits, each tried by itself: the least far-reaching first."""
    attempt = _Attempt(plan, params, facts, registry, forecaster)
    found = (
        attempt.own_settings(),
        attempt.what_is_not_installed(),
        attempt.shorter_context(),
        attempt.smaller_preset(),
    )
    return [remedy for remedy in found if remedy]


@dataclass(frozen=True)
class _Attempt:
    """Plans like the one that does not fit, each with one thing changed."""

    plan: Plan
    params: Params
    facts: Facts
    registry: Registry
    forecaster: Forecaster | None

    def planned(self, facts: Facts | None = None, **changes: dict[str, Any]) -> Plan | None:
        """The plan with keys of sections changed; None where that does not fit. It starts at the ladder's top: one
        simulation instead of one per rung, and what fits there fits from the ground up."""
        from core.plan import resolve

        params = changed(self.params, **changes)
        choice = params.hardware.strategies
        rungs = [r.strategy for r in self.plan.ladder[1:] if r.taken and r.strategy not in choice.remove]
        choice = choice.model_copy(update={"add": list(dict.fromkeys([*choice.add, *rungs]))})
        try:
            plan = resolve(
                changed(params, hardware={"strategies": choice}),
                facts or self.facts,
                self.registry,
                self.forecaster,
            )
        except TightfitError:  # such as sizes of the user's own that do not go with another preset
            return None
        return plan if plan.fits else None

    def own_settings(self) -> str:
        """What the user has set himself, and could leave to the planner."""
        hardware, train = self.params.hardware, self.params.train
        choice = hardware.strategies
        saving = [n for n in choice.remove if n in self.registry.strategies and self._saves_memory(n)]
        kept = choice.model_copy(update={"remove": [n for n in choice.remove if n not in saving]})
        if train.micro_batch != "auto" and self.planned(train={"micro_batch": "auto"}):
            return "train.micro_batch: auto"
        if saving and self.planned(hardware={"strategies": kept}):
            return f"hardware.strategies.remove without {', '.join(saving)}"
        if hardware.memory_gib and self.planned(hardware={"memory_gib": None}):
            return "hardware.memory_gib: null"
        return ""

    def _saves_memory(self, strategy: str) -> bool:
        return strategy == "accumulation" or self.registry.strategies[strategy].rung > 0

    def what_is_not_installed(self) -> str:
        """Strategies that lack a package here."""
        complete = replace(self.facts, modules=frozenset(OPTIONAL_MODULES))
        with_it = self.planned(complete) if complete != self.facts else None
        missing = with_it.active if with_it else []
        why = {s.name: s.available(self.facts, self.plan.profile) for s in missing}
        return ", ".join(f"the strategy {name} ({reason})" for name, reason in why.items() if reason)

    def _floor(self) -> int:
        """What no context and no micro-batch make smaller: an update needs all of it at once [bytes]."""
        parts = self.plan.fit.smallest.parts
        return parts["weights"] + parts["gradients"] + parts["optimizer"]

    def shorter_context(self) -> str:
        """The longest half, quarter, … of the context that fits."""
        context = self.plan.model.block_size // 2
        while context >= MIN_CONTEXT and self._floor() < usable(self.plan):
            sequences, odd = divmod(self.params.train.batch_tokens, context)
            whole = not odd and not sequences % self.plan.num_processes
            if whole and self.planned(model={"block_size": context}):
                return f"model.block_size: {context}"
            context //= 2
        return ""

    def smaller_preset(self) -> str:
        """The largest preset that fits, with nothing of the user's own sizes."""
        model = self.params.model
        per_parameter = self._floor() / self.plan.model.n_params
        for preset in reversed(PRESETS):
            sizes = {"preset": preset, **dict.fromkeys(SIZES)}
            n_params = ModelConfig.resolve(
                model.model_copy(update=sizes), self.params.tokenizer.n_vocab
            ).n_params
            smaller = n_params < self.plan.model.n_params
            if smaller and n_params * per_parameter < usable(self.plan) and self.planned(model=sizes):
                own = [name for name in SIZES if getattr(model, name) is not None]
                return f"model.preset: {preset}" + (f" without {', '.join(own)}" if own else "")
        return ""


def changed(params: Params, **sections: dict[str, Any]) -> Params:
    """Params with some keys of some sections changed, unchecked: changed(params, model={"preset": "nano"}).

    What is auto follows the rest.
    """
    copies = {name: getattr(params, name).model_copy(update=keys) for name, keys in sections.items()}
    if "train" in copies:
        laws = params.train._laws
        copies["train"]._laws = {key: laws[key] for key in laws if key not in sections["train"]}
    return settled(params.model_copy(update=copies))
