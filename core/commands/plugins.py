"""`tightfit plugins`: what is there, a start for your own, and a check of it on a machine you need not have."""

from __future__ import annotations

import json
import re

import click

from core.cli import command
from core.errors import PluginError, UserError
from core.hookspecs import GIB, Facts, Gpu, HardwareProfile
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
    from core.plugins import Registry

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
    if not name.replace("_", "").isalnum() or not name.islower():
        raise UserError(f"name: {name!r} should be lower case letters, digits and '_'")
    folder = project.plugins / ("hardware" if kind == "hardware" else "strategies")
    path = folder / f"{name}.py"
    if path.exists():
        raise UserError(f"{path.relative_to(project.root)} is there already; choose another name")
    template = HARDWARE_TEMPLATE if kind == "hardware" else STRATEGY_TEMPLATE
    title = name.upper() if kind == "hardware" else name.replace("_", " ").title().replace(" ", "")
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
    from core.hardware import choose_profile
    from core.params import HardwareParams, StrategyChoice
    from core.plan import resolve
    from core.plugins import Registry

    registry = Registry.load(project)
    if registry.broken():
        raise PluginError(registry.broken(), title="plugins that do not load")
    if name in registry.profiles:
        profile = registry.profiles[name]
        params = project.params.model_copy(update={"hardware": HardwareParams(profile=name)})
        if profile.match:
            chosen, why = choose_profile(registry.profiles, machine(profile))
            click.echo(f"auto on {gpu_name(profile)!r} chooses {chosen.name}: {why}")
    elif name in registry.strategies:
        works = [
            p
            for p in registry.profiles.values()
            if registry.strategies[name].available(machine(p), p) is None
        ]
        if not works:
            raise PluginError(
                f"strategy {name!r} is available on none of the {len(registry.profiles)} profiles"
            )
        profile = next((p for p in works if name in [s.rstrip("?") for s in p.strategies]), works[0])
        slot = registry.strategies[name].slot
        rivals = [s.rstrip("?") for s in profile.strategies]
        conflicts = registry.strategies[name].conflicts
        rivals = [
            s
            for s in rivals
            if s in conflicts or (s != name and slot and registry.strategies[s].slot == slot)
        ]
        choice = StrategyChoice(add=[name], remove=rivals)
        params = project.params.model_copy(
            update={"hardware": HardwareParams(profile=profile.name, strategies=choice)}
        )
    else:
        known = ", ".join(sorted([*registry.profiles, *registry.strategies]))
        raise UserError(f"no profile or strategy {name!r}. Known: {known}")
    for line in plan_lines(resolve(params, machine(profile), registry)):
        click.echo(line)
    click.echo(f"{name} works")


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
    )


def gpu_name(profile: HardwareProfile) -> str:
    """A card's name that the profile's pattern matches: the pattern without its regular expression marks."""
    plain = re.sub(r"\(\?.*?\)|\\.|[\\^$*+?]", "", profile.match)
    return f"NVIDIA GeForce {plain.strip()}"


for sub in (list_, new, check):
    main.add_command(sub)
