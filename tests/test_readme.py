"""The README's commands, examples and links are tried, so that they cannot rot."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from core.cli import main
from core.hookspecs import GIB, Facts, Gpu
from core.params import Params
from core.plan import resolve
from core.plugins import Registry
from core.project import Project

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
MACHINE = Facts(
    gpus=(Gpu("NVIDIA GeForce RTX 4060", 8 * GIB, (8, 9)),),
    torch_version="2",
    torch_cuda="13.0",
    cores=8,
    ram_bytes=GIB,
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def read(text: str) -> dict:
    return YAML(typ="safe", pure=True).load(text)


def test_two_commands():
    assert "\npip install -c constraints.txt -e . && dvc repro\n" in README
    assert '\npip install -c constraints.txt -e ".[test]" && pytest\n' in README


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_examples_are_params_that_plan(block):
    shipped = read((REPO / "params.yaml").read_text(encoding="utf-8"))
    for section, values in read(block).items():
        shipped[section] = {**shipped[section], **values}
    params = Params.model_validate(shipped)
    plan = resolve(params, MACHINE, Registry.load(Project(REPO)))
    assert plan.sequences * plan.model.block_size == params.train.batch_tokens


def test_python_example_is_a_whole_plugin(tmp_path):
    (block,) = blocks("python")
    name, source = block.split("\n", 1)
    assert len([line for line in source.splitlines() if line.strip()]) <= 15
    path = tmp_path / name.removeprefix("# ")
    shutil.copytree(REPO / "plugins", tmp_path / "plugins")
    path.write_text(source, encoding="utf-8")
    registry = Registry.load(Project(tmp_path))
    assert not registry.broken()
    assert registry.profiles["rtx3070"].vram_gib == 8


COMMANDS = sorted(set(re.findall(r"(?:^|`)(tightfit [^`\n]+)", README, re.M)))


@pytest.mark.parametrize("line", COMMANDS)
def test_tightfit_commands_exist(line):
    arguments = shlex.split(line)[1:]
    result = CliRunner().invoke(main, [*arguments, "--help"])
    assert result.exit_code == 0, result.output


def test_profiles_named_are_the_bundled_ones():
    sentence = README.split("These have a profile: ")[1].split(";")[0]
    bundled = sorted(p.stem for p in (REPO / "plugins" / "hardware").glob("*.py"))
    assert re.findall(r"`(\w+)`", sentence) == bundled


def test_presets_named_are_the_real_ones():
    from core.model_config import PRESETS

    assert " | ".join(PRESETS) in README
    assert " | ".join(PRESETS) in (REPO / "params.yaml").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    for page in [REPO / "README.md", *(REPO / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_nothing_is_left_to_fill_in():
    for page in [REPO / "README.md", *(REPO / "docs").rglob("*.md")]:
        assert not re.search(r"DEFAULT_|TODO|XXX", page.read_text(encoding="utf-8")), page
