"""What the pipeline costs besides training: the stages around it, a `dvc repro` with nothing to do, and `--help`.

    python -m bench.pipeline                # the default job, from nothing: some minutes
    python -m bench.pipeline --steps 20     # a shorter training

Works in a temporary copy of this repository's tracked files. Prints seconds by the clock and of CPU time.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

REPO = Path(__file__).parents[1]
TIMES = 5


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds by the clock, and CPU-seconds of the command and what it starts."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def copy_of_the_repository(folder: Path) -> None:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, check=True, capture_output=True, text=True)
    for name in names.stdout.split("\0")[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)


@click.command()
@click.option("--steps", type=int, default=0, help="Train so many steps instead of the default job.")
def main(steps: int) -> None:
    """Time the default job's stages, a second run, and --help."""
    bin_folder = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_repository(folder)
        if steps:
            params = (folder / "params.yaml").read_text(encoding="utf-8")
            assert params.count("  max_tokens: 2_000_000 ") == 1
            params = params.replace("  max_tokens: 2_000_000 ", f"  max_steps: {steps} ")
            (folder / "params.yaml").write_text(params, encoding="utf-8", newline="\n")
        repro = [str(bin_folder / "dvc"), "repro", "-q"]
        wall, cpu = timed(repro, folder)
        training = json.loads((folder / "reports" / "train.json").read_text(encoding="utf-8"))["seconds"]
        again = [timed(repro, folder) for _ in range(TIMES)]
        help_ = [timed([str(bin_folder / "tightfit"), "--help"], folder) for _ in range(TIMES)]
    print("| what | by the clock [s] | CPU [s] |\n|---|---|---|")
    print(f"| `dvc repro` from nothing | {wall:.1f} | {cpu:.1f} |")
    print(f"| of it training | {training:.1f} | |")
    print(f"| of it everything else | {wall - training:.1f} | |")
    for what, runs in (("`dvc repro`, nothing to do", again), ("`tightfit --help`", help_)):
        clock, of_cpu = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"| {what}, median of {TIMES} | {clock:.2f} | {of_cpu:.2f} |")


if __name__ == "__main__":
    main()
