"""Checkpoints on disk: one safetensors file each, checksummed, that appears whole and durable or not at all.

Measured on others' code: a kill near a save leaves nanoGPT resumable 1 time in 30, transformers' Trainer 7; and none
notices a flipped bit (bench/fault_peers.py). Here a file gets its name only when its bytes are on the disk, older ones
go only after that, and reading checks a SHA-256 over the whole file. The format is that of
https://huggingface.co/docs/safetensors: 8 bytes with the header's length, a JSON header, the tensors. No pickle.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import hashlib
import json
import math
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import MediaError, PluginError, UserError
from core.faults import point
from core.files import fsync_folder, private

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
KEEP = 2
"""Checkpoints of a run that stay."""
HEADER_MAX = 8 << 20
"""Bytes; a header of a 1.5B network with its optimizer has some 0.3 MB."""
PIECE = 8 << 20
NAME = re.compile(r"(\d{9})-(\d{6})\.safetensors")
PREFIX = b'{"__metadata__":{"sha256":"'
UNSIGNED = b"0" * 64
# What making room may mend: a failing or read-only disk it does not.
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
DTYPES = {
    **{f"float{n}": f"F{n}" for n in (16, 32, 64)},
    **{f"int{n}": f"I{n}" for n in (8, 16, 32, 64)},
    **{f"uint{n}": f"U{n}" for n in (8, 16, 32, 64)},
    **{"bfloat16": "BF16", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
}


class Damaged(Exception):
    """Why a file cannot be used: cut, changed, of another format, or of another run."""


# --- one file ----------------------------------------------------------------------------------------------------


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], what: str = "checkpoint"
) -> None:
    """Write a safetensors file that appears whole, and survives a power cut once this returns.

    The checksum covers every byte, its own 64 taken as zeros; it is computed while the disk writes. Needs no more
    memory than the largest tensor on a card. what: names its points in core/faults.py. Raises OSError; nothing
    half-written is then left behind, and `path` is what it was, or already the new file where only the folder could not
    be synced.
    """
    partial = private(path)
    try:
        on_a_card = any(t.device.type != "cpu" for t in tensors.values())
        with partial.open("wb") as f, _Digest(waiting=4 if on_a_card else 0) as digest:
            for piece in _pieces(tensors, metadata, what):
                digest.feed(piece)
                f.write(piece)
            f.flush()
            os.fsync(f.fileno())  # the checksum catches up meanwhile
            f.seek(8 + len(PREFIX))
            f.write(digest.end().encode())
            f.flush()
            point(f"{what}.written")
            os.fsync(f.fileno())
        point(f"{what}.synced")
        if path.exists():
            path.chmod(0o644)  # Windows replaces no read-only file, and DVC's cache hands out such
        partial.replace(path)
        point(f"{what}.renamed")
        fsync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], what: str) -> Iterator[Any]:
    """The file's bytes, with zeros for the checksum."""
    header: dict[str, Any] = {"__metadata__": {"sha256": UNSIGNED.decode(), **metadata}}
    # Wide types first, as safetensors does: each tensor then begins at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        t = tensors[name]
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": dtype_name(t), "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    assert text.startswith(PREFIX), "the checksum comes first"
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_MAX:
        raise PluginError(
            f"a checkpoint's header would have {len(text):,} bytes, more than the {HEADER_MAX:,} that are read back: a "
            "strategy's save_state should return large values as tensors"
        )
    point(f"{what}.begin")
    yield len(text).to_bytes(8, "little") + text
    point(f"{what}.header")
    for name in names:
        data = _bytes(tensors[name])
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]


def dtype_name(tensor: Tensor) -> str:
    """What safetensors calls a tensor's dtype; empty where it has none for it."""
    return DTYPES.get(str(tensor.dtype).removeprefix("torch."), "")


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as they lie in memory; on the CPU nothing is copied."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    values: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(values)


class _Digest:
    """SHA-256 in a thread of its own, so that it costs no time beside the disk; in this one where that cannot begin.

    A thread that finds no memory to begin with dies silently, and `threading.Thread.start` would wait for it for ever
    (https://github.com/python/cpython/issues/140746), so nothing here waits for a thread that has not begun. waiting:
    pieces that may wait, 0 for any number: those of tensors on the CPU take no memory.
    """

    def __init__(self, waiting: int) -> None:
        self.pieces: queue.Queue[Any] = queue.Queue(waiting)
        self.working = threading.Lock()  # whoever holds it takes the pieces
        self.ended = False
        self.hash = hashlib.sha256()
        self.error: Exception | None = None
        with contextlib.suppress(RuntimeError, MemoryError):
            _thread.start_new_thread(self._work, ())

    def __enter__(self) -> _Digest:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _work(self) -> None:
        with self.working:
            while not self.ended:
                self._take()

    def _take(self) -> None:
        piece = self.pieces.get()
        self.ended = piece is None
        try:
            self.hash.update(piece or b"")
        except Exception as e:
            self.error = e

    def feed(self, piece: Any) -> None:
        if self.pieces.full() and self.working.acquire(blocking=False):
            try:
                self._take()
            finally:
                self.working.release()
        self.pieces.put(piece)

    def end(self) -> str:
        if not self.ended:
            self.feed(None)
            self._work()
        if self.error is not None:
            raise self.error
        return self.hash.hexdigest()


def verified_header(path: Path) -> dict[str, Any]:
    """The header of a file that `write_tensors` wrote, once every byte has been checked. Raises Damaged, OSError."""
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > HEADER_MAX or 8 + length > size:
            raise Damaged(f"a header of {length:,} bytes in a file of {size:,}: cut, or no safetensors file")
        text = f.read(length)
        end = len(PREFIX) + len(UNSIGNED)
        signature = text[len(PREFIX) : end]
        digest = hashlib.sha256(length.to_bytes(8, "little") + text[: len(PREFIX)] + UNSIGNED + text[end:])
        while piece := f.read(PIECE):
            digest.update(piece)
    if not text.startswith(PREFIX):
        raise Damaged("no checksum: damaged, or not written by Tightfit")
    if digest.hexdigest().encode() != signature:
        raise Damaged("its bytes are not those that were written (SHA-256)")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Damaged(f"its header is no JSON ({type(e).__name__})") from None


# --- checkpoints of a run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A verified file. state: plain values; tensors are read when asked for."""

    path: Path
    state: dict[str, Any]
    shapes: dict[str, tuple[str, tuple[int, ...]]]
    """{tensor: its dtype as safetensors writes it, and its shape}"""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor on the CPU), one at a time; use it before asking for the next."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as f:
            for name in sorted(self.shapes):
                yield name, f.get_tensor(name)


def position(path: Path) -> tuple[int, int]:
    """(steps, sequences of the next one) that a file's name says."""
    found = NAME.fullmatch(path.name)
    assert found, path
    return int(found[1]), int(found[2])


def listing(folder: Path) -> list[Path]:
    """A run's checkpoints, furthest first: by their names, whatever the clock said."""
    return sorted((p for p in folder.iterdir() if NAME.fullmatch(p.name)), reverse=True)


def save(
    folder: Path, step: int, sequences: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Add a checkpoint, then remove all but the newest `KEEP`.

    On a full disk all but the newest of the older ones are given up and it is tried once more. Raises OSError; at
    least the newest older one is then there.
    """
    path = folder / f"{step:09d}-{sequences:06d}.safetensors"
    metadata = {"format": str(FORMAT), "state": json.dumps({**state, "step": step, "sequences": sequences})}
    older = [p for p in listing(folder)[1:] if p != path]
    try:
        write_tensors(path, tensors, metadata)
    except OSError as e:
        if e.errno not in FULL or not older:
            raise
        for p in older:
            p.unlink()
        write_tensors(path, tensors, metadata)
    point("checkpoint.durable")
    for p in listing(folder)[KEEP:]:
        p.unlink()
    point("checkpoint.pruned")
    return path


def read(path: Path) -> Checkpoint:
    """A verified checkpoint. Raises Damaged, OSError."""
    header = verified_header(path)
    try:
        metadata = header.pop("__metadata__")
        if metadata.get("format") != str(FORMAT):
            raise Damaged(f"format {metadata.get('format')!r}, this version reads {FORMAT}")
        state = json.loads(metadata["state"])
        if (state["step"], state["sequences"]) != position(path):
            raise Damaged(f"it is that of step {state['step']}, under another's name")
        shapes = {name: (t["dtype"], tuple(t["shape"])) for name, t in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise Damaged(f"it is no checkpoint ({type(e).__name__}: {str(e)[:80]})") from None
    return Checkpoint(path, state, shapes)


def newest(
    folder: Path, differences: Callable[[Mapping[str, Any]], list[str]], say: Callable[[str], None]
) -> Checkpoint | None:
    """The furthest checkpoint that can be used, or None where there is none at all. What is skipped is said.

    differences: state → what in it belongs to another run. Files that cannot be used are set aside under another name,
    so that they are never counted among those to keep; one that could only not be read stays. Raises UserError where
    there are files and none is good.
    """
    skipped: list[tuple[Path, Exception]] = []
    for path in listing(folder):
        try:
            found = read(path)
            if other := differences(found.state):
                raise Damaged("it belongs to another run: " + "; ".join(other))
        except (Damaged, OSError) as e:
            skipped.append((path, e))
            continue
        for bad, why in skipped:
            if isinstance(why, Damaged):
                bad.replace(bad.with_suffix(".refused"))
            say(f"warning: {bad.name} cannot be used: {why}. Going back to {path.name}")
        return found
    skipped += [(path, Damaged("set aside earlier")) for path in sorted(folder.glob("*.refused"))]
    if skipped:
        raise UserError(
            [
                *(f"{path.name}: {why}" for path, why in skipped),
                "put a good copy back, or give this run up and begin it afresh: python -m stages.train --fresh",
            ],
            title=f"no checkpoint in {folder} can be used",
        )
    return None


def size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that a checkpoint of these takes, roughly: tensors and a header."""
    return (
        sum(math.prod(t.shape) * t.element_size() for t in tensors.values()) + 400 * len(tensors) + PIECE // 8
    )


def require_room(folder: Path, checkpoint: int, models: int) -> None:
    """Raise MediaError where the disk does not hold what a run will write [bytes].

    For a moment there are KEEP + 1 checkpoints; `models` is what the exported weights take. What lies in the folder
    already counts as room, since it is replaced.
    """
    import shutil

    have = shutil.disk_usage(folder).free + sum(
        p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.suffix != ".refused"
    )
    need = (KEEP + 1) * checkpoint + models
    if have < need:
        raise MediaError(
            f"{folder}: this run's checkpoints and weights need {need:,} bytes, {have:,} are free. Make room "
            "(`tightfit runs gc` removes old runs), or move the project to another disk"
        )
