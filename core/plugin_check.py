"""The author's test of a plugin: does it load, plan on a machine that has its card, and train on this one?

Nothing is left behind: training happens in a temporary folder, and the environment is put back.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from core.errors import PluginError, TightfitError, UserError, did_you_mean
from core.hardware import OPTIONAL_MODULES, choose_profile, read_facts
from core.hookspecs import GIB, Build, Facts, Gpu, HardwareProfile, Plan, Strategy
from core.params import HardwareParams, Params, StrategyChoice
from core.plan import load_state, plan_json, resolve, runtime, saved_state
from core.plugin_guard import HookError
from core.plugins import DISABLE_VARIABLE, Plugin, Registry
from core.project import Project
from core.run import first_difference

STEPS = 10
SAME_LOSS = 1e-3
"""How far a strategy that says affects = "execution" may move a loss [nats]."""
SYSTEMS = ("linux", "windows", "wsl")
TINY = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32},
    "tokenizer": {"kind": "byte"},
    "train": {"max_steps": STEPS, "batch_tokens": 256, "lr": 3e-3, "warmup_steps": 2},
}


@dataclass
class Step:
    """One thing that was tried."""

    name: str
    ok: bool = True
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Check:
    """What was tried so far. `echo` gets each line as soon as it is known."""

    def __init__(self, registry: Registry, echo: Callable[[str], None]) -> None:
        self.registry, self.echo = registry, echo
        self.steps: list[Step] = []
        self.owners: list[Plugin] = []

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Whatever a plugin raises inside is a problem of this step, with file and line."""
        step = Step(name)
        with self.watch(step):
            yield step
        step.ok = not step.problems
        self.steps.append(step)
        self.echo(f"{'ok  ' if step.ok else 'FAIL'} {step.name}")
        for note in step.notes:
            self.echo(note)
        for problem in step.problems:
            self.echo(f"     {problem}")

    @contextlib.contextmanager
    def watch(self, step: Step) -> Iterator[None]:
        """Collect an error instead of raising it, so that the next thing is tried all the same."""
        try:
            yield
        except (Exception, SystemExit) as error:
            step.problems.append(blame(error, self.registry, self.owners))

    @property
    def problems(self) -> list[str]:
        return [problem for step in self.steps for problem in step.problems]

    def to_dict(self, target: str) -> dict[str, Any]:
        return {"target": target, "ok": not self.problems, "steps": [asdict(step) for step in self.steps]}


def check(project: Project, target: str, echo: Callable[[str], None]) -> Check:
    """Try a plugin file, a profile or a strategy: load, plan, train. Problems are collected, not raised.

    Raises UserError where there is no such target.
    """
    with nothing_left_behind() as folder:
        registry = Registry.load(project)
        result = Check(registry, echo)
        profiles, strategies = _find(result, project, target)
        if result.problems:
            return result
        for name in profiles:
            _check_profile(result, project, registry.profiles[name], folder)
        for name in strategies:
            _check_strategy(result, project, registry.strategies[name], folder)
    return result


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[Path]:
    """A temporary folder to train in. Environment variables are put back, and no bytecode is written."""
    environ, bytecode = dict(os.environ), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        with tempfile.TemporaryDirectory(prefix="tightfit-check-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    finally:
        sys.dont_write_bytecode = bytecode
        restore(environ)


def restore(environ: dict[str, str]) -> None:
    for variable in os.environ.keys() - environ.keys():
        del os.environ[variable]
    os.environ.update(environ)


# ---- loading


def _find(result: Check, project: Project, target: str) -> tuple[list[str], list[str]]:
    """Names of the profiles and strategies that `target` stands for; its loading is the first step."""
    registry = result.registry
    if target.endswith(".py"):
        plugin = _plugin_of_file(registry, project, Path(target))
        result.owners = [plugin]
        profiles, strategies = plugin.profiles, plugin.strategies
    else:
        profiles = [target] if target in registry.profiles else []
        strategies = [target] if target in registry.strategies else []
        kinds = [("hardware profile", name) for name in profiles] + [
            ("strategy", name) for name in strategies
        ]
        result.owners = [registry.owner(kind, name) for kind, name in kinds]
        if not kinds and not registry.broken():
            raise UserError(unknown_name(registry, target))
    with result.step("loads and validates") as step:
        step.problems += registry.broken()
        if not step.problems and not profiles and not strategies:
            step.problems.append(f"{target}: declares nothing; its hook returns no profile and no strategy")
    return profiles, strategies


def _plugin_of_file(registry: Registry, project: Project, path: Path) -> Plugin:
    if not path.is_file():
        raise UserError(f"no file {path}; check takes a plugin file, or the name of a profile or strategy")
    path = path.resolve()
    try:
        name = path.relative_to(project.root.resolve()).as_posix()
    except ValueError:
        name = path.as_posix()
    known = next((p for p in registry.plugins if p.name == name), None)
    if known is None:
        registry.add_file(path, name)
        known = registry.plugins[-1]
    if known.disabled:
        raise UserError(f"{name} is switched off; take it out of the environment variable {DISABLE_VARIABLE}")
    return known


def unknown_name(registry: Registry, name: str) -> str:
    """What to say where neither a profile nor a strategy has this name."""
    known = sorted([*registry.profiles, *registry.strategies])
    near = did_you_mean(name, known)
    return f"no profile or strategy {name!r}.{near} Known: {', '.join(known)}"


# ---- planning


def _check_profile(result: Check, project: Project, profile: HardwareProfile, folder: Path) -> None:
    hardware = HardwareParams(profile=profile.name)
    plans = [_plan(result, project, hardware, machine(profile, system)) for system in SYSTEMS]
    if profile.match and re.search(profile.match, gpu_name(profile), re.I):
        chosen, why = choose_profile(result.registry.profiles, machine(profile))
        result.echo(f"auto on {gpu_name(profile)!r} chooses {chosen.name}: {why}")
    if all(plans):
        _train(result, profile, [entry.rstrip("?") for entry in profile.strategies], folder)


def _check_strategy(result: Check, project: Project, strategy: Strategy, folder: Path) -> None:
    home = None
    with result.step(f"{strategy.name} is available") as step:
        home = home_of(result.registry, strategy.name)
        step.notes.append(f"     on the profile {home[0].name}, for one")
    if home is None:
        return
    profile, choice, system = home
    hardware = HardwareParams(profile=profile.name, strategies=choice)
    if _plan(result, project, hardware, machine(profile, system)):
        wanted = [*_required(result.registry, strategy), strategy.name]
        _train(result, HardwareProfile("check", device="cpu"), wanted, folder, strategy)


def _plan(result: Check, project: Project, hardware: HardwareParams, facts: Facts) -> Plan | None:
    """Plan with the user's params on a made-up machine; the first plan is shown in full."""
    from core.env_check import plan_lines

    params, plan = project.params.model_copy(update={"hardware": hardware}), None
    first = not any(step.name.startswith(f"{hardware.profile} plans") for step in result.steps)
    with result.step(f"{hardware.profile} plans on {facts.os}") as step:
        plan = resolve(params, facts, result.registry)
        step.notes += plan_lines(plan) if first else []
        again = resolve(params, facts, result.registry)
        told, now = (json.loads(plan_json(p, result.registry)) for p in (plan, again))
        if told != now:
            step.problems.append(
                f"a second plan is another one ({first_difference(told, now)}), and `dvc repro` would begin anew with "
                "every plan: keep times, random numbers and counters out of it"
            )
    return plan


def _required(registry: Registry, strategy: Strategy) -> list[str]:
    """What the strategy requires, and what that requires in turn."""
    names: list[str] = []
    for name in strategy.requires:
        further = _required(registry, registry.strategies[name]) if name not in names else []
        names += [n for n in (*further, name) if n not in names]
    return names


def home_of(registry: Registry, name: str) -> tuple[HardwareProfile, StrategyChoice, str]:
    """A profile on which the strategy works, preferring one that has it; what to add and remove there; the OS."""
    strategy = registry.strategies[name]
    works: list[tuple[HardwareProfile, str]] = []
    reasons: dict[str, str] = {}
    for system in SYSTEMS:
        for candidate in registry.profiles.values():
            reason = strategy.available(machine(candidate, system), candidate)
            if reason is None:
                works.append((candidate, system))
            else:
                reasons.setdefault(candidate.name, reason)
    if not works:
        raise PluginError(
            [f"{profile}: {reason}" for profile, reason in reasons.items()],
            title=f"strategy {name!r} is available on none of the {len(reasons)} profiles",
        )
    has_it = (w for w in works if name in [s.rstrip("?") for s in w[0].strategies])
    profile, system = next(has_it, works[0])

    def is_rival(other: str) -> bool:
        known = registry.strategies.get(other)
        same_slot = known is not None and strategy.slot and known.slot == strategy.slot
        return other != name and (other in strategy.conflicts or bool(same_slot))

    rivals = [s.rstrip("?") for s in profile.strategies if is_rival(s.rstrip("?"))]
    return profile, StrategyChoice(add=[*strategy.requires, name], remove=rivals), system


def machine(profile: HardwareProfile, system: str = "linux") -> Facts:
    """One that has this profile's card."""
    card = Gpu(gpu_name(profile), int(profile.vram_gib * GIB), profile.compute_capability)
    return Facts(
        os=system,
        gpus=(card,) if profile.device == "cuda" else (),
        torch_version="any",
        torch_cuda="13.0",
        cores=8,
        ram_bytes=16 * GIB,
        cpu_bf16=True,
        modules=frozenset(OPTIONAL_MODULES),
    )


def gpu_name(profile: HardwareProfile) -> str:
    """A card's name that the profile's pattern matches: the pattern without its regular expression marks."""
    plain = re.sub(r"\(\?.*?\)|\\.|[\\^$*+?]", "", profile.match).strip()
    return plain if plain.startswith("NVIDIA") else f"NVIDIA GeForce {plain}"


# ---- training


def _train(
    result: Check,
    profile: HardwareProfile,
    wanted: list[str],
    folder: Path,
    subject: Strategy | None = None,
) -> None:
    """Ten steps with those of the `wanted` strategies that work on a CPU. `subject` is what is being checked."""
    registry, facts = result.registry, replace(read_facts(), gpus=())
    with result.step(f"{STEPS} training steps on the CPU") as step:
        cpu = replace(profile, device="cpu", match="", strategies=())
        usable, not_run = _usable(registry, wanted, facts, cpu)
        step.notes += [f"     {name} is not run on a CPU: {why}" for name, why in not_run.items()]
        if subject and subject.name not in usable:
            step.name = "no training: it does not run on a CPU"
            return
        alone = [name for name in usable if not subject or name != subject.name]
        baseline: list[float] = []
        if subject and subject.affects == "execution":
            baseline = _losses(result, step, _cpu_plan(registry, facts, cpu, alone), folder)
        losses = _losses(result, step, _cpu_plan(registry, facts, cpu, usable), folder)
        if step.problems:
            return
        step.problems += _judge(losses, [p.name for p in result.owners])
        step.notes.append(
            f"     with {', '.join(usable) or 'no strategy'}: loss {losses[0]:.4f} → {losses[-1]:.4f}"
        )
        if baseline and not step.problems:
            step.problems += _compare(subject, losses, baseline)
    if not step.problems:
        _plan_memory(result, _cpu_plan(registry, facts, cpu, usable), _cpu_plan(registry, facts, cpu, alone))


def _plan_memory(result: Check, plan: Plan, without: Plan) -> None:
    """The planner runs the step on tensors without data; see core/memory/simulate.py."""
    from core.memory.simulate import simulate

    params = Params.model_validate(TINY)
    with result.step("its memory can be planned") as step:
        try:
            peaks = [simulate(p, params).peak(p["micro_batch"], False).bytes for p in (plan, without)]
        except TightfitError:
            raise
        except Exception as error:
            raise PluginError(
                f"the step does not run on tensors without data ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}); where build.simulated is true, stand in for "
                "kernels that need values (docs/plugins.md)"
            ) from error
        if plan.active != without.active:
            step.notes.append(f"     {peaks[0] / 1024:.0f} KiB at peak, {peaks[1] / 1024:.0f} without it")


def _usable(
    registry: Registry, wanted: list[str], facts: Facts, cpu: HardwareProfile
) -> tuple[list[str], dict[str, str]]:
    """Those that work here, and why the others do not."""
    not_run: dict[str, str] = {}
    for name in wanted:
        why_not = registry.strategies[name].available(facts, cpu)
        if why_not:
            not_run[name] = why_not
    for _ in wanted:  # what needs one that is out is out, too
        for name in wanted:
            missing = [n for n in registry.strategies[name].requires if n in not_run]
            if missing and name not in not_run:
                not_run[name] = f"it needs {missing[0]}"
    return [name for name in wanted if name not in not_run], not_run


def _cpu_plan(registry: Registry, facts: Facts, cpu: HardwareProfile, names: list[str]) -> Plan:
    options = {name: given for name, given in cpu.options.items() if name in names}
    beside = copy.copy(registry)
    beside.profiles = {"check": replace(cpu, name="check", strategies=tuple(names), options=options)}
    return resolve(Params.model_validate({**TINY, "hardware": {"profile": "check"}}), facts, beside)


def _losses(result: Check, step: Step, plan: Plan, folder: Path) -> list[float]:
    """The loss of each step; errors go to `step`. The way is the trainer's own, on made-up tokens."""
    (folder / "params.yaml").write_text(json.dumps(TINY), encoding="utf-8")
    from core.memory.simulate import fresh_accelerate

    losses: list[float] = []
    before = dict(os.environ)
    os.environ.update({variable: choice.value for variable, choice in plan.env.items()})
    try:
        with contextlib.chdir(folder), fresh_accelerate():
            build = None
            with result.watch(step):
                build = _build(Project(folder), plan, result.echo)
                _run_steps(Project(folder), build, losses)
            if build is not None:
                with result.watch(step):
                    runtime(plan).hook.on_train_end(build=build)
    finally:
        restore(before)
    return losses


def _build(project: Project, plan: Plan, echo: Callable[[str], None]) -> Build:
    from core.optim import check_groups
    from core.trainer import build_training, make_accelerator

    hook = runtime(plan).hook
    accelerator = make_accelerator(plan)
    build = build_training(
        plan, hook, accelerator, plan.model, project.params, lambda line: echo(f"     {line}")
    )
    check_groups(accelerator.unwrap_model(build.model), build.optimizer)  # as finalize_model left it
    return build


def _run_steps(project: Project, build: Build, losses: list[float]) -> None:
    """Fill `losses`. Every step is logged, and there is one evaluation at the end."""
    import torch

    from core.trainer import optimizer_step, set_lr

    plan, params, hook = build.plan, project.params.train, runtime(build.plan).hook
    rows, length = plan.sequences, plan.model.block_size
    tokens = (torch.arange(rows)[:, None] * 5 + torch.arange(length + 1) * 3) % 64  # easy to learn
    x, y, size = tokens[:, :-1], tokens[:, 1:], plan["micro_batch"]
    window = [(x[i : i + size], y[i : i + size]) for i in range(0, rows, size)]
    build.model.train()
    for step in range(1, STEPS + 1):
        lr = set_lr(build, params, step - 1, (step - 1) / STEPS)
        loss, norm = optimizer_step(build, hook, window, params.grad_clip)
        losses.append(loss.item())
        metrics = {"step": step, "tokens": step * params.batch_tokens, "loss": losses[-1], "lr": lr}
        metrics |= {"grad_norm": norm.item(), "tokens_per_second": 1.0}
        hook.on_step_end(build=build, step=step, metrics=metrics)
        if step == STEPS // 2:  # as a run that is resumed
            load_state(plan, build, saved_state(plan, build))
    build.model.eval()
    with torch.inference_mode():
        value = build.model(x, y).item() / y.numel()
    metrics = {"step": STEPS, "val_loss": value, "val_bits_per_byte": value / math.log(2)}
    hook.on_evaluate_end(build=build, step=STEPS, metrics=metrics)


def _judge(losses: list[float], owners: list[str]) -> list[str]:
    from core.trainer import check_first_loss

    who = ", ".join(owners)
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            return [f"{who}: the loss of step {i + 1} is {loss}; look at what the hooks do to model and loss"]
    if not losses[-1] < losses[0]:
        return [
            f"{who}: the loss does not fall, {losses[0]:.4f} at step 1 and {losses[-1]:.4f} at step {STEPS}; "
            "does the optimizer hold the network's own parameters, at build.lr?"
        ]
    try:
        check_first_loss(losses[0], Params.model_validate(TINY).tokenizer.n_vocab)
    except UserError as error:
        return [f"{who}: {error}"]
    return []


def _compare(subject: Strategy | None, losses: list[float], baseline: list[float]) -> list[str]:
    assert subject is not None
    apart = [abs(a - b) for a, b in zip(losses, baseline, strict=True)]
    if max(apart) <= SAME_LOSS:
        return []
    step = apart.index(max(apart))
    return [
        f"strategy {subject.name!r} says it affects execution only, but the loss of step {step + 1} is "
        f"{losses[step]:.4f} with it and {baseline[step]:.4f} without: declare affects = 'recipe'"
    ]


# ---- where an error comes from


def blame(error: BaseException, registry: Registry, owners: list[Plugin]) -> str:
    """`file:line: hook(): what`, at the deepest line of a plugin; without one, the plugin that is being checked."""
    if isinstance(error, HookError):  # it says all that
        return str(error)
    cause = error.__cause__ if isinstance(error, PluginError) and error.__cause__ else error
    files = {Path(plugin.file).resolve(): plugin for plugin in registry.plugins if plugin.file}
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if f.filename.endswith(".py")]
    theirs = [f for f in frames if Path(f.filename).resolve() in files]
    said = str(error) if isinstance(error, TightfitError) else f"{type(error).__name__}: {error}"
    if theirs:
        plugin = files[Path(theirs[-1].filename).resolve()]
        return f"{plugin.name}:{theirs[-1].lineno}: {theirs[-1].name}(): {said}"
    who = ", ".join(plugin.name for plugin in owners)
    if isinstance(error, TightfitError):
        return f"{who}: {said}"
    if isinstance(error, AssertionError) and "optimizer groups" in said:
        return f"{who}: {error}; the optimizer must hold every parameter exactly once, as finalize_model() left them"
    where = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{who}: {said}{where}"
