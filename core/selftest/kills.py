"""Rehearsals of processes that end at the wrong moment, and of what stands around them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from core.checkpoint import listing
from core.faults import POINTS
from core.files import sha256_file
from core.project import Project
from core.run import Run
from core.selftest.lab import PATIENCE, Lab, Outcome, Tally, fault

SAVING = [name for name in POINTS if name.startswith(("checkpoint.", "weights."))]
SLOW = "train.micro_batch=slow@1-100000"


def no_signals() -> str | None:
    return "Windows ends processes without asking them" if sys.platform == "win32" else None


def run_folder(project: Project) -> Path:
    """The one run of a small project."""
    (folder,) = project.runs.iterdir()
    return folder


def wait_until(true: object, seconds: float = PATIENCE) -> bool:
    """Whether `true()` came true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


def has_checkpoint(project: Project) -> bool:
    return project.runs.exists() and any(listing(folder) for folder in project.runs.iterdir())


@fault("F1", "killed at random moments of training", times=20, full=100)
def random_kills(lab: Lab, times: int) -> Outcome:
    """SIGKILL anywhere in the loop, which saves a checkpoint at every step; some runs are killed several times."""
    return kill_at_random(lab, times)


def kill_at_random(lab: Lab, times: int, **sections: Any) -> Outcome:
    """So many kills, on as many runs with these params as it takes."""
    tally, rng, kills, runs = Tally(), random.Random(1), 0, 0
    lab.reference(**sections)
    span = 0.3
    while kills < times:
        project, killed, ended = lab.project("random", **sections), 0, None
        while ended is None:
            life = lab.live(project, "train")
            life.wait_for_the_loop()
            start = time.monotonic()
            if kills < times and killed < 6:
                life.process.join(rng.uniform(0, span))
                if life.process.is_alive():
                    life.kill()
                    kills, killed = kills + 1, killed + 1
            found = life.end()
            if not found.killed:
                ended = found
                span = max(0.1, time.monotonic() - start)
        runs += 1
        for i in range(killed):
            exact = lab.exact(project, **sections)
            tally.check(f"run {runs}, kill {i + 1}: {ended.out[-200:]}", ended.code == 0, exact)
    return tally.outcome(f"{runs} runs")


@fault("F2", "killed at each moment of saving", times=len(SAVING), full=3 * len(SAVING))
def kills_inside_a_save(lab: Lab, times: int) -> Outcome:
    tally = Tally()
    for visit in (2, 1, 3)[: max(1, times // len(SAVING))]:
        for moment in SAVING:
            project = lab.project("saving")
            killed = lab.run(project, "train", faults=f"{moment}=kill@{visit}")
            ended = lab.run(project, "train")
            litter = [*run_folder(project).glob(".*"), *run_folder(project).glob("*.refused")]
            survived = killed.killed and ended.code == 0 and not litter
            tally.check(f"{moment}, save {visit}: {ended.out[-200:]} {litter}", survived, lab.exact(project))
    return tally.outcome()


@fault("F4", "Ctrl-C and SIGTERM; twice", times=6, full=24, unless=no_signals)
def signals(lab: Lab, times: int) -> Outcome:
    """The first finishes the micro-batch, saves and exits with 75; the second ends the process at once."""
    tally = Tally()
    for i in range(times // 3):
        visit = (6, 17, 3, 1, 25, 40, 11, 8)[i % 8]
        for kind in ("interrupt", "terminate"):
            project = lab.project("signals")
            stopped = lab.run(project, "train", faults=f"train.backward={kind}@{visit}")
            files = [p.name for p in listing(run_folder(project))]
            at = f"{(visit) // 4:09d}-{2 * (visit % 4):06d}.safetensors"
            ended = lab.run(project, "train")
            survived = stopped.code == 75 and stopped.says("saved") and at in files and ended.code == 0
            tally.check(f"{kind}, micro-batch {visit}: {stopped.out[-200:]}", survived, lab.exact(project))
        project = lab.project("signals")
        both = f"train.backward=interrupt@{visit}, checkpoint.written=interrupt@{visit // 4 + 1}"
        stopped = lab.run(project, "train", faults=both)
        ended = lab.run(project, "train")
        survived = stopped.code == -signal.SIGINT and ended.code == 0
        tally.check(
            f"twice, micro-batch {visit}: {stopped.code} {stopped.out[-200:]}", survived, lab.exact(project)
        )
    return tally.outcome()


@fault("F5", "`dvc` killed while it trains", unless=no_signals)
def dvc_killed(lab: Lab, times: int) -> Outcome:
    """The trainer notices that its parent is gone, saves and ends; the next `dvc repro` goes on."""
    tally = Tally()
    project = lab.repository("orphan")
    first = lab.dvc(project, "repro", "train", faults=SLOW)
    started = wait_until(lambda: has_checkpoint(project) or first.poll() is not None)
    first.kill()
    first.wait()
    assert first.stdout is not None
    first.stdout.close()
    gone = started and wait_until(lambda: not Run(run_folder(project), {}).is_held(), 10)
    refused_exit = not (project.root / "models").exists()
    second = lab.dvc(project, "repro", "train")
    out, _ = second.communicate(timeout=PATIENCE)
    survived = gone and refused_exit and second.returncode == 0 and "going on after step" in out
    tally.check(f"gone {gone}: {out[-300:]}", survived, lab.exact(project))
    return tally.outcome()


@fault("F6", "two trainings of one run")
def two_at_once(lab: Lab, times: int) -> Outcome:
    """The second refuses and names the first; the lock dies with its holder."""
    tally = Tally()
    project = lab.project("two")
    first = lab.live(project, "train", faults=SLOW)
    first.wait_for_the_loop()
    second = lab.run(project, "train")
    first.kill()
    first.end()
    third = lab.run(project, "train")
    survived = second.code == 75 and second.says(f"process {first.process.pid}") and third.code == 0
    tally.check(second.out + third.out, survived, lab.exact(project))
    return tally.outcome()


@fault("F36", "a clock that lies")
def wrong_clock(lab: Lab, times: int) -> Outcome:
    """The newest checkpoint is the furthest, whatever the files' times say."""
    tally = Tally()
    project = lab.project("clock")
    lab.run(project, "train", faults="checkpoint.durable=kill@5")
    newest, *older = listing(run_folder(project))
    os.utime(newest, (0, 0))
    for path in older:
        os.utime(path, (2**31, 2**31))
    ended = lab.run(project, "train")
    tally.check(ended.out, ended.code == 0 and ended.says(newest.name), lab.exact(project))
    return tally.outcome()


@fault("F37", "killed while documents or tokens are made", times=10, full=50)
def kills_before_training(lab: Lab, times: int) -> Outcome:
    """Run again, the stage gives the same bytes."""
    tally, rng = Tally(), random.Random(2)
    want = {
        stage: hashes(getattr(Project(lab.tokenized()), name))
        for stage, name in (("prepare-data", "documents"), ("tokenize", "tokens"))
    }
    project = lab.project("stages")
    for i in range(times):
        stage, folder = ("tokenize", project.tokens) if i % 3 else ("prepare-data", project.documents)
        at_batch = stage == "tokenize" and i % 2
        life = lab.live(project, stage, faults=f"tokenize.batch=kill@{1 + i % 2}" if at_batch else "")
        if not at_batch:
            life.process.join(rng.uniform(0, 0.5))
            life.kill()
        killed = life.end()
        whole = not folder.exists() or hashes(folder) == want[stage]
        ended = lab.run(project, stage)
        survived = (killed.code == 0 or killed.killed) and whole and ended.code == 0
        tally.check(f"{stage}, kill {i + 1}: {ended.out[-200:]}", survived, hashes(folder) == want[stage])
    return tally.outcome()


def hashes(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()
    }


@fault("F38", "a data loader's worker is killed")
def worker_dies(lab: Lab, times: int) -> Outcome:
    """The error says so, the step is saved, and the next life goes on."""
    import psutil

    tally = Tally()
    hardware = {"options": {"loader": {"workers": 2}}}
    project = lab.project("worker", hardware=hardware)
    life = lab.live(project, "train", faults=SLOW)
    life.wait_for_the_loop()

    def workers() -> list[psutil.Process]:
        family = psutil.Process(life.process.pid).children(recursive=True)
        return [p for p in family if "spawn_main" in " ".join(p.cmdline())]

    found = wait_until(lambda: has_checkpoint(project) and workers(), 60)
    for worker in workers():
        worker.kill()
    ended = life.end(30)
    again = lab.run(project, "train")
    survived = found and ended.code == 1 and ended.says("worker died", "is saved") and again.code == 0
    tally.check(f"{ended.code} {ended.out[-300:]} {again.out[-300:]}", survived, lab.exact(project))
    return tally.outcome()


@fault("F39", "nobody reads what it prints; its folder is tidied away", times=2, unless=no_signals)
def silenced(lab: Lab, times: int) -> Outcome:
    tally = Tally()
    project = lab.project("silenced")
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stages.train"]
    with subprocess.Popen(
        command, cwd=project.root, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        code = process.wait(PATIENCE)
    tally.check(f"closed pipe: exit code {code}", code == 0, lab.exact(project))
    project = lab.project("silenced")
    life = lab.live(project, "train", faults=SLOW)
    life.wait_for_the_loop()
    wait_until(lambda: has_checkpoint(project))
    shutil.rmtree(run_folder(project), ignore_errors=True)
    ended = life.end()
    tally.check(f"folder gone: {ended.out[-300:]}", ended.code == 0, lab.exact(project))
    return tally.outcome()
