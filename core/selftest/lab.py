"""Where faults are rehearsed: a small project, and commands run in it by processes that can be killed at any moment."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.files import remove_folder
from core.project import Project

PATIENCE = 120
"""Seconds after which a process that should have ended is taken to hang."""

WORDS = (
    "the",
    "ferry",
    "carried",
    "seven",
    "figs",
    "under",
    "a",
    "red",
    "bridge",
    "Günel",
    "qayıqlar",
    "çınar",
    "dawn",
)
SMALL: dict[str, Any] = {
    "seed": 7,
    # Without muon, which gives way to a rehearsed plugin that could make the optimizer: all runs are to be compared.
    "hardware": {
        "profile": "cpu",
        "strategies": {"add": [], "remove": ["bf16", "threads", "malloc", "muon"]},
    },
    "data": {"source": "text", "path": "corpus.txt", "documents": "lines", "val_fraction": 0.1},
    "tokenizer": {"kind": "bpe", "vocab_size": 320},
    "model": {
        "architecture": "gpt2",
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 16,
        "dropout": 0.1,
    },
    "train": {
        "max_steps": 12,
        "batch_tokens": 128,
        "micro_batch": 2,
        "warmup_steps": 2,
        "eval_interval": 4,
        "eval_tokens": 64,
        "log_interval": 2,
        "checkpoint_minutes": 1e-9,
    },
    "evaluate": {"max_tokens": 256, "n_samples": 1, "sample_tokens": 8},
}


@dataclass(frozen=True)
class Outcome:
    """What a rehearsal found. exact: of the runs compared, those that ended bit for bit as an undisturbed one."""

    tried: int
    survived: int
    compared: int = 0
    exact: int = 0
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.tried == self.survived and self.compared == self.exact


@dataclass(frozen=True)
class Fault:
    """A row of the fault matrix. times, full: tries in a quick and in a full rehearsal."""

    id: str
    name: str
    rehearse: Callable[[Lab, int], Outcome]
    times: int = 1
    full: int = 1
    unless: Callable[[], str | None] = lambda: None
    """Why it cannot be rehearsed here; None where it can."""


FAULTS: dict[str, Fault] = {}


def fault(
    id: str,
    name: str,
    times: int = 1,
    full: int | None = None,
    unless: Callable[[], str | None] = lambda: None,
) -> Callable[[Callable[[Lab, int], Outcome]], Callable[[Lab, int], Outcome]]:
    """Decorator: enter a rehearsal, a function (lab, times) → Outcome, in the matrix."""

    def enter(rehearse: Callable[[Lab, int], Outcome]) -> Callable[[Lab, int], Outcome]:
        assert id not in FAULTS, f"two rehearsals of {id}"
        FAULTS[id] = Fault(id, name, rehearse, times, full or times, unless)
        return rehearse

    return enter


class Tally:
    """Counts tries; what fails is noted with what it was."""

    def __init__(self) -> None:
        self.tried = self.survived = self.compared = self.exact = 0
        self.failures: list[str] = []

    def check(self, what: str, survived: bool, exact: bool | None = None) -> None:
        """Count one try. `what` says which, for the report of a failure; exact: None where no numbers are compared."""
        self.tried += 1
        self.survived += survived
        self.compared += exact is not None
        self.exact += bool(exact)
        if not survived or exact is False:
            self.failures.append(what)

    def outcome(self, note: str = "") -> Outcome:
        failed = "; ".join(self.failures[:5])
        note = f"FAILED: {failed}" if failed else note
        return Outcome(self.tried, self.survived, self.compared, self.exact, note)


@dataclass
class Ended:
    """A process that is over. code: its exit code, negative for a signal. out: what it printed."""

    code: int | None
    out: str

    @property
    def killed(self) -> bool:
        """Whether it was ended from outside, without being asked: SIGKILL, or TerminateProcess on Windows."""
        return self.code in (-9, -15, 15)

    def says(self, *words: str) -> bool:
        """Whether it ended without a traceback and its output holds every word."""
        return "Traceback" not in self.out and all(word in self.out for word in words)


@dataclass
class Life:
    """A command running in a process of its own."""

    process: Any
    out: Path
    started: Any = field(repr=False)

    def wait_for_the_loop(self) -> None:
        """Until training's first step begins, or the process ends."""
        deadline = time.monotonic() + PATIENCE
        while not self.started.poll(0.05) and self.process.is_alive() and time.monotonic() < deadline:
            pass

    def kill(self) -> None:
        self.process.kill()

    def end(self, patience: float = PATIENCE) -> Ended:
        """Wait for it; one that hangs is killed, and its code is None."""
        self.process.join(patience)
        hangs = self.process.is_alive()
        if hangs:
            self.process.kill()
            self.process.join()
        code = None if hangs else self.process.exitcode
        out = self.out.read_text(encoding="utf-8", errors="replace") if self.out.exists() else ""
        return Ended(code, out)


class Lab:
    """A folder on the disk to test, thrown away at the end.

    plugins: the folder of plugins that the small projects get. tokenized: a small project with tokens.
    """

    def __init__(self, folder: Path, plugins: Path) -> None:
        self.folder, self.plugins = folder, plugins
        self.lives = 0
        self.references: dict[str, Path] = {}
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.context: Any = multiprocessing.get_context(method)
        if method == "forkserver":  # torch is imported once, and each life forks from there
            self.context.set_forkserver_preload(["core.selftest.preload"])

    @classmethod
    @contextlib.contextmanager
    def open(cls, parent: Path, plugins: Path) -> Iterator[Lab]:
        """A lab in a new folder under `parent`, on whose disk everything happens."""
        with tempfile.TemporaryDirectory(
            prefix="tightfit-faults-", dir=parent, ignore_cleanup_errors=True
        ) as folder:
            yield cls(Path(folder), plugins)

    def project(self, name: str, **sections: Any) -> Project:
        """A small project, ready to train; sections change its params. A folder of that name is replaced."""
        root = self.folder / name
        remove_folder(root)
        shutil.copytree(self.tokenized(), root)
        write_params(root, **sections)
        if sections:
            assert self.run(Project(root), "env-check").code == 0, "the small project has a plan"
        return Project(root)

    def tokenized(self) -> Path:
        """A small project with plan, documents and tokens; made at the first call. Copy it before changing it."""
        root = self.folder / "tokenized"
        if not root.exists():
            making = Project(self.folder / "making")
            making.root.mkdir()
            shutil.copytree(self.plugins, making.plugins, ignore=shutil.ignore_patterns("__pycache__"))
            write_params(making.root)
            text = small_corpus(400)
            (making.root / "corpus.txt").write_text(text, encoding="utf-8", newline="\n")
            for stage in ("env-check", "prepare-data", "tokenize"):
                ended = self.run(making, stage)
                assert ended.code == 0, ended.out
            making.root.replace(root)
        return root

    def live(
        self,
        project: Project,
        *arguments: str,
        faults: str = "",
        environ: Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> Life:
        """Start `tightfit ARGUMENTS` in the project's folder. limits: {"RLIMIT_FSIZE": bytes} and the like."""
        self.lives += 1
        out = self.folder / f"out-{self.lives}"
        ours, theirs = self.context.Pipe(duplex=False)
        given = (
            str(project.root),
            arguments,
            dict(environ or {}),
            dict(limits or {}),
            faults,
            str(out),
            theirs,
        )
        process = self.context.Process(target=_live, args=given, daemon=False)
        process.start()
        theirs.close()
        return Life(process, out, ours)

    def run(self, project: Project, *arguments: str, **how: Any) -> Ended:
        """Run `tightfit ARGUMENTS` in the project's folder to its end; `how` as for `live`."""
        return self.live(project, *arguments, **how).end()

    def reference(self, **sections: Any) -> Path:
        """The final model's folder of an undisturbed run with these params; trained at the first call."""
        key = json.dumps(sections, sort_keys=True)
        if key not in self.references:
            project = self.project(f"reference-{len(self.references)}", **sections)
            ended = self.run(project, "train")
            assert ended.code == 0, ended.out
            self.references[key] = project.root
        return self.references[key]

    def exact(self, project: Project, **sections: Any) -> bool:
        """Whether a project's finished training is the undisturbed one: weights and curves, byte for byte."""
        reference = Project(self.reference(**sections))
        names = ("models/final/model.safetensors", "reports/curve.tsv", "reports/curve_val.tsv")
        return all(
            (project.root / name).is_file()
            and (project.root / name).read_bytes() == (reference.root / name).read_bytes()
            for name in names
        )

    def repository(self, name: str, **sections: Any) -> Project:
        """A small project under git and DVC, with its own copy of the code, as `dvc repro` needs it."""
        project = self.project(name, **sections)
        for part in (
            "core",
            "stages",
            "dvc.yaml",
            ".dvc/config",
            ".dvc/.gitignore",
            ".dvcignore",
            ".gitignore",
        ):
            source, target = self.plugins.parent / part, project.root / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        subprocess.run(["git", "init", "-q"], cwd=project.root, check=True)
        return project

    def dvc(self, project: Project, *arguments: str, faults: str = "") -> subprocess.Popen[str]:
        """Start `dvc ARGUMENTS` in a repository, one thread per process; its output is in a pipe."""
        environ = os.environ | {"TIGHTFIT_FAULTS": faults, "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
        environ["DVC_SITE_CACHE_DIR"] = str(self.folder / "site")
        environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ["PATH"]])
        return subprocess.Popen(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=project.root,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )


def write_params(root: Path, **sections: Any) -> None:
    """params.yaml of a small project; sections win key by key."""
    from ruamel.yaml import YAML

    params = {}
    for name in SMALL | sections:
        base, given = SMALL.get(name, {}), sections.get(name, {})
        params[name] = {**base, **given} if isinstance(base, dict) else sections.get(name, base)
    with (root / "params.yaml").open("w", encoding="utf-8", newline="\n") as f:
        YAML(typ="safe", pure=True).dump(params, f)


def small_corpus(n_lines: int, seed: int = 1) -> str:
    """Lines of words: equal arguments give equal text."""
    rng = random.Random(seed)
    return "".join(" ".join(rng.choices(WORDS, k=rng.randint(8, 24))) + ".\n" for _ in range(n_lines))


def _live(
    root: str,
    arguments: tuple[str, ...],
    environ: dict[str, str],
    limits: dict[str, int],
    spec: str,
    out: str,
    started: Any,
) -> None:
    """A process's whole life: run a command, its output in a file."""
    os.chdir(root)
    os.environ.update(environ)
    with open(out, "wb", buffering=0) as f:  # noqa: PTH123
        for stream in (1, 2):
            os.dup2(f.fileno(), stream)
    import torch

    from core import faults
    from core.cli import main

    torch.set_num_threads(1)  # small networks are fastest so, and sums do not depend on the machine's cores
    for name, value in limits.items():
        import resource

        resource.setrlimit(getattr(resource, name), (value, value))
    faults.when("train.loop", lambda: started.send_bytes(b"."))
    faults.arm(spec)
    main(list(arguments), prog_name="tightfit")
