"""`tightfit runs`: what lies in runs/, looked at and cleared."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from helpers import make_project

from core import faults
from core.checkpoint import listing
from core.cli import main
from core.env_check import env_check
from core.errors import Stopped
from core.launch import run_training
from core.project import Project
from core.run import Run

SMALL: dict[str, Any] = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
    "train": {
        "max_steps": 4,
        "batch_tokens": 128,
        "micro_batch": 4,
        "lr": 0.001,
        "eval_interval": 2,
        "eval_tokens": 64,
    },
}


HARDWARE = {"profile": "cpu", "strategies": {"add": [], "remove": ["bf16"]}}
OTHER = {
    "model": {**SMALL["model"], "n_embd": 32},
    "train": {**SMALL["train"], "lr": 0.002},
}


@pytest.fixture(scope="module")
def master(tokenized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run that was stopped in its third step, and the finished one of its params.yaml."""
    root = tmp_path_factory.mktemp("runs") / "project"
    shutil.copytree(tokenized, root)
    with pytest.raises(Stopped):
        trained(root, "train.backward=interrupt@5", OTHER)
    trained(root, "", SMALL)
    return root


def trained(root: Path, spec: str, sections: dict[str, Any]) -> None:
    """Train with these params; `spec` as for TIGHTFIT_FAULTS."""
    project = make_project(root, hardware=HARDWARE, **sections)
    env_check(project, lambda line: None)
    faults.arm(spec)
    try:
        run_training(project, lambda line: None)
    finally:
        faults.disarm()


@pytest.fixture
def project(master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of it, which is the current folder."""
    root = tmp_path / "project"
    shutil.copytree(master, root, ignore=shutil.ignore_patterns("documents"))
    monkeypatch.chdir(root)
    return Project(root)


def named(project: Project) -> tuple[Path, Path]:
    """The folders of the finished run and of the one that was stopped."""
    finished, stopped = sorted(project.runs.iterdir(), key=lambda folder: not (folder / "last").exists())
    return finished, stopped


def empty(project: Project) -> Path:
    """The folder of a run that has not begun, the only one."""
    shutil.rmtree(project.runs)
    (project.runs / "abc").mkdir(parents=True)
    return project.runs / "abc"


def runs(*arguments: str, answer: str | None = None) -> Result:
    """`tightfit runs ARGUMENTS`; answer: what is typed."""
    result = CliRunner().invoke(main, ["runs", *arguments], input=answer)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def rows(output: str) -> dict[str, dict[str, str]]:
    """The table by run."""
    head, *lines = output.splitlines()
    starts = [head.index(name) for name in ("run", "state", "step", "of", "best", "size", "last written")]
    cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines]
    return {
        row[0]: dict(zip(("state", "step", "of", "best", "size", "written"), row[1:], strict=True))
        for row in cells
    }


def copies(folder: Path, *names: str) -> list[Path]:
    """Runs of these names that hold what `folder` does, last written an hour earlier each."""
    made = []
    for i, name in enumerate(names):
        made.append(Path(shutil.copytree(folder, folder.with_name(name))))
        for path in made[-1].iterdir():
            os.utime(path, (10**9 - 3600 * i,) * 2)
    return made


def left(project: Project) -> set[str]:
    return {folder.name for folder in project.runs.iterdir()}


# --- list ---------------------------------------------------------------------------------------------------


def test_no_runs_yet(project: Project) -> None:
    empty(project).rmdir()
    assert "no runs yet" in runs("list").output
    project.runs.rmdir()
    assert "no runs yet" in runs("list").output
    assert "nothing to remove" in runs("gc").output


def test_finished_stopped_and_in_training(project: Project) -> None:
    finished, stopped = named(project)
    best = json.loads((finished / "best" / "config.json").read_text("utf-8"))["val_loss"]
    (training,) = copies(stopped, "abc")
    with Run(training, {}).held():
        table = rows(runs("list").output)
    assert {name: (r["state"], r["step"], r["of"]) for name, r in table.items()} == {
        finished.name: ("finished", "4", "4"),
        stopped.name: ("stopped", "2", "4"),
        "abc": ("training", "2", "4"),
    }
    assert table[finished.name]["best"] == f"{best:.4f}"
    bytes_ = sum(p.stat().st_size for p in finished.rglob("*") if p.is_file())
    assert table[finished.name]["size"] == f"{bytes_ / 2**20:.1f} MiB"
    assert rows(runs("list").output)["abc"]["state"] == "stopped", "the lock is free again"


def test_the_last_written_comes_first_and_looking_is_no_writing(project: Project) -> None:
    finished, stopped = named(project)
    copies(finished, "abc", "abd")
    os.utime(stopped / "log.jsonl", (4 * 10**9,) * 2)

    def times() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in project.runs.rglob("*")}

    before = times()
    first = runs("list").output
    runs("show", "abc")
    assert runs("list").output == first and times() == before
    assert list(rows(first)) == [stopped.name, finished.name, "abc", "abd"]


def test_budgets_in_tokens_and_minutes(project: Project) -> None:
    folder = empty(project)
    for train, told in (
        ({"max_steps": None, "max_tokens": 300, "batch_tokens": 128}, "2"),
        ({"max_steps": None, "max_tokens": None, "max_minutes": 90.0, "batch_tokens": 128}, "90 min"),
    ):
        (folder / "run.json").write_text(json.dumps({"identity": {"train": train}}), encoding="utf-8")
        assert rows(runs("list").output)["abc"]["of"] == told


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"identity": []}', "\x00"])
def test_damaged_documents_are_no_traceback(project: Project, text: str) -> None:
    folder = empty(project)
    (folder / "best").mkdir()
    for name in ("run.json", "best/config.json"):
        (folder / name).write_text(text, encoding="utf-8")
    row = rows(runs("list").output)["abc"]
    assert (row["state"], row["step"], row["of"], row["best"]) == ("stopped", "0", "?", "-")
    assert runs("show", "abc").exit_code == 0


@pytest.mark.parametrize(
    "text", ['{"identity": [1]}', '{"identity": {"train": []}}', '{"identity": {"train": 1}}']
)
def test_documents_of_another_shape_are_no_traceback(project: Project, text: str) -> None:
    (empty(project) / "run.json").write_text(text, encoding="utf-8")
    assert runs("list").exit_code == 0 and rows(runs("list").output)["abc"]["of"] == "?"


# --- show ---------------------------------------------------------------------------------------------------


def test_show_tells_sound_damaged_and_refused_checkpoints(project: Project) -> None:
    folder, _ = named(project)
    newest, older = listing(folder)
    shutil.copy(older, folder / "000000001-000000.refused")
    older.write_bytes(older.read_bytes()[:-1])
    lines = runs("show", folder.name[:5]).output.splitlines()
    assert f"run           {folder.name}" in lines and "state         finished" in lines
    (sound,) = [line for line in lines if newest.name in line]
    (damaged,) = [line for line in lines if older.name in line]
    assert "sound, " in sound and " tensors, " in sound
    assert "cannot be used: its bytes are not those that were written" in damaged
    assert any(line.startswith("refused") and "000000001-000000.refused" in line for line in lines)
    assert "params.yaml, plugins, data and code are now those of this run" in lines


def test_show_tells_how_the_recipe_differs_from_params_yaml(project: Project) -> None:
    _, folder = named(project)
    with (project.root / "params.yaml").open("a", encoding="utf-8") as f:
        f.write("seed: 5\n")
    lines = runs("show", folder.name).output.splitlines()
    told = [line.strip() for line in lines[lines.index("now it would be another:") + 1 :]]
    expected = {
        "recipe.model.n_embd is 32, not 16",
        "seed is 1337, not 5",
        "train.lr is 0.002, not 0.001",
    }
    assert expected <= set(told)
    assert not any("log_interval" in line or "micro_batch" in line for line in told)


def test_show_without_a_plan_tells_no_differences(project: Project) -> None:
    project.plan.unlink()
    result = runs("show", named(project)[0].name)
    assert result.exit_code == 0 and "now" not in result.output


@pytest.mark.parametrize("command", ["show", "gc"])
def test_a_name_that_is_unknown_or_not_enough(project: Project, command: str) -> None:
    empty(project).rmdir()
    for name in ("abcdef123456", "abcdee123456", "999999999999"):
        (project.runs / name).mkdir()
    for name, told in {
        "abcdef123465": ("there is none", "Did you mean 'abcdef123456'?", "999999999999"),
        "abc": ("2 begin so", "abcdef123456", "abcdee123456"),
        "zzz": ("there is none", "Known: "),
    }.items():
        result = runs(command, name)
        assert result.exit_code == 2 and all(word in result.output for word in told), result.output
    assert len(left(project)) == 3
    shutil.rmtree(project.runs)
    assert "Known: none" in runs(command, "abc").output


# --- gc -----------------------------------------------------------------------------------------------------


def test_gc_removes_the_others_once_that_is_confirmed(project: Project) -> None:
    mine, stopped = named(project)
    copies(mine, "abc")
    result = runs("gc", answer="n\n")
    assert "remove 2 of them" in result.output and mine.name not in result.output
    assert "abc  finished, step 4 of 4, " in result.output
    assert f"{stopped.name}  stopped, step 2 of 4, " in result.output
    assert left(project) == {mine.name, stopped.name, "abc"}
    runs("gc", answer="")  # nobody is there to answer
    assert left(project) == {mine.name, stopped.name, "abc"}
    assert "removed 2" in runs("gc", answer="y\n").output
    assert left(project) == {mine.name} and len(listing(mine)) == 2
    assert "nothing to remove" in runs("gc", "--yes").output


def test_gc_of_named_runs_takes_these_only(project: Project) -> None:
    mine, stopped = named(project)
    copies(mine, "xyz")
    assert "removed 1" in runs("gc", "xyz", "--yes").output
    assert left(project) == {mine.name, stopped.name}
    assert "removed 1" in runs("gc", mine.name[:6], "--yes").output, "the present one too, where it is named"
    assert left(project) == {stopped.name}


def test_gc_never_removes_a_run_in_training(project: Project) -> None:
    mine, training = named(project)
    copies(mine, "xyz")
    before = {p for p in training.rglob("*") if p.is_file()}
    with Run(training, {}).held():
        output = runs("gc", "--yes").output
        assert f"{training.name}  training, step 2 of 4" in output and "stays, it is being trained" in output
        assert "removed 1" in output and left(project) == {mine.name, training.name}
        assert "nothing to remove" in runs("gc", training.name, "--yes").output
        assert before <= set(training.rglob("*"))


def test_a_run_named_twice_is_removed_once(project: Project) -> None:
    copies(named(project)[0], "xyz")
    assert "removed 1" in runs("gc", "xyz", "xy", "--yes").output


@pytest.mark.parametrize("missing", ["plan", "params", "tokens"])
def test_gc_keeps_everything_where_it_cannot_tell_the_present_run(project: Project, missing: str) -> None:
    before = left(project)
    if missing == "plan":
        project.plan.unlink()
    elif missing == "tokens":
        shutil.rmtree(project.tokens)
    else:
        with (project.root / "params.yaml").open("a", encoding="utf-8") as f:
            f.write("sead: 3\n")
    result = runs("gc", "--yes")
    assert left(project) == before and result.exit_code == 2, result.output


def test_a_removed_run_can_be_trained_again(project: Project, master: Path) -> None:
    finished, _ = named(project)
    runs("gc", finished.name, "--yes")
    trained(project.root, "", SMALL)
    weights = Path("models") / "final" / "model.safetensors"
    assert finished.name in left(project)
    assert (project.root / weights).read_bytes() == (master / weights).read_bytes()
