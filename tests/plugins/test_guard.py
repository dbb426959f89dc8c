"""The guard around a strategy: what passes it, what it refuses, and whose fault it says that was."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import make_project

import core.plan
import core.plugins
from core.cli import main
from core.errors import PluginError, UserError
from core.hookspecs import GIB, Build, Facts, Gpu, HardwareProfile, Phase, Plan, Strategy, hookimpl
from core.memory.ladder import rungs_of
from core.params import HardwareParams
from core.plan import accelerator_kwargs, load_state, plan_json, resolve, runtime, saved_state
from core.plugin_guard import HookError, guard
from core.plugins import RUNTIME_HOOKS, Registry
from core.project import Project

FACTS = Facts(cores=2, ram_bytes=8 * GIB)
WritePlugin = Callable[[str, str], str]


def guarded(*strategies: Strategy) -> list[Strategy]:
    """As if they had been loaded from mine.py."""
    for s in strategies:
        hooks = [h for h in RUNTIME_HOOKS if hasattr(getattr(s, h, None), "tightfit_impl")]
        guard(s, ["available", *hooks], "plugins/strategies/mine.py", __file__)
    return list(strategies)


@pytest.fixture
def plan(project: Project) -> Plan:
    make_project(project.root, hardware={"profile": "cpu"})
    return resolve(Project(project.root).params, FACTS, Registry.load(project, entry_points=False))


def tiny(plan: Plan) -> Build:
    import torch

    model = torch.nn.Linear(2, 2)
    return Build(plan, SimpleNamespace(device=torch.device("cpu")), model, model, lr=0.1)


def call(strategy: Strategy, hook: str, plan: Plan, **given: Any) -> Any:
    """Call a hook the way the trainer does, as the only strategy."""
    plan.active = guarded(strategy)
    known = {
        "plan": plan,
        "facts": FACTS,
        "build": tiny(plan),
        "step": 3,
        "metrics": {"loss": 2.0},
        "state": {},
        **given,
    }
    return getattr(runtime(plan).hook, hook)(**{name: known[name] for name in RUNTIME_HOOKS[hook]})


def raising(hook: str, error: BaseException) -> Strategy:
    @hookimpl
    def method(self: Strategy) -> None:
        raise error

    return type("Mine", (Strategy,), {"name": "mine", hook: method})()


# ---- what passes


@pytest.mark.parametrize("hook", RUNTIME_HOOKS)
@pytest.mark.parametrize(
    "error",
    [
        UserError("mend your params"),
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        KeyboardInterrupt(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_others_handle_passes_as_it_is(plan: Plan, hook: str, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        call(raising(hook, error), hook, plan)
    assert caught.value is error


@pytest.mark.parametrize("hook", RUNTIME_HOOKS)
@pytest.mark.parametrize(
    "error", [ValueError("two\nlines"), SystemExit(0), StopIteration(), AssertionError()]
)
def test_anything_else_is_blamed(plan: Plan, hook: str, error: BaseException) -> None:
    line = raising.__code__.co_firstlineno + 3
    with pytest.raises(HookError) as caught:
        call(raising(hook, error), hook, plan)
    said = str(caught.value)
    assert said.startswith(f"plugins/strategies/mine.py:{line}: {hook}() failed: {type(error).__name__}"), (
        said
    )
    assert said.endswith("hardware.strategies.remove: [mine]; or mend or delete plugins/strategies/mine.py")
    assert caught.value.exit_code == 3 and caught.value.__cause__ is error and "\n" not in said


def test_an_instance_that_is_loaded_again_is_guarded_once(plan: Plan) -> None:
    strategy = raising("on_train_end", ValueError())
    for _ in range(3):
        guarded(strategy)
    assert not hasattr(strategy.on_train_end.unguarded, "unguarded")  # type: ignore[attr-defined]


def test_a_frozen_dataclass_may_be_a_strategy(plan: Plan) -> None:
    @dataclasses.dataclass(frozen=True)
    class Frozen(Strategy):
        name: str = "mine"

        @hookimpl
        def on_train_end(self) -> None:
            raise ValueError

    with pytest.raises(HookError):
        call(Frozen(), "on_train_end", plan)


def test_a_call_without_pluggy_is_guarded_too(plan: Plan) -> None:
    """As of a rung's prepare_model in the middle of a run; the hook may leave out arguments."""
    (strategy,) = guarded(raising("prepare_model", ValueError("boom")))
    with pytest.raises(HookError, match="boom"):
        core.plan.call(strategy, "prepare_model", build=tiny(plan))


def test_a_rung_that_cannot_say_whether_it_is_available(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin(
        "strategies/mine.py",
        """
        from core.hookspecs import Strategy, hookimpl

        class Mine(Strategy):
            name, rung = "mine", 5

            def available(self, facts, profile):
                return facts.nothing

        @hookimpl
        def strategies():
            return Mine()
        """,
    )
    registry = Registry.load(project, entry_points=False)
    with pytest.raises(
        HookError, match=r"plugins/strategies/mine\.py:7: available\(\) failed: AttributeError"
    ):
        rungs_of(
            SimpleNamespace(active=[], profile=registry.profiles["cpu"]), FACTS, registry, HardwareParams()
        )  # type: ignore[arg-type]


# ---- step_context


class Context:
    """A context manager that can be told to raise, and that tries to swallow."""

    def __init__(self, at: str = "", error: BaseException | None = None) -> None:
        self.at, self.error = at, error

    def __enter__(self) -> None:
        if self.at == "enter":
            raise self.error or ValueError("mine")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if self.at == "exit":
            raise self.error or ValueError("mine")
        return True


def with_context(context: Any) -> Strategy:
    class Mine(Strategy):
        name = "mine"

        @hookimpl
        def step_context(self) -> Any:
            return context

    return Mine()


@contextmanager
def generator() -> Iterator[None]:
    try:
        yield
    finally:
        pass


class Reraises(Context):
    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        raise error


@pytest.mark.parametrize("context", [Context, generator, Reraises])
@pytest.mark.parametrize(
    "error", [ValueError("the run's"), RuntimeError("CUDA out of memory"), SystemExit(3)]
)
def test_an_error_of_the_run_inside_a_context_stays_what_it_is(
    plan: Plan, context: Callable[[], Any], error: BaseException
) -> None:
    (entered,) = call(with_context(context()), "step_context", plan)
    with pytest.raises(type(error)) as caught, entered:
        raise error
    assert caught.value is error


@pytest.mark.parametrize("at", ["enter", "exit"])
def test_an_error_of_the_context_itself_is_blamed(plan: Plan, at: str) -> None:
    (entered,) = call(with_context(Context(at)), "step_context", plan)
    with pytest.raises(HookError, match=r"step_context\(\) failed: ValueError: mine"), entered:
        pass
    (entered,) = call(with_context(Context(at, MemoryError())), "step_context", plan)
    with pytest.raises(MemoryError), entered:
        pass


def test_a_context_that_fails_because_the_run_failed(plan: Plan) -> None:
    (entered,) = call(with_context(Context("exit")), "step_context", plan)
    with pytest.raises(HookError, match="ValueError: mine"), entered:
        raise KeyError("the run's")


# ---- what is kept in a checkpoint


def keeping(state: Any, name: str = "mine") -> Strategy:
    class Keeps(Strategy):
        taken: Any = None

        @hookimpl
        def save_state(self, build: Build) -> Any:
            return state

        @hookimpl
        def load_state(self, state: Any) -> None:
            self.taken = state

    strategy = Keeps()
    strategy.name = name
    return strategy


def test_state_goes_out_and_comes_back_to_its_owner(plan: Plan) -> None:
    import torch

    mine = {"t": torch.arange(3), "x": {"deep": [1, 2.5, None, True, "ə", float("inf")]}}
    first, second, none = guarded(keeping(mine), keeping({"n": 1}, "other"), keeping(None, "none"))
    plan.active = [first, second, none]
    states = saved_state(plan, tiny(plan))
    assert states == {"mine": mine, "other": {"n": 1}}
    plan.active = [second, none]
    assert load_state(plan, tiny(plan), {**states, "gone": {}}) == ["mine", "gone"]
    assert (first.taken, second.taken, none.taken) == (None, {"n": 1}, None)  # type: ignore[attr-defined]
    assert second.taken is not states["other"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda torch: [1], "must return a dict of tensors and plain values, not [1]"),
        (lambda torch: {1: 2}, "whose keys are strings, not 1"),
        (lambda torch: {"x": object()}, "returned a object in 'x', which a checkpoint cannot hold"),
        (lambda torch: {"x": (1, 2)}, "a tuple (it would come back as a list: make it one) in 'x'"),
        (lambda torch: {"x": [{1: 2}]}, "a dict whose keys are not strings in 'x'"),
        (
            lambda torch: {"x": [torch.ones(1)]},
            "a tensor inside a list or dict (give it a key of its own) in 'x'",
        ),
        (
            lambda torch: {"x": torch.ones(1).to_sparse()},
            "a tensor of torch.float32, torch.sparse_coo in 'x'",
        ),
        (lambda torch: {"x": torch.ones(1, dtype=torch.complex64)}, "a tensor of torch.complex64"),
        (lambda torch: {"x": torch.float32}, "returned a dtype in 'x'"),
    ],
)
def test_state_that_would_not_come_back_is_refused(plan: Plan, make: Any, words: str) -> None:
    import torch

    plan.active = guarded(keeping(make(torch)))
    with pytest.raises(PluginError) as caught:
        saved_state(plan, tiny(plan))
    assert "save_state() " in str(caught.value) and words in str(caught.value)


# ---- what is returned and changed


def doing(hook: str, action: Callable[..., Any]) -> Strategy:
    arguments = ", ".join(RUNTIME_HOOKS[hook])
    scope: dict[str, Any] = {"action": action}
    exec(f"def {hook}(self, {arguments}):\n    return action({arguments})", scope)
    return type("Mine", (Strategy,), {"name": "mine", hook: hookimpl(scope[hook])})()


@pytest.mark.parametrize(
    "hook", [h for h in RUNTIME_HOOKS if h.startswith(("on_", "adjust", "load", "final"))]
)
def test_hooks_that_return_nothing(plan: Plan, hook: str) -> None:
    with pytest.raises(HookError, match=rf"{hook}\(\) must return nothing, not 3"):
        call(doing(hook, lambda *given: 3), hook, plan)


def test_metrics_that_the_log_cannot_hold_are_taken_back(plan: Plan) -> None:
    """The record is written all the same: else writing it would fail, and hide whose fault it was."""

    class Mine(Strategy):
        name = "mine"

        @hookimpl
        def on_step_end(self, build: Build, step: int, metrics: dict) -> None:
            metrics["mine"] = object()
            if step == 2:
                raise ValueError("boom")

    for step, words in ((1, "put a object"), (2, "boom")):
        metrics = {"loss": 2.0}
        with pytest.raises(HookError, match=words):
            call(Mine(), "on_step_end", plan, step=step, metrics=metrics)
        assert metrics == {"loss": 2.0}


@pytest.mark.parametrize("hook", ["on_step_end", "on_evaluate_end"])
def test_metrics_may_be_added_and_nothing_else(plan: Plan, hook: str) -> None:
    import numpy as np

    def act(change: Callable[[dict], Any]) -> None:
        def action(build: Build, step: int, metrics: dict) -> None:
            change(metrics)

        call(doing(hook, action), hook, plan)

    act(lambda m: m.update(mine=1, more=np.float64(2), loss=m["loss"]))
    for change in (lambda m: m.update(loss=1.0), lambda m: m.clear()):
        with pytest.raises(HookError, match=r"changed metrics\['loss'\], which is the run's own"):
            act(change)
    with pytest.raises(HookError, match=r"put a ndarray into metrics\['mine'\]"):
        act(lambda m: m.update(mine=np.ones(2)))


def test_notes_are_a_list_of_strings(plan: Plan) -> None:
    for notes in (None, [1], "text"):
        with pytest.raises(HookError, match=r"adjust_plan\(\) left .* as plan.notes; append strings to it"):
            call(
                doing("adjust_plan", lambda plan, facts, notes=notes: setattr(plan, "notes", notes)),
                "adjust_plan",
                plan,
            )
        plan.notes = []


def test_network_stays_and_model_is_a_module(plan: Plan) -> None:
    def lose(build: Build) -> None:
        build.model = None

    def swap(build: Build) -> None:
        import torch

        build.network = build.model = torch.nn.Linear(1, 1)

    for hook in ("prepare_model", "finalize_model"):
        with pytest.raises(HookError, match=r"left None as build\.model"):
            call(doing(hook, lose), hook, plan)
        with pytest.raises(HookError, match=r"replaced build\.network"):
            call(doing(hook, swap), hook, plan)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"cpu": False}, "must leave accelerate's cpu alone"),
        ({"mixed_precision": "fp99"}, "mixed_precision 'fp99'; known: no, fp16, bf16, fp8"),
        (["bf16"], "must return a dict of keyword arguments, not ['bf16']"),
    ],
)
def test_accelerators_arguments(plan: Plan, answer: Any, words: str) -> None:
    with pytest.raises(HookError) as caught:
        call(doing("accelerator_kwargs", lambda plan: answer), "accelerator_kwargs", plan)
    assert words in str(caught.value)


def asking(name: str, **kwargs: Any) -> Strategy:
    strategy = doing("accelerator_kwargs", lambda plan: kwargs)
    strategy.name = name
    return strategy


def test_accelerators_arguments_of_several_strategies(plan: Plan) -> None:
    one, two = asking("one", kwargs_handlers=[1], mixed_precision="bf16"), asking("two", kwargs_handlers=[2])
    plan.active = guarded(one, two)
    assert accelerator_kwargs(plan) == {"kwargs_handlers": [1, 2], "mixed_precision": "bf16"}
    plan.active = guarded(one, asking("three", mixed_precision="fp16"))
    with pytest.raises(
        PluginError, match=r"one and three disagree on accelerate's mixed_precision.*\[three\]"
    ):
        accelerator_kwargs(plan)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda plan: plan.set("batch_tokens", 1, reason="", by="mine"), "changed batch_tokens"),
        (
            lambda plan: plan.set("num_workers", 1, reason="", by="core"),
            "set num_workers in the name of 'core'",
        ),
        (lambda plan: plan.values.clear(), "removed batch_tokens, dtype, "),
        (lambda plan: setattr(plan, "micro_batches", (2, 3)), "left plan.micro_batches (2, 3)"),
        (lambda plan: setattr(plan, "micro_batches", ()), "left plan.micro_batches ()"),
        (lambda plan: plan.options.clear(), "changed plan.options"),
        (lambda plan: plan.active.reverse() or plan.active.append(1), "changed plan.active"),
        (lambda plan: plan.env.update(X=1), "changed plan.env"),
        (lambda plan: plan.skipped.update(x="y"), "changed plan.skipped"),
        (lambda plan: sys.modules.update(torch=sys), "imports torch, which is too early"),
    ],
)
def test_a_plan_changes_by_set_alone(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, action: Any, words: str
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    strategy = doing("adjust_plan", lambda plan, facts: [action(plan)].clear())
    plan.active = guarded(strategy)
    with pytest.raises(HookError) as caught:
        strategy.adjust_plan(plan, FACTS)  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert words in str(caught.value)


def test_notes_are_everybodys(plan: Plan) -> None:
    call(doing("check_plan", lambda plan, facts: plan.notes.append("a word")), "check_plan", plan)
    assert plan.notes[-1] == "a word"


# ---- at load


def test_a_file_that_hangs_is_named_while_it_does(
    project: Project,
    write_plugin: WritePlugin,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    name = write_plugin("strategies/slow.py", "import time\ntime.sleep(0.6)\n")
    monkeypatch.setattr(core.plugins, "PATIENCE", 0.1)
    registry = Registry()
    registry.add_file(project.root / name, name)
    said = capsys.readouterr().err
    assert (
        said.startswith(f"{name} has been loading for 0.1 s.")
        and f"{core.plugins.DISABLE_VARIABLE}={name}" in said
    )


def test_a_plugin_that_is_refused_declares_nothing(project: Project, write_plugin: WritePlugin) -> None:
    name = write_plugin(
        "hardware/both.py",
        """
        from core.hookspecs import HardwareProfile, Strategy, hookimpl

        class Loader(Strategy):
            name = "loader"

        @hookimpl
        def hardware_profiles():
            return HardwareProfile("mine", device="cpu")

        @hookimpl
        def strategies():
            return Loader()
        """,
    )
    registry = Registry()
    for path in (project.plugins / "strategies" / "loader.py", project.root / name):
        registry.add_file(path, path.relative_to(project.root).as_posix())
    assert "'loader' is already defined" in registry.plugins[-1].error
    assert "mine" not in registry.profiles and registry.plugins[-1].profiles == []


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ("vram_gib=float('nan')", "vram_gib nan"),
        ("bandwidth_gbs=-1", "bandwidth_gbs -1"),
        ("tflops={'fp32': float('inf')}", "tflops"),
    ],
)
def test_figures_that_cannot_be(project: Project, write_plugin: WritePlugin, fields: str, word: str) -> None:
    source = "from core.hookspecs import HardwareProfile, hookimpl\n\n@hookimpl\ndef hardware_profiles():\n"
    write_plugin("hardware/bad.py", source + f"    return HardwareProfile('bad', device='cpu', {fields})\n")
    (said,) = Registry.load(project, entry_points=False).broken()
    assert (word in said and "0 or more" in said) or word == "tflops"


@pytest.mark.parametrize(("body", "word"), [("rung = '5'", "rung '5'"), ("mid_run = 1", "mid_run 1")])
def test_attributes_of_another_type(
    project: Project, write_plugin: WritePlugin, body: str, word: str
) -> None:
    source = "from core.hookspecs import Strategy, hookimpl\n\nclass Mine(Strategy):\n    name = 'mine'\n"
    write_plugin(
        "strategies/mine.py", source + f"    {body}\n\n@hookimpl\ndef strategies():\n    return Mine()\n"
    )
    (said,) = Registry.load(project, entry_points=False).broken()
    assert word in said


def test_a_module_may_keep_the_dicts_it_gave(project: Project) -> None:
    shared = {"loader": {"workers": 1}}
    profile = HardwareProfile(
        "mine", device="cpu", tflops=types.MappingProxyType({"fp32": 1.0}), options=shared
    )
    ours = core.plugins._profile(profile, "mine.py")
    shared["loader"]["workers"] = 99
    assert ours.options == {"loader": {"workers": 1}} and ours.tflops == {"fp32": 1.0}


def test_ctrl_c_while_a_file_loads_ends_the_command(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("strategies/mine.py", "raise KeyboardInterrupt\n")
    result = CliRunner().invoke(main, ["plugins", "list"])
    assert result.exit_code == 75 and "interrupted" in result.output


# ---- two that want the same


def setting(name: str, value: int, phase: Phase = Phase.DATA, after: tuple[str, ...] = ()) -> str:
    return (
        f"class {name.title()}(Strategy):\n    name, phase, after = {name!r}, Phase.{phase.name}, {after!r}\n\n"
        "    @hookimpl\n    def adjust_plan(self, plan):\n"
        f"        plan.set('num_workers', {value}, reason='so', by=self.name)\n\n"
    )


def planned(project: Project, write_plugin: WritePlugin, *classes: str) -> tuple[Plan, Registry]:
    names = [c.split("name, phase, after = '")[1].split("'")[0] for c in classes]
    source = "from core.hookspecs import Phase, Strategy, hookimpl\n\n" + "".join(classes)
    made = ", ".join(f"{n.title()}()" for n in names)
    write_plugin("strategies/mine.py", source + f"@hookimpl\ndef strategies():\n    return [{made}]\n")
    hardware = {"profile": "cpu", "strategies": {"add": names, "remove": ["loader"]}}
    registry = Registry.load(project, entry_points=False)
    return resolve(make_project(project.root, hardware=hardware).params, FACTS, registry), registry


def test_a_later_phase_wins_and_says_over_what(project: Project, write_plugin: WritePlugin) -> None:
    later = setting("later", 2, Phase.LOOP)
    plan, registry = planned(project, write_plugin, later, setting("early", 1))
    assert (plan["num_workers"], plan.values["num_workers"].reason) == (2, "so; instead of 1 [early]")
    assert "so; instead of 1 [early] [later]" in plan_json(plan, registry)


def test_after_through_others_decides(project: Project, write_plugin: WritePlugin) -> None:
    middle = "class Middle(Strategy):\n    name, phase, after = 'middle', Phase.DATA, ('one',)\n\n"
    last = setting("last", 2, after=("middle",))
    plan, _ = planned(project, write_plugin, last, middle, setting("one", 1))
    assert plan["num_workers"] == 2


def test_equal_rank_is_no_problem_where_they_agree(project: Project, write_plugin: WritePlugin) -> None:
    plan, _ = planned(project, write_plugin, setting("one", 1), setting("two", 1))
    assert plan.values["num_workers"].reason == "so"
    with pytest.raises(PluginError, match="one sets num_workers to 1, two to 2, both in the phase DATA"):
        planned(project, write_plugin, setting("one", 1), setting("two", 2))


def test_workers_that_are_not_there_are_not_kept(project: Project, write_plugin: WritePlugin) -> None:
    keeps = setting("keeps", 0).replace("'num_workers', 0", "'persistent_workers', True")
    with pytest.raises(PluginError, match="keeps sets persistent_workers, but core sets num_workers to 0"):
        planned(project, write_plugin, keeps)


def test_a_missing_plugin_is_not_missed_besides(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("strategies/mine.py", "import nothing_of_that_name\n")
    hardware = {"profile": "cpu", "strategies": {"add": ["mine"]}}
    params = make_project(project.root, hardware=hardware, train={"batch_tokens": 100}).params
    with pytest.raises(PluginError) as caught:
        resolve(params, FACTS, Registry.load(project, entry_points=False))
    assert "unknown strategy" not in str(caught.value) and "train.batch_tokens: 100" in str(caught.value)


def test_two_profiles_for_one_card(project: Project, write_plugin: WritePlugin) -> None:
    path = project.plugins / "hardware" / "rtx2050.py"
    twin = path.read_text(encoding="utf-8").replace('"rtx2050"', '"twin"')
    write_plugin("hardware/twin.py", twin)
    registry = Registry.load(project, entry_points=False)
    facts = Facts(gpus=(Gpu("NVIDIA GeForce RTX 2050", 4 * GIB, (8, 6)),), torch_cuda="13.0")
    with pytest.raises(PluginError, match="between rtx2050 and twin, which match"):
        resolve(make_project(project.root).params, facts, registry)
