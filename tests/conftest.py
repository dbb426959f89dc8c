"""Every test runs offline, sends nothing, and leaves the user's caches alone."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from core.project import Project

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # helpers; core and stages when nothing is installed

# Before any test imports datasets, which reads them once.
HF_HOME = tempfile.mkdtemp(prefix="tightfit-tests-")
os.environ.update(DVC_NO_ANALYTICS="1", HF_HOME=HF_HOME, HF_HUB_OFFLINE="1")
os.environ.pop("HF_DATASETS_CACHE", None)


@pytest.fixture(scope="session")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project with its plugins, plan and tokens: fp32 on the CPU. Copy it before changing it."""
    from helpers import make_project

    from core.corpus import prepare
    from core.env_check import env_check
    from core.tokens import tokenize

    folder = tmp_path_factory.mktemp("tokenized")
    shutil.copytree(
        TESTS.parent / "plugins", folder / "plugins", ignore=shutil.ignore_patterns("__pycache__")
    )
    project = make_project(folder, hardware={"profile": "cpu", "strategies": {"add": [], "remove": ["bf16"]}})
    env_check(project, lambda line: None)
    prepare(project, lambda line: None)
    tokenize(project, lambda line: None)
    return folder


@pytest.fixture
def ready(tokenized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Project]:
    """Make a project ready to train: `ready(train={"max_steps": 3})`. It becomes the current folder."""
    from helpers import make_project

    from core.env_check import env_check

    def make(folder: str = "project", **sections: Any) -> Project:
        root = tmp_path / folder
        if not root.exists():
            shutil.copytree(tokenized, root)
        hardware = {"profile": "cpu", "strategies": {"add": [], "remove": ["bf16"]}}
        project = make_project(root, **{"hardware": hardware, **sections})
        monkeypatch.chdir(root)
        env_check(project, lambda line: None)
        return project

    return make


def pytest_unconfigure() -> None:
    shutil.rmtree(HF_HOME, ignore_errors=True)
