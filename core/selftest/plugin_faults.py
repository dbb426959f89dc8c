"""F22 to F25: plugins that raise, are misspelt, answer nonsense or get into each other's way."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from core.errors import PluginError, TightfitError
from core.hookspecs import GIB, Facts, Gpu
from core.params import HardwareParams
from core.plan import plan_json, resolve
from core.plugins import DISABLE_VARIABLE, DISCOVERY_HOOKS, PATIENCE, RUNTIME_HOOKS, Registry
from core.project import Project
from core.selftest.lab import SMALL, Ended, Lab, Outcome, Tally, fault, write_params

VARIABLE = "TIGHTFIT_REHEARSED_PLUGIN"
FILE = "plugins/strategies/rehearsed.py"
REMEDY = "hardware.strategies.remove: [rehearsed]"
PLUGIN = f'''
import os, sys, time

from core.hookspecs import Phase, Strategy, hookimpl

CASE = os.environ.get("{VARIABLE}", "")


def fail(hook):
    if CASE == f"raise {{hook}}":
        raise ValueError("rehearsed")
    if CASE == f"exit {{hook}}":
        sys.exit(0)


class Context:
    def __enter__(self):
        fail("enter")

    def __exit__(self, kind, error, trace):
        fail("leave")


class Rehearsed(Strategy):
    name, phase = "rehearsed", Phase.DATA
    after = ("loader",)
    count = 0

    def available(self, facts, profile):
        fail("available")
        return 3 if CASE == "available 3" else None

    @hookimpl
    def adjust_plan(self, plan, facts):
        fail("adjust_plan")
        if CASE == "dtype fp99":
            plan.set("dtype", "fp99", reason="rehearsed", by=self.name)
        if CASE == "micro_batch -3":
            plan.set("micro_batch", -3, reason="rehearsed", by=self.name)
        if CASE == "micro_batch 1e9":
            plan.set("micro_batch", 1e9, reason="rehearsed", by=self.name)
        if CASE == "num_workers two":
            plan.values["num_workers"] = plan.values["num_workers"].__class__("two", "rehearsed", self.name)
        if CASE == "misspelt key":
            plan.set("num_worker", 2, reason="rehearsed", by=self.name)
        if CASE == "plan.profile":
            plan.profile.tflops["fp32"] = 1e9
        if CASE == "plan.sequences":
            plan.sequences = 10**9
        if CASE == "facts.environ":
            facts.environ["HOME"] = "rehearsed"
        if CASE == "frozen":
            facts.cores = 10**9

    @hookimpl
    def configure_env(self):
        fail("configure_env")
        return ["REHEARSED=1"] if CASE == "env list" else None

    @hookimpl
    def check_plan(self):
        fail("check_plan")
        return 3 if CASE == "check 3" else None

    @hookimpl
    def accelerator_kwargs(self):
        fail("accelerator_kwargs")
        return {{"mixed_precison": "bf16"}} if CASE == "misspelt kwargs" else None

    @hookimpl
    def prepare_model(self, build):
        fail("prepare_model")
        return build.model if CASE == "model returned" else None

    @hookimpl
    def make_optimizer(self, build):
        fail("make_optimizer")
        return "adam" if CASE == "optimizer adam" else None

    @hookimpl
    def finalize_model(self, build):
        fail("finalize_model")
        if CASE == "model None":
            build.model = None

    @hookimpl
    def step_context(self):
        fail("step_context")
        return 3 if CASE == "context 3" else Context()

    @hookimpl
    def save_state(self, build):
        import torch

        fail("save_state")
        if CASE == "state object":
            return {{"count": self}}
        return {{"count": self.count, "tensor": torch.full((3,), float(self.count))}}

    @hookimpl
    def load_state(self, build, state):
        fail("load_state")
        assert state["tensor"].tolist() == 3 * [float(state["count"])]
        self.count = state["count"]

    @hookimpl
    def on_step_end(self, build, step, metrics):
        fail("on_step_end")
        self.count += 1
        if CASE == "metrics":
            metrics["loss"] = 0.0

    @hookimpl
    def on_evaluate_end(self, build):
        fail("on_evaluate_end")

    @hookimpl
    def on_train_end(self, build):
        fail("on_train_end")
        build.say(f"rehearsed: {{self.count}} calls")


@hookimpl
def hardware_profiles():
    fail("hardware_profiles")


@hookimpl
def strategies():
    fail("strategies")
    return Rehearsed()


fail("import")
if CASE == "hang":
    time.sleep({PATIENCE} + 2)
if CASE == "torch":
    sys.modules["torch"] = sys
'''
NOT_SIMULATED = ("save_state", "on_step_end", "on_evaluate_end")
LOGGED = 7
"""Steps that the small project logs: 1, and every second of 12."""


def with_plugin(lab: Lab, name: str) -> Project:
    """A small project with the plugin above switched on, and a plan."""
    project = lab.project(name)
    (project.root / FILE).write_text(PLUGIN, encoding="utf-8", newline="\n")
    strategies = SMALL["hardware"]["strategies"] | {"add": ["rehearsed"]}
    write_params(project.root, hardware={"strategies": strategies})
    ended = lab.run(project, "env-check")
    assert ended.code == 0, ended.out
    return project


def in_one_process(lab: Lab, project: Project, command: str, cases: Sequence[str]) -> list[Ended]:
    """Run `tightfit COMMAND` once for each case, one after another in a process that imports torch once."""
    out = lab.folder / f"cases-{project.root.name}"
    process = lab.context.Process(target=_run_cases, args=(str(project.root), command, list(cases), str(out)))
    process.start()
    process.join()
    return [Ended(*found) for found in json.loads(out.read_text(encoding="utf-8"))]


def _run_cases(root: str, command: str, cases: list[str], out: str) -> None:
    import torch
    from click.testing import CliRunner

    from core.cli import main
    from core.memory.simulate import fresh_accelerate

    os.chdir(root)
    torch.set_num_threads(1)
    found = []
    for case in cases:
        with fresh_accelerate():
            result = CliRunner().invoke(main, [command], env={VARIABLE: case})
        bug = result.exception is not None and not isinstance(result.exception, SystemExit)
        found.append((result.exit_code, result.output + bug * f"Traceback: {result.exception!r}"))
    Path(out).write_text(json.dumps(found), encoding="utf-8")


@fault("F22", "a plugin raises in one of its hooks, or ends the program")
def raising(lab: Lab, times: int) -> Outcome:
    """Each hook: exit code 3, and one message with file, line, hook, error and remedy; nothing half-applied."""
    tally, project = Tally(), with_plugin(lab, "F22")
    written = project.plan.read_bytes()
    planning = ("available", "adjust_plan", "configure_env", "check_plan")
    # load_state needs the checkpoints that those before it leave behind.
    late = ("load_state", "on_train_end")
    training = [h for h in RUNTIME_HOOKS if h not in planning + late]
    groups = {
        "env-check": [
            *(
                f"{way} {hook}"
                for hook in ("import", *DISCOVERY_HOOKS, *planning)
                for way in ("raise", "exit")
            ),
            *(f"raise {hook}" for hook in training if hook not in NOT_SIMULATED),
        ],
        "train": [f"raise {hook}" for hook in (*training, "enter", "leave", *late)],
    }
    forecasts = project.forecasts.read_bytes()
    for command, cases in groups.items():
        if command == "env-check":  # as for a plugin that was edited: memory is planned again
            project.forecasts.unlink()
        for case, ended in zip(cases, in_one_process(lab, project, command, cases), strict=True):
            tally.check(f"{command}, {case}: code {ended.code}", _names(ended, case))
        project.forecasts.write_bytes(forecasts)
    ended = lab.run(
        project, "train", environ={VARIABLE: "exit prepare_model"}
    )  # by a process's own exit code
    tally.check(f"train, exit prepare_model: code {ended.code}", _names(ended, "exit prepare_model"))
    tally.check("the plan is as it was", project.plan.read_bytes() == written)
    tally.check("nothing was exported", not project.final_model.exists())
    debug = lab.run(project, "env-check", "--debug", environ={VARIABLE: "raise adjust_plan"})
    tally.check("--debug shows the traceback", debug.code != 0 and "Traceback" in debug.out)
    ended = lab.run(project, "train")
    # The step whose on_step_end raised was saved before that: it is not done, nor told, again.
    whole = ended.code == 0 and f"rehearsed: {LOGGED - 1} calls" in ended.out
    tally.check(f"the run goes on: {ended.out[-300:]}", whole, lab.exact(project))
    return tally.outcome("every hook; afterwards the run went on to the same weights")


def _names(ended: Ended, case: str) -> bool:
    """Whether a message has all that a user needs."""
    way, hook = case.split()
    error = "ValueError: rehearsed" if way == "raise" else "SystemExit: 0"
    if hook in ("import", *DISCOVERY_HOOKS):
        words = [error, f"{DISABLE_VARIABLE}={FILE}"] + ([f"{hook}() failed"] if hook != "import" else [])
    else:
        words = [error, REMEDY, f"{'step_context' if hook in ('enter', 'leave') else hook}() "]
    return ended.code == 3 and ended.says(*words) and re.search(rf"{FILE}:\d+: ", ended.out) is not None


MISTAKES = {
    "wrong argument": ("def adjust_plan(self, plan, fact): pass", ["no argument 'fact'", "'facts'?"]),
    "misspelt hook": ("def ajust_plan(self): pass", ["no hook 'ajust_plan'", "'adjust_plan'?"]),
    "name twice": ("def check_plan(self): pass\n    name = 'loader'", ["'loader' is already defined by"]),
    "default value": ("def on_step_end(self, step=0): pass", ["'step'", "has a default value"]),
    "other order": ("def on_step_end(self): pass", ["asks for tryfirst", "`after`"]),
    "half a state": ("def save_state(self): pass", ["is of no use without load_state()"]),
}


@fault("F23", "a plugin with a wrong argument, a misspelt hook, or a name that is taken")
def misspelt(lab: Lab, times: int) -> Outcome:
    """Refused when it is loaded, with file, line and the nearest name; the other plugins load."""
    tally = Tally()
    for mistake, (method, words) in MISTAKES.items():
        project = _plain(lab, "F23")
        marker = "@hookimpl(tryfirst=True)" if mistake == "other order" else "@hookimpl"
        _strategy(project, "rehearsed", f"name = 'rehearsed'\n    {marker}\n    {method}")
        registry = Registry.load(project, entry_points=False)
        said = "\n".join(registry.broken())
        line = "" if mistake == "name twice" else "6: "
        named = f"{FILE}:{line}" in said and all(w in said for w in (*words, f"{DISABLE_VARIABLE}={FILE}"))
        tally.check(
            f"{mistake}: {said}", named and len(registry.broken()) == 1 and "cpu" in registry.profiles
        )
        tally.check(f"{mistake}: the plan", bool(_refusal(project, registry)))
    return tally.outcome()


PLANNED_NONSENSE = {
    "available 3": ["available() must return None or one sentence", "not 3"],
    "dtype fp99": ["adjust_plan()", "dtype 'fp99' must be 'fp32', 'fp16' or 'bf16'"],
    "micro_batch -3": ["adjust_plan()", "micro_batch -3 must be a whole number, 1 or more"],
    "micro_batch 1e9": ["adjust_plan()", "micro_batch 1000000000.0 must be a whole number"],
    "num_workers two": ["adjust_plan()", "num_workers 'two' must be a whole number, 0 or more"],
    "misspelt key": ["adjust_plan()", "no 'num_worker'. Did you mean 'num_workers'?"],
    "plan.profile": ["adjust_plan() changed plan.profile"],
    "plan.sequences": ["adjust_plan() changed plan.sequences"],
    "facts.environ": ["adjust_plan() changed facts.environ"],
    "frozen": ["adjust_plan() failed: FrozenInstanceError"],
    "env list": ["configure_env() must return {variable: (value, reason)}", "['REHEARSED=1']"],
    "check 3": ["check_plan() must return None, a sentence or a list of them, not 3"],
}
TRAINED_NONSENSE = {
    "misspelt kwargs": ["accelerator_kwargs()", "'mixed_precison'", "Did you mean 'mixed_precision'?"],
    "model returned": ["prepare_model() must return nothing", "set build.model instead"],
    "optimizer adam": ["make_optimizer() must return a torch.optim.Optimizer or None, not 'adam'"],
    "model None": ["finalize_model() left None as build.model"],
    "context 3": ["step_context() must return a context manager or None, not 3"],
    "state object": ["save_state() returned a Rehearsed in 'count', which a checkpoint cannot hold"],
    "metrics": ["on_step_end() changed metrics['loss']"],
}


@fault("F24", "a plugin returns nonsense, changes what it is given, hangs, or imports torch too early")
def nonsense(lab: Lab, times: int) -> Outcome:
    """Refused with the plugin's name, the value and the remedy; one that hangs is named while the user waits."""
    tally, project = Tally(), with_plugin(lab, "F24")
    hangs = lab.live(project, "env-check", environ={VARIABLE: "hang"})
    facts = Facts(cores=2, ram_bytes=8 * GIB, environ={"HOME": "here"})
    for case, words in PLANNED_NONSENSE.items():
        with mock.patch.dict(os.environ, {VARIABLE: case}):
            said = _refusal(project, Registry.load(project, entry_points=False), facts)
        tally.check(f"{case}: {said}", all(word in said for word in (FILE, REMEDY, *words)))
    with mock.patch.dict(sys.modules), mock.patch.dict(os.environ, {VARIABLE: "torch"}):
        sys.modules.pop("torch", None)
        (said,) = Registry.load(project, entry_points=False).broken()
    tally.check(f"torch: {said}", f"{FILE}: imports torch when it is loaded" in said)
    ends = in_one_process(lab, project, "train", list(TRAINED_NONSENSE))
    for (case, words), ended in zip(TRAINED_NONSENSE.items(), ends, strict=True):
        named = ended.code == 3 and ended.says(FILE, REMEDY, *words)
        tally.check(f"{case}: {ended.out[-300:]}", named)
    ended = hangs.end()
    named = ended.says(f"{FILE} has been loading for {PATIENCE:g} s", f"{DISABLE_VARIABLE}={FILE}")
    tally.check(f"hang: {ended.out[:300]}", ended.code == 0 and named)
    return tally.outcome()


SETS = """name, phase = "{name}", Phase.DATA
    after = {after}

    @hookimpl
    def adjust_plan(self, plan):
        plan.set("num_workers", {value}, reason="rehearsed", by=self.name)"""
CARD = {
    "match": "RTX 9050",
    "vram_gib": 8,
    "compute_capability": (8, 6),
    "strategies": ("accumulation",),
}


@fault("F25", "two plugins that want the same thing, loaded in any order", times=6, full=60)
def clashing(lab: Lab, times: int) -> Outcome:
    """The same plan, byte for byte, whatever the order; of two with equal rank neither wins, it is an error."""
    tally, project = Tally(), _plain(lab, "F25")
    for name, after, value in (("one", ("loader",), 1), ("two", ("one",), 2), ("three", ("two",), 3)):
        _strategy(project, name, SETS.format(name=name, after=after, value=value))
    choice = {"add": ["three", "one", "two"], "remove": ["threads", "bf16"]}
    hardware = HardwareParams.model_validate({"profile": "cpu", "strategies": choice})
    plans = {_planned(project, hardware, order) for order in _orders(project, times)}
    tally.check("one plan", len(plans) == 1)
    tally.check("its reason", "rehearsed; instead of 2 [two] [three]" in next(iter(plans)))

    _strategy(project, "two", SETS.format(name="two", after=("loader",), value=2))
    _strategy(project, "three", SETS.format(name="three", after=("two",), value=3))
    for order in _orders(project, times):
        said = _refusal(project, _load(project, order), hardware=hardware)
        words = ("one sets num_workers to 1, two to 2", "both in the phase DATA", "[one] or [two]", "`after`")
        tally.check(f"equal rank: {said}", all(word in said for word in words))

    for name in ("card_a", "card_b"):
        source = "from core.hookspecs import hookimpl\n\n\n@hookimpl\ndef hardware_profiles():\n"
        source += f"    return {CARD | {'name': name}}\n"
        (project.plugins / "hardware" / f"{name}.py").write_text(source, encoding="utf-8")
    facts = Facts(gpus=(Gpu("NVIDIA GeForce RTX 9050", 8 * GIB, (8, 6)),), torch_cuda="13.0")
    auto = HardwareParams(profile="auto")
    for order in _orders(project, times):
        said = _refusal(project, _load(project, order), facts, auto)
        tally.check(f"two profiles: {said}", "cannot choose between card_a and card_b" in said)
    return tally.outcome(f"{times} orders of loading")


def _plain(lab: Lab, name: str) -> Project:
    """A folder with params and the bundled plugins; no data."""
    project = Project(lab.folder / name)
    shutil.rmtree(project.root, ignore_errors=True)
    shutil.copytree(lab.plugins, project.plugins, ignore=shutil.ignore_patterns("__pycache__"))
    write_params(project.root)
    return project


def _strategy(project: Project, name: str, body: str) -> None:
    source = (
        "from core.hookspecs import Phase, Strategy, hookimpl\n\n\nclass Rehearsed(Strategy):\n"
        f"    {body}\n\n\n@hookimpl\ndef strategies():\n    return Rehearsed()\n"
    )
    (project.plugins / "strategies" / f"{name}.py").write_text(source, encoding="utf-8", newline="\n")


def _orders(project: Project, times: int) -> list[list[Path]]:
    """Orders in which the project's plugin files may be loaded: as they are, reversed, and shuffled."""
    files = sorted(project.plugins.glob("*/*.py"))
    rng, orders = random.Random(25), [files, files[::-1]]
    for _ in range(times - len(orders)):
        orders.append(rng.sample(files, len(files)))
    return orders[:times]


def _load(project: Project, order: Sequence[Path]) -> Registry:
    registry = Registry()
    for path in order:
        registry.add_file(path, path.relative_to(project.root).as_posix())
    return registry


def _planned(project: Project, hardware: HardwareParams, order: Sequence[Path]) -> str:
    registry = _load(project, order)
    params = project.params.model_copy(update={"hardware": hardware})
    return plan_json(resolve(params, Facts(cores=2, ram_bytes=8 * GIB), registry), registry)


def _refusal(
    project: Project, registry: Registry, facts: Facts | None = None, hardware: HardwareParams | None = None
) -> str:
    """What PluginError says of a plan; empty where there is a plan, or another error."""
    params = project.params
    if hardware is not None:
        params = params.model_copy(update={"hardware": hardware})
    try:
        resolve(params, facts or Facts(cores=2, ram_bytes=8 * GIB), registry)
    except PluginError as error:
        return str(error)
    except TightfitError:
        pass
    return ""
