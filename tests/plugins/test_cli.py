"""`tightfit plugins list`, `show`, `new` and `check`."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import core
from core.cli import main
from core.hardware import choose_profile, derive_profile
from core.hookspecs import GIB, Facts, Gpu, HardwareProfile
from core.plugin_check import gpu_name, machine
from core.plugins import DISABLE_VARIABLE, Registry
from core.project import Project

REPO = Path(core.__file__).parents[1]
PROFILES = sorted(p.stem for p in (REPO / "plugins" / "hardware").glob("*.py"))
STRATEGIES = sorted(p.stem for p in (REPO / "plugins" / "strategies").glob("*.py"))
WritePlugin = Callable[[str, str], str]


def tightfit(*args: str) -> Result:
    return CliRunner().invoke(main, ["plugins", *args])


def card_plugin(**fields: object) -> str:
    given = {"name": "card", "vram_gib": 8, "compute_capability": (8, 6), **fields}
    return f"from core.hookspecs import hookimpl\n@hookimpl\ndef hardware_profiles():\n    return {given!r}\n"


def strategy_plugin(body: str) -> str:
    return (
        "from core.hookspecs import Phase, Strategy, hookimpl\nclass Mine(Strategy):\n    name = 'mine'\n"
        f"{body}\n@hookimpl\ndef strategies():\n    return Mine()\n"
    )


# ---- list


def test_list_shows_every_plugin_and_what_it_declares(project: Project) -> None:
    result = tightfit("list")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) == len(PROFILES) + len(STRATEGIES)
    assert "ok   plugins/hardware/rtx4060.py  hardware_profiles: rtx4060" in lines
    assert "ok   plugins/strategies/bf16.py  strategies: bf16 (adjust_plan, accelerator_kwargs)" in lines


def test_list_as_json(project: Project) -> None:
    result = tightfit("list", "--json")
    plugins = {p["name"]: p for p in json.loads(result.output)}
    assert plugins["plugins/hardware/t4.py"]["profiles"] == ["t4"]
    fp16 = plugins["plugins/strategies/fp16.py"]
    assert len(fp16["sha256"]) == 64 and Path(fp16["file"]).samefile(project.plugins / "strategies/fp16.py")
    assert fp16["hooks"] == ["strategies"] and fp16["doc"].startswith("fp16 autocast")
    assert fp16["runtime_hooks"] == {"fp16": ["adjust_plan", "accelerator_kwargs"]}


def test_list_shows_broken_and_disabled_ones_and_exits_with_3(
    project: Project, write_plugin: WritePlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plugin("strategies/bad.py", "import nothing_of_that_name\n")
    monkeypatch.setenv(DISABLE_VARIABLE, "plugins/strategies/debug.py")
    result = tightfit("list")
    assert result.exit_code == 3 and "Traceback" not in result.output
    assert (
        "FAIL plugins/strategies/bad.py" in result.output
        and "off  plugins/strategies/debug.py" in result.output
    )
    assert "ok   plugins/strategies/bf16.py" in result.output
    assert "bad.py:1:" in result.output and "ModuleNotFoundError" in result.output
    assert f"{DISABLE_VARIABLE}=plugins/strategies/bad.py" in result.output
    document = json.loads(tightfit("list", "--json").stdout)
    assert [p["name"] for p in document if p["error"]] == ["plugins/strategies/bad.py"]


# ---- show


def test_show_a_strategy(project: Project) -> None:
    result = tightfit("show", "fp16")
    assert result.exit_code == 0, result.output
    shown = {line[:18].strip(): line[19:] for line in result.output.splitlines()}
    assert shown["kind"] == "strategy" and shown["phase"] == "PRECISION" and shown["affects"] == "recipe"
    assert shown["plugin"] == "plugins/strategies/fp16.py" and len(shown["sha256"]) == 64
    assert shown["options"] == "{'init_scale': 65536.0, 'growth_interval': 2000}"
    assert shown["hooks"] == "adjust_plan, accelerator_kwargs" and shown["doc"].startswith("fp16 autocast")


def test_show_a_profile_names_every_field(project: Project) -> None:
    (shown,) = json.loads(tightfit("show", "t4", "--json").stdout)
    for field in fields(HardwareProfile):
        assert field.name in shown
    assert shown["kind"] == "hardware profile" and shown["vram_gib"] == 15
    assert shown["compute_capability"] == [7, 5] and shown["hooks"] == ["hardware_profiles"]
    assert Path(shown["file"]).samefile(project.plugins / "hardware" / "t4.py")


def test_show_a_plugin_file(project: Project) -> None:
    (shown,) = json.loads(tightfit("show", "plugins/strategies/bf16.py", "--json").stdout)
    assert shown["kind"] == "plugin" and shown["strategies"] == ["bf16"] and not shown["error"]
    assert "plugins/strategies/bf16.py" in tightfit("show", "plugins/strategies/bf16.py").output


def test_show_of_an_unknown_name(project: Project) -> None:
    result = tightfit("show", "rtx-4060")
    assert result.exit_code == 2 and "Did you mean 'rtx4060'?" in result.output


def test_show_of_a_broken_file_says_why(project: Project, write_plugin: WritePlugin) -> None:
    name = write_plugin("strategies/mine.py", "x =\n")
    assert "mine.py:1: SyntaxError" in tightfit("show", name).output
    assert "tightfit plugins list" in tightfit("show", "mine").output


# ---- new

CARD = Gpu("NVIDIA GeForce RTX 3070 (Test) Laptop GPU", 8 * GIB, (8, 6), 40, 1620, 7001, 256)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[Gpu | None], None]:
    """Put a card, or none, into this machine."""

    def put(gpu: Gpu | None) -> None:
        facts = Facts(gpus=(gpu,) if gpu else ())
        monkeypatch.setattr("core.commands.plugins.read_facts", lambda: facts)

    return put


def code_lines(source: str) -> int:
    """Lines of code: no blank lines, no comments, no docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate((line.strip() for line in source.splitlines()), 1)
    return sum(1 for n, line in lines if line and not line.startswith("#") and n not in docstrings)


@pytest.mark.parametrize("path", sorted((REPO / "plugins").glob("*/*.py")), ids=lambda p: p.stem)
def test_bundled_plugins_are_short(path: Path) -> None:
    limit = 15 if path.parent.name == "hardware" else 30
    assert code_lines(path.read_text(encoding="utf-8")) <= limit


@pytest.mark.parametrize("gpu", [None, CARD], ids=["no card", "a card"])
@pytest.mark.parametrize("name", ["rtx3070", "a100"])
def test_new_profile_works_as_it_is(project: Project, card: Callable, name: str, gpu: Gpu | None) -> None:
    card(gpu)
    result = tightfit("new", name)
    assert result.exit_code == 0, result.output
    assert f"wrote plugins/hardware/{name}.py" in result.output
    assert f"tightfit plugins check {name}" in result.output
    assert (f"found {CARD.name}" if gpu else "no NVIDIA card found here") in result.output
    source = (project.plugins / "hardware" / f"{name}.py").read_bytes()
    assert b"\r" not in source and len([line for line in source.splitlines() if line.strip()]) <= 15
    result = tightfit("check", name)
    assert result.exit_code == 0 and result.output.endswith(f"{name} works\n"), result.output
    assert gpu or f"chooses {name}: " in result.output


def test_new_profile_describes_the_card(project: Project, card: Callable) -> None:
    card(CARD)
    tightfit("new", "mine")
    profiles = Registry.load(project, entry_points=False).profiles
    derived = vars(derive_profile(CARD))
    for key, value in vars(profiles["mine"]).items():
        assert key in ("name", "match") or value == derived[key], key
    assert profiles["mine"].tflops and profiles["mine"].bandwidth_gbs
    chosen, _ = choose_profile(profiles, Facts(gpus=(CARD,), torch_cuda="13.0"))
    assert chosen.name == "mine"


def test_new_strategy_works_as_it_is_and_logs(project: Project) -> None:
    result = tightfit("new", "my_logger", "--strategy")
    assert result.exit_code == 0 and "wrote plugins/strategies/my_logger.py" in result.output
    path = project.plugins / "strategies" / "my_logger.py"
    assert len([line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]) <= 30
    strategy = Registry.load(project, entry_points=False).strategies["my_logger"]
    assert type(strategy).__name__ == "MyLogger" and strategy.defaults == {"every": 100}
    result = tightfit("check", "my_logger")
    assert result.exit_code == 0 and result.output.endswith("my_logger works\n"), result.output


def test_new_never_overwrites(project: Project) -> None:
    before = (project.plugins / "hardware" / "cpu.py").read_bytes()
    result = tightfit("new", "cpu")
    assert result.exit_code == 2 and "is there already; choose another name" in result.output
    assert (project.plugins / "hardware" / "cpu.py").read_bytes() == before


@pytest.mark.parametrize("name", ["RTX3070", "rtx-3070", "../escape", "rtx 3070", "a.b", ""])
def test_new_refuses_bad_names(project: Project, name: str) -> None:
    result = tightfit("new", name)
    assert result.exit_code == 2 and "lower case letters, digits and '_'" in result.output
    assert not (project.root / "escape.py").exists()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("strategy", "8bit"),
        ("strategy", "none"),
        ("hardware", "auto"),
        ("hardware", "kartım"),
        ("hardware", "_x"),
    ],
)
def test_new_plugin_of_any_accepted_name_loads(project: Project, kind: str, name: str) -> None:
    result = tightfit("new", name, *(["--strategy"] if kind == "strategy" else []))
    if result.exit_code == 0:
        assert tightfit("check", name).exit_code == 0
    assert not Registry.load(project, entry_points=False).broken()


# ---- check


@pytest.mark.parametrize("name", PROFILES)
def test_every_shipped_profile_checks(project: Project, name: str) -> None:
    result = tightfit("check", name)
    assert result.exit_code == 0 and result.output.endswith(f"{name} works\n"), result.output
    assert f"profile      {name}: hardware.profile names it" in result.output
    if name != "cpu":
        assert f"chooses {name}: " in result.output


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_shipped_strategy_checks(project: Project, name: str) -> None:
    result = tightfit("check", name)
    assert result.exit_code == 0 and result.output.endswith(f"{name} works\n"), result.output
    (order,) = [line for line in result.output.splitlines() if line.startswith("strategies ")]
    assert name in order.removeprefix("strategies").replace("→", " ").split()


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "cpu"])
def test_made_up_card_is_one_of_the_profile(project: Project, name: str) -> None:
    profiles = Registry.load(project, entry_points=False).profiles
    facts = machine(profiles[name])
    assert facts.gpu is not None and facts.gpu.name == gpu_name(profiles[name])
    assert choose_profile(profiles, facts)[0].name == name


def test_check_of_an_unknown_name(project: Project) -> None:
    result = tightfit("check", "rtx-4060")
    assert result.exit_code == 2 and "no profile or strategy 'rtx-4060'" in result.output
    assert "accumulation, adamw8bit, allocator" in result.output


def test_check_of_a_broken_plugin(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("strategies/mine.py", "x =\n")
    result = tightfit("check", "mine")
    assert (
        result.exit_code == 3
        and "mine.py:1: SyntaxError" in result.output
        and "Traceback" not in result.output
    )


def test_check_finds_a_profile_that_cannot_run(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("hardware/card.py", card_plugin(strategies=("bf61",)))
    result = tightfit("check", "card")
    assert result.exit_code == 3 and "unknown strategy 'bf61'. Did you mean 'bf16'?" in result.output


def test_check_of_a_strategy_that_works_nowhere(project: Project, write_plugin: WritePlugin) -> None:
    body = "    def available(self, facts, profile):\n        return 'needs a quantum computer'\n"
    write_plugin("strategies/mine.py", strategy_plugin(body))
    result = tightfit("check", "mine")
    assert result.exit_code == 3 and "strategy 'mine' is available on none of the" in result.output


def test_check_of_a_strategy_that_works_nowhere_says_why(project: Project, write_plugin: WritePlugin) -> None:
    body = "    def available(self, facts, profile):\n        return 'needs a quantum computer'\n"
    write_plugin("strategies/mine.py", strategy_plugin(body))
    assert "needs a quantum computer" in tightfit("check", "mine").output


def test_check_of_a_strategy_that_needs_a_package(project: Project, write_plugin: WritePlugin) -> None:
    body = "    def available(self, facts, profile):\n        return None if 'triton' in facts.modules else 'no'\n"
    write_plugin("strategies/mine.py", strategy_plugin(body))
    assert tightfit("check", "mine").exit_code == 0


def test_check_adds_what_a_strategy_requires(project: Project, write_plugin: WritePlugin) -> None:
    source = strategy_plugin("    requires = ('other',)\n").replace(
        "return Mine()", "return [Mine(), Other()]"
    )
    write_plugin("strategies/mine.py", source + "class Other(Strategy):\n    name = 'other'\n")
    result = tightfit("check", "mine")
    assert result.exit_code == 0, result.output


def test_check_of_a_strategy_beside_a_bad_profile(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("hardware/a_card.py", card_plugin(strategies=("bf16", "lodaer")))
    result = tightfit("check", "bf16")
    assert not isinstance(result.exception, KeyError)


@pytest.mark.parametrize("match", ["RTX (3070|3080)", "^NVIDIA GeForce RTX 3070$", "RTX 30[78]0"])
def test_check_never_claims_that_auto_would_miss_a_good_pattern(
    project: Project, write_plugin: WritePlugin, match: str
) -> None:
    write_plugin("hardware/card.py", card_plugin(match=match))
    result = tightfit("check", "card")
    assert result.exit_code == 0 and "chooses derived" not in result.output
