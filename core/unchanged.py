"""Inputs that change while a stage runs: noticed, and its result refused.

DVC hashes inputs after the command, so that an edit made meanwhile would be recorded as what the result was made from
(treeverse/dvc#11058).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import sha256_file
from core.project import Project

HASHED_MAX = 4 << 20
"""Bytes up to which a file's content is compared; a larger one's size and time are."""


@contextlib.contextmanager
def unchanged(project: Project, stage: str) -> Iterator[Callable[[], list[str]]]:
    """Remember the inputs that dvc.yaml lists for a stage; yields a function that says which have changed since.

    Where the block ends well and DVC runs it, raises UserError if any has.
    """
    before = _inputs(project, stage)

    def changes() -> list[str]:
        after = _inputs(project, stage)
        keys = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
        return [_line(key, before.get(key), after.get(key)) for key in keys]

    yield changes
    if (found := changes()) and "DVC_STAGE" in os.environ:
        raise UserError(
            [
                *found,
                "put it back and run `dvc repro`: what was computed is kept, and taken at once",
                "or run `dvc repro` as it is now: it begins with the new inputs",
            ],
            title=f"inputs of {stage} changed while it ran, so its result is not recorded",
        )


def _inputs(project: Project, stage: str) -> dict[str, Any]:
    """What the stage reads: {file: what it looks like} and {"file: key": value}."""
    stages = _yaml(project.root / "dvc.yaml").get("stages")
    wanted = (stages.get(stage) if isinstance(stages, dict) else None) or {}
    found: dict[str, Any] = {}
    for dependency in wanted.get("deps") or []:
        path = project.root / dependency
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found |= {_name(f, project.root): _look(f) for f in files if not f.is_dir()}
    for listed in wanted.get("params") or []:  # a key of params.yaml, or {another file: [keys]}
        for file, keys in ({"params.yaml": [listed]} if isinstance(listed, str) else listed).items():
            params = _yaml(project.root / file)
            for key in keys or params:
                found |= {f"{file}: {name}": value for name, value in _flat(key, _at(params, key))}
    return found


def _name(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _at(params: Any, key: str) -> Any:
    """The value at "train.lr"; None where there is none."""
    for part in key.split("."):
        params = params.get(part) if isinstance(params, Mapping) else None
    return params


def _look(path: Path) -> Any:
    try:
        stat = path.stat()
        return sha256_file(path) if stat.st_size <= HASHED_MAX else (stat.st_size, stat.st_mtime_ns)
    except OSError:
        return None


def _yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; empty where it is missing or broken at the moment."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        read = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8-sig"))
    except (OSError, YAMLError, UnicodeDecodeError):
        return {}
    return read if isinstance(read, dict) else {}


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}", inner)
    else:
        yield key, value


def _line(key: str, before: Any, after: Any) -> str:
    if ": " in key:
        return f"{key} was changed from {before} to {after}"
    return f"{key} {'is gone' if after is None else 'was changed'}"
