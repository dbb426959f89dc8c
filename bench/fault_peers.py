"""What peers lose: a kill near a save, a resume in mid-epoch, a flipped bit, a full disk.

    pip install accelerate transformers pytorch-lightning
    python -m bench.fault_peers                  # all peers, 30 kills each
    python -m bench.fault_peers --peer trainer   # one of them
    python -m bench.fault_peers --quick          # 5 kills and 5 flipped bits

Each peer trains through its public interface: accelerate in a loop with save_state and load_state, transformers'
Trainer with resume_from_checkpoint=True, Lightning with ModelCheckpoint(save_last=True) and ckpt_path="last".
Every life is a fork of a process that has imported torch and the peer, and has computed nothing. POSIX only.

kills: training saves 24 MiB after every step. SIGKILL hits at a random moment of the fourth save or shortly after it,
within 1.25 times what the saves before it took, so this is a rate on condition that a kill comes near a save. Then the
peer's own resume logic runs in a fresh life. It has resumed if it raises nothing, and weights, optimizer and step
count come from one and the same step, not from the beginning. Lost random states are not counted against it.
mid-epoch: a run with shuffle, over rows that are always the same, is killed after a save in its second epoch and
resumed. Its final weights must be bit-equal to those of a run that nobody interrupted; two of those must agree.
bits: one bit of the weights or of the optimizer's moments is flipped in the saved files. Noticed: the resume raises,
or writes anything to stderr that it does not write for the intact checkpoint.
disk: in the second save no file may grow over 4 MiB (RLIMIT_FSIZE, which needs no privileges). Room that is freed
does not help, as where another program takes it; where it does, total_limit=1 can save, as it deletes first. Is the
first checkpoint left, and does the peer's own resume logic find it?
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from torch import Tensor, nn

MIB = 1 << 20
SEED, ROWS, BATCH, EPOCHS = 3, 32, 2, 3
"""Of a training that ends: 16 micro-batches an epoch."""
ENDLESS = 1000
"""Epochs of a training that is killed."""
LENGTH = 120
"""That is shown of an error."""
PATIENCE = 300
"""A life that takes longer is ended [s]."""


# ---- what is trained


class Net(nn.Module):
    """Counts its training steps, so that one can see of which step its weights are."""

    steps: Tensor

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.inner, self.output = nn.Linear(width, inner, bias=False), nn.Linear(inner, 1)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        return {"loss": self.output(self.dropout(torch.relu(self.inner(x)))).square().mean()}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The same rows in every life."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": torch.randn(self.width, generator=torch.Generator().manual_seed(i))}


@dataclass(frozen=True)
class Case:
    """A small training, interrupted after `at` micro-batches."""

    dropout: float
    accumulation: int
    at: int
    seedable: bool = False
    """With accelerate's SeedableRandomSampler instead of torch's."""

    def __str__(self) -> str:
        window = f", accumulation {self.accumulation}" if self.accumulation > 1 else ""
        mid = ", mid-window" if self.at % self.accumulation else ""
        sampler = ", seedable sampler" if self.seedable else ""
        return f"dropout {self.dropout}{window}{mid}{sampler}"


class Resumed(Exception):
    """Ends a life that was only to resume."""

    def __init__(self, steps: list[int], digest: str) -> None:
        super().__init__()
        self.state = {"steps": steps, "digest": digest}


@dataclass
class Run:
    """One training by a peer, and what happens at its saves."""

    folder: Path
    case: Case | None = None
    """None: 24 MiB of weights and moments that are saved after every step."""
    resume: bool = False
    checkpoint: Path | None = None
    """Resume from this one, instead of what the peer finds."""
    stop_when_resumed: bool = False
    before_save: Callable[[int], None] = lambda n: None
    after_save: Callable[[int], None] = lambda n: None
    saves: int = field(default=0, init=False)
    in_save: bool = field(default=False, init=False)

    @property
    def accumulation(self) -> int:
        return self.case.accumulation if self.case else 1

    @property
    def save_every(self) -> int:
        """[micro-batches]"""
        return self.case.at if self.case else 1

    @property
    def epochs(self) -> int:
        return EPOCHS if self.case else ENDLESS

    def data(self) -> Rows:
        return Rows(8 if self.case else 1024)

    def net(self) -> Net:
        torch.manual_seed(SEED)
        return Net(8, 16, self.case.dropout) if self.case else Net(1024, 2048, 0.0)

    def saving(self) -> None:
        self.saves += 1
        self.in_save = True
        self.before_save(self.saves)

    def saved(self) -> None:
        if self.in_save:
            self.in_save = False
            self.after_save(self.saves)

    def resumed(self, net: Any, optimizer: Any, step: int) -> None:
        """Called before the first step of a training that resumes."""
        if self.stop_when_resumed:
            moments = optimizer.state_dict()["state"]
            steps = [int(net.steps), int(moments[0]["step"]) if moments else 0, step]
            raise Resumed(steps, digest(net.state_dict(), *moments.values()))


def digest(*states: Mapping[str, Any]) -> str:
    """Of all tensors, to the bit."""
    whole = hashlib.sha256()
    for state in states:
        for value in state.values():
            if isinstance(value, Tensor):
                whole.update(value.detach().contiguous().numpy().tobytes())
    return whole.hexdigest()


# ---- peers


class Peer:
    """A way to train, with its own files and its own way to resume."""

    label: str
    packages: tuple[str, ...]
    """On PyPI."""
    module: str
    """Imported before any fork."""
    temporary: Path | None = None
    """$TMPDIR, where it is not beside the checkpoints."""

    def train(self, run: Run) -> Net:
        """To the end, or to whatever happens before."""
        raise NotImplementedError

    def first(self, folder: Path) -> Path:
        """The checkpoint of the first save."""
        raise NotImplementedError

    def cases(self) -> list[Case]:
        """In mid-epoch. It saves after optimizer steps."""
        return [Case(dropout, n, at) for dropout in (0.0, 0.5) for n, at in ((1, 21), (4, 24))]


class Accelerate(Peer):
    packages, module = ("accelerate",), "accelerate"

    def __init__(self, total_limit: int) -> None:
        self.total_limit = total_limit
        self.label = f"accelerate, total_limit={total_limit}"

    def first(self, folder: Path) -> Path:
        return folder / "checkpoints/checkpoint_0"

    def cases(self) -> list[Case]:
        windows = (1, 21), (4, 24), (4, 22)
        return [
            Case(d, n, at, seedable) for seedable in (False, True) for d in (0.0, 0.5) for n, at in windows
        ]

    def train(self, run: Run) -> Net:
        """The recipe of its guide to checkpoints, with skip_first_batches; the script keeps count."""
        from accelerate import Accelerator
        from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration

        seedable = bool(run.case and run.case.seedable)
        project = ProjectConfiguration(
            str(run.folder), automatic_checkpoint_naming=True, total_limit=self.total_limit
        )
        accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=run.accumulation,
            project_config=project,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable),
        )
        net = run.net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        loader = torch.utils.data.DataLoader(run.data(), batch_size=BATCH, shuffle=True)
        model, optimizer, scheduler, loader = accelerator.prepare(net, optimizer, scheduler, loader)
        done = 0
        if run.resume:
            accelerator.load_state(str(run.checkpoint) if run.checkpoint else None)
            run.resumed(net, optimizer, scheduler.state_dict()["last_epoch"])
            done = run.save_every
        first, skipped = divmod(done, len(loader))
        for epoch in range(first, run.epochs):
            loader.set_epoch(epoch)  # not in the guide; without it no seedable sampler resumes
            again = run.resume and epoch == first
            for batch in accelerator.skip_first_batches(loader, skipped) if again else loader:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch)["loss"])
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                done += 1
                if done % run.save_every == 0 and not run.resume:
                    run.saving()
                    accelerator.save_state()
                    run.saved()
        return net


class HFTrainer(Peer):
    label, packages, module = "transformers' Trainer", ("transformers", "accelerate"), "transformers.trainer"

    def first(self, folder: Path) -> Path:
        return folder / "checkpoint-1"

    def train(self, run: Run) -> Net:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class Watch(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **also: Any) -> None:
                if run.resume:
                    run.resumed(also["model"], also["optimizer"], state.global_step)

            def on_step_end(self, args: Any, state: Any, control: Any, **also: Any) -> None:
                if control.should_save:
                    run.saving()

            def on_save(self, args: Any, state: Any, control: Any, **also: Any) -> None:
                run.saved()

        arguments = TrainingArguments(
            str(run.folder),
            use_cpu=True,
            seed=SEED,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=run.accumulation,
            num_train_epochs=run.epochs,
            save_steps=run.save_every // run.accumulation,
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
        )
        net = run.net()
        trainer = Trainer(net, arguments, train_dataset=run.data(), callbacks=[Watch()])
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else run.resume)
        return net


class Lightning(Peer):
    packages, module = ("pytorch-lightning",), "pytorch_lightning"

    def __init__(self, temporary: Path | None = None) -> None:
        self.temporary = temporary
        self.label = f"Lightning, $TMPDIR on {'another' if temporary else 'the same'} file system"

    def first(self, folder: Path) -> Path:
        return folder / "epoch=0-step=1.ckpt"

    def train(self, run: Run) -> Net:
        import pytorch_lightning as pl
        from pytorch_lightning.callbacks import ModelCheckpoint

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = run.net()

            def training_step(self, batch: dict[str, Tensor], i: int) -> Tensor:
                return self.net(**batch)["loss"]

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.parameters(), lr=1e-3)

        save_every = run.save_every // run.accumulation

        class Watch(pl.Callback):
            """Runs before ModelCheckpoint, which Lightning always puts last."""

            step = 0
            """That a save was announced for."""

            def on_train_batch_start(self, trainer: Any, module: Any, *batch: Any) -> None:
                run.saved()
                if run.resume:
                    run.resumed(module.net, trainer.optimizers[0], trainer.global_step)

            def on_train_batch_end(self, trainer: Any, *also: Any) -> None:
                if trainer.global_step != self.step and trainer.global_step % save_every == 0:
                    self.step = trainer.global_step
                    run.saving()

        pl.seed_everything(SEED, verbose=False)
        module = Module()
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=run.epochs,
            accumulate_grad_batches=run.accumulation,
            callbacks=[Watch(), ModelCheckpoint(run.folder, save_last=True, every_n_train_steps=save_every)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = torch.utils.data.DataLoader(run.data(), batch_size=BATCH, shuffle=True)
        path = run.checkpoint or ("last" if run.resume else None)
        trainer.fit(module, loader, ckpt_path=path)
        return module.net


# ---- lives


@dataclass
class Outcome:
    """Of one life."""

    value: Any = None
    error: str = ""
    """First line of what was raised, or the signal that ended it."""
    stderr: str = ""


Body = Callable[[Callable[[bytes], Any]], Any]
"""Of a life: given what sends bytes to the parent, it returns what JSON can hold."""


class Life:
    """A fork that runs `body`."""

    def __init__(self, body: Body, temporary: Path) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="life-"))
        self.events, sender = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            os.close(sender)
            return
        outcome = {"error": "left"}
        try:
            signal.alarm(PATIENCE)
            for fd, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(self.scratch / name, os.O_WRONLY | os.O_CREAT), fd)
            tempfile.tempdir = str(temporary)
            outcome = {"value": body(lambda event: os.write(sender, event))}
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")}
        finally:
            (self.scratch / "outcome").write_text(json.dumps(outcome))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def event(self) -> bytes:
        """The next byte it sends; none after its end."""
        return os.read(self.events, 1)

    def end(self) -> Outcome:
        """Wait for its end."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.events)
        read = {name: (self.scratch / name).read_text() for name in ("stderr", "outcome") if not status}
        shutil.rmtree(self.scratch)
        if status:
            return Outcome(error=signal.Signals(os.WTERMSIG(status)).name)
        return Outcome(**json.loads(read["outcome"]), stderr=read["stderr"])


@dataclass
class Place:
    """Folders of one trial."""

    checkpoints: Path
    temporary: Path

    def live(self, body: Body) -> Outcome:
        """One life, from its beginning to its end; an error without these folders' names."""
        outcome = Life(body, self.temporary).end()
        error = outcome.error.replace(str(self.checkpoints), "").replace(str(self.temporary), "$TMPDIR")
        error = re.sub(r"(checkpoint[-_])\d+", r"\1N", error)
        outcome.error = error if len(error) <= LENGTH else error[:LENGTH] + "..."
        return outcome

    def train(self, peer: Peer, **run: Any) -> Outcome:
        """To the end; the value is a digest of the weights."""
        made = Run(self.checkpoints, **run)
        return self.live(lambda send: digest(dict(peer.train(made).named_parameters())))

    def resume(self, peer: Peer, checkpoint: Path | None = None) -> Outcome:
        """By the peer's own logic, or from `checkpoint`. An error if there is none, or one of several steps."""

        def body(send: Callable[[bytes], Any]) -> dict[str, Any]:
            try:
                peer.train(Run(self.checkpoints, resume=True, checkpoint=checkpoint, stop_when_resumed=True))
            except Resumed as reached:
                return reached.state
            raise RuntimeError("nothing left to train")

        outcome = self.live(body)
        if not outcome.error:
            steps = outcome.value["steps"]
            if not any(steps):
                outcome.error = "without an error, a fresh start from step 0"
            elif len(set(steps)) > 1:
                outcome.error = f"without an error, weights, optimizer and counter of steps {steps}"
        return outcome


@contextmanager
def place(peer: Peer) -> Iterator[Place]:
    """Empty folders, removed afterwards."""
    with TemporaryDirectory() as checkpoints, TemporaryDirectory(dir=peer.temporary) as temporary:
        yield Place(Path(checkpoints), Path(temporary))


# ---- the four experiments


@dataclass
class Result:
    cell: str
    """Of the table."""
    notes: list[str] = field(default_factory=list)


def kill(peer: Peer, here: Place, rng: random.Random) -> bool:
    """Kill a training near its fourth save; whether it was inside a save."""

    def body(send: Callable[[bytes], Any]) -> None:
        peer.train(Run(here.checkpoints, before_save=lambda n: send(b"s"), after_save=lambda n: send(b"f")))

    life = Life(body, here.temporary)
    events, times = b"", []
    while len(events) < 7:
        event = life.event()
        if not event:
            raise click.ClickException(f"{peer.label} does not train: {life.end().error}")
        events += event
        times.append(time.perf_counter())
    took = statistics.median(times[i + 1] - times[i] for i in (0, 2, 4))
    time.sleep(rng.uniform(0, 1.25 * took))
    os.kill(life.pid, signal.SIGKILL)
    while event := life.event():
        events += event
    life.end()
    return events.count(b"s") > events.count(b"f")


def kills(peer: Peer, trials: int) -> Result:
    rng = random.Random(SEED)
    inside, errors = 0, Counter[str]()
    for _ in range(trials):
        with place(peer) as here:
            inside += kill(peer, here, rng)
            errors[here.resume(peer).error] += 1
    resumed = errors.pop("", 0)
    notes = [f"{inside} of {trials} came inside a save"]
    notes += [f"{n} x {error}" for error, n in errors.most_common()]
    return Result(f"{resumed}/{trials}", notes)


def die(save: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def mid_epoch(peer: Peer) -> Result:
    equal: list[str] = []
    other: list[str] = []
    for case in peer.cases():
        wholes = []
        for _ in range(2):
            with place(peer) as here:
                wholes.append(here.train(peer, case=case))
        if wholes[0].error or wholes[0].value != wholes[1].value:
            reason = wholes[0].error or "two runs with one seed differ"
            raise click.ClickException(f"{peer.label}, {case}: {reason}")
        with place(peer) as here:
            here.train(peer, case=case, after_save=die)
            resumed = here.train(peer, case=case, resume=True)
        same = resumed.value == wholes[0].value
        (equal if same else other).append(f"{case} ({resumed.error})" if resumed.error else str(case))
    notes = [f"{what}: {'; '.join(cases)}" for what, cases in (("bit-equal", equal), ("not", other)) if cases]
    return Result(f"{len(equal)}/{len(equal) + len(other)}", notes)


def tensor_data(path: Path) -> list[tuple[int, int]]:
    """(offset, bytes) of the large tensors in a file of safetensors or of torch.save."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            start = 8 + struct.unpack("<Q", file.read(8))[0]
            return [(start, path.stat().st_size - start)]
        if not zipfile.is_zipfile(path):
            return []
        found = []
        for entry in zipfile.ZipFile(path).infolist():
            file.seek(entry.header_offset + 26)  # where the lengths of its name and its extra field are
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            found += [(start, entry.file_size)] * (entry.file_size > MIB)
        return found


def flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def flipped_bits(peer: Peer, flips: int) -> Result:
    rng = random.Random(SEED)
    noticed, silent = Counter[str](), 0
    with place(peer) as here:
        here.train(peer, after_save=die)
        checkpoint = peer.first(here.checkpoints)
        files = sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]
        regions = [(path, *region) for path in files for region in tensor_data(path)]
        intact = here.resume(peer, checkpoint)
        if intact.error or not regions:
            raise click.ClickException(f"{peer.label} does not resume: {intact.error}")
        for _ in range(flips):
            path, start, size = rng.choices(regions, [size for *_, size in regions])[0]
            where = start + rng.randrange(size), rng.randrange(8)
            flip(path, *where)
            damaged = here.resume(peer, checkpoint)
            flip(path, *where)
            if damaged.error or damaged.stderr != intact.stderr:
                noticed[damaged.error or damaged.stderr.strip().splitlines()[-1]] += 1
            else:
                silent += damaged.value["digest"] != intact.value["digest"]
    notes = [f"{silent} of {flips} loaded other values without a word"]
    notes += [f"{n} x {what}" for what, n in noticed.most_common()]
    return Result(f"{noticed.total()}/{flips}", notes)


def full_disk(peer: Peer) -> Result:
    def fill(save: int) -> None:
        import resource  # not on Windows

        if save == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, 4 * MIB))
        if save == 3:
            raise RuntimeError("none; it trained on")

    with place(peer) as here:
        failed = here.train(peer, before_save=fill)
        own = here.resume(peer)
        by_hand = here.resume(peer, peer.first(here.checkpoints))
    if not own.error:
        cell = "yes"
    elif not by_hand.error:
        cell = "yes, but its own resume fails"
    else:
        cell = "no"
    notes = [f"message: {failed.error}"]
    return Result(cell, notes + ([f"its own resume: {own.error}"] if own.error else []))


# ---- the table


def other_file_system(root: Path) -> Path | None:
    """A writable folder on another file system than `root`, with room for some states."""
    for name in ("/dev/shm", os.environ.get("XDG_RUNTIME_DIR", "/tmp"), "/var/tmp", "/tmp", str(Path.home())):
        folder = Path(name)
        usable = folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 256 * MIB
        if usable and folder.stat().st_dev != root.stat().st_dev:
            return folder
    return None


COLUMNS = {
    "kills": "resumed after a kill near a save",
    "mid-epoch": "bit-equal after a resume in mid-epoch",
    "bits": "flipped bits noticed",
    "disk": "checkpoint left after a full disk",
}


def rows(name: str, root: Path) -> list[Peer]:
    """One peer's rows of the table."""
    if name == "accelerate":
        return [Accelerate(1), Accelerate(2)]
    if name == "trainer":
        return [HFTrainer()]
    other = other_file_system(root)
    if not other:
        click.echo("No second file system to write to: one row of Lightning is left out.")
    return [Lightning(), *([Lightning(other)] if other else [])]


def installed(name: str, peers: list[Peer]) -> bool:
    """Import the peer; if that fails, say what gives it."""
    try:
        for module in ("torch._dynamo", peers[0].module):  # the former is what the first optimizer imports
            importlib.import_module(module)
    except ImportError as error:
        click.echo(f"{name} is left out ({error}): pip install {' '.join(peers[0].packages)}")
        return False
    return True


def measure(peers: list[Peer], trials: int, flips: int) -> Iterator[tuple[Peer, list[Result]]]:
    """What does not depend on what the rows of one peer differ in is measured for the first of them only."""
    shared = [mid_epoch(peers[0]), flipped_bits(peers[0], flips)]
    for peer in peers:
        yield peer, [kills(peer, trials), *shared, full_disk(peer)]
        shared = [Result(result.cell) for result in shared]


@click.command()
@click.option("--peer", type=click.Choice(["accelerate", "trainer", "lightning", "all"]), default="all")
@click.option("--trials", default=30, show_default=True, help="Kills a row.")
@click.option("--quick", is_flag=True, help="5 kills and 5 flipped bits.")
def main(peer: str, trials: int, quick: bool) -> None:
    """Print the table in Markdown, and under it what happened."""
    if not hasattr(os, "fork"):
        raise click.ClickException("POSIX only: it forks and limits files. On Windows, run it in WSL.")
    start = time.perf_counter()
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    trials, flips = (5, 5) if quick else (trials, 20)
    done: list[tuple[Peer, list[Result]]] = []
    packages = ["torch"]
    with TemporaryDirectory(prefix="fault-peers-") as folder:
        tempfile.tempdir = folder
        for name in ("accelerate", "trainer", "lightning") if peer == "all" else (peer,):
            peers = rows(name, Path(folder))
            if installed(name, peers):
                packages += peers[0].packages
                try:
                    done += measure(peers, trials, flips)
                except click.ClickException as error:
                    click.echo(error.message)
    tempfile.tempdir = None
    if not done:
        raise click.ClickException("nothing was measured")
    click.echo(f"| peer | {' | '.join(COLUMNS.values())} |\n|---|---|---|---|---|")
    for one, results in done:
        click.echo(f"| {one.label} | {' | '.join(result.cell for result in results)} |")
    for one, results in done:
        click.echo(f"\n{one.label}")
        for column, result in zip(COLUMNS, results, strict=True):
            for note in result.notes:
                click.echo(f"- {column}: {note}")
    versions = ", ".join(f"{name} {version(name)}" for name in dict.fromkeys(packages))
    click.echo(f"\n{versions}; Python {platform.python_version()}, {platform.system()}")
    click.echo(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
