"""Rehearsals of full, read-only and rotten disks, and of checkpoints that are not what they were."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core import checkpoint
from core.checkpoint import Damaged, listing, newest
from core.errors import MediaError, UserError
from core.files import remove_folder
from core.selftest.kills import run_folder
from core.selftest.lab import Lab, Outcome, Tally, fault

ORDER = ["file", "file", "rename", "folder"]  # the data, the checksum over it, the name, the folder


def no_root() -> str | None:
    """Why no disk can be made here."""
    if sys.platform != "linux":
        return "mounting a disk of its own needs Linux"
    if os.geteuid() != 0:
        return "mounting a disk of its own needs root"
    return None


@contextlib.contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[bool]:
    """Mount a file system at `folder`; yields whether that worked."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, check=False)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


@fault("F3", "power cut", times=1, full=16)
def power_cut(lab: Lab, times: int) -> Outcome:
    """A file is synced before it gets its name, and the folder after; where root allows, real cuts of a loop disk."""
    tally = Tally()
    tally.check("the order of syncs and rename", _order_of_syncs(lab.folder) == ORDER)
    why_not = no_root() or (None if shutil.which("mkfs.ext4") else "there is no mkfs.ext4")
    if times > 1 and why_not is None:
        rng = random.Random(3)
        for i in range(times - 1):
            survived, exact = _cut(lab, rng)
            tally.check(f"cut {i + 1}", survived, exact)
    return tally.outcome(
        f"order only: {why_not}" if why_not and times > 1 else "" if times > 1 else "order only"
    )


def _order_of_syncs(folder: Path) -> list[str]:
    import torch

    seen: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        seen.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")  # noqa: PTH112
        real_fsync(handle)

    def replace(self: Path, target: Any) -> Path:
        seen.append("rename")
        return real_replace(self, target)

    os.fsync, Path.replace = fsync, replace  # type: ignore[method-assign, assignment]
    try:
        checkpoint.write_tensors(folder / "order.safetensors", {"a": torch.ones(3)}, {})
    finally:
        os.fsync, Path.replace = real_fsync, real_replace  # type: ignore[method-assign]
    return seen if sys.platform == "linux" else ORDER


def _cut(lab: Lab, rng: random.Random) -> tuple[bool, bool]:
    """Train on an ext4 of its own, copy that disk as it is at some moment, and go on from the copy.

    What the system has not written to the disk yet is lost, as in a power cut. The newest checkpoint may not have been
    promised at that moment; the one before it was.
    """
    image, copy, place = lab.folder / "disk.img", lab.folder / "copy.img", lab.folder / "disk"
    with image.open("wb") as f:
        f.truncate(96 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
    project = lab.project("cut")
    with mounted(place, "-o", "loop", str(image)) as works:
        if not works:
            return False, False
        project.runs.symlink_to(place)
        life = lab.live(project, "train")
        life.wait_for_the_loop()
        life.process.join(rng.uniform(0.02, 0.3))
        with contextlib.suppress(ProcessLookupError):
            os.kill(life.process.pid, signal.SIGSTOP)
        there = _checkpoints(place)
        shutil.copyfile(image, copy)
        life.kill()
        life.end()
    with mounted(place, "-o", "loop", str(copy)) as works:
        found = _checkpoints(place)
        ended = lab.run(project, "train")
        exact = lab.exact(project)
    kept = not there[1:] or any(name >= there[1] for name in found)
    return works and kept and ended.code == 0, exact


def _checkpoints(place: Path) -> list[str]:
    """Names of the one run's checkpoints, newest first."""
    runs = [folder for folder in place.iterdir() if folder.name != "lost+found"]
    return [path.name for path in listing(runs[0])] if runs else []


@fault("F7", "disk full, quota, no inodes", times=10)
def disk_full(lab: Lab, times: int) -> Outcome:
    """Earlier checkpoints stay, nothing half-written does; training goes on and its result is the same."""
    tally = Tally()
    for faults, warned in {
        "checkpoint.begin=full@3": False,  # an older one gives way, and it works
        "checkpoint.header=full@2-6": True,
        "checkpoint.written=quota@4-8": True,
        "train.log=full@2-5": True,
    }.items():
        project = lab.project("full")
        ended = lab.run(project, "train", faults=faults)
        litter = list(run_folder(project).glob(".*.partial"))
        told = ("warning" in ended.out) == warned
        tally.check(
            f"{faults}: {ended.out[-200:]}", ended.code == 0 and told and not litter, lab.exact(project)
        )
    project = lab.project("full")
    ended = lab.run(project, "train", faults="weights.written=full@2")
    again = lab.run(project, "train")
    survived = ended.code == 4 and ended.says("room") and again.code == 0
    tally.check(f"no room for the best weights: {ended.out[-200:]}", survived, lab.exact(project))
    project = lab.project("full")
    ended = lab.run(project, "train", faults="checkpoint.begin=full@1-1000")
    said = ended.code == 4 and ended.says("bytes", "free", str(project.runs))
    again = lab.run(project, "train")
    tally.check(f"never any room: {ended.out[-200:]}", said and again.code == 0, lab.exact(project))
    tally.check("refused before step 0", _preflight(lab))
    if sys.platform != "win32":
        project = lab.project("full")
        limit = {"RLIMIT_FSIZE": 60_000}  # below one checkpoint's size, above a model's
        ended = lab.run(project, "train", limits=limit)
        again = lab.run(project, "train")
        tally.check(
            f"file size limit: {ended.out[-200:]}", ended.code == 4 and again.code == 0, lab.exact(project)
        )
    if no_root() is None:
        for options in ("size=350k", "nr_inodes=8"):
            project = lab.project("full")
            with mounted(project.runs, "-t", "tmpfs", "-o", options, "tmpfs") as works:
                stopped = lab.run(project, "train") if works else None
            again = lab.run(project, "train")
            fine = stopped is None or (stopped.code == 4 and "Traceback" not in stopped.out)
            tally.check(
                f"{options}: {stopped and stopped.out[-300:]}", fine and again.code == 0, lab.exact(project)
            )
    return tally.outcome()


def _preflight(lab: Lab) -> bool:
    """A run that the disk cannot hold is refused, with the bytes it needs and the bytes that are free."""
    try:
        checkpoint.require_room(lab.folder, checkpoint=1 << 60, models=0)
    except MediaError as error:
        return "need" in str(error) and "free" in str(error)
    return False


@fault("F8", "read-only output")
def read_only(lab: Lab, times: int) -> Outcome:
    """It never reports success without its files."""
    tally = Tally()
    project = lab.project("readonly")
    ended = lab.run(project, "train", faults="checkpoint.begin=readonly@2-1000")
    again = lab.run(project, "train")
    tally.check(ended.out[-200:], ended.code == 4 and again.code == 0, lab.exact(project))
    project = lab.project("readonly")
    if no_root() is None:
        with mounted(project.runs, "-t", "tmpfs", "-o", "ro", "tmpfs") as works:
            ended = lab.run(project, "train")
        tally.check(f"ro: {ended.out[-200:]}", not works or (ended.code == 4 and ended.says("ead-only")))
    elif sys.platform != "win32":
        project.runs.mkdir()
        project.runs.chmod(0o500)
        ended = lab.run(project, "train")
        project.runs.chmod(0o700)
        tally.check(f"0500: {ended.out[-200:]}", ended.code == 4 and ended.says("ermission"))
    return tally.outcome()


@fault("F9", "a checkpoint cut, flipped, swapped or empty", times=308, full=308)
def damaged_checkpoints(lab: Lab, times: int) -> Outcome:
    """Each kind of damage is noticed and the one before is used; with none left it stops, and never starts afresh."""
    tally, rng = Tally(), random.Random(4)
    project = lab.project("damaged")
    lab.run(project, "train", faults="checkpoint.pruned=kill@5")
    last, before = listing(run_folder(project))
    good, header = last.read_bytes(), int.from_bytes(last.read_bytes()[:8], "little")

    def flipped(offset: int) -> bytes:
        changed = bytearray(good)
        changed[offset] ^= 1 << rng.randrange(8)
        return bytes(changed)

    damages = {f"cut at {n}": good[:n] for n in (0, 1, 8, len(good) // 2, len(good) - 1)}
    damages |= {"a byte more": good + b"\0", "another's content": before.read_bytes()}
    half, page = len(good) // 2 // 4096 * 4096, 4096
    damages["two blocks swapped"] = (
        good[:page]
        + good[half : half + page]
        + good[2 * page : half]
        + good[page : 2 * page]
        + good[half + page :]
    )
    damages |= {
        f"bit in the header at {(n := rng.randrange(8 + header))}, {i}": flipped(n) for i in range(100)
    }
    damages |= {f"bit at {(n := rng.randrange(len(good)))}, {i}": flipped(n) for i in range(200)}
    folder = lab.folder / "flips"
    for what, content in list(damages.items())[:times]:
        remove_folder(folder)
        folder.mkdir()
        (folder / last.name).write_bytes(content)
        (folder / before.name).write_bytes(before.read_bytes())
        said: list[str] = []
        found = newest(folder, lambda state: [], said.append)
        tally.check(what, found is not None and found.path.name == before.name and last.name in said[0])
    last.write_bytes(flipped(len(good) - 9))
    ended = lab.run(project, "train")
    tally.check(f"goes on from the one before: {ended.out[-300:]}", ended.code == 0, lab.exact(project))
    for path in listing(run_folder(project)):
        path.write_bytes(path.read_bytes()[:-1])
    ended = lab.run(project, "train")
    tally.check(f"none left: {ended.out[-300:]}", ended.code == 2 and ended.says("--fresh"))
    return tally.outcome()


@fault("F10", "a checkpoint of another run; another execution")
def foreign(lab: Lab, times: int) -> Outcome:
    """Another recipe is refused field by field; another micro-batch is allowed and said."""
    tally = Tally()
    theirs = lab.project("theirs", train={"lr": 0.002}, model={"n_layer": 2})
    lab.run(theirs, "train")
    ours = lab.project("ours")
    lab.run(ours, "train", faults="checkpoint.pruned=kill@5")
    shutil.copy(listing(run_folder(theirs))[0], run_folder(ours))
    ended = lab.run(ours, "train")
    survived = ended.code == 0 and ended.says("train.lr is 0.002, not", "recipe.model.n_layer is 2, not 1")
    tally.check(ended.out[-400:], survived, lab.exact(ours))
    alone = lab.project("alone")
    lab.run(alone, "train", faults="checkpoint.pruned=kill@5")
    for path in listing(run_folder(alone)):
        path.unlink()
    shutil.copy(listing(run_folder(theirs))[0], run_folder(alone))
    ended = lab.run(alone, "train")
    tally.check(ended.out[-400:], ended.code == 2 and ended.says("belongs to another run"))
    moved = lab.project("moved")
    lab.run(moved, "train", faults="train.backward=interrupt@18")
    from core.selftest.lab import write_params

    write_params(moved.root, train={"micro_batch": 4})
    lab.run(moved, "env-check")
    ended = lab.run(moved, "train")
    tally.check(
        ended.out[-400:], ended.code == 0 and ended.says("micro_batch 2 → 4", "going on after step 4")
    )
    return tally.outcome()


@fault("F30", "absurd headers and names in a checkpoint", times=6)
def absurd_headers(lab: Lab, times: int) -> Outcome:
    """Refused by size or by the checksum; no path and no import ever comes from a file."""
    import psutil
    import torch

    tally = Tally()
    project = lab.project("absurd")
    lab.run(project, "train", faults="checkpoint.pruned=kill@3")
    good = listing(run_folder(project))[0]
    state = checkpoint.read(good).state
    before = psutil.Process().memory_info().rss

    def refused(what: str, make: Callable[[Path], int]) -> None:
        path = lab.folder / good.name
        make(path)
        try:
            checkpoint.read(path)
            tally.check(f"{what}: it was read", False)
        except Damaged:
            tally.check(what, True)
        path.unlink()

    def header(text: bytes) -> Callable[[Path], int]:
        return lambda path: path.write_bytes(len(text).to_bytes(8, "little") + text)

    refused("a header of 100 MB", header(b" " * 100_000_000))
    refused("a header that says 2^63 bytes", lambda path: path.write_bytes(b"\xff" * 7 + b"\x7f{}"))
    refused("brackets without end", header(b"[" * 4_000_000))
    refused("a million keys", header(b"{" + b",".join(b'"%d":0' % i for i in range(500_000)) + b"}"))
    grown = psutil.Process().memory_info().rss - before
    tally.check(f"memory grew by {grown:,} bytes", grown < 200 << 20)
    # Sound by its checksum, and full of names that something might follow: it is refused for its names.
    for path in listing(run_folder(project)):
        path.unlink()
    names = {f"../../{name}": torch.ones(2) for name in ("x", "optimizer/../y")} | {
        "model/_instantiator": torch.ones(1)
    }
    kept = {key: value for key, value in state.items() if key not in ("step", "sequences")}
    checkpoint.save(run_folder(project), state["step"], state["sequences"], names, kept)
    ended = lab.run(project, "train")
    outside = [p for p in (lab.folder / "x", lab.folder.parent / "x", lab.folder / "y") if p.exists()]
    tally.check(ended.out[-300:], ended.code == 2 and "Traceback" not in ended.out and not outside)
    return tally.outcome()


@fault("F41", "a checkpoint of another version")
def other_version(lab: Lab, times: int) -> Outcome:
    """An unknown format is refused with its number."""
    import torch

    tally = Tally()
    path = lab.folder / "000000003-000000.safetensors"
    checkpoint.write_tensors(path, {"a": torch.ones(2)}, {"format": "999", "state": "{}"})
    try:
        checkpoint.read(path)
        tally.check("format 999 was read", False)
    except Damaged as error:
        tally.check(str(error), "999" in str(error))
    with contextlib.suppress(UserError):
        newest(lab.folder, lambda state: [], lambda line: None)
        tally.check("it began afresh", False)
    path.unlink()
    return tally.outcome()
