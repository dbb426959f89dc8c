"""`tightfit plugins`: what is there, a start for your own, and a check of it on a machine you need not have."""

from __future__ import annotations

import contextlib
import json
import keyword
import re
import sys
from typing import Any

import click

from core.cli import command
from core.errors import PluginError, UserError
from core.hardware import derive_profile, read_facts
from core.hookspecs import Gpu, Strategy
from core.plugin_check import check as check_plugin
from core.plugin_check import unknown_name
from core.plugins import Plugin, Registry
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
        strategies=("bf16", "muon", "accumulation", "allocator", "loader", "cleanup"),
    )
'''

CARD_TEMPLATE = '''"""{card}: the card of this machine, as its driver describes it."""

from core.hookspecs import HardwareProfile, hookimpl


@hookimpl
def hardware_profiles():
    return HardwareProfile(
        name="{name}",
        match={match},
        vram_gib={vram_gib},
        compute_capability={compute_capability},
        bandwidth_gbs={bandwidth_gbs},
        tflops={tflops},
        strategies={strategies},
        source={source},
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
    """List, show, create and check plugins."""


@command("list")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def list_(project: Project, as_json: bool) -> None:
    """Every plugin found, what it declares, its hooks, and why a broken one failed (exit code 3)."""
    registry = Registry.load(project)
    if as_json:
        click.echo(json.dumps([vars(p) for p in registry.plugins], indent=2))
    else:
        for plugin in registry.plugins:
            state = "off " if plugin.disabled else "FAIL" if plugin.error else "ok  "
            click.echo(f"{state} {plugin.name} {plugin.version}".rstrip() + f"  {declares(plugin)}")
    if registry.broken():
        raise PluginError(registry.broken(), title="plugins that do not load")


def declares(plugin: Plugin) -> str:
    """What a plugin's hooks declare: "strategies: bf16 (adjust_plan, accelerator_kwargs)"."""
    names = {
        "hardware_profiles": plugin.profiles,
        "strategies": [f"{name} ({', '.join(hooks)})" for name, hooks in plugin.runtime_hooks.items()],
    }
    return "; ".join(f"{hook}: {', '.join(names[hook]) or 'none'}" for hook in plugin.hooks)


@command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def show(project: Project, name: str, as_json: bool) -> None:
    """All about a profile, a strategy or a plugin: tightfit plugins show bf16"""
    registry = Registry.load(project)
    found = descriptions(registry, name)
    if not found:
        hint = " (some plugins do not load: tightfit plugins list)" if registry.broken() else ""
        raise UserError(unknown_name(registry, name) + hint)
    if as_json:
        click.echo(json.dumps(found, indent=2, default=str))
        return
    for thing in found:
        for key, value in thing.items():
            lines = (", ".join(value) if isinstance(value, list) else str(value)).splitlines() or [""]
            for label, line in zip([key, *[""] * len(lines)], lines, strict=False):
                click.echo(f"{label:<18} {line}".rstrip())


def descriptions(registry: Registry, name: str) -> list[dict[str, Any]]:
    """The plugin, profile and strategy of this name, as far as there are such."""
    found: list[dict[str, Any]] = [{"kind": "plugin", **vars(p)} for p in registry.plugins if p.name == name]
    if name in registry.profiles:
        fields = {**vars(registry.profiles[name]), "strategies": list(registry.profiles[name].strategies)}
        plugin = registry.owner("hardware profile", name)
        found.append({"kind": "hardware profile", **fields, **origin(plugin), "hooks": plugin.hooks})
    if name in registry.strategies:
        strategy, plugin = registry.strategies[name], registry.owner("strategy", name)
        hooks = plugin.runtime_hooks[name]
        found.append({"kind": "strategy", **attributes(strategy), **origin(plugin), "hooks": hooks})
        found[-1]["doc"] = type(strategy).__doc__ or plugin.doc
    return found


def attributes(strategy: Strategy) -> dict[str, Any]:
    return {
        "name": strategy.name,
        "phase": strategy.phase.name,
        "slot": strategy.slot,
        "affects": strategy.affects,
        "requires": list(strategy.requires),
        "conflicts": dict(strategy.conflicts),
        "after": list(strategy.after),
        "options": dict(strategy.defaults),
    }


def origin(plugin: Plugin) -> dict[str, str]:
    return {
        "plugin": plugin.name,
        "version": plugin.version,
        "file": plugin.file,
        "sha256": plugin.sha256,
        "doc": plugin.doc,
    }


@command("new")
@click.argument("name")
@click.option("--strategy", is_flag=True, help="A strategy to fill in, instead of a hardware profile.")
def new(project: Project, name: str, strategy: bool) -> None:
    """Write a profile of this machine's card to start from, or a strategy: tightfit plugins new rtx3070"""
    title = name.replace("_", " ").title().replace(" ", "") if strategy else name.upper()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "auto" or keyword.iskeyword(title):
        raise UserError(
            f"name: {name!r} should be lower case letters, digits and '_', "
            "begin with a letter, and be no word of Python's"
        )
    folder = project.plugins / ("strategies" if strategy else "hardware")
    path = folder / f"{name}.py"
    if path.exists():
        raise UserError(f"{path.relative_to(project.root)} is there already; choose another name")
    card = None if strategy else read_facts().gpu
    if strategy:
        source = STRATEGY_TEMPLATE.format(name=name, title=title)
    elif card:
        source = profile_source(name, card)
    else:
        match = title.replace("RTX", "RTX ").replace("GTX", "GTX ")
        source = HARDWARE_TEMPLATE.format(name=name, title=title, match=match)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8", newline="\n")
    if card:
        click.echo(f"found {card.name}")
    elif not strategy:
        click.echo("no NVIDIA card found here: the figures in the file are examples, put in your card's")
    click.echo(
        f"wrote {path.relative_to(project.root).as_posix()}; edit it, then: tightfit plugins check {name}"
    )


def profile_source(name: str, card: Gpu) -> str:
    """A plugin file that describes a card of this machine."""
    profile = derive_profile(card)
    values = {key: value if isinstance(value, float) else code(value) for key, value in vars(profile).items()}
    values |= {"name": name, "match": code(re.sub(r"([^\w\s-])", r"\\\1", card.name) + "$")}
    return CARD_TEMPLATE.format(card=card.name, **values)


def code(value: Any) -> str:
    """Python source of a value, with double quotes around strings."""
    return repr(value).replace("'", '"')


@command("check")
@click.argument("target")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def check(project: Project, target: str, as_json: bool) -> None:
    """Load, plan and train ten steps on the CPU with a plugin file, a profile or a strategy."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = check_plugin(project, target, (lambda line: None) if as_json else click.echo)
    if as_json:
        click.echo(json.dumps(result.to_dict(target), indent=2))
    if result.problems:
        raise PluginError(result.problems, title=f"{target} does not work")
    if not as_json:
        click.echo(f"{target} works")


for sub in (list_, show, new, check):
    main.add_command(sub)
