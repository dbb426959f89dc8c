"""The tokenize stage: exit codes, messages without a traceback, nothing heavy imported."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import make_project, sample_text

from core.tokens import TokenShards
from stages.tokenize import main

ROOT = Path(__file__).parents[2]


def write_documents(project, train, val):
    project.documents.mkdir(parents=True)
    manifest = {"source": "test"}
    for split, text in (("train", train), ("val", val)):
        line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
        (project.documents / f"{split}.jsonl").write_bytes(line)
        sha256 = hashlib.sha256(line).hexdigest()
        manifest[split] = {"documents": 1, "bytes": len(text.encode()), "sha256": sha256}
    (project.documents / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda: CliRunner().invoke(main, [])


def test_writes_tokens(tmp_path, run):
    project = make_project(tmp_path, tokenizer={"vocab_size": 300})
    write_documents(project, sample_text(20_000, seed=1), sample_text(2_000, seed=2))
    result = run()
    assert result.exit_code == 0, result.output
    assert "learned 300 ids" in result.output and "bytes per token" in result.output
    assert TokenShards.open(project.tokens, "val", verify=True).n_tokens > 33


def test_without_documents(tmp_path, run):
    make_project(tmp_path)
    result = run()
    assert result.exit_code == 2
    assert "prepare-data" in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(("block_size", "exit_code"), [(39, 0), (40, 2)])
def test_too_little_held_out_text_for_one_window(tmp_path, run, block_size, exit_code):
    project = make_project(
        tmp_path, tokenizer={"kind": "byte", "vocab_size": None}, model={"block_size": block_size}
    )
    write_documents(project, "x" * 1000, "y" * 39)  # 40 tokens with bos
    result = run()
    assert result.exit_code == exit_code, result.output
    assert ("model.block_size" in result.output) == bool(exit_code)
    assert project.tokens.exists() != bool(exit_code)


def test_bad_params(tmp_path, run):
    make_project(tmp_path, tokenizer={"kind": "bpee"})
    result = run()
    assert result.exit_code == 2
    assert "tokenizer.kind" in result.output and "Traceback" not in result.output


def test_runs_as_a_module_without_torch_or_datasets(tmp_path):
    project = make_project(tmp_path, tokenizer={"vocab_size": 300})
    write_documents(project, sample_text(20_000, seed=1), sample_text(2_000, seed=2))
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['tokenize']\n"
        "try: runpy.run_module('stages.tokenize', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert not {'torch', 'datasets', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    assert (project.tokens / "manifest.json").exists()


def test_importing_it_is_light():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import stages.tokenize\n"
        "assert not {'torch', 'datasets', 'numpy', 'tiktoken', 'regex'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
