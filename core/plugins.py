"""Finding plugins, checking them for their author, and looking things up in them.

Order: `plugins/hardware/*.py`, `plugins/strategies/*.py` (sorted; names with a leading "_" are skipped), then pip
entry points in the group `tightfit`. Bundled plugins take the same way as a user's own file. One bad plugin never
hides the others: every problem is collected, with file and line.

We load entry points ourselves because pluggy's loader stops at the first broken package and silently drops the second
of two with one name (pluggy 1.7, `PluginManager.load_setuptools_entrypoints`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import math
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from core.errors import PluginError, TightfitError, did_you_mean
from core.hookspecs import (
    API_VERSION,
    PROJECT,
    DiscoverySpecs,
    HardwareProfile,
    Phase,
    RuntimeSpecs,
    Strategy,
)
from core.plugin_guard import guard, line_of, short
from core.project import Project

DISABLE_VARIABLE = "TIGHTFIT_DISABLE_PLUGINS"
PATIENCE = 10.0
"""Seconds that a plugin may take to load before the user is told which one it is."""


def hook_signatures(specs: type) -> dict[str, list[str]]:
    """{hook: its argument names} of a class of hook specifications."""
    return {
        name: [p for p in inspect.signature(function).parameters if p != "self"]
        for name, function in vars(specs).items()
        if hasattr(function, f"{PROJECT}_spec")
    }


DISCOVERY_HOOKS = hook_signatures(DiscoverySpecs)
RUNTIME_HOOKS = hook_signatures(RuntimeSpecs)


@dataclass
class Plugin:
    """One file or entry point, and what became of it."""

    name: str
    version: str = ""
    sha256: str = ""
    """Of its source file: part of the plan, so that editing a plugin in use reruns training."""
    profiles: list[str] = field(default_factory=list)
    strategies: list[str] = field(default_factory=list)
    error: str = ""
    disabled: bool = False
    file: str = ""
    """Its source file."""
    doc: str = ""
    hooks: list[str] = field(default_factory=list)
    """Discovery hooks of the module."""
    runtime_hooks: dict[str, list[str]] = field(default_factory=dict)
    """{strategy: its hooks}."""


class Registry:
    """Every hardware profile and strategy that was found."""

    def __init__(self) -> None:
        self.plugins: list[Plugin] = []
        self.profiles: dict[str, HardwareProfile] = {}
        self.strategies: dict[str, Strategy] = {}
        self._owner: dict[tuple[str, str], Plugin] = {}
        self._disabled = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",")}

    @classmethod
    def load(cls, project: Project, entry_points: bool = True) -> Registry:
        """Load the project's plugin files and the installed entry points."""
        registry = cls()
        for kind in ("hardware", "strategies"):
            for path in sorted((project.plugins / kind).glob("*.py")):
                if not path.name.startswith("_"):
                    registry.add_file(path, path.relative_to(project.root).as_posix())
        if entry_points:
            registry._add_entry_points()
        return registry

    def add_file(self, path: Path, name: str) -> None:
        """Load one plugin file; `name` is what messages call it."""
        self._add(name, lambda: _import_file(path, name))

    def _add_entry_points(self) -> None:
        found: dict[str, importlib.metadata.Distribution] = {}
        for distribution in importlib.metadata.distributions():
            package = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
            found.setdefault(package, distribution)  # it is listed once per sys.path entry that has it
        for package, distribution in sorted(found.items()):  # whatever order the disk lists them in
            for entry in sorted(distribution.entry_points):
                if entry.group == PROJECT:
                    self._add(f"{package}/{entry.name}", entry.load, distribution.version)

    def _add(self, name: str, load: Callable[[], Any], version: str = "") -> None:
        plugin = Plugin(name, version)
        self.plugins.append(plugin)
        if name in self._disabled:
            plugin.disabled = True
            return
        torch_before = "torch" in sys.modules
        try:
            with _patience(name):
                module = load()
                plugin.sha256 = _source_sha256(module)
                plugin.file, plugin.doc = inspect.getfile(module), inspect.getdoc(module) or ""
                profiles, strategies = _declared(module, name)
            if "torch" in sys.modules and not torch_before:
                raise PluginError(
                    f"{name}: imports torch when it is loaded. Import it inside the hook: settings such as the "
                    "allocator's must be in the environment before torch is."
                )
            self._require_free("hardware profile", profiles, self.profiles, plugin)
            self._require_free("strategy", strategies, self.strategies, plugin)
            self._enter("hardware profile", profiles, self.profiles, plugin)
            self._enter("strategy", strategies, self.strategies, plugin)
            plugin.profiles = [p.name for p in profiles]
            plugin.strategies = [s.name for s in strategies]
            plugin.hooks = implemented(module, DISCOVERY_HOOKS)
            plugin.runtime_hooks = {s.name: implemented(s, RUNTIME_HOOKS) for s in strategies}
            for s in strategies:
                guard(s, ["available", *plugin.runtime_hooks[s.name]], name, plugin.file)
        except (Exception, SystemExit) as error:  # whatever a plugin does, the others still load
            plugin.error = str(error) if isinstance(error, PluginError) else _where_it_failed(error, name)

    def _require_free(self, kind: str, found: list[Any], known: dict[str, Any], plugin: Plugin) -> None:
        names = [thing.name for thing in found]
        for name in names:
            if names.count(name) > 1:
                raise PluginError(f"{plugin.name}: declares the {kind} {name!r} twice. Rename one of them.")
            if name in known:
                other = self._owner[kind, name].name
                raise PluginError(
                    f"{plugin.name}: {kind} {name!r} is already defined by {other}. Rename it, or switch the other "
                    f"off with the environment variable {DISABLE_VARIABLE}={other}"
                )

    def _enter(self, kind: str, found: list[Any], known: dict[str, Any], plugin: Plugin) -> None:
        known.update({thing.name: thing for thing in found})
        self._owner.update({(kind, thing.name): plugin for thing in found})

    def profile(self, name: str) -> HardwareProfile:
        """Look up a hardware profile. Raises PluginError with the nearest name."""
        if name not in self.profiles:
            raise PluginError(self._unknown("hardware profile", name, self.profiles, "hardware.profile"))
        return self.profiles[name]

    def unknown_strategy(self, name: str, key: str) -> str:
        """The problem to report when `key` in params.yaml (or a profile) names a strategy that is not there."""
        return self._unknown("strategy", name, self.strategies, key)

    def _unknown(self, kind: str, name: str, known: Iterable[str], key: str) -> str:
        near = did_you_mean(name, known)
        return f"{key}: unknown {kind} {name!r}.{near} Known: {', '.join(sorted(known))}"

    def owner(self, kind: str, name: str) -> Plugin:
        """The plugin that declares the "hardware profile" or "strategy" of this name."""
        return self._owner[kind, name]

    def broken(self) -> list[str]:
        """One line for every plugin that did not load, with the way out."""
        return [
            f"{p.error} (fix it, or switch it off with {DISABLE_VARIABLE}={p.name})"
            for p in self.plugins
            if p.error
        ]


def implemented(thing: Any, hooks: Iterable[str]) -> list[str]:
    """Which of the hooks a module or a strategy has, in their own order."""
    return [hook for hook in hooks if hasattr(getattr(thing, hook, None), f"{PROJECT}_impl")]


@contextmanager
def _patience(name: str) -> Iterator[None]:
    """Tell the user which plugin hangs. It is not ended: nothing can end a part of its own process safely."""

    def tell() -> None:
        print(
            f"{name} has been loading for {PATIENCE:g} s. Ctrl-C ends the wait; {DISABLE_VARIABLE}={name} switches it "
            "off. Whatever takes so long belongs into a hook.",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(PATIENCE, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _import_file(path: Path, name: str) -> ModuleType:
    module_name = "_tightfit_plugin_" + re.sub(r"\W", "_", name)
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # a plugin's own dataclasses look themselves up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _source_sha256(module: Any) -> str:
    """Hex sha256 of the module's source with LF line ends, so that a checkout's line ends do not matter."""
    source = Path(inspect.getfile(module)).read_bytes()
    return hashlib.sha256(source.replace(b"\r\n", b"\n")).hexdigest()


def _declared(module: Any, name: str) -> tuple[list[HardwareProfile], list[Strategy]]:
    """Check a plugin module and return what it declares. Raises PluginError."""
    wanted = getattr(module, "PLUGIN_API", API_VERSION)
    if not (isinstance(wanted, tuple) and len(wanted) == 2 and all(isinstance(n, int) for n in wanted)):
        raise PluginError(f"{name}: PLUGIN_API {wanted!r} must be a pair of numbers such as {API_VERSION}.")
    if wanted[0] != API_VERSION[0] or wanted > API_VERSION:
        raise PluginError(
            f"{name}: wants plugin API {'.'.join(map(str, wanted))}, this version offers "
            f"{'.'.join(map(str, API_VERSION))}."
        )
    hooks = _check_hooks(module, name, DISCOVERY_HOOKS, "belongs on a Strategy, as a method")
    if not hooks:
        raise PluginError(
            f"{name}: no @hookimpl function found. A plugin declares hardware_profiles() or strategies()."
        )
    profiles = [_profile(p, name) for p in _ask(module, "hardware_profiles", name)]
    strategies = [_strategy(s, name) for s in _ask(module, "strategies", name)]
    return profiles, strategies


def _ask(module: Any, hook: str, name: str) -> list[Any]:
    """What a discovery hook of the module declares."""
    try:
        return many(getattr(module, hook)()) if hasattr(module, hook) else []
    except TightfitError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(_where_it_failed(error, name, f"{hook}() failed: ")) from error


def _check_hooks(thing: Any, label: str, hooks: Mapping[str, list[str]], elsewhere: str) -> list[str]:
    """Return the hooks that `thing` implements.

    Raises PluginError for what pluggy would ignore or report unhelpfully: a misspelt hook or argument, an argument
    with a default value, and a hook without its decorator.
    """
    known = {**DISCOVERY_HOOKS, **RUNTIME_HOOKS}
    found = []
    for attribute, function in inspect.getmembers(thing, inspect.isroutine):
        marker = getattr(function, f"{PROJECT}_impl", None)
        if marker is None:
            if attribute in hooks and _defined_by_plugin(thing, attribute):
                raise PluginError(
                    f"{line_of(function)}: {label}: {attribute}() lacks @hookimpl, so it would never be called."
                )
            continue
        if marker.get("specname"):
            raise PluginError(
                f"{line_of(function)}: {label}: name the method {marker['specname']}() instead of using specname."
            )
        changed = [key for key in ("wrapper", "hookwrapper", "tryfirst", "trylast") if marker.get(key)]
        if changed:
            raise PluginError(
                f"{line_of(function)}: {label}: {attribute}() asks for {changed[0]}; a strategy's phase and `after` "
                "decide the order, write @hookimpl alone."
            )
        hook = attribute
        if hook not in known and marker.get("optionalhook"):
            continue
        if hook not in known:
            near = did_you_mean(hook, hooks)
            raise PluginError(
                f"{line_of(function)}: {label}: no hook {hook!r}.{near} Hooks: {', '.join(sorted(hooks))}"
            )
        if hook not in hooks:
            raise PluginError(f"{line_of(function)}: {label}: the hook {hook!r} {elsewhere}.")
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name not in hooks[hook]:
                near = did_you_mean(parameter.name, hooks[hook])
                raise PluginError(
                    f"{line_of(function)}: {label}: hook {hook!r} has no argument {parameter.name!r}.{near} "
                    f"It may take: {', '.join(hooks[hook]) or 'nothing'}"
                )
            if parameter.default is not parameter.empty:
                raise PluginError(
                    f"{line_of(function)}: {label}: argument {parameter.name!r} of hook {hook!r} has a default value; "
                    f"remove '={parameter.default!r}', hooks are called with every argument they name."
                )
        found.append(hook)
    return found


def _defined_by_plugin(thing: Any, attribute: str) -> bool:
    owners = [thing] if inspect.ismodule(thing) else type(thing).__mro__
    return any(attribute in vars(owner) for owner in owners if owner is not Strategy)


def _profile(value: Any, name: str) -> HardwareProfile:
    if isinstance(value, Mapping):
        known = [f.name for f in fields(HardwareProfile)]
        unknown = [key for key in value if key not in known]
        if unknown:
            near = did_you_mean(unknown[0], known)
            raise PluginError(
                f"{name}: a hardware profile has no field {unknown[0]!r}.{near} Fields: {', '.join(known)}"
            )
        value = HardwareProfile(**value)
    if not isinstance(value, HardwareProfile):
        raise PluginError(f"{name}: hardware_profiles() must return HardwareProfile or dict, not {value!r}.")
    if isinstance(value.compute_capability, list):  # as JSON has it
        value = replace(value, compute_capability=tuple(value.compute_capability))
    problems = _wrong_types(value) or _wrong_values(value)
    if problems:
        raise PluginError(f"{name}: hardware profile {value.name!r}: " + "; ".join(problems))
    options = {strategy: dict(given) for strategy, given in value.options.items()}
    return replace(value, tflops=dict(value.tflops), options=options)  # ours: nobody else holds these dicts


def _wrong_types(p: HardwareProfile) -> list[str]:
    def number(x: Any) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and x >= 0

    capability, problems = p.compute_capability, []
    for key in ("name", "device", "match", "source"):
        if not isinstance(getattr(p, key), str):
            problems.append(f"{key} {getattr(p, key)!r} must be a string")
    for key in ("vram_gib", "bandwidth_gbs", "vram_budget"):
        if not number(getattr(p, key)):
            problems.append(f"{key} {getattr(p, key)!r} must be a number, 0 or more")
    if not (
        isinstance(capability, tuple) and len(capability) == 2 and all(isinstance(n, int) for n in capability)
    ):
        problems.append(f"compute_capability {capability!r} must be a pair such as (8, 6)")
    if not (isinstance(p.tflops, Mapping) and all(number(rate) for rate in p.tflops.values())):
        problems.append(f"tflops {p.tflops!r} must be numbers by dtype, such as {{'bf16': 30.2}}")
    if not (isinstance(p.options, Mapping) and all(isinstance(o, Mapping) for o in p.options.values())):
        problems.append(f"options {p.options!r} must be {{strategy: {{option: value}}}}")
    return problems


def _wrong_values(p: HardwareProfile) -> list[str]:
    problems = []
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", p.name) or p.name == "auto":
        problems.append(f"name {p.name!r} must be lower case letters, digits, '_', '-', '.', and not 'auto'")
    if p.device not in ("cuda", "cpu"):
        problems.append(f"device {p.device!r} must be 'cuda' or 'cpu'")
    if p.device == "cuda" and not p.vram_gib > 0:
        problems.append("vram_gib is missing: the card's memory in GiB")
    if p.device == "cuda" and p.compute_capability[0] < 3:
        problems.append(f"compute_capability {p.compute_capability!r} must be a pair such as (8, 6)")
    if not 0 < p.vram_budget <= 1:
        problems.append(f"vram_budget {p.vram_budget!r} must be a share between 0 and 1")
    if isinstance(p.strategies, str):
        problems.append(f"strategies {p.strategies!r} must be a tuple of names: ({p.strategies!r},)")
    elif not (isinstance(p.strategies, list | tuple) and all(isinstance(s, str) for s in p.strategies)):
        problems.append(f"strategies {p.strategies!r} must be a tuple of names")
    try:
        re.compile(p.match)
    except re.error as e:
        problems.append(f"match {p.match!r} is no regular expression: {e}")
    unknown_dtypes = set(p.tflops) - {"fp32", "fp16", "bf16"}
    if unknown_dtypes:
        problems.append(f"tflops has {sorted(unknown_dtypes)}; known: fp32, fp16, bf16")
    return problems


def _strategy(value: Any, name: str) -> Strategy:
    if isinstance(value, type):
        raise PluginError(
            f"{name}: strategies() returned the class {value.__name__}; return {value.__name__}()."
        )
    if not isinstance(value, Strategy) or not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", value.name or ""):
        raise PluginError(
            f"{name}: strategies() must return Strategy instances whose name is lower case letters, digits, '_', '-' "
            f"or '.', not {getattr(value, 'name', value)!r}."
        )
    problems = []
    if value.affects not in ("recipe", "execution"):
        problems.append(f"affects {value.affects!r} must be 'recipe' or 'execution'")
    if not isinstance(value.phase, Phase):
        problems.append(f"phase {value.phase!r} must be one of Phase: {', '.join(p.name for p in Phase)}")
    for key in ("requires", "after"):
        given = getattr(value, key)
        if not isinstance(given, list | tuple) or not all(isinstance(s, str) for s in given):
            problems.append(f"{key} {given!r} must be a tuple of names, such as ('bf16',)")
    for key in ("conflicts", "defaults"):
        given = getattr(value, key)
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            problems.append(f"{key} {given!r} must be a dict with names as keys")
    if not isinstance(value.slot, str):
        problems.append(f"slot {value.slot!r} must be a string")
    if type(value.rung) is not int or value.rung < 0:
        problems.append(f"rung {value.rung!r} must be a whole number, 0 or more")
    if not isinstance(value.mid_run, bool):
        problems.append(f"mid_run {value.mid_run!r} must be True or False")
    if problems:
        raise PluginError(f"{name}: strategy {value.name!r}: " + "; ".join(problems))
    hooks = _check_hooks(
        value,
        f"strategy {value.name!r}",
        RUNTIME_HOOKS,
        "belongs at the top of the module, not on a Strategy",
    )
    for has, lacks in (("save_state", "load_state"), ("load_state", "save_state")):
        if has in hooks and lacks not in hooks:
            raise PluginError(
                f"{line_of(getattr(value, has))}: strategy {value.name!r}: {has}() is of no use without {lacks}()."
            )
    return value


def many(value: Any) -> list[Any]:
    """None → [], one thing → [thing], a list, tuple or generator → list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) or inspect.isgenerator(value) else [value]


def _where_it_failed(error: BaseException, name: str, what: str = "") -> str:
    """`file:line: what`, where the line is the deepest one outside the import machinery."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{short(error.filename)}:{error.lineno}: SyntaxError: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(".py")]
    frames = [f for f in frames if Path(f.filename) != Path(__file__)]
    where = f"{short(frames[-1].filename)}:{frames[-1].lineno}" if frames else name
    who = "" if where.startswith(name) else f" {name}:"
    return f"{where}:{who} {what}{type(error).__name__}: {error}"
