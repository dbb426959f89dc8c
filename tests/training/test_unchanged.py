"""Inputs that change while a stage runs: seen, told, and under DVC the result is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import core
from core.errors import UserError
from core.project import Project
from core.selftest.kills import SLOW, has_checkpoint, wait_until
from core.selftest.lab import PATIENCE, Lab, write_params
from core.unchanged import HASHED_MAX, unchanged

DVC = """
stages:
  train:
    cmd: python -m stages.train
    deps: [code.py, data/tokens, missing.json]
    params: [seed, train]
    outs: [models/final]
  alone:
    cmd: echo
"""
PARAMS = """
seed: 7
train: {lr: 0.001, betas: {first: 0.9}, strategies: [a, b]}
evaluate: {n_samples: 3}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    (tmp_path / "data" / "tokens" / "tokenizer").mkdir(parents=True)
    for name, text in {
        "dvc.yaml": DVC,
        "params.yaml": PARAMS,
        "code.py": "x = 1",
        "other.py": "x = 1",
        "data/tokens/train_000.bin": "0123",
        "data/tokens/tokenizer/tokenizer.json": "{}",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return Project(tmp_path)


def edit(project: Project, name: str, old: str, new: str) -> None:
    path = project.root / name
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def changes(project: Project, change: Callable[[], object], stage: str = "train") -> list[str]:
    """What is told of a change."""
    with unchanged(project, stage) as found:
        assert found() == []
        change()
        return found()


def test_nothing_changed(project: Project) -> None:
    assert changes(project, lambda: None) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("seed: 7", "seed: 8", "seed was changed from 7 to 8"),
        ("lr: 0.001", "lr: 0.002", "train.lr was changed from 0.001 to 0.002"),
        ("first: 0.9", "first: 0.8", "train.betas.first was changed from 0.9 to 0.8"),
        ("[a, b]", "[b, a]", "train.strategies was changed from ['a', 'b'] to ['b', 'a']"),
        ("lr: 0.001, ", "", "train.lr was changed from 0.001 to None"),
        ("{lr:", "{new: 1, lr:", "train.new was changed from None to 1"),
    ],
)
def test_an_edited_key_is_told_with_both_values(project: Project, old: str, new: str, told: str) -> None:
    assert changes(project, lambda: edit(project, "params.yaml", old, new)) == [f"params.yaml: {told}"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("n_samples: 3", "n_samples: 4"),  # another stage's
        ("seed: 7", "# why\nseed: 7  # because"),
        ("lr: 0.001", "lr: 1.0e-3"),
        ("{first: 0.9}", "{'first': 0.9}"),
        ("\nseed: 7", ""),
    ],
)
def test_what_the_stage_does_not_read_may_change(project: Project, old: str, new: str) -> None:
    def change() -> None:
        edit(project, "params.yaml", old, new)
        if not new:
            (project.root / "params.yaml").open("a").write("seed: 7\n")

    assert changes(project, change) == []


def test_files(project: Project) -> None:
    root = project.root
    tokens = root / "data" / "tokens"
    assert changes(project, lambda: edit(project, "code.py", "1", "2")) == ["code.py was changed"]
    assert changes(project, lambda: edit(project, "other.py", "1", "2")) == []
    inside = "data/tokens/tokenizer/tokenizer.json"
    assert changes(project, lambda: edit(project, inside, "{}", "[]")) == [f"{inside} was changed"]
    assert changes(project, (tokens / "train_001.bin").touch) == ["data/tokens/train_001.bin was changed"]
    assert changes(project, (tokens / "train_001.bin").unlink) == ["data/tokens/train_001.bin is gone"]
    assert changes(project, (root / "code.py").unlink) == ["code.py is gone"]
    assert changes(project, lambda: (root / "missing.json").write_text("{}")) == ["missing.json was changed"]
    gone = changes(project, lambda: shutil.rmtree(tokens))
    assert gone == [f"{inside} is gone", "data/tokens/train_000.bin is gone"]


def test_a_file_written_anew_with_the_same_bytes_is_the_same(project: Project) -> None:
    def again() -> None:
        path = project.root / "code.py"
        path.write_bytes(path.read_bytes())
        os.utime(path, (1, 1))

    assert changes(project, again) == []


def test_big_files_are_compared_by_size_and_time(project: Project) -> None:
    """Hashing a corpus' tokens would take minutes."""
    path = project.root / "data" / "tokens" / "train_000.bin"
    with path.open("wb") as f:
        f.truncate(HASHED_MAX + 1)
    now = path.stat()

    def put(byte: bytes, ns: int) -> None:
        with path.open("r+b") as f:
            f.write(byte)
        os.utime(path, ns=(ns, ns))

    assert changes(project, lambda: put(b"1", now.st_mtime_ns)) == []
    told = ["data/tokens/train_000.bin was changed"]
    assert changes(project, lambda: put(b"1", now.st_mtime_ns + 1_000_000)) == told
    assert changes(project, lambda: os.truncate(path, HASHED_MAX)) == told
    assert changes(project, lambda: put(b"2", path.stat().st_mtime_ns)) == told, "small ones by content"


@pytest.mark.parametrize("stage", ["alone", "no such stage"])
def test_a_stage_without_inputs_has_none_that_change(project: Project, stage: str) -> None:
    assert changes(project, lambda: edit(project, "params.yaml", "7", "8"), stage) == []


def test_without_a_dvc_yaml_nothing_is_listed(project: Project) -> None:
    (project.root / "dvc.yaml").unlink()
    assert changes(project, lambda: edit(project, "params.yaml", "7", "8")) == []


# --- the end of a stage -------------------------------------------------------------------------------------


def test_under_dvc_the_result_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "train")
    with pytest.raises(UserError) as e, unchanged(project, "train"):
        edit(project, "params.yaml", "0.001", "0.002")
        edit(project, "code.py", "1", "2")
    said = str(e.value)
    assert "inputs of train changed while it ran" in said and "dvc repro" in said
    assert "params.yaml: train.lr was changed from 0.001 to 0.002" in said and "code.py was changed" in said
    with unchanged(project, "train"):
        pass


def test_put_back_in_time_it_is_accepted(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "train")
    with unchanged(project, "train") as found:
        edit(project, "params.yaml", "0.001", "0.002")
        assert found()
        edit(project, "params.yaml", "0.002", "0.001")


def test_without_dvc_nothing_is_refused(project: Project) -> None:
    """Nobody records what a stage that runs alone was made from."""
    with unchanged(project, "train") as found:
        edit(project, "params.yaml", "0.001", "0.002")
        assert found()


def test_an_error_on_its_way_is_not_replaced(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "train")
    with pytest.raises(ZeroDivisionError), unchanged(project, "train"):
        edit(project, "params.yaml", "0.001", "0.002")
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "text", ["train: {lr: ", "\x00", "- a list", "", "train: null", "seed: !!python/x 1"]
)
def test_params_that_are_broken_at_the_end_are_told(
    project: Project, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("DVC_STAGE", "train")
    with (
        pytest.raises(UserError, match=r"train\.lr was changed from 0\.001 to None"),
        unchanged(project, "train"),
    ):
        (project.root / "params.yaml").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"\xff\xfe\xff"), Path.unlink])
def test_params_that_cannot_be_read_at_the_end_are_told(
    project: Project, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], object]
) -> None:
    monkeypatch.setenv("DVC_STAGE", "train")
    with pytest.raises(UserError, match=r"seed was changed from 7 to None"), unchanged(project, "train"):
        spoil(project.root / "params.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "stages: [",
        "stages: {train: {}}",
        "stages:",
        "stages: {train: }",
        "stages: {train: {deps: , params: }}",
    ],
)
def test_a_dvc_yaml_that_lists_nothing_at_the_end_is_told(
    project: Project, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("DVC_STAGE", "train")
    with pytest.raises(UserError, match=r"code\.py is gone"), unchanged(project, "train"):
        (project.root / "dvc.yaml").write_text(text, encoding="utf-8")


# --- stages that somebody has written otherwise -------------------------------------------------------------


@pytest.mark.parametrize(
    "params", ["[seed, train, {other.yaml: [a]}]", "[{params.yaml: [seed, train]}]", "[seed, train.lr]"]
)
def test_every_way_that_dvc_lists_params(project: Project, params: str) -> None:
    edit(project, "dvc.yaml", "[seed, train]", params)
    told = changes(project, lambda: edit(project, "params.yaml", "0.001", "0.002"))
    assert told == ["params.yaml: train.lr was changed from 0.001 to 0.002"]


def test_inputs_outside_the_project(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("elsewhere") / "tokens.bin"
    other.touch()
    edit(project, "dvc.yaml", "missing.json", other.as_posix())
    assert len(changes(project, other.unlink)) == 1


# --- through DVC --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab.open(tmp_path_factory.mktemp("unchanged"), Path(core.__file__).parents[1] / "plugins") as lab:
        yield lab


def test_params_edited_while_dvc_trains(lab: Lab) -> None:
    """Nothing is recorded; the value put back, the finished run is taken as it is."""
    project = lab.repository("edited")
    lock = project.root / "dvc.lock"
    first = lab.dvc(project, "repro", "-s", "train", faults=SLOW)
    assert wait_until(lambda: has_checkpoint(project) or first.poll() is not None)
    write_params(project.root, train={"lr": 0.002})
    out, _ = first.communicate(timeout=PATIENCE)
    assert first.returncode != 0, out
    assert "params.yaml: train.lr was changed from None to 0.002 while this run trains" in out
    assert "inputs of train changed while it ran" in out and "Traceback" not in out
    assert not lock.exists() or "train:" not in lock.read_text("utf-8")

    write_params(project.root)
    again = lab.dvc(project, "repro", "-s", "train", faults="train.window=crash")
    out, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0 and "going on after step 12" in out, out
    assert "train:" in lock.read_text("utf-8")
    assert lab.exact(project)
