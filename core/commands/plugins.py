"""`tightfit plugins`: what is there, a start for your own, and a check of it on a machine you need not have."""

from __future__ import annotations

import json
import keyword
import re

import click

from core.cli import command
from core.errors import PluginError, UserError
from core.hardware import OPTIONAL_MODULES, choose_profile
from core.hookspecs import GIB, Facts, Gpu, HardwareProfile
from core.params import HardwareParams, StrategyChoice
from core.plugins import Registry
from core.project import Project

HARDWARE_TEMPLATE = '''"""{title}: say here what this card is."""

from core.hookspecs import HardwareProfile, hookimpl


@hookimpl
def hardware_profiles():
    return HardwareProfile(
        name="{name}",
        match=r"{match}",  # regular expression on the name that nvidia-smi prints
        vram_gib=8,
        compute_capability=(8, 6),  # nvidia-smi --query-gpu=compute_cap --format=csv
        strategies=("bf16", "accumulation", "allocator", "loader", "cleanup"),
    )
'''

STRATEGY_TEMPLATE = '''"""{title}: say here what this optimises."""

from core.hookspecs import Phase, Strategy, hookimpl


class {title}(Strategy):
    name, phase = "{name}", Phase.LOOP
    defaults = {{"every": 100}}

    @hookimpl
    def on_step_end(self, build, step, metrics):
        if step % self.opts(build.plan)["every"] == 0:
            build.say(f"{name}: step {{step}}, loss {{metrics['loss']:.3f}}")


@hookimpl
def strategies():
    return {title}()
'''


@click.group("plugins")
def main() -> None:
    """List, check and create plugins."""


@command("list")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def list_(project: Project, as_json: bool) -> None:
    """Every plugin found, what it declares, and why a broken one failed (exit code 3)."""
    registry = Registry.load(project)
    if as_json:
        click.echo(json.dumps([vars(p) for p in registry.plugins], indent=2))
    else:
        for plugin in registry.plugins:
            state = "off " if plugin.disabled else "FAIL" if plugin.error else "ok  "
            declares = [f"profile {n}" for n in plugin.profiles] + [
                f"strategy {n}" for n in plugin.strategies
            ]
            click.echo(f"{state} {plugin.name} {plugin.version}".rstrip() + f"  {', '.join(declares)}")
    if registry.broken():
        raise PluginError(registry.broken(), title="plugins that do not load")


@command("new")
@click.argument("kind", type=click.Choice(["hardware", "strategy"]))
@click.argument("name")
def new(project: Project, kind: str, name: str) -> None:
    """Write a plugin to start from: tightfit plugins new hardware rtx3070"""
    title = name.upper() if kind == "hardware" else name.replace("_", " ").title().replace(" ", "")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "auto" or keyword.iskeyword(title):
        raise UserError(
            f"name: {name!r} should be lower case letters, digits and '_', "
            "begin with a letter, and be no word of Python's"
        )
    folder = project.plugins / ("hardware" if kind == "hardware" else "strategies")
    path = folder / f"{name}.py"
    if path.exists():
        raise UserError(f"{path.relative_to(project.root)} is there already; choose another name")
    template = HARDWARE_TEMPLATE if kind == "hardware" else STRATEGY_TEMPLATE
    match = title.replace("RTX", "RTX ").replace("GTX", "GTX ")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(template.format(name=name, title=title, match=match), encoding="utf-8", newline="\n")
    click.echo(
        f"wrote {path.relative_to(project.root).as_posix()}; edit it, then: tightfit plugins check {name}"
    )


@command("check")
@click.argument("name")
def check(project: Project, name: str) -> None:
    """Plan with a profile or strategy on a machine made up for it, and print what comes out."""
    from core.env_check import plan_lines
    from core.plan import resolve

    registry = Registry.load(project)
    if registry.broken():
        raise PluginError(registry.broken(), title="plugins that do not load")
    if name in registry.profiles:
        profile = registry.profiles[name]
        params = project.params.model_copy(update={"hardware": HardwareParams(profile=name)})
        if profile.match and re.search(profile.match, gpu_name(profile), re.I):
            chosen, why = choose_profile(registry.profiles, machine(profile))
            click.echo(f"auto on {gpu_name(profile)!r} chooses {chosen.name}: {why}")
    elif name in registry.strategies:
        profile, choice = home_of(registry, name)
        hardware = HardwareParams(profile=profile.name, strategies=choice)
        params = project.params.model_copy(update={"hardware": hardware})
    else:
        known = ", ".join(sorted([*registry.profiles, *registry.strategies]))
        raise UserError(f"no profile or strategy {name!r}. Known: {known}")
    for line in plan_lines(resolve(params, machine(profile), registry)):
        click.echo(line)
    click.echo(f"{name} works")


def home_of(registry: Registry, name: str) -> tuple[HardwareProfile, StrategyChoice]:
    """A profile on which the strategy works, preferring one that has it, and what to add and remove there."""
    strategy = registry.strategies[name]
    why_not = {p.name: strategy.available(machine(p), p) for p in registry.profiles.values()}
    works = [p for p in registry.profiles.values() if why_not[p.name] is None]
    if not works:
        reasons = [f"{profile}: {reason}" for profile, reason in why_not.items()]
        raise PluginError(
            reasons, title=f"strategy {name!r} is available on none of the {len(reasons)} profiles"
        )
    profile = next((p for p in works if name in [s.rstrip("?") for s in p.strategies]), works[0])

    def is_rival(other: str) -> bool:
        known = registry.strategies.get(other)
        same_slot = known is not None and strategy.slot and known.slot == strategy.slot
        return other != name and (other in strategy.conflicts or bool(same_slot))

    rivals = [s.rstrip("?") for s in profile.strategies if is_rival(s.rstrip("?"))]
    return profile, StrategyChoice(add=[*strategy.requires, name], remove=rivals)


def machine(profile: HardwareProfile) -> Facts:
    """One that has this profile's card."""
    card = Gpu(gpu_name(profile), int(profile.vram_gib * GIB), profile.compute_capability)
    return Facts(
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
    plain = re.sub(r"\(\?.*?\)|\\.|[\\^$*+?]", "", profile.match)
    return f"NVIDIA GeForce {plain.strip()}"


for sub in (list_, new, check):
    main.add_command(sub)
