"""bench.tokenizing runs, finds the peers' ids equal, and keeps its folder clean."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import tokenizing
from core import bpe
from core.files import write_json

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    command = [sys.executable, "-m", "bench.tokenizing", "--quick", "--folder", str(folder)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=REPO, env=environ, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    return done.stdout


def test_every_table_has_our_rows(output):
    rows = re.findall(r"^\| (.*?) \| ([\d,.]+)", output, re.MULTILINE)
    assert all(float(value.replace(",", "")) >= 0 for _, value in rows)
    names = [name for name, _ in rows]
    assert {"Tightfit, encode", "Tightfit, documents to token files", "Tightfit"} <= set(names)
    assert {"plain write, synced", "token files from arrays: written, hashed, synced"} <= set(names)
    small, large = (float(value) for name, value in rows if name.endswith("MB of documents"))
    assert large < small + 64, "memory does not grow with the corpus: 10 MB, then what batches hold"


def test_hf_tokenizers_give_equal_ids(output):
    pytest.importorskip("tokenizers")
    assert re.search(r"ids of HF tokenizers: equal in all of \d+ documents", output)
    assert "| HF tokenizers, encode_batch_fast |" in output and "| HF tokenizers |" in output


def test_rustbpe_is_measured(output):
    pytest.importorskip("rustbpe")
    assert "| rustbpe, batch_encode |" in output and "| rustbpe |" in output


def test_missing_peers_are_named(output):
    missing = [name for name in ("tokenizers", "rustbpe") if not find_spec(name)]
    assert (tokenizing.INSTALL in output) == bool(missing)


def test_merges_follow_from_ranks():
    ranks = bpe.train(["hug"] * 10 + ["pug"] * 5 + ["hugs"] * 5, 260)
    assert [tokenizing._halves(token, ranks) for token in (b"ug", b"hug", b"pug", b"hugs")] == [
        [b"u", b"g"],
        [b"h", b"ug"],
        [b"p", b"ug"],
        [b"hug", b"s"],
    ]


def test_a_repeated_corpus_is_a_whole_one(tmp_path):
    project = tokenizing.Project(tmp_path)
    project.documents.mkdir(parents=True)
    manifest = {}
    for split in tokenizing.SPLITS:
        (project.documents / f"{split}.jsonl").write_bytes(b'{"text": "abc"}\n')
        manifest[split] = {"documents": 1, "bytes": 3, "sha256": ""}
    write_json(project.documents / "manifest.json", manifest)
    larger = tokenizing.repeated(project, tmp_path / "larger", 5)
    tokenizing.encode_to_files(larger, tokenizing.Tokenizer.byte())
    assert (larger.tokens / "train_000.bin").stat().st_size == 5 * 4 * 2
