"""The loader: one bad plugin never hides the others, and its author reads file, line, mistake and remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import core
from core.errors import PluginError
from core.hookspecs import API_VERSION, DiscoverySpecs, RuntimeSpecs
from core.plugins import DISABLE_VARIABLE, DISCOVERY_HOOKS, RUNTIME_HOOKS, Plugin, Registry, many
from core.project import Project

REPO = Path(core.__file__).parents[1]
WritePlugin = Callable[[str, str], str]

USE = "from core.hookspecs import HardwareProfile, Phase, Strategy, hookimpl\n"
PROFILE = USE + "@hookimpl\ndef hardware_profiles():\n    return {fields}\n"
STRATEGY = USE + "class S(Strategy):\n    name = 's'\n{body}\n@hookimpl\ndef strategies():\n    return S()\n"
OFFERS = f"offers {API_VERSION[0]}.{API_VERSION[1]}"
CARD = "'name': 'card', 'vram_gib': 8, 'compute_capability': (8, 6)"


def load(project: Project) -> Registry:
    return Registry.load(project, entry_points=False)


def plugin_named(registry: Registry, name: str) -> Plugin:
    return next(p for p in registry.plugins if p.name == name)


def error_of(
    project: Project, write_plugin: WritePlugin, source: str, file: str = "strategies/bad.py"
) -> str:
    """Load `source` between the bundled plugins: its error, after checking that those are unharmed."""
    name = write_plugin(file, source)
    registry = load(project)
    for plugin in registry.plugins:
        assert bool(plugin.error) == (plugin.name == name), plugin
    assert {"cpu", "t4", "rtx4090"} <= registry.profiles.keys()
    assert {"accumulation", "loader", "fp16"} <= registry.strategies.keys()
    (broken,) = registry.broken()
    assert f"{DISABLE_VARIABLE}={name}" in broken
    return plugin_named(registry, name).error


# ---- what is found


def test_bundled_plugins_all_load_and_declare_one_thing_each(project: Project) -> None:
    registry = load(project)
    assert not registry.broken()
    assert [p.name for p in registry.plugins] == [
        path.relative_to(REPO).as_posix()
        for kind in ("hardware", "strategies")
        for path in sorted((REPO / "plugins" / kind).glob("*.py"))
    ]
    for plugin in registry.plugins:
        stem = Path(plugin.name).stem
        assert plugin.profiles + plugin.strategies == [stem]
        kind = "hardware profile" if plugin.profiles else "strategy"
        assert registry.owner(kind, stem) is plugin


def test_hooks_are_read_from_the_specifications() -> None:
    assert DISCOVERY_HOOKS == {"hardware_profiles": [], "strategies": []}
    assert RUNTIME_HOOKS["on_step_end"] == ["build", "step", "metrics"]
    assert {name for name in vars(RuntimeSpecs) if not name.startswith("_")} == RUNTIME_HOOKS.keys()
    assert {name for name in vars(DiscoverySpecs) if not name.startswith("_")} == DISCOVERY_HOOKS.keys()


def test_a_dict_needs_only_pluggy(project: Project, write_plugin: WritePlugin) -> None:
    source = f"import pluggy\n@pluggy.HookimplMarker('tightfit')\ndef hardware_profiles():\n    return {{{CARD}}}\n"
    write_plugin("hardware/card.py", source)
    assert load(project).profile("card").compute_capability == (8, 6)


def test_lists_and_generators_declare_several(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("hardware/two.py", PROFILE.format(fields=f"[{{{CARD}}}, {{**{{{CARD}}}, 'name': 'card2'}}]"))
    source = USE + (
        "class A(Strategy):\n    name = 'a'\nclass B(Strategy):\n    name = 'b'\n"
        "@hookimpl\ndef strategies():\n    yield A()\n    yield B()\n"
    )
    write_plugin("strategies/two.py", source)
    registry = load(project)
    assert not registry.broken()
    assert {"card", "card2"} <= registry.profiles.keys() and {"a", "b"} <= registry.strategies.keys()
    assert many(None) == [] and many("x") == ["x"]


def test_one_file_may_declare_both_kinds(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("hardware/both.py", STRATEGY.format(body="") + PROFILE.format(fields=f"{{{CARD}}}"))
    plugin = plugin_named(load(project), "plugins/hardware/both.py")
    assert (plugin.profiles, plugin.strategies, plugin.error) == (["card"], ["s"], "")


def test_leading_underscore_and_other_files_are_not_plugins(
    project: Project, write_plugin: WritePlugin
) -> None:
    for file in ("hardware/_shared.py", "strategies/notes.txt", "loose.py"):
        write_plugin(file, "raise RuntimeError('must not be loaded')\n")
    assert not load(project).broken()


def test_project_without_plugins_folder(tmp_path: Path) -> None:
    registry = load(Project(tmp_path))
    assert registry.plugins == [] and not registry.profiles


def test_plugins_that_take_fewer_arguments_or_an_optional_hook(
    project: Project, write_plugin: WritePlugin
) -> None:
    body = (
        "    @hookimpl\n    def on_step_end(self, step):\n        pass\n"
        "    @hookimpl(optionalhook=True)\n    def of_a_later_version(self, anything):\n        pass\n"
    )
    write_plugin("strategies/s.py", STRATEGY.format(body=body))
    registry = load(project)
    assert not registry.broken() and "s" in registry.strategies


# ---- what is refused


@pytest.mark.parametrize(
    ("source", "words"),
    [
        pytest.param(
            USE + "@hookimpl\ndef hardware_profile():\n    pass\n",
            ["bad.py:2:", "no hook 'hardware_profile'", "Did you mean 'hardware_profiles'?", "strategies"],
            id="unknown hook",
        ),
        pytest.param(
            USE + "@hookimpl\ndef strategies(plan):\n    pass\n",
            ["bad.py:2:", "no argument 'plan'", "It may take: nothing"],
            id="unknown argument of a discovery hook",
        ),
        pytest.param(
            STRATEGY.format(body="    @hookimpl\n    def on_step_end(self, metric):\n        pass\n"),
            ["bad.py:4:", "strategy 's'", "no argument 'metric'", "Did you mean 'metrics'?", "build, step"],
            id="unknown argument",
        ),
        pytest.param(
            STRATEGY.format(body="    @hookimpl\n    def on_step_end(self, step=0):\n        pass\n"),
            ["bad.py:4:", "'step'", "has a default value", "remove '=0'"],
            id="argument with a default",
        ),
        pytest.param(
            STRATEGY.format(body="    @hookimpl\n    def prepare_modell(self, build):\n        pass\n"),
            ["bad.py:4:", "strategy 's'", "no hook 'prepare_modell'", "Did you mean 'prepare_model'?"],
            id="misspelt method",
        ),
        pytest.param(
            STRATEGY.format(body="    def prepare_model(self, build):\n        pass\n"),
            ["bad.py:4:", "prepare_model() lacks @hookimpl"],
            id="method without hookimpl",
        ),
        pytest.param(
            "def hardware_profiles():\n    return []\n",
            ["bad.py:1:", "hardware_profiles() lacks @hookimpl", "never be called"],
            id="function without hookimpl",
        ),
        pytest.param(
            "x = 1\n", ["no @hookimpl function found", "hardware_profiles() or strategies()"], id="nothing"
        ),
        pytest.param("", ["no @hookimpl function found"], id="empty file"),
        pytest.param(
            "x = 1\nimport nosuchmodule\n",
            ["bad.py:2:", "ModuleNotFoundError", "nosuchmodule"],
            id="missing module",
        ),
        pytest.param("x = 1\n\ndef f(:\n    pass\n", ["bad.py:3:", "SyntaxError"], id="syntax error"),
        pytest.param(
            "def f():\n    1 / 0\nf()\n", ["bad.py:2:", "ZeroDivisionError"], id="error while loading"
        ),
        pytest.param(
            USE + "@hookimpl\ndef strategies():\n    return undefined\n",
            ["bad.py:4:", "NameError", "undefined"],
            id="error in a discovery hook",
        ),
        pytest.param(
            "PLUGIN_API = (2, 0)\n" + STRATEGY.format(body=""),
            ["wants plugin API 2.0", OFFERS],
            id="newer major",
        ),
        pytest.param(
            "PLUGIN_API = (1, 99)\n" + STRATEGY.format(body=""),
            ["wants plugin API 1.99", OFFERS],
            id="newer minor",
        ),
        pytest.param(
            "PLUGIN_API = (0, 9)\n" + STRATEGY.format(body=""),
            ["wants plugin API 0.9", OFFERS],
            id="older major",
        ),
        pytest.param(
            STRATEGY.format(body="").replace("return S()", "return S"),
            ["returned the class S", "return S()"],
            id="class, not instance",
        ),
        pytest.param(
            STRATEGY.format(body="").replace("return S()", "return 'bf16'"),
            ["must return Strategy instances", "'bf16'"],
            id="no strategy",
        ),
        pytest.param(
            STRATEGY.format(body="").replace("name = 's'", "name = 'My Strategy'"),
            ["lower case", "'My Strategy'"],
            id="bad name",
        ),
        pytest.param(
            STRATEGY.format(body="").replace("name = 's'", "pass"), ["lower case", "not ''"], id="no name"
        ),
        pytest.param(
            STRATEGY.format(body="    affects = 'speed'\n"),
            ["affects 'speed'", "'recipe' or 'execution'"],
            id="bad affects",
        ),
        pytest.param(
            USE + "@hookimpl\ndef on_step_end(step):\n    pass\n",
            ["bad.py:2:", "'on_step_end' belongs on a Strategy"],
            id="runtime hook on the module",
        ),
        pytest.param(
            STRATEGY.format(body="    @hookimpl\n    def hardware_profiles(self):\n        pass\n"),
            ["bad.py:4:", "'hardware_profiles' belongs at the top of the module"],
            id="discovery hook on a strategy",
        ),
        pytest.param(
            PROFILE.format(fields="{'name': 'x', 'vram': 4}"),
            ["no field 'vram'", "Did you mean 'vram_gib'?", "compute_capability"],
            id="unknown field in a dict",
        ),
        pytest.param(
            PROFILE.format(fields="HardwareProfile(name='x', vram=4)"),
            ["bad.py:4:", "TypeError", "'vram'"],
            id="unknown field as a keyword",
        ),
        pytest.param(
            PROFILE.format(fields="{'vram_gib': 4}"),
            ["TypeError", "missing", "'name'"],
            id="profile without name",
        ),
        pytest.param(
            PROFILE.format(fields="'rtx3070'"),
            ["must return HardwareProfile or dict", "'rtx3070'"],
            id="no profile",
        ),
    ],
)
def test_mistake_is_explained_with_its_place(
    project: Project, write_plugin: WritePlugin, source: str, words: list[str]
) -> None:
    error = error_of(project, write_plugin, source)
    assert "plugins/strategies/bad.py" in error and "\n" not in error
    for word in words:
        assert word in error, error


def test_bad_profile_values_all_at_once(project: Project, write_plugin: WritePlugin) -> None:
    fields = (
        "HardwareProfile(name='RTX 3070', device='gpu', vram_budget=85, strategies='bf16', match='(',"
        " tflops={'int8': 1})"
    )
    error = error_of(project, write_plugin, PROFILE.format(fields=fields), "hardware/bad.py")
    for words in (
        "name 'RTX 3070' must be lower case",
        "device 'gpu' must be 'cuda' or 'cpu'",
        "vram_budget 85 must be a share",
        "strategies 'bf16' must be a tuple of names: ('bf16',)",
        "match '(' is no regular expression",
        "tflops has ['int8']; known: fp32, fp16, bf16",
    ):
        assert words in error, error


def test_card_needs_memory_and_capability_and_auto_is_taken(
    project: Project, write_plugin: WritePlugin
) -> None:
    error = error_of(
        project, write_plugin, PROFILE.format(fields="HardwareProfile(name='auto')"), "hardware/bad.py"
    )
    for words in ("vram_gib is missing", "compute_capability (0, 0) must be a pair", "not 'auto'"):
        assert words in error, error


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ("'vram_gib': '8', 'compute_capability': (8, 6)", "vram_gib"),
        ("'vram_gib': 8, 'compute_capability': 8.6", "compute_capability"),
        ("'vram_gib': 8, 'compute_capability': (8, 6), 'tflops': 30.2", "tflops"),
        ("'vram_gib': 8, 'compute_capability': (8, 6), 'tflops': {'bf16': '30'}", "tflops"),
        ("'vram_gib': 8, 'compute_capability': (8, 6), 'options': {'loader': 2}", "options"),
    ],
)
def test_profile_value_of_another_type_names_its_field(
    project: Project, write_plugin: WritePlugin, fields: str, field: str
) -> None:
    source = PROFILE.format(fields=f"{{'name': 'card', {fields}}}")
    error = error_of(project, write_plugin, source, "hardware/bad.py")
    assert f"{field} " in error and "must be" in error, error


@pytest.mark.parametrize(
    ("body", "attribute"),
    [
        ("    requires = 'bf16'\n", "requires"),  # resolve() says: s needs b
        ("    after = 'bf16'\n", "after"),
        ("    conflicts = ('bf16',)\n", "conflicts"),  # AttributeError in resolve()
        ("    phase = 'MODEL'\n", "phase"),  # TypeError in resolve()
        ("    defaults = ['workers']\n", "defaults"),
        ("    defaults = {5: 1}\n", "must be a dict with names as keys"),
    ],
)
def test_strategy_attribute_of_another_type_is_named(
    project: Project, write_plugin: WritePlugin, body: str, attribute: str
) -> None:
    assert attribute in error_of(project, write_plugin, STRATEGY.format(body=body))


@pytest.mark.parametrize("version", ["1", "'1.0'", "1.0"])
def test_plugin_api_of_another_type(project: Project, write_plugin: WritePlugin, version: str) -> None:
    error = error_of(project, write_plugin, f"PLUGIN_API = {version}\n" + STRATEGY.format(body=""))
    assert "PLUGIN_API" in error and str(API_VERSION) in error, error


def test_sys_exit_in_a_plugin_is_its_error(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("strategies/bad.py", "import sys\nsys.exit('needs a newer Python')\n")
    try:
        registry = load(project)
    except SystemExit:
        pytest.fail("the plugin ended the program")
    assert "needs a newer Python" in plugin_named(registry, "plugins/strategies/bad.py").error


@pytest.mark.parametrize(
    "source",
    [
        USE + "@hookimpl(specname='strategies')\ndef mine():\n    return []\n",
        STRATEGY.format(
            body="    @hookimpl(specname='adjust_plan')\n    def mine(self, plan):\n        pass\n"
        ),
    ],
)
def test_specname_would_never_be_called(project: Project, write_plugin: WritePlugin, source: str) -> None:
    assert "specname" in error_of(project, write_plugin, source)


# ---- names that clash


def test_second_definition_of_a_profile_is_refused(project: Project, write_plugin: WritePlugin) -> None:
    error = error_of(project, write_plugin, PROFILE.format(fields=f"{{**{{{CARD}}}, 'name': 'rtx2050'}}"))
    assert "hardware profile 'rtx2050' is already defined by plugins/hardware/rtx2050.py" in error
    assert f"{DISABLE_VARIABLE}=plugins/hardware/rtx2050.py" in error


def test_second_definition_of_a_strategy_is_refused(project: Project, write_plugin: WritePlugin) -> None:
    write_plugin("strategies/a.py", STRATEGY.format(body=""))
    error = error_of(project, write_plugin, STRATEGY.format(body=""), "strategies/b.py")
    assert "strategy 's' is already defined by plugins/strategies/a.py" in error


def test_one_file_that_declares_a_name_twice(project: Project, write_plugin: WritePlugin) -> None:
    fields = f"[{{{CARD}}}, {{**{{{CARD}}}, 'vram_gib': 12}}]"
    error = error_of(project, write_plugin, PROFILE.format(fields=fields), "hardware/bad.py")
    assert "'card'" in error


def test_replacing_a_bundled_plugin_by_disabling_it(
    project: Project, write_plugin: WritePlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plugin("hardware/mine.py", PROFILE.format(fields=f"{{**{{{CARD}}}, 'name': 'rtx2050'}}"))
    monkeypatch.setenv(DISABLE_VARIABLE, "plugins/hardware/rtx2050.py")
    registry = load(project)
    assert not registry.broken() and registry.profile("rtx2050").vram_gib == 8


# ---- looking up and switching off


def test_lookup_suggests(project: Project) -> None:
    registry = load(project)
    with pytest.raises(
        PluginError, match=r"hardware\.profile: unknown hardware profile 'rtx-4060'.*'rtx4060'\?"
    ):
        registry.profile("rtx-4060")
    message = registry.unknown_strategy("bf61", "hardware.strategies.add")
    assert message.startswith("hardware.strategies.add: unknown strategy 'bf61'. Did you mean 'bf16'?")
    assert "Known: accumulation, adamw8bit, allocator, bf16" in message


def test_disabled_plugins_are_not_even_imported(
    project: Project, write_plugin: WritePlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = write_plugin(
        "strategies/bad.py", "from pathlib import Path\nPath('touched').touch()\nraise ValueError\n"
    )
    monkeypatch.setenv(DISABLE_VARIABLE, f"{bad},plugins/strategies/debug.py")
    registry = load(project)
    assert not registry.broken() and "debug" not in registry.strategies
    assert [p.name for p in registry.plugins if p.disabled] == [bad, "plugins/strategies/debug.py"]
    assert not (project.root / "touched").exists()


def test_disabling_allows_spaces(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE_VARIABLE, "plugins/strategies/debug.py, plugins/strategies/loader.py")
    assert not {"debug", "loader"} & load(project).strategies.keys()


# ---- torch, in a fresh interpreter; a stand-in named torch is as good as the real one


@pytest.mark.parametrize("importer", ["import torch\n", "import helper_that_imports_torch\n"])
def test_torch_at_module_level_is_refused(project: Project, write_plugin: WritePlugin, importer: str) -> None:
    write_plugin("strategies/eager.py", importer + STRATEGY.format(body=""))
    write_plugin("strategies/late.py", STRATEGY.format(body="").replace("'s'", "'late'"))
    fakes = project.root / "fakes"
    fakes.mkdir()
    (fakes / "torch.py").write_text("", encoding="utf-8")
    (fakes / "helper_that_imports_torch.py").write_text("import torch\n", encoding="utf-8")
    code = (
        "import json; from core.plugins import Registry; from core.project import Project\n"
        "r = Registry.load(Project.find(), entry_points=False)\n"
        "print(json.dumps({p.name: p.error for p in r.plugins if p.error}))"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(fakes), str(REPO)])}
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project.root,
        env=environ,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    errors = json.loads(out.stdout)
    assert list(errors) == ["plugins/strategies/eager.py"], out
    assert (
        "imports torch when it is loaded. Import it inside the hook" in errors["plugins/strategies/eager.py"]
    )


# ---- pip packages


def install(folder: Path, name: str, module: str, source: str | None, version: str = "0.3") -> None:
    """A distribution as pip leaves it: a module, METADATA and entry_points.txt."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text(f"[tightfit]\nplugin = {module}\n", encoding="utf-8")
    if source is not None:
        (folder / f"{module}.py").write_text(source, encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("tightfit_test_"):
            del sys.modules[name]


def own(registry: Registry) -> list[Plugin]:
    return [p for p in registry.plugins if p.name.startswith("tightfit-test-")]


def test_entry_point_plugin_beside_a_broken_one(project: Project, site: Path) -> None:
    install(site, "tightfit-test-card", "tightfit_test_card", PROFILE.format(fields=f"{{{CARD}}}"))
    install(site, "tightfit-test-broken", "tightfit_test_broken", "raise RuntimeError('boom')\n")
    install(site, "tightfit-test-gone", "tightfit_test_gone", None)
    registry = Registry.load(project)
    found = {p.name: p for p in own(registry)}
    good = found["tightfit-test-card/plugin"]
    assert (good.version, good.profiles, good.error) == ("0.3", ["card"], "") and len(good.sha256) == 64
    assert registry.owner("hardware profile", "card") is good
    assert "RuntimeError: boom" in found["tightfit-test-broken/plugin"].error
    assert "ModuleNotFoundError" in found["tightfit-test-gone/plugin"].error
    assert "cpu" in registry.profiles


def test_entry_point_plugin_is_switched_off_by_its_name(
    project: Project, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(site, "tightfit-test-card", "tightfit_test_card", PROFILE.format(fields=f"{{{CARD}}}"))
    monkeypatch.setenv(DISABLE_VARIABLE, "tightfit-test-card/plugin")
    registry = Registry.load(project)
    assert "card" not in registry.profiles and own(registry)[0].disabled


def test_local_file_wins_over_a_package_of_the_same_name(
    project: Project, site: Path, write_plugin: WritePlugin
) -> None:
    install(site, "tightfit-test-card", "tightfit_test_card", PROFILE.format(fields=f"{{{CARD}}}"))
    write_plugin("hardware/card.py", PROFILE.format(fields=f"{{**{{{CARD}}}, 'vram_gib': 12}}"))
    registry = Registry.load(project)
    assert registry.profile("card").vram_gib == 12
    assert "already defined by plugins/hardware/card.py" in own(registry)[0].error


def test_distribution_seen_twice_is_loaded_once(
    project: Project, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = PROFILE.format(fields=f"{{{CARD}}}")
    for folder in (site, site / "again"):
        install(folder, "tightfit-test-card", "tightfit_test_card", source)
    monkeypatch.syspath_prepend(str(site / "again"))
    registry = Registry.load(project)
    assert [p.error for p in own(registry)] == [""]


# ---- the source's hash


def test_hash_does_not_depend_on_line_ends(project: Project, write_plugin: WritePlugin) -> None:
    name = write_plugin("strategies/s.py", STRATEGY.format(body=""))
    path = project.root / name
    unix = plugin_named(load(project), name).sha256
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert plugin_named(load(project), name).sha256 == unix
    path.write_bytes(path.read_bytes() + b"# edited\r\n")
    assert plugin_named(load(project), name).sha256 != unix
