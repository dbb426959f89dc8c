"""`tightfit plugins check`: what it finds in good and bad plugins, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import core
from core.cli import main
from core.plugin_check import STEPS
from core.project import Project

REPO = Path(core.__file__).parents[1]
DOCS = (REPO / "docs" / "plugins.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^```python file=plugins/(\S+)\n(.*?)^```$", DOCS, re.S | re.M))
BUNDLED = sorted(p.relative_to(REPO).as_posix() for p in (REPO / "plugins").glob("*/*.py"))
WritePlugin = Callable[[str, str], str]
FILE = "plugins/strategies/mine.py"
SAVES = "@hookimpl\ndef save_state(self):\n    return {'a': 1}\n"


def check(*args: str) -> Result:
    return CliRunner().invoke(main, ["plugins", "check", *args])


def strategy(body: str, attributes: str = "") -> str:
    """A strategy "mine"; its first method begins in line 5."""
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    return (
        "from core.hookspecs import Phase, Strategy, hookimpl\n\n"
        f"class Mine(Strategy):\n    name = 'mine'; {attributes}\n{indented}\n"
        "@hookimpl\ndef strategies():\n    return Mine()\n"
    )


@pytest.fixture
def mine(project: Project, write_plugin: WritePlugin) -> Callable[..., Result]:
    """Write plugins/strategies/mine.py and check it."""

    def run(body: str, attributes: str = "") -> Result:
        write_plugin("strategies/mine.py", strategy(body, attributes))
        result = check("mine")
        assert "Traceback" not in result.output and result.exit_code in (0, 3), result.output
        assert result.exit_code == 0 or "mine does not work" in result.output
        return result

    return run


# ---- good ones


@pytest.mark.parametrize("file", BUNDLED)
def test_bundled_plugin_passes(project: Project, file: str) -> None:
    result = check(file)
    assert result.exit_code == 0 and result.output.endswith(f"{file} works\n"), result.output
    assert "FAIL" not in result.output and "ok   loads and validates" in result.output
    if "hardware" in file:
        for system in ("linux", "windows", "wsl"):
            assert f"plans on {system}\n" in result.output
        assert f"ok   {STEPS} training steps on the CPU" in result.output


def test_good_profile_names_what_a_cpu_cannot_run(project: Project) -> None:
    output = check("rtx4060").output
    assert "allocator is not run on a CPU: it sets up CUDA's allocator" in output
    assert re.search(r"with .*accumulation, loader: loss 5\.\d+ → \d\.\d+", output)


def test_good_strategy(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("strategies/sgd.py", EXAMPLES["strategies/sgd.py"])
    result = check("sgd")
    assert result.exit_code == 0 and "with sgd: loss" in result.output, result.output


def test_every_hook_is_called(mine: Callable) -> None:
    hooks = (
        "prepare_model",
        "finalize_model",
        "step_context",
        "on_step_end",
        "on_evaluate_end",
        "on_train_end",
    )
    body = "\n".join(f"@hookimpl\ndef {hook}(self, build):\n    build.say('called {hook}')" for hook in hooks)
    output = mine(body, "affects = 'recipe'").output
    for hook in hooks:
        count = STEPS if hook in ("step_context", "on_step_end") else 1
        assert output.count(f"called {hook}") == count, hook


def test_strategy_that_needs_a_card_is_planned_only(mine: Callable) -> None:
    body = "def available(self, facts, profile):\n    return None if profile.device == 'cuda' else 'needs a card'"
    result = mine(body)
    assert result.exit_code == 0 and "mine is not run on a CPU: needs a card" in result.output


def test_required_strategy_takes_part(mine: Callable) -> None:
    assert "with accumulation, mine: loss" in mine("", "requires = ('accumulation',)").output


# ---- bad ones


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("@hookimpl\ndef step_context(self):\n    raise ValueError('boom')", 7),
        ("@hookimpl\ndef on_train_end(self):\n    raise ValueError('boom')", 7),
        ("@hookimpl\ndef make_optimizer(self):\n\n    raise ValueError('boom')", 8),
        ("@hookimpl\ndef adjust_plan(self):\n    raise ValueError('boom')", 7),
        ("def available(self, facts, profile):\n    raise ValueError('boom')", 6),
        ("@hookimpl\ndef prepare_model(self):\n    raise SystemExit('boom')", 7),
        (f"{SAVES}@hookimpl\ndef load_state(self):\n    raise ValueError('boom')", 10),
        (f"{SAVES}@hookimpl\ndef load_state(self, state):\n    raise ValueError('boom', state)", 10),
    ],
)
def test_hook_that_raises(mine: Callable, body: str, line: int) -> None:
    result = mine(body)
    hook = re.findall(r"def (\w+)", body)[-1]
    assert result.exit_code == 3 and "FAIL" in result.output
    assert f"{FILE}:{line}: {hook}() failed: " in result.output and "boom" in result.output, result.output


def test_two_hooks_that_raise_are_both_reported(mine: Callable) -> None:
    body = "@hookimpl\ndef on_step_end(self):\n    1 / 0\n@hookimpl\ndef on_train_end(self):\n    [][1]"
    output = mine(body, "affects = 'recipe'").output
    assert f"{FILE}:7: on_step_end() failed: ZeroDivisionError" in output
    assert f"{FILE}:10: on_train_end() failed: IndexError" in output


def test_a_plan_that_is_another_each_time(mine: Callable) -> None:
    body = "@hookimpl\ndef adjust_plan(self, plan):\n    import uuid\n    plan.notes.append(uuid.uuid4().hex)"
    result = mine(body)
    assert result.exit_code == 3 and "a second plan is another one (notes" in result.output, result.output


def test_loss_that_is_no_number(mine: Callable) -> None:
    body = (
        "@hookimpl\ndef prepare_model(self, build):\n"
        "    forward = build.model.forward\n    build.model.forward = lambda *a: forward(*a) * float('nan')"
    )
    result = mine(body, "affects = 'recipe'")
    assert result.exit_code == 3 and f"{FILE}: the loss of step 1 is nan" in result.output


def test_loss_that_does_not_fall(mine: Callable) -> None:
    body = (
        "@hookimpl\ndef make_optimizer(self, build):\n    import torch\n"
        "    return torch.optim.SGD(build.model.parameters(), lr=0.0)"
    )
    result = mine(body, "affects = 'recipe'")
    assert result.exit_code == 3 and "the loss does not fall" in result.output


def test_optimizer_that_misses_parameters(mine: Callable) -> None:
    body = (
        "@hookimpl\ndef make_optimizer(self, build):\n    import torch\n"
        "    return torch.optim.SGD([p for p in build.model.parameters() if p.dim() > 1], lr=build.lr)"
    )
    result = mine(body, "affects = 'recipe'")
    assert result.exit_code == 3 and f"{FILE}:5: make_optimizer() must hold every parameter" in result.output
    assert "exactly once; optimizer groups: missing" in result.output


def test_execution_strategy_that_changes_the_numbers(mine: Callable) -> None:
    body = (
        "@hookimpl\ndef make_optimizer(self, build):\n    import torch\n"
        "    return torch.optim.SGD(build.model.parameters(), lr=build.lr)"
    )
    result = mine(body)
    assert result.exit_code == 3 and "declare affects = 'recipe'" in result.output
    assert mine(body, "affects = 'recipe'").exit_code == 0


def test_metric_that_the_log_cannot_hold(mine: Callable) -> None:
    body = "@hookimpl\ndef on_step_end(self, metrics):\n    import torch\n    metrics['x'] = torch.zeros(())"
    result = mine(body)
    assert result.exit_code == 3 and "on_step_end() put a Tensor into metrics['x']" in result.output


def test_profile_that_works_on_one_system_only(project: Project, write_plugin: WritePlugin) -> None:
    body = "def available(self, facts, profile):\n    return None if facts.os == 'linux' else 'needs Linux'"
    write_plugin("strategies/mine.py", strategy(body))
    fields = {"name": "card", "vram_gib": 8, "compute_capability": (8, 6), "strategies": ("mine",)}
    source = (
        f"from core.hookspecs import hookimpl\n@hookimpl\ndef hardware_profiles():\n    return {fields}\n"
    )
    write_plugin("hardware/card.py", source)
    result = check("card")
    assert result.exit_code == 3 and "ok   card plans on linux" in result.output
    assert "FAIL card plans on windows" in result.output and "FAIL card plans on wsl" in result.output


# ---- files


@pytest.mark.parametrize("inside", [True, False])
def test_broken_file(project: Project, tmp_path_factory: pytest.TempPathFactory, inside: bool) -> None:
    folder = project.plugins / "strategies" if inside else tmp_path_factory.mktemp("elsewhere")
    (folder / "mine.py").write_text("x = 1\ny =\n", encoding="utf-8")
    result = check(str(folder / "mine.py"))
    assert result.exit_code == 3 and "FAIL loads and validates" in result.output
    assert "mine.py:2: SyntaxError" in result.output and "Traceback" not in result.output


def test_file_outside_the_project(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("elsewhere") / "mine.py"
    path.write_text(strategy(""), encoding="utf-8")
    result = check(str(path))
    assert result.exit_code == 0 and "with mine: loss" in result.output, result.output
    assert not (path.parent / "__pycache__").exists()
    path.write_text(strategy("@hookimpl\ndef prepare_model(self):\n    1 / 0"), encoding="utf-8")
    assert (
        f"{path.resolve().as_posix()}:7: prepare_model() failed: ZeroDivisionError" in check(str(path)).output
    )


def test_file_that_is_not_there(project: Project) -> None:
    result = check("plugins/strategies/gone.py")
    assert result.exit_code == 2 and "no file" in result.output


def test_file_that_declares_a_known_name(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("elsewhere") / "bf16.py"
    path.write_bytes((project.plugins / "strategies" / "bf16.py").read_bytes())
    result = check(str(path))
    assert result.exit_code == 3 and "is already defined by plugins/strategies/bf16.py" in result.output


# ---- --json


def test_json_of_a_good_plugin_stays_json_when_the_plugin_prints(
    project: Project, write_plugin: WritePlugin
) -> None:
    write_plugin("strategies/mine.py", strategy("@hookimpl\ndef on_step_end(self):\n    print('noise')"))
    result = check("mine", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 0 and document["ok"] and document["target"] == "mine"
    names = [step["name"] for step in document["steps"]]
    assert names[-2:] == [f"{STEPS} training steps on the CPU", "its memory can be planned"]


READS = """@hookimpl
def prepare_model(self, build):
    if CONDITION:
        build.largest = max(p.abs().max().item() for p in build.model.parameters())
"""


@pytest.mark.parametrize(("condition", "works"), [("True", False), ("not build.simulated", True)])
def test_step_that_reads_tensors_cannot_be_planned(
    mine: Callable[..., Result], condition: str, works: bool
) -> None:
    output = mine(READS.replace("CONDITION", condition)).output
    assert f"ok   {STEPS} training steps on the CPU" in output
    assert f"{'ok  ' if works else 'FAIL'} its memory can be planned" in output
    if not works:
        assert f"{FILE}:8: " in output and "tensors without data" in output
        assert "where build.simulated is true" in output


def test_json_of_a_bad_plugin(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("strategies/mine.py", strategy("@hookimpl\ndef step_context(self):\n    1 / 0"))
    result = check("mine", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 3 and not document["ok"] and not document["steps"][-1]["ok"]
    assert f"{FILE}:7: step_context() failed: ZeroDivisionError" in document["steps"][-1]["problems"][0]


# ---- what it leaves behind: nothing


def test_nothing_is_written_and_no_variable_changed(project: Project, write_plugin: WritePlugin) -> None:
    body = (
        "@hookimpl\ndef configure_env(self):\n    return {'MINE': ('1', 'a test')}\n"
        "@hookimpl\ndef on_train_end(self, build):\n    import os, pathlib\n"
        "    pathlib.Path('mine.txt').touch()\n    build.say('MINE=' + os.environ['MINE'])"
    )
    write_plugin("strategies/mine.py", strategy(body))
    files, environ = sorted(project.root.rglob("*")), dict(os.environ)
    result = check("mine")
    assert result.exit_code == 0 and "MINE=1" in result.output, result.output
    assert sorted(project.root.rglob("*")) == files and dict(os.environ) == environ
    assert Path.cwd() == project.root


def test_torch_is_imported_for_training_only(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("strategies/mine.py", strategy("def available(self, facts, profile):\n    return 'no'"))
    code = (
        "import sys; from pathlib import Path; from core.plugin_check import check; from core.project import Project\n"
        "check(Project(Path.cwd()), 'mine', print); print('torch' in sys.modules)"
    )
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    out = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "False", out
