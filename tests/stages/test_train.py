"""The stage train: exit codes and messages."""

from __future__ import annotations

import shutil

import pytest
from click.testing import CliRunner

from stages.train import main


def test_trains(ready):
    project = ready(train={"max_steps": 2})
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 0, result.output
    assert "step 2/2" in result.output and "held-out loss" in result.output
    assert (project.final_model / "model.safetensors").is_file()
    assert (project.final_model / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("remove", "message"),
    [("reports/plan.json", "stages.env_check"), ("data/tokens", "tokenize")],
)
def test_what_is_missing_is_named(ready, remove, message):
    project = ready()
    path = project.root / remove
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
    assert not project.final_model.exists()


def test_interrupted_exits_75_and_keeps_the_last_model(ready, monkeypatch):
    project = ready(train={"max_steps": 2})
    CliRunner().invoke(main, [])
    before = (project.final_model / "model.safetensors").read_bytes()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("core.trainer.optimizer_step", interrupt)
    result = CliRunner().invoke(main, ["--fresh"])
    assert result.exit_code == 75
    assert (project.final_model / "model.safetensors").read_bytes() == before


def test_full_disk_exits_4_and_keeps_the_last_model(ready, monkeypatch):
    import errno

    project = ready(train={"max_steps": 2})
    CliRunner().invoke(main, [])
    before = (project.final_model / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("core.checkpoint.write_tensors", full)
    result = CliRunner().invoke(main, ["--fresh"])
    assert result.exit_code == 4
    assert "No space left" in result.output and "Traceback" not in result.output
    assert (project.final_model / "model.safetensors").read_bytes() == before
    assert not list(project.root.rglob(".*.partial"))
