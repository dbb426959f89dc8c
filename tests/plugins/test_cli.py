"""`tightfit plugins list`, `new` and `check`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import core
from core.cli import main
from core.commands.plugins import gpu_name, machine
from core.hardware import choose_profile
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
    assert "ok   plugins/hardware/rtx4060.py  profile rtx4060" in lines
    assert "ok   plugins/strategies/bf16.py  strategy bf16" in lines


def test_list_as_json(project: Project) -> None:
    result = tightfit("list", "--json")
    plugins = {p["name"]: p for p in json.loads(result.output)}
    assert plugins["plugins/hardware/t4.py"]["profiles"] == ["t4"]
    assert len(plugins["plugins/strategies/fp16.py"]["sha256"]) == 64


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


# ---- new


@pytest.mark.parametrize(
    ("kind", "name"), [("hardware", "rtx3070"), ("strategy", "my_logger"), ("hardware", "a100")]
)
def test_new_plugin_works_as_it_is(project: Project, kind: str, name: str) -> None:
    folder = "hardware" if kind == "hardware" else "strategies"
    result = tightfit("new", kind, name)
    assert result.exit_code == 0, result.output
    assert (
        f"wrote plugins/{folder}/{name}.py" in result.output
        and f"tightfit plugins check {name}" in result.output
    )
    source = (project.plugins / folder / f"{name}.py").read_bytes()
    assert b"\r" not in source and len(source.splitlines()) <= 25
    result = tightfit("check", name)
    assert result.exit_code == 0 and result.output.endswith(f"{name} works\n"), result.output
    if kind == "hardware":
        assert f"chooses {name}: " in result.output


def test_new_strategy_logs(project: Project) -> None:
    tightfit("new", "strategy", "my_logger")
    strategy = Registry.load(project, entry_points=False).strategies["my_logger"]
    assert type(strategy).__name__ == "MyLogger" and strategy.defaults == {"every": 100}


def test_new_never_overwrites(project: Project) -> None:
    before = (project.plugins / "hardware" / "cpu.py").read_bytes()
    result = tightfit("new", "hardware", "cpu")
    assert result.exit_code == 2 and "is there already; choose another name" in result.output
    assert (project.plugins / "hardware" / "cpu.py").read_bytes() == before


@pytest.mark.parametrize("name", ["RTX3070", "rtx-3070", "../escape", "rtx 3070", "a.b", ""])
def test_new_refuses_bad_names(project: Project, name: str) -> None:
    result = tightfit("new", "hardware", name)
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
    result = tightfit("new", kind, name)
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
    assert "accumulation, allocator" in result.output


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
