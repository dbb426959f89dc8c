"""Where things lie in a project folder. One place for every path."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import UserError

if TYPE_CHECKING:
    from core.params import Params


@dataclass(frozen=True)
class Project:
    """A folder with a `params.yaml`. Paths only; nothing is created or read until asked for."""

    root: Path

    @classmethod
    def find(cls, start: Path | None = None) -> Project:
        """Return the project that holds `start` (default: the current folder).

        Raises UserError when neither it nor a folder above has a params.yaml.
        """
        here = (start or Path.cwd()).resolve()
        for folder in (here, *here.parents):
            if (folder / "params.yaml").is_file():
                return cls(folder)
        raise UserError(f"no params.yaml in {here} or above. Change into your Tightfit folder first.")

    @cached_property
    def params(self) -> Params:
        """The validated params.yaml. Raises UserError with every problem in it."""
        from core.params import load_params

        return load_params(self.root / "params.yaml")

    @property
    def plugins(self) -> Path:
        return self.root / "plugins"

    @property
    def documents(self) -> Path:
        """prepare-data's output: train.jsonl, val.jsonl and manifest.json."""
        return self.root / "data" / "documents"

    @property
    def tokens(self) -> Path:
        """tokenize's output: token shards, manifest.json and the folder tokenizer/."""
        return self.root / "data" / "tokens"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def plan(self) -> Path:
        """Deterministic result of env-check; train and evaluate depend on it."""
        return self.reports / "plan.json"

    @property
    def inputs(self) -> Path:
        """Deterministic list of the corpus files with their hashes; prepare-data depends on it."""
        return self.reports / "inputs.json"

    @property
    def env(self) -> Path:
        """What env-check saw on this machine: volatile, git-ignored, no DVC output."""
        return self.reports / "env.json"

    @property
    def forecasts(self) -> Path:
        """What the memory planner was asked before: volatile, git-ignored, no DVC output."""
        return self.reports / "forecasts.json"

    @property
    def final_model(self) -> Path:
        """train's output: model.safetensors, config.json and the tokenizer."""
        return self.root / "models" / "final"

    @property
    def runs(self) -> Path:
        return self.root / "runs"
