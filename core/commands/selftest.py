"""`tightfit selftest --faults`: what can go wrong, rehearsed on this machine and this disk."""

from __future__ import annotations

from pathlib import Path

import click

from core.cli import command
from core.errors import TightfitError, UserError
from core.project import Project


@command("selftest")
@click.option("--faults", is_flag=True, help="Rehearse the faults F1 to F41 on a small training.")
@click.option("--only", default="", metavar="F1,F2", help="Only these rows.")
@click.option("--full", is_flag=True, help="Every try: 100 kills, power cuts where root allows.")
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False, exists=True), help="The disk to try."
)
@click.option("--list", "listed", is_flag=True, help="Name the rows, and rehearse nothing.")
def main(project: Project, faults: bool, only: str, full: bool, folder: Path | None, listed: bool) -> None:
    """Kill, fill, flip and break a small training, and see that nothing is lost."""
    from core.selftest.lab import Lab
    from core.selftest.matrix import choose, heading, rehearse, row

    chosen = choose(only)
    if listed:
        for fault in chosen:
            click.echo(f"{fault.id:<4} {fault.name}")
        return
    if not faults:
        raise UserError("say what to test: --faults (some five minutes), or --list to see what that is")
    where = folder or project.root
    click.echo(f"{len(chosen)} faults in a throw-away folder under {where}")
    for line in heading():
        click.echo(line)
    failed = []
    with Lab.open(where, project.plugins) as lab:
        for fault in chosen:
            done = rehearse(lab, fault, full)
            click.echo(row(done))
            failed += [fault.id] if done.failed else []
    if failed:
        raise TightfitError(f"not survived: {', '.join(failed)}. Notes are in the last column")
    click.echo("nothing was lost")
