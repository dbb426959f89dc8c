"""A run: `runs/<fingerprint>/`, git-ignored and no DVC output (DVC deletes outputs before a stage starts).

The fingerprint covers what changes the numbers: recipe, data, seed and the code that computes them. Execution
(micro-batch, workers, allocator) does not count, and neither do comments.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checkpoint import Damaged, verified_header, write_tensors
from core.errors import Stopped, UserError
from core.files import copy_folder, new_folder, read_json, remove_folder, write_json
from core.garbage import import_torch
from core.model_config import ModelConfig
from core.plan import recipe_strategies
from core.project import Project

# What computes the numbers of a run.
NUMERICS = (
    "batches.py",
    "fused.py",
    "loss.py",
    "measure.py",
    "model.py",
    "muon.py",
    "numbers.py",
    "optim.py",
    "optim8bit.py",
    "trainer.py",
)


def identity(project: Project, plan: Mapping[str, Any], tokens: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the numbers of a run. plan: the plan document; tokens: the token manifest."""
    train = project.params.train.model_dump(exclude={"micro_batch", "log_interval", "checkpoint_minutes"})
    known = {
        "recipe": plan["recipe"],
        "strategies": {s["name"]: {k: s[k] for k in ("options", "sha256")} for s in recipe_strategies(plan)},
        "train": train,
        "seed": project.params.seed,
        "tokens": {k: tokens[k] for k in ("tokenizer_sha256", "train", "val")},
        "code": code_sha256(),
    }
    return json.loads(json.dumps(known))  # as it comes back from a file


def fingerprint(known: Mapping[str, Any]) -> str:
    """Twelve hex digits that name a run: of its `identity`."""
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode("utf-8")).hexdigest()[:12]


def differences(theirs: Any, ours: Any, at: str = "") -> list[str]:
    """Where two nested documents differ: "train.lr is 0.1, not 0.2"."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        return [
            line
            for key in sorted({*theirs, *ours})
            for line in differences(theirs.get(key), ours.get(key), f"{at}.{key}" if at else key)
        ]
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = enumerate(zip(theirs, ours, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{at}[{i}]")]
    return [] if theirs == ours else [f"{at} is {_short(theirs)}, not {_short(ours)}"]


def first_difference(theirs: Any, ours: Any) -> str:
    """Of documents that are not equal. `differences` takes a missing key for null, so it may find none."""
    return next(iter(differences(theirs, ours)), "a key that is null is missing in one of them")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def code_sha256(names: tuple[str, ...] = NUMERICS) -> str:
    """Hash of the syntax trees of core's numerics, docstrings and comments left out; the same on every Python."""
    trees = []
    for name in names:
        tree = ast.parse((Path(__file__).parent / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                # A string that stands alone is a docstring; fields of a dataclass have them too.
                node.body = [s for s in node.body if not _is_docstring(s)]
        trees.append(_plain(tree))
    return hashlib.sha256(json.dumps(trees).encode("utf-8")).hexdigest()


def _plain(node: Any) -> Any:
    """A syntax tree as lists, without empty fields: those come and go with Python's version, as in ast.dump."""
    if isinstance(node, ast.AST):
        fields = {key: _plain(value) for key, value in ast.iter_fields(node) if value not in (None, [])}
        return [type(node).__name__, fields]
    return [_plain(item) for item in node] if isinstance(node, list) else repr(node)


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


@dataclass(frozen=True)
class Run:
    """A run's folder: checkpoints, log.jsonl, and the weights as folders `best` and `last`."""

    folder: Path
    identity: Mapping[str, Any]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run's lock, which dies with this process. Raises Stopped, naming its holder, where it is taken."""
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        holder = self.folder / "holder.json"
        try:
            with FileLock(self.folder / "lock", timeout=1):  # somebody may only be looking (is_held)
                write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
                yield
        except Timeout:
            who = read_json(holder, made_by="") if holder.exists() else {}
            raise Stopped(
                f"{self.folder} is being trained by process {who.get('pid', '?')} on {who.get('host', '?')}; wait for "
                "it, or stop it"
            ) from None

    def is_held(self) -> bool:
        """Whether a process trains it now."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.folder / "lock", timeout=0):
                return False
        except Timeout:
            return True

    def clean(self) -> None:
        """Remove what killed lives left half-written. Under the lock only."""
        for old in self.folder.glob(".*.old"):  # killed between the two renames of core.files.new_folder
            now = old.with_name(old.name[1:].removesuffix(".old"))
            remove_folder(old) if now.exists() else old.replace(now)
        for partial in self.folder.glob(".*.partial"):
            remove_folder(partial) if partial.is_dir() else partial.unlink()

    def forget(self) -> None:
        """Remove what it has made so far, but for the lock. Under the lock only."""
        for path in self.folder.iterdir():
            if path.name not in ("lock", "holder.json"):
                remove_folder(path) if path.is_dir() else path.unlink()

    def free(self) -> int:
        """Bytes that are free on its disk."""
        return shutil.disk_usage(self.folder).free

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    def weights(self, which: str) -> Path:
        """The folder of the "best" or the "last" weights."""
        return self.folder / which

    def step_of(self, which: str) -> int | None:
        """The step of the "best" or the "last" weights; None where they are missing or damaged."""
        step = self.facts(which).get("step")
        try:
            verified_header(self.weights(which) / "model.safetensors")
        except (OSError, Damaged):
            return None
        return step if isinstance(step, int) else None

    def holds(self, which: str, step: int) -> bool:
        """Whether the "best" or the "last" weights are those of a step, and sound; others are not read through."""
        return self.facts(which).get("step") == step == self.step_of(which)

    def facts(self, which: str) -> dict[str, Any]:
        """config.json of the "best" or the "last" weights; empty where it is missing or damaged."""
        try:
            found = json.loads((self.weights(which) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


def save_model(folder: Path, network: Any, tokenizer: Path, facts: Mapping[str, Any]) -> None:
    """Write model.safetensors, config.json and the tokenizer to a folder, which appears whole or not at all.

    facts: what config.json shall say besides the sizes.
    """
    state, config = network.exported()
    with new_folder(folder) as new:
        write_tensors(new / "model.safetensors", state, {"format": "pt"}, "weights")
        write_json(new / "config.json", {"format": 1, "model": config.to_dict(), **facts})
        copy_folder(tokenizer, new / "tokenizer")


def load_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the network (fp32, on the CPU, in eval mode) and config.json of a folder that `save_model` wrote.

    Raises UserError where it is missing, damaged, or holds other parameters than its config says.
    """
    import_torch(training=False)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from core.model import ARCHITECTURES

    facts = read_json(folder / "config.json", made_by="python -m stages.train", keys=("model", "tokens"))
    again = "train again, or point to another folder"
    try:
        config = ModelConfig(**facts["model"])
        header = verified_header(folder / "model.safetensors")
        there = sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
        if there != config.n_params:
            raise Damaged(f"its config.json means {config.n_params:,} parameters, its weights are {there:,}")
        model = ARCHITECTURES[config.architecture](config)
        state = load_file(folder / "model.safetensors")
    except FileNotFoundError:
        raise UserError(f"{folder / 'model.safetensors'} is missing; {again}") from None
    except (Damaged, SafetensorError, KeyError, TypeError) as e:
        raise UserError(f"{folder}: damaged model ({e or type(e).__name__}); {again}") from None
    if config.tie_embeddings and "lm_head.weight" not in state:
        embedding = (
            "model.embed_tokens.weight" if config.architecture == "qwen3" else "transformer.wte.weight"
        )
        state |= {"lm_head.weight": state[embedding]} if embedding in state else {}
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as e:
        raise UserError(
            f"{folder}: the weights do not fit its config.json ({str(e).splitlines()[0]}); {again}"
        ) from None
    return model.eval(), facts
