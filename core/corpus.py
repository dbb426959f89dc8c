"""Documents on disk: stream what `data.source` names, clean it, split it by hash.

Nothing here holds a corpus in memory: documents go to disk one by one. Only `data.filters.deduplicate` keeps something
per document, some 100 bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from core import text as clean
from core.errors import UserError
from core.files import new_folder, write_json
from core.params import DataParams, FilterParams
from core.project import Project
from core.sources import check_sotu, documents_of, find_files, identity

PROGRESS_SECONDS = 5

CLEANING = {
    "mojibake_lines": "lines of mojibake undone",
    "bom": "byte order marks removed",
    "nul": "NUL characters removed",
    "crlf_lines": "CRLF or CR line ends turned into LF",
    "replaced_bytes": "bytes that are not UTF-8 replaced (data.errors: replace)",
    "surrogates": "lone surrogates replaced",
    "cut_documents": "cuts through documents of over 16 Mi characters",
    "null_rows": "rows without text skipped",
    "dropped_empty": "empty documents dropped",
    "dropped_short": "documents dropped that are shorter than data.filters.min_chars",
    "duplicates": "documents dropped that were seen before",
}
"""Counts in the manifest's `cleaning`, and how they are told."""


def prepare(project: Project, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the corpus as documents to data/documents/: train.jsonl, val.jsonl and manifest.json.

    A document is held out when the first 8 bytes of its text's sha256, as a fraction of 2^64, are below
    `data.val_fraction`: it stays on its side whatever is added around it, and equal texts are on one side.
    With `data.filters.deduplicate` 16 bytes of each hash stay in memory, some 100 bytes per document.
    `say` gets lines for a human. Returns the manifest, which holds no times: equal inputs give equal bytes.
    Raises UserError for what describe_inputs refuses, text that cannot be decoded, a missing column, an
    unreachable hub, and a split without documents; then the output stays as it was.
    """
    data = project.params.data
    files = find_files(project)
    if data.source == "sotu":
        check_sotu(files)
    counts: Counter[str] = Counter()
    documents = _keep(documents_of(project, files, counts, say), data, counts)
    with new_folder(project.documents) as folder:
        with _Writer(folder / "train.jsonl") as train, _Writer(folder / "val.jsonl") as val:
            for text, n_bytes, digest in _progress(documents, say):
                held_out = int.from_bytes(digest[:8], "big") / 2**64 < data.val_fraction
                (val if held_out else train).write(text, n_bytes)
        _check_split(train, val, data, counts)
        manifest = {
            "source": identity(data, files),
            "train": train.summary(),
            "val": val.summary(),
            "cleaning": {name: counts[name] for name in CLEANING},
        }
        write_json(folder / "manifest.json", manifest)
    for name, what in CLEANING.items():
        if counts[name]:
            say(f"{counts[name]:,} {what}")
    say(
        f"train {train.n:,} documents, {_megabytes(train.n_bytes)}; held out {val.n:,}, {_megabytes(val.n_bytes)}"
    )
    return manifest


def read_documents(path: Path, digest: Any = None) -> Iterator[str]:
    """Stream the texts of train.jsonl or val.jsonl; `digest`, of hashlib, is updated with the file's bytes.

    Raises UserError naming a damaged line, or a missing file.
    """
    try:
        f = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Run `prepare-data` first (or `dvc repro`).") from None
    with f:
        for number, line in enumerate(f, 1):
            if digest is not None:
                digest.update(line)
            try:
                text = json.loads(line.decode())["text"]
                if not isinstance(text, str):
                    raise TypeError("text is no string")
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise UserError(
                    f"{path} line {number} is damaged ({type(e).__name__}: {e}). Run `prepare-data` again "
                    "(`dvc repro -f -s prepare-data`)."
                ) from None
            yield text


_quote = json.JSONEncoder(ensure_ascii=False).encode


class _Writer:
    """One jsonl file, with its counts and its hash."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("wb")
        self.digest = hashlib.sha256()
        self.n = self.n_bytes = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def write(self, text: str, n_bytes: int) -> None:
        line = f'{{"text": {_quote(text)}}}\n'.encode()
        self.file.write(line)
        self.digest.update(line)
        self.n += 1
        self.n_bytes += n_bytes

    def summary(self) -> dict[str, Any]:
        return {"documents": self.n, "bytes": self.n_bytes, "sha256": self.digest.hexdigest()}


def _keep(texts: Iterable[str], data: DataParams, counts: Counter[str]) -> Iterator[tuple[str, int, bytes]]:
    """Clean and filter documents up to the limits; each with its UTF-8 size and the sha256 of its text."""
    seen: set[bytes] = set()
    n = total = 0
    for raw in texts:
        text = _clean(raw, data.filters, counts)
        if not text:
            counts["dropped_empty"] += 1
            continue
        if len(text) < data.filters.min_chars:
            counts["dropped_short"] += 1
            continue
        encoded = text.encode()
        digest = hashlib.sha256(encoded).digest()
        if data.filters.deduplicate:
            if digest[:16] in seen:
                counts["duplicates"] += 1
                continue
            seen.add(digest[:16])
        if data.max_bytes and total + len(encoded) > data.max_bytes:
            return
        yield text, len(encoded), digest
        n += 1
        total += len(encoded)
        if n == data.max_rows:
            return


def _clean(text: str, filters: FilterParams, counts: Counter[str]) -> str:
    """One document, cleaned; an empty string when nothing but blanks is left."""
    text, n = clean.unify_newlines(text)
    counts["crlf_lines"] += n
    if filters.fix_mojibake:
        text, n = clean.fix_mojibake(text)
        counts["mojibake_lines"] += n
    text, n = clean.remove_bom(text)
    counts["bom"] += n
    text, n = clean.remove_nul(text)
    counts["nul"] += n
    text, n = clean.replace_surrogates(text)
    counts["surrogates"] += n
    text = clean.lowercase(clean.normalize(text, filters.normalize), filters.lowercase)
    return "" if text.isspace() else text.strip("\n")


def _progress(
    documents: Iterable[tuple[str, int, bytes]], say: Callable[[str], None]
) -> Iterator[tuple[str, int, bytes]]:
    """Pass documents on and tell every few seconds how many there were."""
    total = 0
    due = time.monotonic() + PROGRESS_SECONDS
    for n, document in enumerate(documents, 1):
        yield document
        total += document[1]
        if time.monotonic() >= due:
            say(f"read {n:,} documents, {_megabytes(total)}")
            due = time.monotonic() + PROGRESS_SECONDS


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.2f} MB"


def _check_split(train: _Writer, val: _Writer, data: DataParams, counts: Counter[str]) -> None:
    """Both sides need documents. Raises UserError with the remedy that fits."""
    if train.n + val.n == 0:
        dropped = [f"{counts[name]:,} {what}" for name, what in CLEANING.items() if counts[name]]
        if data.max_bytes:
            dropped.append(f"data.max_bytes: {data.max_bytes} may be less than the first document")
        raise UserError(f"data: no document is left ({'; '.join(dropped) or 'the source is empty'}).")
    if train.n and val.n:
        return
    finer = {"auto": "paragraphs or lines", "file": "paragraphs", "paragraphs": "lines"}.get(data.documents)
    split_finer = f", or data.documents: {finer} for more and shorter documents" if finer else ""
    more = "set a larger data.val_fraction" if train.n else "set a smaller data.val_fraction"
    side = "held-out" if train.n else "training"
    raise UserError(
        f"data.val_fraction: {data.val_fraction} of {train.n + val.n} documents leaves no {side} document. "
        f"Add text, {more}{split_finer if data.source == 'text' else ''}."
    )
