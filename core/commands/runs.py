"""`tightfit runs`: what lies in runs/, how far each got, and making room."""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from core.checkpoint import Damaged, listing, position, read
from core.cli import command
from core.errors import TightfitError, UserError, did_you_mean
from core.files import remove_folder
from core.project import Project
from core.run import Run, differences


@click.group("runs")
def main() -> None:
    """List, look at and clear the runs of this project."""


@command("list")
def list_(project: Project) -> None:
    """Every run: its state, steps, best held-out loss, size and age."""
    rows = [describe(run) for run in runs_of(project)]
    if not rows:
        click.echo("no runs yet: `dvc repro` or `python -m stages.train` makes one")
        return
    columns = ("run", "state", "step", "of", "best", "size", "last written")
    table = [columns, *(tuple(str(row[c]) for c in columns) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@command("show")
@click.argument("name")
def show(project: Project, name: str) -> None:
    """One run: its files, whether its checkpoints are sound, and where its recipe differs from params.yaml's."""
    run = find(project, name)
    for key, value in describe(run).items():
        click.echo(f"{key:<13} {value}")
    for path in listing(run.folder):
        click.echo(f"checkpoint    {path.name}: {_soundness(path)}")
    for path in sorted(run.folder.glob("*.refused")):
        click.echo(f"refused       {path.name}: set aside, it could not be used")
    for line in _against_now(project, run):
        click.echo(line)


@command("gc")
@click.argument("names", nargs=-1)
@click.option("--yes", is_flag=True, help="Do not ask.")
def gc(project: Project, names: tuple[str, ...], yes: bool) -> None:
    """Remove runs: those named, or all but the one of the present params.yaml. A run in training stays."""
    present = _present(project)
    if not names and present is None:
        raise UserError(
            "which run is the present one cannot be told: reports/plan.json and data/tokens do not match params.yaml. "
            "Run `dvc repro` (or env-check and tokenize) first, or name the runs to remove"
        )
    named = {run.folder: run for run in (find(project, name) for name in names)}
    chosen = list(named.values()) or [
        run for run in runs_of(project) if present is not None and run.folder != present.folder
    ]
    idle = [run for run in chosen if not run.is_held()]
    for run in chosen:
        row = describe(run)
        note = "" if run in idle else ": stays, it is being trained"
        click.echo(f"{row['run']}  {row['state']}, step {row['step']} of {row['of']}, {row['size']}{note}")
    if not idle:
        click.echo("nothing to remove")
        return
    total = sum(size_of(run.folder) for run in idle)
    if not yes and not click.confirm(f"remove {len(idle)} of them, {human(total)}?"):
        return
    for run in idle:
        with run.held():
            run.forget()
            if sys.platform != "win32":  # where an open lock can be removed
                remove_folder(run.folder)
        remove_folder(run.folder)
    click.echo(f"removed {len(idle)}, {human(total)}")


for sub in (list_, show, gc):
    main.add_command(sub)


def runs_of(project: Project) -> list[Run]:
    """The project's runs, the last written first."""
    folders = [p for p in project.runs.iterdir() if p.is_dir()] if project.runs.is_dir() else []
    return [Run(folder, _identity(folder)) for folder in sorted(folders, key=_written, reverse=True)]


def find(project: Project, name: str) -> Run:
    """The run of that name, or of the only name that begins so. Raises UserError where there is none."""
    known = {run.folder.name: run for run in runs_of(project)}
    near = [known[name]] if name in known else [known[n] for n in known if n.startswith(name)]
    if len(near) != 1:
        found = f"{len(near)} begin so" if near else f"there is none.{did_you_mean(name, known)}"
        raise UserError(f"run {name!r}: {found} Known: {', '.join(known) or 'none'}")
    return near[0]


def describe(run: Run) -> dict[str, Any]:
    """A row of the list."""
    there = listing(run.folder)
    step = position(there[0])[0] if there else 0
    last = run.facts("last").get("step")
    train = run.identity.get("train", {})
    total = train.get("max_steps") or max(
        1, round((train.get("max_tokens") or 0) / train.get("batch_tokens", 1))
    )
    total = f"{train['max_minutes']:g} min" if train.get("max_minutes") else total
    state = "training" if run.is_held() else "finished" if last and last == step else "stopped"
    best = run.facts("best").get("val_loss")
    return {
        "run": run.folder.name,
        "state": state,
        "step": step,
        "of": total if train else "?",
        "best": f"{best:.4f}" if isinstance(best, float) else "-",
        "size": human(size_of(run.folder)),
        "last written": datetime.datetime.fromtimestamp(_written(run.folder)).strftime("%Y-%m-%d %H:%M"),
    }


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def human(n: int) -> str:
    """Bytes as a person reads them."""
    return f"{n / 2**30:.2f} GiB" if n >= 1 << 30 else f"{n / 2**20:.1f} MiB"


def _against_now(project: Project, run: Run) -> list[str]:
    now = _present(project)
    if now is None or not run.identity:
        return []
    found = differences(run.identity, now.identity)
    head = (
        "params.yaml, plugins, data and code are now those of this run"
        if not found
        else "now it would be another:"
    )
    return [head, *(f"  {line}" for line in found)]


def _present(project: Project) -> Run | None:
    """The run that training would go on with now; None where plan, tokens and params do not belong together."""
    from core.launch import planned, the_run
    from core.plugin_check import restore

    environ = dict(os.environ)  # which a plan changes, for a training
    try:
        return the_run(project, planned(project)[1])
    except TightfitError:
        return None
    finally:
        restore(environ)


def _soundness(path: Path) -> str:
    try:
        found = read(path)
    except (Damaged, OSError) as e:
        return f"cannot be used: {e}"
    return f"sound, {len(found.shapes)} tensors, {human(path.stat().st_size)}"


def _identity(folder: Path) -> dict[str, Any]:
    """What run.json says that the run is; empty where it is missing or damaged."""
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))["identity"]
        return found if isinstance(found["train"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _written(folder: Path) -> float:
    return max((p.stat().st_mtime for p in folder.iterdir()), default=folder.stat().st_mtime)
