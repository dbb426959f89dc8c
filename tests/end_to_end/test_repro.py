"""The whole pipeline through DVC, in a copy of the repository: what a newcomer does, on less text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import sample_text

REPO = Path(__file__).parents[2]
TRACKED = [
    *(".dvc/.gitignore", ".dvc/config", ".dvcignore", ".gitattributes", ".gitignore"),
    *("core", "dvc.yaml", "params.yaml", "plugins", "stages"),
]
STAGES = ("prepare-data", "tokenize", "train", "evaluate")

PROFILE = """
from core.hookspecs import HardwareProfile, hookimpl

@hookimpl
def hardware_profiles():
    return HardwareProfile(name="mine", device="cpu", strategies=("accumulation",))
"""


class Repository:
    """A copy under git, with DVC's own cache and site folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in TRACKED:
            source, target = REPO / name, root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        (root / "corpus.txt").write_text(sample_text(150_000, seed=1), encoding="utf-8", newline="\n")
        self.environ = os.environ | {
            "DVC_SITE_CACHE_DIR": str(root.parent / "site"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            **{
                f"GIT_{who}_{what}": "t@example.org"
                for who in ("AUTHOR", "COMMITTER")
                for what in ("NAME", "EMAIL")
            },
        }
        self.git("init", "-q")

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environ,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
        output = done.stdout + done.stderr
        assert not check or done.returncode == 0, output
        return output

    def git(self, *arguments: str) -> str:
        return self.run("git", *arguments)

    def commit(self) -> None:
        self.git("add", "-A")
        self.git("commit", "-qm", "state")

    def repro(self, check: bool = True) -> str:
        return self.run(sys.executable, "-m", "dvc", "repro", check=check)

    def edit(self, old: str, new: str) -> None:
        path = self.root / "params.yaml"
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, old
        path.write_text(text.replace(old, new), encoding="utf-8", newline="\n")


def test_a_newcomers_day(tmp_path):
    repo = Repository(tmp_path / "repo")
    repo.edit("source: sotu ", "source: text ")
    repo.edit("path: null ", "path: corpus.txt ")
    repo.edit("vocab_size: 8192", "vocab_size: 512")
    repo.edit("preset: nano ", "n_layer: 1\n  n_embd: 32\n  n_head: 2\n  block_size: 32\n  preset: nano ")
    repo.edit("max_tokens: ", "max_steps: 6\n  # max_tokens: ")
    repo.edit("eval_interval: ", "eval_interval: 3\n  # eval_interval: ")
    repo.edit("sample_tokens: ", "sample_tokens: 10\n  # sample_tokens: ")
    repo.edit("val_fraction: 0.05", "val_fraction: 0.2")

    # One command: everything.
    output = repo.repro()
    assert [s for s in STAGES if f"Running stage '{s}'" in output] == list(STAGES)
    for path in (
        "reports/report.html",
        "reports/samples.md",
        "reports/metrics.json",
        "models/final/model.safetensors",
    ):
        assert (repo.root / path).is_file(), path
    weights = (repo.root / "models/final/model.safetensors").read_bytes()
    repo.commit()

    # Again: nothing runs, nothing changes.
    output = repo.repro()
    assert output.count("didn't change, skipping") == 4
    assert repo.git("status", "--short") == ""

    # A plugin that is not in use changes nothing.
    (repo.root / "plugins/hardware/mine.py").write_text(PROFILE, encoding="utf-8", newline="\n")
    assert repo.repro().count("didn't change, skipping") == 4

    # Its profile reruns train and evaluate, and nothing else.
    repo.edit("profile: auto ", "profile: mine ")
    output = repo.repro()
    assert [s for s in STAGES if f"Running stage '{s}'" in output] == ["train", "evaluate"]
    assert (
        json.loads((repo.root / "reports/plan.json").read_text(encoding="utf-8"))["profile"]["name"] == "mine"
    )

    # Going back is served from the cache.
    repo.edit("profile: mine ", "profile: auto ")
    output = repo.repro()
    assert "Stage 'train' is cached" in output and "Stage 'evaluate' is cached" in output
    assert (repo.root / "models/final/model.safetensors").read_bytes() == weights

    # More text: held-out documents stay held out, and everything after it runs again.
    before = held_out(repo)
    with (repo.root / "corpus.txt").open("a", encoding="utf-8", newline="\n") as f:
        f.write(sample_text(100_000, seed=2))
    output = repo.repro()
    assert [s for s in STAGES if f"Running stage '{s}'" in output] == list(STAGES)
    assert len(before & held_out(repo)) >= len(before) - 1, "only the block at the old end may change"

    # DVC's own views.
    assert "bits_per_byte" in repo.run(sys.executable, "-m", "dvc", "metrics", "diff")
    assert "bits_per_byte" in repo.run(sys.executable, "-m", "dvc", "exp", "show", "--md")
    assert "index.html" in repo.run(sys.executable, "-m", "dvc", "plots", "diff", "HEAD")

    # A profile that this machine cannot run stops before any data is touched.
    repo.edit("profile: auto ", "profile: rtx4060 ")
    output = repo.repro(check=False)
    assert "Running stage 'prepare-data'" not in output and "Running stage 'train'" not in output
    assert "hardware.profile: rtx4060" in output and "Traceback" not in output


def held_out(repo: Repository) -> set[str]:
    return set((repo.root / "data/documents/val.jsonl").read_text(encoding="utf-8").splitlines())


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
