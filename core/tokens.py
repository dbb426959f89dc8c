"""Documents → token files on disk, and reading them back.

A split is a row of shards, `train_000.bin`, `train_001.bin` …: bare little-endian ids, one document after the other,
`bos` before each. `manifest.json` says how many there are of what, with their hashes.
"""

from __future__ import annotations

import hashlib
import os
import reprlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from core import faults
from core.errors import UserError
from core.files import new_folder, read_json, write_json
from core.hardware import usable_cores

if TYPE_CHECKING:
    import numpy as np

    from core.project import Project
    from core.tokenizer import Tokenizer

FORMAT = 1
SPLITS = ("train", "val")
SHARD_TOKENS = 1 << 26
"""Tokens per file: 128 MiB as uint16."""
BATCH = 1 << 20
"""Characters that a thread encodes at a time, or one document if that is longer."""
LONG = 1 << 24
"""Characters that are encoded or wait for it at a time, or one document if that is longer."""
PASSAGE = 1 << 16
"""Characters: a longer document gives its share to the training of the vocabulary in passages."""
PROGRESS_SECONDS = 5
MAX_MANIFEST = 4 << 20
"""Bytes of a manifest: some 20,000 shards, 1.3e12 tokens."""
LARGEST = 1 << 60
"""More tokens or bytes than any corpus has."""
LOOK_AGAIN = r"attrib -r .dvc\cache\files\* /s" if os.name == "nt" else "chmod -R u+w .dvc/cache/files"
"""DVC takes read-only objects of its cache for good, rotten ones too; it looks at writable ones."""


def tokenize(
    project: Project, say: Callable[[str], None], min_tokens: int = 2, threads: int | None = None
) -> dict[str, Any]:
    """Make the tokenizer that `tokenizer` in params.yaml asks for and write data/tokens/ with it.

    `say` gets lines for a human. `min_tokens` is what each split needs at least: one window of the model, T + 1.
    `threads` (default: the cores, at most 8) changes speed only. Returns the manifest, which holds no times: equal
    documents and parameters give equal bytes. Memory does not grow with the corpus.

    Raises UserError when the documents are missing or damaged, or a split is too short; what was there before stays.
    """
    source = read_json(project.documents / "manifest.json", made_by="prepare-data")
    with new_folder(project.tokens) as folder:
        tokenizer = _make_tokenizer(project, source, say)
        tokenizer.save(folder / "tokenizer")
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "dtype": "uint16" if tokenizer.n_vocab <= 1 << 16 else "uint32",
            "n_vocab": tokenizer.n_vocab,
            "bos": tokenizer.bos,
            "tokenizer_sha256": tokenizer.sha256,
        }
        for split in SPLITS:
            writer = _Writer(folder, split, manifest["dtype"])
            _write_split(project, source, tokenizer, writer, say, threads)
            manifest[split] = writer.facts()
        _check_lengths(manifest, min_tokens)
        manifest["bytes_per_token"] = {
            split: round(manifest[split]["bytes"] / manifest[split]["tokens"], 4) for split in SPLITS
        }
        write_json(folder / "manifest.json", manifest)
    return manifest


# --- the tokenizer ----------------------------------------------------------------------------------------------


def _make_tokenizer(project: Project, source: dict[str, Any], say: Callable[[str], None]) -> Tokenizer:
    from core.corpus import read_documents
    from core.tokenizer import Tokenizer

    params = project.params.tokenizer
    if params.kind == "gpt2":
        return Tokenizer.gpt2()
    if params.kind == "byte":
        return Tokenizer.byte()
    total = _count(source, "train", "bytes")
    learned_from = min(total, params.train_bytes)
    say(f"learning {params.n_vocab:,} ids from {learned_from / 1e6:.1f} MB of {total / 1e6:.1f} MB ...")
    start = time.perf_counter()
    documents = read_documents(project.documents / "train.jsonl")
    tokenizer = Tokenizer.train_bpe(spread(documents, total, params.train_bytes), params.n_vocab)
    say(f"learned {tokenizer.n_vocab:,} ids in {time.perf_counter() - start:.1f} s")
    if tokenizer.n_vocab < params.n_vocab:
        say(f"the corpus holds no more pairs: {tokenizer.n_vocab:,} ids, not {params.n_vocab:,}")
    return tokenizer


def spread(texts: Iterable[str], total: int, budget: int) -> Iterator[str]:
    """Pick at most `budget` of `total` bytes of UTF-8, evenly over all texts: whole ones, or passages of long ones."""
    seen = taken = 0
    for text in texts:
        for start in range(0, len(text), PASSAGE):
            passage = text[start : start + PASSAGE].encode("utf-8", "replace")
            seen += len(passage)
            behind = taken * total < seen * budget  # the line from (0, 0) to (total, budget)
            if behind and taken < budget:
                passage = passage[: budget - taken]
                taken += len(passage)
                yield passage.decode("utf-8", "ignore")


# --- encoding ---------------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    tokens: np.ndarray
    n_documents: int
    n_bytes: int


def _write_split(
    project: Project,
    source: dict[str, Any],
    tokenizer: Tokenizer,
    writer: _Writer,
    say: Callable[[str], None],
    threads: int | None,
) -> None:
    """Encode every document of the writer's split and write it, in order."""
    from core.corpus import read_documents

    path = project.documents / f"{writer.split}.jsonl"
    total = _count(source, writer.split, "bytes")
    start = told = time.perf_counter()
    digest = hashlib.sha256()
    with writer:
        for batch in _encode(tokenizer, read_documents(path, digest), writer.dtype, threads):
            faults.point("tokenize.batch")
            writer.write(batch)
            if time.perf_counter() - told > PROGRESS_SECONDS:
                told = time.perf_counter()
                speed = writer.n_bytes / 1e6 / (told - start)
                say(f"{writer.split}: {writer.n_bytes / 1e6:,.0f} of {total / 1e6:,.0f} MB, {speed:.1f} MB/s")
    if digest.hexdigest() != source[writer.split].get("sha256"):
        raise UserError(
            [
                f"its sha256 is not the one in manifest.json; it holds {writer.n_documents:,} documents of "
                f"{_count(source, writer.split, 'documents'):,}",
                remedy("prepare-data"),
            ],
            title=f"{path} is damaged",
        )
    seconds = time.perf_counter() - start
    say(
        f"{writer.split}: {writer.n_tokens:,} tokens of {writer.n_documents:,} documents, "
        f"{writer.n_bytes / max(writer.n_tokens, 1):.2f} bytes per token, {writer.n_bytes / 1e6 / seconds:.1f} MB/s"
    )


def _encode(
    tokenizer: Tokenizer, texts: Iterable[str], dtype: np.dtype, threads: int | None
) -> Iterator[_Batch]:
    """Encode texts on some threads. Batches come in the order of the texts; few are in memory at a time.

    tiktoken's encode_to_numpy lets other threads run: 42 MB/s on one, 59 on two of two busy cores (8,192 ids,
    English). Its encode_ordinary builds a list, which holds the others up: 31, 33. Meanwhile this thread reads JSON,
    hashes and writes, at some 300 MB/s, so more than eight bring nothing.
    """
    import numpy as np

    bos = np.array([tokenizer.bos], dtype)

    def encode(batch: list[str]) -> _Batch:
        parts = [part for text in batch for part in (bos, tokenizer.encode(text).astype(dtype))]
        return _Batch(
            np.concatenate(parts), len(batch), sum(len(t.encode("utf-8", "surrogatepass")) for t in batch)
        )

    threads = threads or min(usable_cores(), 8)
    waiting: deque[tuple[Future[_Batch], int]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in _batches(texts):
            waiting.append((pool.submit(encode, batch), sum(map(len, batch))))
            while len(waiting) > threads + 1 or sum(size for _, size in waiting) > LONG:
                yield waiting.popleft()[0].result()
        while waiting:
            yield waiting.popleft()[0].result()


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Appends ids to the shards of a split; counts and hashes on the way."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self.folder, self.split, self.dtype = folder, split, _on_disk(dtype)
        self.n_tokens = self.n_documents = self.n_bytes = 0
        self.shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(self, batch: _Batch) -> None:
        tokens = batch.tokens
        while len(tokens):
            if self._file is None:
                self._open()
            room = SHARD_TOKENS - self.shards[-1]["tokens"]
            self._append(tokens[:room])
            tokens = tokens[room:]
            if self.shards[-1]["tokens"] == SHARD_TOKENS:
                self._close()
        self.n_tokens += len(batch.tokens)
        self.n_documents += batch.n_documents
        self.n_bytes += batch.n_bytes

    def facts(self) -> dict[str, Any]:
        """The split's part of the manifest."""
        return {
            "tokens": self.n_tokens,
            "bytes": self.n_bytes,
            "documents": self.n_documents,
            "shards": self.shards,
        }

    def _open(self) -> None:
        name = shard_name(self.split, len(self.shards))
        self._file = (self.folder / name).open("wb")
        self._digest = hashlib.sha256()
        self.shards.append({"file": name, "tokens": 0})

    def _append(self, tokens: np.ndarray) -> None:
        assert self._file is not None
        data = tokens.tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.shards[-1]["tokens"] += len(tokens)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self.shards[-1]["sha256"] = self._digest.hexdigest()


def _check_lengths(manifest: dict[str, Any], min_tokens: int) -> None:
    problems = []
    for split in SPLITS:
        tokens = manifest[split]["tokens"]
        if tokens < min_tokens:
            fraction = ", a larger data.val_fraction" if split == "val" else ""
            problems.append(
                f"{split}: {tokens:,} tokens, but one window of the model needs {min_tokens:,}. Take more text (data)"
                f"{fraction} or a smaller model.block_size."
            )
    if problems:
        raise UserError(problems, title="the corpus is too short")


def _count(source: dict[str, Any], split: str, what: str) -> int:
    """A number of the documents' manifest."""
    try:
        return int(source[split][what])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"the manifest of data/documents says nothing of {split}.{what}. Run `prepare-data` again."
        ) from None


def _on_disk(dtype: str) -> np.dtype:
    import numpy as np

    return np.dtype({"uint16": "<u2", "uint32": "<u4"}[dtype])


# --- reading ----------------------------------------------------------------------------------------------------


class TokenShards:
    """The tokens of one split, memory-mapped. Picklable: a spawned worker maps the files again."""

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        self.folder, self.split, self.manifest = folder, split, manifest
        self.n_tokens: int = manifest[split]["tokens"]
        self.n_bytes: int = manifest[split]["bytes"]
        self.dtype = _on_disk(manifest["dtype"])
        self._maps: list[np.memmap] | None = None

    @classmethod
    def open(cls, folder: Path, split: str, verify: bool = False) -> TokenShards:
        """Check that a split of data/tokens/ is there with its right sizes; if `verify`, every byte as well.

        Verifying reads each file once: its hash, that every id is one of the tokenizer's, and that the tokenizer is the
        one that the tokens were made with. Memory does not grow with the files.
        Raises UserError naming every file that is missing or damaged.
        """
        manifest = _read_manifest(folder)
        try:
            _check_manifest(manifest)
        except (KeyError, TypeError, ValueError) as e:
            raise _damaged(folder, [f"manifest.json: {_told(e)}"]) from None
        shards = cls(folder, split, manifest)
        problems = [problem for file in manifest[split]["shards"] for problem in shards._check(file, verify)]
        if verify:
            problems += _check_tokenizer(folder, manifest)
        if problems:
            raise _damaged(folder, problems)
        return shards

    @property
    def shards(self) -> list[np.memmap]:
        """The ids of each file, in order."""
        import numpy as np

        if self._maps is None:
            files = [self.folder / shard["file"] for shard in self.manifest[self.split]["shards"]]
            self._maps = [np.memmap(path, dtype=self.dtype, mode="r") for path in files]
        return self._maps

    def _check(self, shard: dict[str, Any], verify: bool) -> Iterator[str]:
        path = self.folder / shard["file"]
        expected = shard["tokens"] * self.dtype.itemsize
        if not path.is_file():
            yield f"{path.name} is missing"
        elif path.stat().st_size != expected:
            yield f"{path.name} has {path.stat().st_size:,} bytes, not {expected:,}"
        elif verify:
            yield from self._check_content(path, shard["sha256"])

    def _check_content(self, path: Path, sha256: str) -> Iterator[str]:
        import numpy as np

        digest, largest = hashlib.sha256(), 0
        with path.open("rb") as f:
            while piece := f.read(1 << 20):  # whole ids: the size of the file was looked at before
                digest.update(piece)
                largest = max(largest, int(np.frombuffer(piece, self.dtype).max()))
        if digest.hexdigest() != sha256:
            yield f"{path.name}: its sha256 is not the one in manifest.json"
        if largest >= self.manifest["n_vocab"]:
            yield f"{path.name} holds the id {largest:,}, but there are {self.manifest['n_vocab']:,} ids"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}


def shard_name(split: str, number: int) -> str:
    return f"{split}_{number:03d}.bin"


def _read_manifest(folder: Path) -> Any:
    path = folder / "manifest.json"
    if path.is_file() and path.stat().st_size > MAX_MANIFEST:
        raise _damaged(folder, [f"manifest.json has more than {MAX_MANIFEST >> 20} MiB"])
    return read_json(path, made_by="tokenize")


def _check_manifest(manifest: Any) -> None:
    """Raise KeyError, TypeError or ValueError where it says what `tokenize` never writes.

    A shard has the name that `tokenize` gives it and no other, so that nothing outside the folder is read.
    """
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {reprlib.repr(manifest['format'])}, this version reads {FORMAT}")
    if manifest["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"dtype: {reprlib.repr(manifest['dtype'])} should be 'uint16' or 'uint32'")
    n_vocab = _whole(manifest, "n_vocab", least=257, most=1 << (16 if manifest["dtype"] == "uint16" else 32))
    if _whole(manifest, "bos") >= n_vocab:
        raise ValueError(f"bos {manifest['bos']:,} is no id: there are {n_vocab:,}")
    _sha256(manifest, "tokenizer_sha256")
    for split in SPLITS:
        for name in ("tokens", "bytes", "documents"):
            _whole(manifest[split], name)
        files = manifest[split]["shards"]
        if not isinstance(files, list):
            raise TypeError(f"{split}.shards is no list")
        for number, file in enumerate(files):
            if file["file"] != shard_name(split, number):
                raise ValueError(
                    f"{split}: {reprlib.repr(file['file'])} where {shard_name(split, number)} belongs"
                )
            _whole(file, "tokens", least=1)
            _sha256(file, "sha256")
        if sum(file["tokens"] for file in files) != manifest[split]["tokens"]:
            raise ValueError(f"the files of {split} do not add up to {manifest[split]['tokens']:,} tokens")


def _whole(values: dict[str, Any], name: str, least: int = 0, most: int = LARGEST) -> int:
    value = values[name]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: {reprlib.repr(value)} should be a whole number from {least:,} to {most:,}")
    return value


def _sha256(values: dict[str, Any], name: str) -> None:
    if not isinstance(values[name], str) or len(values[name]) != 64:
        raise ValueError(f"{name}: {reprlib.repr(values[name])} is no sha256")


def _check_tokenizer(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    from core.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.load(folder / "tokenizer")
    except UserError as e:
        yield str(e)
        return
    if tokenizer.sha256 != manifest["tokenizer_sha256"]:
        yield "tokenizer: it is not the one that these tokens were made with"
    elif (tokenizer.n_vocab, tokenizer.bos) != (manifest["n_vocab"], manifest["bos"]):
        yield "manifest.json: n_vocab and bos are not the tokenizer's"


def _told(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _damaged(folder: Path, problems: list[str]) -> UserError:
    return UserError([*problems, remedy("tokenize")], title=f"{folder} is damaged")


def remedy(stage: str) -> str:
    """What writes a stage's output anew, even where DVC's cache holds the damage too."""
    return (
        f"to mend it: `{LOOK_AGAIN}`, so that DVC looks at its own copies again, then `dvc repro -f -s {stage}`; "
        f"without DVC: run `{stage}` again"
    )
