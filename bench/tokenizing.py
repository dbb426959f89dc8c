"""Tokenizing beside its peers: speed of encoding, of training a vocabulary, of writing; and memory.

    python -m bench.tokenizing             # the whole corpus sotu, some minutes
    python -m bench.tokenizing --quick     # a megabyte of it, once: does the bench work?

Peers: HF tokenizers, with Tightfit's own vocabulary, merges and split as byte-level BPE (the ids are compared), and
rustbpe, which cannot load a vocabulary and so learns its own of that size with the same split. All run in this process
in turn, each on one thread and on the same core (where the system can pin a process); encoding and training are told
per second of CPU, which a busy neighbour changes least, the disk per second of the clock. Ratios are of one turn each.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil

from bench.figures import spread
from core import bpe
from core.corpus import prepare, read_documents
from core.files import new_folder, read_json, sha256_file, write_json, write_text
from core.project import Project
from core.tokenizer import Tokenizer
from core.tokens import SPLITS, _Batch, _write_split, _Writer

REPO = Path(__file__).parents[1]
VOCAB = 8192
TIMES = 10  # how much larger the larger corpus is
INSTALL = "pip install tokenizers rustbpe"

# A fresh process, so that its peak is that of encoding: of the first document, then of the corpus.
CHILD = """
import sys
from pathlib import Path
from bench.tokenizing import encode_to_files
from core.corpus import read_documents
from core.monitor import peak_resident
from core.project import Project
from core.tokenizer import Tokenizer
project = Project(Path(sys.argv[1]))
tokenizer = Tokenizer.load(Path(sys.argv[2]))
tokenizer.encode(next(read_documents(project.documents / "train.jsonl")))
before = peak_resident()
encode_to_files(project, tokenizer)
print(peak_resident() - before)
"""

Job = Callable[[], Any]


# --- what runs ----------------------------------------------------------------------------------------------------


def encode_to_files(project: Project, tokenizer: Tokenizer) -> None:
    """What the stage tokenize does once it has its tokenizer: documents → token files, on one thread."""
    source = read_json(project.documents / "manifest.json", made_by="prepare-data")
    with new_folder(project.tokens) as folder:
        for split in SPLITS:
            _write_split(project, source, tokenizer, _Writer(folder, split, "uint16"), lambda line: None, 1)


def hf_tokenizer(ranks: dict[bytes, int]) -> Any:
    """HF's byte-level BPE with the ids, merges and split of Tightfit's."""
    from tokenizers import Tokenizer as HF
    from tokenizers import models

    visible = _visible()
    names = {token: "".join(visible[byte] for byte in token) for token in ranks}
    merges = []
    for left, right in (_halves(token, ranks) for token in ranks if len(token) > 1):
        merges.append((names[left], names[right]))
    tokenizer = HF(models.BPE(vocab={names[token]: rank for token, rank in ranks.items()}, merges=merges))
    tokenizer.pre_tokenizer = _hf_split()
    return tokenizer


def _hf_split() -> Any:
    from tokenizers import Regex, pre_tokenizers

    cut = pre_tokenizers.Split(Regex(bpe.SPLIT), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _visible() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself, or one from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that were merged to this one: encode it, but for the last merge."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def hf_train(texts: list[str], vocab: int) -> None:
    from tokenizers import Tokenizer as HF
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = HF(models.BPE())
    tokenizer.pre_tokenizer = _hf_split()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)


def rust_train(texts: list[str], vocab: int) -> Any:
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab, pattern=bpe.SPLIT)
    return tokenizer


# --- what is measured ---------------------------------------------------------------------------------------------


def in_turn(turns: int, jobs: dict[str, Job], clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each job in each turn; one turn before that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(turns + (turns > 1)):
        for name, job in jobs.items():
            start = clock()
            job()
            if turn or turns == 1:
                seconds[name].append(clock() - start)
    return seconds


def table(title: str, seconds: dict[str, list[float]], size: int, ours: str) -> None:
    """A row for each job: its MB/s, its seconds, and how many times its speed `ours` has."""
    click.echo(f"\n| {title} | MB/s: median (lowest to highest) | seconds | speed of: {ours} / this |")
    click.echo("|---|---|---|---|")
    for name, times in seconds.items():
        rates = [size / 1e6 / t for t in times]
        ratios = [t / own for t, own in zip(times, seconds[ours], strict=True)]
        click.echo(
            f"| {name} | {spread(rates, ',.2f')} | {spread(times, ',.3f')} | {spread(ratios, ',.2f')} |"
        )


def table_of_encoding(project: Project, texts: list[str], tokenizer: Tokenizer, turns: int) -> None:
    jobs: dict[str, Job] = {
        "Tightfit, encode": lambda: [tokenizer.encode(text) for text in texts],
        "Tightfit, documents to token files": lambda: encode_to_files(project, tokenizer),
    }
    if find_spec("tokenizers"):
        hf = hf_tokenizer(tokenizer.ranks)
        encodings = hf.encode_batch_fast(texts, add_special_tokens=False)
        pairs = zip(texts, encodings, strict=True)
        other = sum(not np.array_equal(tokenizer.encode(text), e.ids) for text, e in pairs)
        del encodings
        click.echo(
            f"ids of HF tokenizers: {f'other in {other:,}' if other else 'equal in all'} of {len(texts):,} documents"
        )
        jobs["HF tokenizers, encode_batch_fast"] = lambda: hf.encode_batch_fast(
            texts, add_special_tokens=False
        )
    if find_spec("rustbpe"):
        rust = rust_train(texts, len(tokenizer.ranks))
        jobs["rustbpe, batch_encode"] = lambda: rust.batch_encode(texts)
        jobs["rustbpe, encode"] = lambda: [rust.encode(text) for text in texts]
    table(
        "encoding, per second of CPU", in_turn(turns, jobs, time.process_time), _size(texts), next(iter(jobs))
    )


def table_of_training(texts: list[str], vocab: int, turns: int) -> None:
    jobs: dict[str, Job] = {"Tightfit": lambda: bpe.train(texts, vocab)}
    if find_spec("tokenizers"):
        jobs["HF tokenizers"] = lambda: hf_train(texts, vocab)
    if find_spec("rustbpe"):
        jobs["rustbpe"] = lambda: rust_train(texts, vocab)
    seconds = in_turn(turns, jobs, time.process_time)
    table(f"learning {vocab:,} ids, per second of CPU", seconds, _size(texts), "Tightfit")


def table_of_writing(project: Project, tokenizer: Tokenizer, turns: int) -> None:
    """The token files: made and synced, only written and synced, and their bytes in one plain file."""
    encode_to_files(project, tokenizer)
    made = sorted(project.tokens.glob("*.bin"))
    data = b"".join(path.read_bytes() for path in made)
    batch = np.frombuffer(data, np.dtype("<u2"))
    parts = [_Batch(part, 1, 0) for part in np.array_split(batch, max(len(batch) >> 18, 1))]

    def sync(path: Path) -> None:
        with path.open("rb+") as f:
            os.fsync(f.fileno())

    def whole() -> None:
        encode_to_files(project, tokenizer)
        for path in made:
            sync(path)

    def writer() -> None:
        with new_folder(project.root / "written") as folder:
            with _Writer(folder, "train", "uint16") as shards:
                for part in parts:
                    shards.write(part)
            for path in folder.iterdir():
                sync(path)

    def plain() -> None:
        with (project.root / "plain").open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        (project.root / "plain").unlink()

    jobs = {
        "plain write, synced": plain,
        "token files from arrays: written, hashed, synced": writer,
        "token files from documents: encoded, written, hashed, synced": whole,
    }
    title = f"{len(data) / 1e6:.1f} MB of token files, by the clock"
    table(title, in_turn(turns, jobs, time.perf_counter), len(data), "plain write, synced")


def table_of_memory(project: Project, tokenizer: Tokenizer) -> None:
    tokenizer.save(project.root / "tokenizer")
    larger = repeated(project, project.root / "larger", TIMES)
    click.echo("\n| memory of encoding to token files | growth of the peak, MB |\n|---|---|")
    for it in (project, larger):
        documents = sum((it.documents / f"{split}.jsonl").stat().st_size for split in SPLITS)
        command = [sys.executable, "-c", CHILD, str(it.root), str(project.root / "tokenizer")]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
        click.echo(f"| {documents / 1e6:,.1f} MB of documents | {int(done.stdout) / 1e6:.1f} |")


def repeated(project: Project, root: Path, times: int) -> Project:
    """A project whose documents are those of another one, several times."""
    larger = Project(root)
    larger.documents.mkdir(parents=True)
    manifest = read_json(project.documents / "manifest.json", made_by="prepare-data")
    for split in SPLITS:
        path = larger.documents / f"{split}.jsonl"
        content = (project.documents / path.name).read_bytes()
        with path.open("wb") as f:
            for _ in range(times):
                f.write(content)
        facts = manifest[split]
        facts.update(
            bytes=times * facts["bytes"], documents=times * facts["documents"], sha256=sha256_file(path)
        )
    write_json(larger.documents / "manifest.json", manifest)
    return larger


def _size(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


@click.command()
@click.option("--quick", is_flag=True, help="One turn over a megabyte.")
@click.option("--turns", default=5, show_default=True)
@click.option(
    "--folder", default=".", type=click.Path(path_type=Path, file_okay=False, exists=True), help="The disk."
)
def main(quick: bool, turns: int, folder: Path) -> None:
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")  # read when the peers start
    here: Any = psutil.Process()
    if hasattr(here, "cpu_affinity"):
        here.cpu_affinity(here.cpu_affinity()[:1])
    turns = 1 if quick else turns
    with tempfile.TemporaryDirectory(prefix="tokenizing-", dir=folder) as private:
        project = Project(Path(private).resolve())
        limit = ", max_bytes: 1_000_000" if quick else ""
        params = f"data: {{source: sotu, val_fraction: 0.2{limit}}}\ntrain: {{max_steps: 1}}\n"
        write_text(project.root / "params.yaml", params)
        prepare(project, click.echo)
        texts = [text for split in SPLITS for text in read_documents(project.documents / f"{split}.jsonl")]
        tokenizer = Tokenizer("bpe", bpe.SPLIT, bpe.train(texts, VOCAB - 1))
        missing = [name for name in ("tokenizers", "rustbpe") if not find_spec(name)]
        if missing:
            click.echo(f"without {' and '.join(missing)}, which are not installed: {INSTALL}")
        table_of_encoding(project, texts, tokenizer, turns)
        table_of_training(texts, VOCAB, turns)
        table_of_writing(project, tokenizer, turns)
        table_of_memory(project, tokenizer)


if __name__ == "__main__":
    main()
