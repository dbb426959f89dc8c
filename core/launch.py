"""From params to a finished training: the plan in force, its environment, one process or several, and the outputs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core.errors import Stopped, TightfitError, UserError
from core.faults import point
from core.files import copy_folder, new_folder, read_json, write_json, write_text
from core.garbage import import_torch
from core.hardware import read_facts, usable_cores
from core.hookspecs import Plan
from core.memory.forecast import Forecaster
from core.plan import apply_env, plan_json, resolve
from core.plugins import Registry
from core.project import Project
from core.run import Run, fingerprint, first_difference, identity
from core.stop import LAUNCHED, Stop
from core.tokens import TokenShards
from core.unchanged import unchanged

CURVE_ROWS = 1000


def planned(project: Project) -> tuple[Plan, dict[str, Any]]:
    """The plan that env-check wrote: with its strategies loaded and its variables in the environment, and as written.

    Raises UserError where reports/plan.json is missing, or no longer what params, plugins and machine give.
    """
    written = read_json(project.plan, made_by="python -m stages.env_check")
    registry = Registry.load(project)
    forecaster = Forecaster(project.forecasts, simulates=False)
    plan = resolve(project.params, read_facts(), registry, forecaster)
    # Through JSON, which turns tuples into lists.
    now = json.loads(plan_json(plan, registry))
    if LAUNCHED not in os.environ and now != written:
        raise UserError(
            "reports/plan.json does not match params.yaml, the plugins and this machine any more "
            f"({first_difference(written, now)}): run `python -m stages.env_check` (or `dvc repro`)"
        )
    apply_env(plan)
    # torch then counts the cards as the driver and env-check do
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return plan, written


def run_training(project: Project, echo: Callable[[str], None], fresh: bool = False) -> None:
    """Train and write models/final, reports/train.json, curve.tsv and curve_val.tsv. fresh: forget this run's past."""
    stop = Stop(patient=LAUNCHED in os.environ)
    try:
        if int(os.environ.get("RANK", "0")) > 0:
            _follow(project, echo, stop)
            return
        with unchanged(project, "train") as changes:  # before anything is read
            _lead(project, echo, stop, changes, fresh)
    except TightfitError as error:
        if LAUNCHED in os.environ:  # launchers end with 1 whatever happened: hand our exit code back
            Path(os.environ[LAUNCHED]).write_text(str(error.exit_code), encoding="utf-8")
        raise


def _lead(
    project: Project, echo: Callable[[str], None], stop: Stop, changes: Callable[[], list[str]], fresh: bool
) -> None:
    """The process that speaks and writes; the only one, but with several GPUs."""
    plan, document = planned(project)
    if plan.num_processes > 1 and not {"LOCAL_RANK", LAUNCHED} & os.environ.keys():
        launch_processes(project, plan, fresh)
        return
    import_torch(training=True)
    from core.trainer import train

    run = the_run(project, document)
    with run.held():
        echo(f"run {run.folder.name}")
        if fresh:
            run.forget()
        write_json(
            run.folder / "run.json",
            {"plan": document, "params": project.params.model_dump(), "identity": run.identity},
        )
        result = train(project, plan, run, echo, stop, changes)
        point("train.export")
        write_outputs(project, run, result)
    rate, seconds = result["tokens_per_second"], result["seconds"]
    echo(f"done: {result['steps']} steps in {seconds:.0f} s, {rate:,.0f} tokens/s")


def _follow(project: Project, echo: Callable[[str], None], stop: Stop) -> None:
    """One of the other processes."""
    plan, document = planned(project)
    import_torch(training=True)
    from core.trainer import train

    train(project, plan, the_run(project, document), echo, stop)


def the_run(project: Project, document: Mapping[str, Any]) -> Run:
    """The run that the plan document and the tokens make. Raises UserError where tokens are missing or damaged."""
    known = identity(project, document, TokenShards.open(project.tokens, "train").manifest)
    return Run(project.runs / fingerprint(known), known)


def launch_processes(project: Project, plan: Plan, fresh: bool) -> None:
    """Start this stage again, one process per GPU, through `accelerate launch`.

    On a CPU accelerate launches only with MPI, so there torchrun does it, which accelerate starts cards with too.
    """
    n = str(plan.num_processes)
    if plan.profile.device == "cpu":
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", n]
    else:  # the plan decides precision and compilation
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", n, "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    threads = max(1, usable_cores() // plan.num_processes)
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "error"
        environ = {"OMP_NUM_THREADS": str(threads), **os.environ, LAUNCHED: str(told)}
        command = [sys.executable, "-m", *launcher, "-m", "stages.train", *(["--fresh"] if fresh else [])]
        with Stop(patient=True) as stop, subprocess.Popen(command, cwd=project.root, env=environ) as process:
            code = _wait(process, stop)
        if not code:
            return
        words = told.read_text(encoding="utf-8") if told.exists() else ""
        error = TightfitError(f"training in {n} processes failed; the message above says why")
        error.exit_code = int(words) if words.isdigit() else 1
        if error.exit_code == Stopped.exit_code:
            error = Stopped(
                f"the {n} processes have stopped: {stop.requested or 'the message above says why'}"
            )
        raise error


def _wait(process: subprocess.Popen[bytes], stop: Stop) -> int:
    """Wait for the launcher; hand a request to stop on to it. A terminal sends Ctrl-C to all of them by itself."""
    told = False
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(0.5)
        if stop.look() and not told:
            told = True
            if stop.requested != "SIGINT":
                process.terminate()


def write_outputs(project: Project, run: Run, result: dict[str, Any]) -> None:
    """The stage's outputs: the final model, metrics and curves."""
    source = run.weights(project.params.train.final_weights)
    with new_folder(project.final_model) as new:
        copy_folder(source, new)
    columns = {"step": 0, "tokens": 0, "lr": 9, "loss": 6}
    write_table(project.reports / "curve.tsv", columns, result["losses"])
    columns = {"step": 0, "tokens": 0, "val_loss": 6, "val_bits_per_byte": 6}
    write_table(project.reports / "curve_val.tsv", columns, result["evaluations"])
    names: tuple[str, ...] = (
        "steps",
        "tokens",
        "epochs",
        "loss",
        "best_val_loss",
        "seconds",
        "tokens_per_second",
        "share_of_peak",
    )
    names += ("peak_memory_gib", "predicted_memory_gib", "micro_batch", "out_of_memory", "skipped_steps")
    figures = {name: round(result[name], 6) for name in names if name in result}
    write_json(project.reports / "train.json", figures)


def write_table(path: Path, columns: dict[str, int], records: list[dict[str, Any]]) -> None:
    """A TSV that `dvc plots` reads and git diffs well: at most 1,000 rows, evenly thinned, the last one kept.

    columns: {name: decimals}.
    """
    every = -(-len(records) // CURVE_ROWS)
    kept = [r for i, r in enumerate(records) if i % every == 0 or i == len(records) - 1]
    rows = ["\t".join(columns)]
    rows += ["\t".join(f"{r[name]:.{digits}f}" for name, digits in columns.items()) for r in kept]
    write_text(path, "\n".join(rows) + "\n")
