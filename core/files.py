"""Writing files so that a reader finds the old content or the new, never a half of either."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from core.errors import UserError

JSON_MAX = 64 << 20
"""Bytes; what the stages write has some thousand."""


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with LF line ends to a private file, sync it, and rename it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = private(path)
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        if path.exists():
            path.chmod(0o644)  # Windows replaces no read-only file, and DVC's cache hands out such
        partial.replace(path)
        fsync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def private(path: Path) -> Path:
    """Where a file or folder is made before it takes its name. One that a killed process left may be replaced."""
    return path.with_name(f".{path.name}.partial")


def write_json(path: Path, value: Any) -> None:
    """`write_text` of sorted, indented JSON: equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path, made_by: str, keys: Iterable[str] = ()) -> Any:
    """Read a JSON file that a stage wrote.

    Raises UserError naming the stage `made_by` when the file is missing, is not JSON, or lacks one of `keys`.
    """
    try:
        if path.stat().st_size > JSON_MAX:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        if keys and not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} in the place of an object")
        if missing := [key for key in keys if key not in found]:
            raise ValueError(f"without {', '.join(missing)}")
        return found
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Run `{made_by}` first (or `dvc repro`).") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}). Delete it and run `{made_by}` again.") from None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a private folder to fill; when the block ends well it takes the place of `path`, else it is removed.

    The old folder is moved aside before the new one takes its name, and deleted only then.
    """
    partial, old = private(path), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():  # killed between the two renames below
        old.replace(path)
    remove_folder(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        remove_folder(old)
        fsync_folder(partial)
        if path.exists():
            path.replace(old)
        partial.replace(path)
        fsync_folder(path.parent)
        remove_folder(old)
    except BaseException:
        remove_folder(partial)
        if old.exists() and not path.exists():
            old.replace(path)
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder if it is there, read-only files included: DVC's cache hands out such, and Windows minds."""

    def make_writable_and_retry(function: Any, name: str, error: Any) -> None:
        Path(name).chmod(0o700)
        function(name)

    if path.exists():
        shutil.rmtree(path, onerror=make_writable_and_retry)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder's content onto the disk; the copies are writable, whatever the source's mode."""

    def copy(a: str, b: str) -> None:
        with Path(a).open("rb") as f, Path(b).open("wb") as g:
            shutil.copyfileobj(f, g, 1 << 20)
            g.flush()
            os.fsync(g.fileno())

    shutil.copytree(source, target, copy_function=copy, dirs_exist_ok=True)


def fsync_folder(path: Path) -> None:
    """Wait until a folder's names are on the disk, so that a rename survives a power cut. Windows has no such call."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
