"""docs/plugins.md cannot rot: its headings are the hooks, and every example is loaded and run."""

from __future__ import annotations

import re
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import make_project

import core
from core.cli import main
from core.hookspecs import API_VERSION, GIB, PROJECT, Build, Facts, HardwareProfile, Phase, Plan, Strategy
from core.optim import check_groups
from core.plan import resolve, runtime, saved_state
from core.plugins import DISCOVERY_HOOKS, RUNTIME_HOOKS, Registry
from core.project import Project

REPO = Path(core.__file__).parents[1]
TEXT = (REPO / "docs" / "plugins.md").read_text(encoding="utf-8")
WritePlugin = Callable[[str, str], str]


def blocks(info: str) -> list[str]:
    """The code blocks whose opening fence says exactly this."""
    return re.findall(rf"^```{re.escape(info)}\n(.*?)^```$", TEXT, re.S | re.M)


FILES = dict(re.findall(r"^```python file=plugins/(\S+)\n(.*?)^```$", TEXT, re.S | re.M))
SECTIONS = dict(re.findall(r"^### (\w+)\(.*?\)\n(.*?)(?=^##|\Z)", TEXT, re.S | re.M))
CPU_MACHINE = Facts(cores=8, ram_bytes=8 * GIB, cpu_bf16=True)


@pytest.fixture
def documented(project: Project, write_plugin: WritePlugin) -> Project:
    """A project with the page's plugin files in it."""
    for file, code in FILES.items():
        write_plugin(file, code)
    return project


# ---- the page is complete


def test_every_hook_has_its_heading_and_no_other_has() -> None:
    signatures = {
        name: f"{name}({', '.join(args)})" for name, args in {**DISCOVERY_HOOKS, **RUNTIME_HOOKS}.items()
    }
    assert re.findall(r"^### (.*)$", TEXT, re.M) == list(signatures.values())


@pytest.mark.parametrize("hook", [*DISCOVERY_HOOKS, *RUNTIME_HOOKS])
def test_every_hook_has_text_an_example_and_a_time(hook: str) -> None:
    section = SECTIONS[hook]
    prose, _, example = section.partition("```python")
    assert len(prose.split()) > 8 and f"def {hook}(" in example
    life = TEXT.split("## The life of a run")[1].split("\n## ")[0]
    assert f"`{hook}`" in life


def test_every_field_and_attribute_is_in_its_table() -> None:
    profile, strategy = (
        TEXT.split(f"## Your own {what}")[1].split("\n## ")[0] for what in ("card", "strategy")
    )
    for field in fields(HardwareProfile):
        assert re.search(rf"^\|.*`{field.name}`.*\|.*\|$", profile, re.M), field.name
    for name, value in vars(Strategy).items():
        if not name.startswith("_") and not callable(value):
            assert re.search(rf"^\| `{name}` \|", strategy, re.M), name
    for phase in Phase:
        assert f"`{phase.name}`" in strategy
    assert "available(facts, profile)" in strategy and "self.opts(plan)" in strategy


def test_values_that_adjust_plan_may_set(project: Project) -> None:
    registry = Registry.load(project, entry_points=False)
    plan = resolve(make_project(project.root).params, CPU_MACHINE, registry)
    for key in plan.values.keys() - {"batch_tokens"}:
        assert f"`{key}`" in SECTIONS["adjust_plan"], key


def test_attributes_of_build() -> None:
    prose = TEXT.split("## Hooks of a strategy: training")[1].split("###")[0]
    for field in fields(Build):
        assert f"`{field.name}" in prose, field.name


def test_versions_variables_and_messages_are_the_real_ones() -> None:
    assert f"PLUGIN_API = {API_VERSION}" in TEXT
    names = ("plugins.py", "plan.py", "plugin_guard.py", "plugin_check.py")
    source = "".join((REPO / "core" / name).read_text(encoding="utf-8") for name in names)
    table = TEXT.split("| it says |")[1].split("\n\n")[0]
    said = [
        phrase for row in table.splitlines()[2:] for phrase in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    assert len(said) > 12
    for phrase in said:
        assert phrase in source, phrase
    assert "TIGHTFIT_DISABLE_PLUGINS" in source


# ---- the examples work


@pytest.mark.parametrize("file", FILES)
def test_example_is_short_and_checks(documented: Project, file: str) -> None:
    lines = [line for line in FILES[file].splitlines() if line.strip()]
    assert len(lines) <= (15 if file.startswith("hardware") else 30)
    registry = Registry.load(documented, entry_points=False)
    assert not registry.broken()
    plugin = next(p for p in registry.plugins if p.name == f"plugins/{file}")
    names = plugin.profiles + plugin.strategies
    assert names
    for name in names:
        result = CliRunner().invoke(main, ["plugins", "check", name])
        assert result.exit_code == 0 and result.output.endswith(f"{name} works\n"), result.output


def test_first_profile_and_first_strategy_are_complete(documented: Project) -> None:
    assert list(FILES)[:2] == ["hardware/rtx3070.py", "strategies/sgd.py"]
    shipped = {p.stem for p in (REPO / "plugins").rglob("*.py")}
    assert not shipped & {Path(file).stem for file in FILES}  # nothing is overwritten, all of it is new
    profile = Registry.load(documented, entry_points=False).profile("rtx3070")
    assert all(getattr(profile, name) for name in ("match", "vram_gib", "bandwidth_gbs", "tflops", "source"))


@pytest.mark.parametrize("code", blocks("python test"))
def test_test_blocks_run(documented: Project, code: str) -> None:
    exec(compile(code, "docs/plugins.md", "exec"), {})


def test_yaml_example(documented: Project) -> None:
    (code,) = blocks("yaml")
    params = documented.root / "params.yaml"
    rest = re.sub(r"^hardware:.*?(?=^\w)", "", params.read_text(encoding="utf-8"), flags=re.S | re.M)
    params.write_text(code + rest, encoding="utf-8")
    registry = Registry.load(documented, entry_points=False)
    plan = resolve(Project(documented.root).params, CPU_MACHINE, registry)
    assert plan.options["sgd"] == {"momentum": 0.95, "nesterov": True}


def tiny_build(plan: Plan, said: list[str]) -> Build:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"))
    return Build(plan, accelerator, model, model, lr=0.05, say=said.append)


def test_sgd_trains(documented: Project) -> None:
    import torch

    params = make_project(documented.root, hardware={"strategies": {"add": ["sgd"]}}).params
    plan = resolve(params, CPU_MACHINE, Registry.load(documented, entry_points=False))
    build = tiny_build(plan, [])
    optimizer = runtime(plan).hook.make_optimizer(build=build)
    check_groups(build.model, optimizer)
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.9
    x = torch.randn(32, 4)
    losses = []
    for _ in range(30):
        loss = (build.model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("hook", RUNTIME_HOOKS)
def test_method_example_loads_plans_and_runs(project: Project, write_plugin: WritePlugin, hook: str) -> None:
    (code,) = re.findall(r"^```python method\n(.*?)^```$", SECTIONS[hook], re.S | re.M)
    source = "from core.hookspecs import Strategy, hookimpl\n\n\nclass Example(Strategy):\n    name = 'example'\n\n"
    source += textwrap.indent(code, "    ") + "\n\n@hookimpl\ndef strategies():\n    return Example()\n"
    write_plugin("strategies/example.py", source)
    params = make_project(project.root, hardware={"strategies": {"add": ["example"]}}).params
    registry = Registry.load(project, entry_points=False)
    assert not registry.broken()
    plan = resolve(params, CPU_MACHINE, registry)
    if hook == "adjust_plan":
        assert plan.values["num_workers"].by == "example" and plan["num_workers"] == 2
    if hook == "configure_env":
        assert plan.env["OMP_NUM_THREADS"].value == "8"
    if hook in ("adjust_plan", "configure_env", "check_plan"):
        return
    import torch

    said: list[str] = []
    build = tiny_build(plan, said)
    given = {
        "plan": plan,
        "build": build,
        "step": 5,
        "metrics": {"loss": 2.0, "grad_norm": 101.0, "val_loss": 2.0},
        "state": {"average": torch.ones(2)},
    }
    answer = getattr(runtime(plan).hook, hook)(**{name: given[name] for name in RUNTIME_HOOKS[hook]})
    if hook == "step_context":
        with answer[0]:
            pass
    if hook == "make_optimizer":
        check_groups(build.model, answer)
    if hook in ("accelerator_kwargs", "make_optimizer", "step_context", "save_state"):
        assert answer
    if hook == "load_state":
        assert saved_state(plan, build)["example"]["average"].tolist() == [1, 1]
    if hook.startswith("on_"):
        assert len(said) == 1


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("tightfit_rtx3070", None)


def test_pip_package(project: Project, site: Path) -> None:
    """What a build makes of the page's pyproject.toml, without building."""
    (code,) = blocks("toml")
    package = tomllib.loads(code)["project"]
    ((name, module),) = package["entry-points"][PROJECT].items()
    info = site / f"{module}-{package['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Name: {package['name']}\nVersion: {package['version']}\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text(f"[{PROJECT}]\n{name} = {module}\n", encoding="utf-8")
    assert f"`{module}.py`" in TEXT and f"`{package['name']}/{name}`" in TEXT
    (site / f"{module}.py").write_text(FILES["hardware/rtx3070.py"], encoding="utf-8")
    registry = Registry.load(project)
    assert registry.owner("hardware profile", "rtx3070").name == f"{package['name']}/{name}"
    assert registry.owner("hardware profile", "rtx3070").version == package["version"]
