"""A project with the bundled plugins beside its params.yaml, and machines to plan for."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import make_project

import core
from core.plugins import DISABLE_VARIABLE
from core.project import Project

REPO = Path(core.__file__).parents[1]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (
        DISABLE_VARIABLE,
        "CUDA_VISIBLE_DEVICES",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
    ):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A small project in tmp_path, which is also the current folder."""
    made = make_project(tmp_path)
    shutil.copytree(REPO / "plugins", made.plugins, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def write_plugin(project: Project) -> Callable[..., str]:
    """write_plugin("strategies/x.py", source) → the plugin's name in messages."""

    def write(file: str, source: str) -> str:
        path = project.plugins / file
        path.write_text(textwrap.dedent(source).lstrip(), encoding="utf-8", newline="\n")
        return f"plugins/{file}"

    return write
