"""A run: `runs/<fingerprint>/`, git-ignored and no DVC output (DVC deletes outputs before a stage starts).

The fingerprint covers what changes the numbers: recipe, data, seed and the code that computes them. Execution
(micro-batch, workers, allocator) does not count, and neither do comments.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import Stopped, UserError
from core.files import copy_folder, fsync_file, new_folder, read_json, write_json
from core.model_config import ModelConfig
from core.plan import recipe_strategies
from core.project import Project

# What computes the numbers of a run.
NUMERICS = ("batches.py", "loss.py", "measure.py", "model.py", "optim.py", "optim8bit.py", "trainer.py")


def fingerprint(project: Project, plan: Mapping[str, Any], tokens: Mapping[str, Any]) -> str:
    """Twelve hex digits that name a run. plan: the plan document; tokens: the token manifest."""
    train = project.params.train.model_dump(exclude={"micro_batch", "log_interval", "checkpoint_minutes"})
    identity = {
        "recipe": plan["recipe"],
        "strategies": [{k: s[k] for k in ("name", "options", "sha256")} for s in recipe_strategies(plan)],
        "train": train,
        "seed": project.params.seed,
        "tokens": {k: tokens[k] for k in ("tokenizer_sha256", "train", "val")},
        "code": code_sha256(),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode("utf-8")).hexdigest()[:12]


def code_sha256(names: tuple[str, ...] = NUMERICS) -> str:
    """Hash of the syntax trees of core's numerics, docstrings and comments left out."""
    digest = hashlib.sha256()
    for name in names:
        tree = ast.parse((Path(__file__).parent / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                # A string that stands alone is a docstring; fields of a dataclass have them too.
                node.body = [s for s in node.body if not _is_docstring(s)]
        digest.update(ast.dump(tree).encode("utf-8"))
    return digest.hexdigest()


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


@dataclass(frozen=True)
class Run:
    """A run's folder: log.jsonl, and the weights as folders `best` and `last`."""

    folder: Path

    @classmethod
    @contextlib.contextmanager
    def open(cls, project: Project, name: str) -> Iterator[Run]:
        """Hold the run's lock. Raises Stopped where another process trains it."""
        from filelock import FileLock, Timeout

        folder = project.runs / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / "lock", timeout=0):
                yield cls(folder)
        except Timeout:
            raise Stopped(f"{folder} is being trained by another process; wait for it or stop it") from None

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    def weights(self, which: str) -> Path:
        """The folder of the "best" or the "last" weights."""
        return self.folder / which


def save_model(folder: Path, network: Any, tokenizer: Path, facts: Mapping[str, Any]) -> None:
    """Write model.safetensors, config.json and the tokenizer to a folder, which appears whole or not at all.

    A tied output head is left out: it is the embedding. facts: what config.json shall say besides the sizes.
    """
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    if network.config.tie_embeddings:
        state.pop("lm_head.weight")
    with new_folder(folder) as new:
        save_file(state, new / "model.safetensors", metadata={"format": "pt"})
        (new / "model.safetensors").chmod(0o644)  # safetensors gives 0600, which a shared cache cannot read
        fsync_file(new / "model.safetensors")
        write_json(new / "config.json", {"format": 1, "model": network.config.to_dict(), **facts})
        copy_folder(tokenizer, new / "tokenizer")


def load_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the network (fp32, on the CPU, in eval mode) and config.json of a folder that `save_model` wrote.

    Raises UserError where it is missing, damaged, or holds other parameters than its config says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from core.model import ARCHITECTURES

    facts = read_json(folder / "config.json", made_by="python -m stages.train")
    again = "train again, or point to another folder"
    try:
        config = ModelConfig(**facts["model"])
        model = ARCHITECTURES[config.architecture](config)
        state = load_file(folder / "model.safetensors")
    except FileNotFoundError:
        raise UserError(f"{folder / 'model.safetensors'} is missing; {again}") from None
    except (SafetensorError, KeyError, TypeError) as e:
        raise UserError(f"{folder}: damaged model ({type(e).__name__}: {e}); {again}") from None
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
