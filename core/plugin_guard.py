"""Around every call of a strategy: what it raises gets an owner, what it returns is looked at, what it is given stays.

A strategy is guarded once, when it is loaded, so that whoever calls one of its hooks need not know. Errors that are
meant for the user (TightfitError) and running out of memory pass as they are: core.survive gives way to the latter.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from core.errors import PluginError, TightfitError, did_you_mean, is_out_of_memory
from core.hookspecs import Facts, HardwareProfile, Plan, Strategy, check_value

CORE_KWARGS = ("cpu", "gradient_accumulation_plugin", "gradient_accumulation_steps")
"""Of accelerate.Accelerator, what the plan decides."""
PRECISIONS = ("no", "fp16", "bf16", "fp8")


class HookError(PluginError):
    """A hook that failed or answered nonsense: which, where, and how to go on without it."""


class Nonsense(Exception):
    """What is wrong with what a hook returned or left behind; follows the hook's name in the message."""


@dataclass(frozen=True)
class Hook:
    """One strategy's implementation of a hook. plugin, file: what declares it, as messages call it and on the disk."""

    name: str
    strategy: str
    plugin: str
    file: str
    function: Callable[..., Any]

    @contextlib.contextmanager
    def blamed(self, simulated: bool = False) -> Iterator[None]:
        """Turn what is raised inside into a HookError. SystemExit too: with 0 it would pass for success."""
        try:
            yield
        except (Exception, SystemExit) as error:
            if isinstance(error, TightfitError) or is_out_of_memory(error):
                raise
            raise self.error(error, simulated) from error

    def error(self, error: BaseException, simulated: bool = False) -> HookError:
        """The message for the user."""
        text = str(error).partition("\n")[0]
        said = f"{type(error).__name__}: {text}".removesuffix(": ")
        what = f"failed: {said}"
        if isinstance(error, Nonsense):
            what = text
        elif simulated:
            what = (
                f"does not run on tensors without data, with which memory is planned ({said}); where "
                "build.simulated is true, stand in for what needs values (docs/plugins.md)"
            )
        end = "" if what.endswith((".", "?", "!")) else "."
        return HookError(
            f"{self.where(error)}: {self.name}() {what}{end} To go on without it: hardware.strategies.remove: "
            f"[{self.strategy}]; or mend or delete {self.plugin}"
        )

    def where(self, error: BaseException) -> str:
        """`file:line`, at the deepest line of the hook's own file; else where the hook is defined."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        if code is None:
            return self.plugin
        trace = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in trace if frame.f_code.co_filename == code.co_filename]
        file = self.plugin if code.co_filename == self.file else short(code.co_filename)
        return f"{file}:{lines[-1] if lines else code.co_firstlineno}"


def guard(strategy: Strategy, hooks: Iterable[str], plugin: str, file: str) -> None:
    """Put a guard around these methods of a strategy."""
    for name in hooks:
        function = getattr(strategy, name)
        function = getattr(
            function, "unguarded", function
        )  # a package may hand out one instance again and again
        # A strategy may be a frozen dataclass; it always has a __dict__.
        object.__setattr__(strategy, name, _guarded(Hook(name, strategy.name, plugin, file, function)))


def _guarded(hook: Hook) -> Callable[..., Any]:
    names = list(inspect.signature(hook.function).parameters)
    look, keeps = ANSWERS.get(hook.name, _nothing), KEEPS.get(hook.name, _anything)

    @functools.wraps(hook.function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        with hook.blamed(getattr(given.get("build"), "simulated", False)), keeps(given, hook):
            return look(hook.function(*args, **kwargs), given, hook)

    call.unguarded = hook.function  # type: ignore[attr-defined]
    return call


# ---- what a hook returns


def _nothing(answer: Any, given: Mapping[str, Any], hook: Hook) -> None:
    if answer is not None:
        remedy = "; set build.model instead" if hook.name in ("prepare_model", "finalize_model") else ""
        raise Nonsense(f"must return nothing, not {shown(answer)}{remedy}")


def _reason(answer: Any, given: Mapping[str, Any], hook: Hook) -> str | None:
    if answer is not None and not isinstance(answer, str):
        raise Nonsense(f"must return None or one sentence that says why not, not {shown(answer)}")
    return answer


def _environment(answer: Any, given: Mapping[str, Any], hook: Hook) -> Mapping[str, tuple[str, str]] | None:
    must = "must return {variable: (value, reason)}, two strings"
    if answer is None:
        return None
    if not isinstance(answer, Mapping):
        raise Nonsense(f"{must}, not {shown(answer)}")
    for variable, choice in answer.items():
        if not (isinstance(choice, tuple) and len(choice) == 2 and all(isinstance(c, str) for c in choice)):
            raise Nonsense(f"{must}; {variable} is {shown(choice)}")
        if not isinstance(variable, str) or not variable or "=" in variable or "\0" in variable + choice[0]:
            raise Nonsense(f"{must}; {shown(variable)} is no name or value of a variable")
    return answer


def _problems(answer: Any, given: Mapping[str, Any], hook: Hook) -> list[str]:
    found = [answer] if isinstance(answer, str) else [] if answer is None else answer
    if isinstance(found, list | tuple) or inspect.isgenerator(found):
        found = list(found)
    if not isinstance(found, list) or not all(isinstance(problem, str) for problem in found):
        raise Nonsense(f"must return None, a sentence or a list of them, not {shown(answer)}")
    return found


def _kwargs(answer: Any, given: Mapping[str, Any], hook: Hook) -> Mapping[str, Any] | None:
    if answer is None:
        return None
    if not isinstance(answer, Mapping):
        raise Nonsense(f"must return a dict of keyword arguments, not {shown(answer)}")
    from accelerate import Accelerator

    known = inspect.signature(Accelerator).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key in answer:
        if key in CORE_KWARGS:
            raise Nonsense(f"must leave accelerate's {key} alone: the plan decides it")
        if key not in known and not takes_all:
            raise Nonsense(f"returned {key!r}, which Accelerator does not take.{did_you_mean(key, known)}")
    precision = answer.get("mixed_precision", "no")
    if precision not in PRECISIONS:
        raise Nonsense(f"returned mixed_precision {precision!r}; known: {', '.join(PRECISIONS)}")
    return answer


def _optimizer(answer: Any, given: Mapping[str, Any], hook: Hook) -> Any:
    if answer is None:
        return None
    import torch

    from core.optim import check_groups

    if not isinstance(answer, torch.optim.Optimizer):
        raise Nonsense(f"must return a torch.optim.Optimizer or None, not {shown(answer)}")
    if "build" in given:
        try:
            check_groups(given["build"].model, answer)
        except AssertionError as error:
            raise Nonsense(f"must hold every parameter exactly once; {error}") from None
    return answer


def _context(answer: Any, given: Mapping[str, Any], hook: Hook) -> AbstractContextManager | None:
    if answer is None:
        return None
    if not all(hasattr(type(answer), name) for name in ("__enter__", "__exit__")):
        raise Nonsense(f"must return a context manager or None, not {shown(answer)}")
    return _Context(answer, hook)


class _Context(AbstractContextManager):
    """A step_context under guard. What is raised inside the block is the run's own, and is never swallowed."""

    def __init__(self, context: Any, hook: Hook) -> None:
        self.context, self.hook = context, hook

    def __enter__(self) -> Any:
        with self.hook.blamed():
            return self.context.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            with self.hook.blamed():
                self.context.__exit__(kind, error, trace)
        except BaseException as own:
            if error is None or error not in (own, own.__cause__):
                raise


def _state(answer: Any, given: Mapping[str, Any], hook: Hook) -> dict[str, Any] | None:
    if answer is None:
        return None
    if not isinstance(answer, Mapping):
        raise Nonsense(f"must return a dict of tensors and plain values, not {shown(answer)}")
    for key, value in answer.items():
        if not isinstance(key, str):
            raise Nonsense(f"must return a dict whose keys are strings, not {shown(key)}")
        wrong = _cannot_keep(value)
        if wrong:
            raise Nonsense(f"returned {wrong} in {key!r}, which a checkpoint cannot hold")
    return dict(answer)


def _cannot_keep(value: Any, inside: bool = False) -> str:
    """What in a value a checkpoint would not give back as it was; "" where there is nothing."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if inside:
            return "a tensor inside a list or dict (give it a key of its own)"
        odd = value.is_complex() or value.is_quantized or value.layout != torch.strided
        return f"a tensor of {value.dtype}, {value.layout}" if odd else ""
    if value is None or type(value) in (bool, int, float, str):
        return ""
    if type(value) is list:
        return next(filter(None, (_cannot_keep(v, True) for v in value)), "")
    if type(value) is dict:
        if not all(isinstance(key, str) for key in value):
            return "a dict whose keys are not strings"
        return next(filter(None, (_cannot_keep(v, True) for v in value.values())), "")
    return "a tuple (it would come back as a list: make it one)" if type(value) is tuple else shown(value)


ANSWERS: dict[str, Callable[[Any, Mapping[str, Any], Hook], Any]] = {
    "available": _reason,
    "configure_env": _environment,
    "check_plan": _problems,
    "accelerator_kwargs": _kwargs,
    "make_optimizer": _optimizer,
    "step_context": _context,
    "save_state": _state,
}
"""{hook: returns its answer where that makes sense, else raises Nonsense}; the other hooks return nothing."""


# ---- what a hook is given


@contextlib.contextmanager
def _anything(given: Mapping[str, Any], hook: Hook) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _planning(given: Mapping[str, Any], hook: Hook) -> Iterator[None]:
    """A plan changes by `set` alone, facts and profile not at all, and torch is not imported."""
    free = {"notes"} | ({"values", "micro_batches"} if hook.name == "adjust_plan" else set())
    torch_before, before = "torch" in sys.modules, _picture(given, free)
    plan = given.get("plan")
    values, sizes = (dict(plan.values), plan.micro_batches) if plan else ({}, ())
    yield
    if "torch" in sys.modules and not torch_before:
        raise Nonsense(
            "imports torch, which is too early: settings must be in the environment before torch is"
        )
    after = _picture(given, free)
    notes = getattr(plan, "notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise Nonsense(f"left {shown(notes)} as plan.notes; append strings to it")
    changed = [name for name, value in before.items() if after.get(name) != value]
    if changed:
        raise Nonsense(f"changed {changed[0]}, which is not its to change; plan.set() decides values")
    if hook.name == "adjust_plan" and plan:
        _look_at_values(plan, values, hook)
        if plan.micro_batches != sizes:
            _look_at_sizes(plan.micro_batches, plan.sequences // plan.num_processes)


def _picture(given: Mapping[str, Any], free: set[str]) -> dict[str, Any]:
    """A copy, by name, of all that a planning hook must leave alone."""
    return {
        f"{name}.{f.name}": _copy(getattr(thing, f.name))
        for name, thing in given.items()
        for f in (fields(thing) if is_dataclass(thing) else ())
        if not (name == "plan" and f.name in free)
    }


def _copy(value: Any) -> Any:
    if isinstance(value, HardwareProfile | Facts):
        return {f.name: _copy(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _copy(v) for key, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _look_at_values(plan: Plan, before: Mapping[str, Any], hook: Hook) -> None:
    for key, choice in plan.values.items():
        if choice is before.get(key):
            continue
        try:
            check_value(key, choice.value)
        except ValueError as error:
            raise Nonsense(f"left a value that makes no sense: {error}") from None
        if key == "batch_tokens":
            raise Nonsense("changed batch_tokens, which is the user's (train.batch_tokens)")
        if choice.by != hook.strategy:
            raise Nonsense(f"set {key} in the name of {choice.by!r}; say by=self.name")
    if set(before) - set(plan.values):
        raise Nonsense(f"removed {', '.join(sorted(set(before) - set(plan.values)))} from plan.values")


def _look_at_sizes(sizes: Any, batch: int) -> None:
    right = isinstance(sizes, tuple) and sizes and all(type(n) is int and 0 < n <= batch for n in sizes)
    if not right or any(batch % n for n in sizes) or list(sizes) != sorted(sizes, reverse=True):
        raise Nonsense(
            f"left plan.micro_batches {shown(sizes)}; it must be a tuple of divisors of {batch}, largest first"
        )


@contextlib.contextmanager
def _metrics(given: Mapping[str, Any], hook: Hook) -> Iterator[None]:
    """Metrics may be added to; what is there stays."""
    metrics = given.get("metrics", {})
    before = dict(metrics)
    try:
        yield
        _look_at_metrics(before, metrics)
    except BaseException:  # the record is written all the same, without what the log cannot hold
        metrics.clear()
        metrics.update(before)
        raise


def _look_at_metrics(before: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    for key, value in before.items():
        if key not in metrics or (metrics[key] is not value and metrics[key] != value):
            raise Nonsense(f"changed metrics[{key!r}], which is the run's own; add numbers under other names")
    for key, value in metrics.items():
        if key in before:
            continue
        try:
            json.dumps({key: value})
        except (TypeError, ValueError):
            raise Nonsense(
                f"put a {type(value).__name__} into metrics[{key!r}], which the log cannot hold; add a number, such "
                "as value.item()"
            ) from None


@contextlib.contextmanager
def _model(given: Mapping[str, Any], hook: Hook) -> Iterator[None]:
    """build.model may be wrapped or edited, and remains a module; build.network is edited, never replaced."""
    build = given.get("build")
    network = getattr(build, "network", None)
    yield
    if build is None:
        return
    import torch

    if not isinstance(build.model, torch.nn.Module):
        raise Nonsense(f"left {shown(build.model)} as build.model; it must be a torch.nn.Module")
    if getattr(build, "network", None) is not network:
        raise Nonsense(
            "replaced build.network, whose weights are saved; wrap build.model, or edit the network"
        )


KEEPS: dict[str, Callable[[Mapping[str, Any], Hook], AbstractContextManager[None]]] = {
    "available": _planning,
    "adjust_plan": _planning,
    "configure_env": _planning,
    "check_plan": _planning,
    "prepare_model": _model,
    "finalize_model": _model,
    "on_step_end": _metrics,
    "on_evaluate_end": _metrics,
}
"""{hook: a context manager around its call that raises Nonsense where it changed what it must not}."""


# ---- for messages


def shown(value: Any) -> str:
    """A plain value as Python writes it, cut short; of anything else the type."""
    if value is None or isinstance(value, bool | int | float | str | bytes | list | tuple | dict | set):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    return f"a {type(value).__name__}"


def line_of(function: Any) -> str:
    """`file:line` of a function's definition."""
    code = inspect.unwrap(function).__code__
    return f"{short(code.co_filename)}:{code.co_firstlineno}"


def short(filename: str) -> str:
    """Relative to the current folder, where that is possible."""
    try:
        return Path(filename).relative_to(Path.cwd()).as_posix()
    except ValueError:
        return filename
