"""The fault matrix: fault, times tried, times survived, bit-exact, seconds.

    python -m bench.faults            what the tests try
    python -m bench.faults --full     100 kills on training, power cuts where root allows, and the rest

The peers' column is made by `python -m bench.fault_peers`.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

import click

from core.selftest.lab import Lab
from core.selftest.matrix import choose, heading, rehearse, row


@click.command()
@click.option("--full", is_flag=True)
@click.option("--only", default="", metavar="F1,F2")
@click.option("--folder", default=".", type=click.Path(path_type=Path, file_okay=False, exists=True))
def main(full: bool, only: str, folder: Path) -> None:
    """Print the matrix, as Markdown."""
    import torch

    start, done = time.perf_counter(), []
    for line in heading():
        click.echo(line)
    with Lab.open(folder.resolve(), Path(__file__).parents[1] / "plugins") as lab:
        for fault in choose(only):
            done.append(rehearse(lab, fault, full))
            click.echo(row(done[-1]))
    outcomes = [d.outcome for d in done if d.outcome]
    tried, survived = sum(o.tried for o in outcomes), sum(o.survived for o in outcomes)
    compared, exact = sum(o.compared for o in outcomes), sum(o.exact for o in outcomes)
    click.echo(
        f"\n{tried} faults injected, {survived} survived; {exact} of {compared} results compared are bit-exact; "
        f"{time.perf_counter() - start:.0f} s. torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()}, {torch.get_num_threads()} cores"
    )


if __name__ == "__main__":
    main()
