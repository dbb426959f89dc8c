"""`tightfit runs`: what lies in runs/, looked at and cleared."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from core import faults
from core.checkpoint import listing
from core.cli import main
from core.errors import Stopped
from core.launch import run_training
from core.project import Project
from core.run import Run

SMALL: dict[str, Any] = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
    "train": {"max_steps": 4, "batch_tokens": 128, "micro_batch": 4, "eval_interval": 2, "eval_tokens": 64},
}


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    faults.disarm()


def with_lr(lr: float) -> dict[str, Any]:
    return {**SMALL, "train": {**SMALL["train"], "lr": lr}}


def runs(*arguments: str, answer: str | None = None) -> Result:
    """`tightfit runs ARGUMENTS`; answer: what is typed."""
    result = CliRunner().invoke(main, ["runs", *arguments], input=answer)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def trained(project: Project, spec: str = "") -> Path:
    """The folder of the run that this training, stopped by `spec`, made or went on with."""
    faults.disarm()
    faults.arm(spec)
    names: list[str] = []
    try:
        run_training(project, lambda line: names.extend(line.split()[1:] if line.startswith("run ") else []))
    except Stopped:
        assert spec
    return project.runs / names[0]


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


# --- list --------------------------------------------------------------------------------------------------------


def test_no_runs_yet(ready: Callable[..., Project]) -> None:
    project = ready(**SMALL)
    assert "no runs yet" in runs("list").output
    project.runs.mkdir()
    assert "no runs yet" in runs("list").output
    assert "nothing to remove" in runs("gc").output


def test_finished_stopped_and_in_training(ready: Callable[..., Project]) -> None:
    stopped = trained(ready(**with_lr(0.002)), "train.backward=interrupt@5")  # in step 3
    project = ready(**SMALL)
    finished = trained(project)
    best = json.loads((finished / "best" / "config.json").read_text("utf-8"))["val_loss"]
    (training,) = copies(stopped, "abc")
    with Run(training, {}).held():
        table = rows(runs("list").output)
    assert list(table)[0] in ("abc", finished.name), "the last written first"
    assert {name: (r["state"], r["step"], r["of"]) for name, r in table.items()} == {
        finished.name: ("finished", "4", "4"),
        stopped.name: ("stopped", "2", "4"),
        "abc": ("training", "2", "4"),
    }
    assert table[finished.name]["best"] == f"{best:.4f}" and table[finished.name]["size"] == "0.1 MiB"
    assert rows(runs("list").output)["abc"]["state"] == "stopped", "the lock is free again"


def test_looking_writes_nothing(ready: Callable[..., Project]) -> None:
    """The order is that of training, not of looking."""
    project = ready(**SMALL)
    trained(project)
    copies(trained(project), "abc", "abd")

    def times() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in project.runs.rglob("*")}

    before = times()
    first = runs("list").output
    runs("show", "abc")
    assert runs("list").output == first and times() == before
    assert list(rows(first))[1:] == ["abc", "abd"]


def test_budgets_in_tokens_and_minutes(ready: Callable[..., Project]) -> None:
    for budget, told in (({"max_tokens": 300}, "2"), ({"max_minutes": 1e-9}, "1e-09 min")):
        train = {k: v for k, v in SMALL["train"].items() if k != "max_steps"} | budget
        folder = trained(ready(**{**SMALL, "train": train}))
        assert rows(runs("list").output)[folder.name]["of"] == told


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}"])
def test_damaged_documents_are_no_traceback(ready: Callable[..., Project], text: str) -> None:
    project = ready(**SMALL)
    folder = project.runs / "abc"
    (folder / "best").mkdir(parents=True)
    for name in ("run.json", "best/config.json"):
        (folder / name).write_text(text, encoding="utf-8")
    row = rows(runs("list").output)["abc"]
    assert (row["state"], row["step"], row["of"], row["best"]) == ("stopped", "0", "?", "-")
    assert runs("show", "abc").exit_code == 0


@pytest.mark.xfail(strict=True, reason="a traceback")
@pytest.mark.parametrize(
    "text",
    ['{"identity": []}', '{"identity": [1]}', '{"identity": {"train": []}}', '{"identity": {"train": 1}}'],
)
def test_documents_of_another_shape_are_no_traceback(ready: Callable[..., Project], text: str) -> None:
    folder = ready(**SMALL).runs / "abc"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(text, encoding="utf-8")
    assert rows(runs("list").output)["abc"]["of"] == "?"


# --- show --------------------------------------------------------------------------------------------------------


def test_show_tells_sound_damaged_and_refused_checkpoints(ready: Callable[..., Project]) -> None:
    folder = trained(ready(**SMALL))
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


def test_show_tells_how_the_recipe_differs_from_params_yaml(ready: Callable[..., Project]) -> None:
    folder = trained(ready(**with_lr(0.002)))
    ready(**{**SMALL, "model": {**SMALL["model"], "n_embd": 32}, "seed": 5})
    lines = runs("show", folder.name).output.splitlines()
    at = lines.index("now it would be another:")
    told = [line.strip() for line in lines[at + 1 :]]
    assert "train.lr is 0.002, not 0.001" in told and "recipe.model.n_embd is 16, not 32" in told
    assert any(line.startswith("seed is ") and line.endswith("not 5") for line in told)
    assert not any("log_interval" in line or "micro_batch" in line for line in told)


def test_show_without_a_plan_tells_no_differences(ready: Callable[..., Project]) -> None:
    project = ready(**SMALL)
    folder = trained(project)
    project.plan.unlink()
    result = runs("show", folder.name)
    assert result.exit_code == 0 and "now" not in result.output


@pytest.mark.parametrize("command", ["show", "gc"])
def test_a_name_that_is_unknown_or_not_enough(ready: Callable[..., Project], command: str) -> None:
    project = ready(**SMALL)
    for name in ("abcdef123456", "abcdee123456", "999999999999"):
        (project.runs / name).mkdir(parents=True)
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


# --- gc ----------------------------------------------------------------------------------------------------------


def test_gc_removes_the_others_once_they_are_confirmed(ready: Callable[..., Project]) -> None:
    project = ready(**SMALL)
    mine = trained(project)
    copies(mine, "abc", "abd")
    result = runs("gc", answer="n\n")
    assert "remove 2 of them" in result.output and mine.name not in result.output
    assert "abc  finished, step 4 of 4, 0.1 MiB" in result.output
    assert left(project) == {mine.name, "abc", "abd"}
    runs("gc", answer="")  # nobody is there to answer
    assert left(project) == {mine.name, "abc", "abd"}
    assert "removed 2" in runs("gc", answer="y\n").output
    assert left(project) == {mine.name} and len(listing(mine)) == 2
    assert "nothing to remove" in runs("gc", "--yes").output


def test_gc_of_named_runs_takes_these_only(ready: Callable[..., Project]) -> None:
    project = ready(**SMALL)
    mine = trained(project)
    copies(mine, "abc", "abd")
    assert "removed 1" in runs("gc", "abc", "--yes").output
    assert left(project) == {mine.name, "abd"}
    assert "removed 1" in runs("gc", mine.name[:6], "--yes").output, "the present one too, where it is named"
    assert left(project) == {"abd"}


def test_gc_never_removes_a_run_in_training(ready: Callable[..., Project]) -> None:
    project = ready(**SMALL)
    mine = trained(project)
    training, _ = copies(mine, "abc", "abd")
    before = {p.relative_to(training): p.stat().st_size for p in training.rglob("*")}
    with Run(training, {}).held():
        result = runs("gc", "--yes")
        assert "abc  training, step 4 of 4" in result.output and "stays, it is being trained" in result.output
        assert "removed 1" in result.output and left(project) == {mine.name, "abc"}
        assert "nothing to remove" in runs("gc", "abc", "--yes").output
        after = {p.relative_to(training): p.stat().st_size for p in training.rglob("*")}
    assert before.keys() <= after.keys()


def test_a_run_named_twice_is_removed_once(ready: Callable[..., Project]) -> None:
    project = ready(**SMALL)
    copies(trained(project), "abc")
    output = runs("gc", "abc", "ab", "--yes").output
    assert "abc" not in left(project)
    if "removed 1" not in output:
        pytest.xfail("it is counted twice")


@pytest.mark.xfail(strict=True, reason="where nothing is the present one, everything is removed")
@pytest.mark.parametrize("missing", ["plan", "params", "tokens"])
def test_gc_keeps_everything_where_it_cannot_tell_which_run_is_the_present_one(
    ready: Callable[..., Project], missing: str
) -> None:
    project = ready(**SMALL)
    mine = trained(project)
    if missing == "plan":
        project.plan.unlink()
    elif missing == "tokens":
        shutil.rmtree(project.tokens)
    else:
        with (project.root / "params.yaml").open("a", encoding="utf-8") as f:
            f.write("sead: 3\n")
    result = runs("gc", "--yes")
    assert left(project) == {mine.name} and result.exit_code == 2, result.output


def test_an_old_run_trains_again_after_gc(ready: Callable[..., Project]) -> None:
    project = ready(**SMALL)
    folder = trained(project)
    weights = (project.final_model / "model.safetensors").read_bytes()
    runs("gc", folder.name, "--yes")
    assert trained(project) == folder
    assert (project.final_model / "model.safetensors").read_bytes() == weights
