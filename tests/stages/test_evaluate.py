"""The stage evaluate: figures, samples and the report."""

from __future__ import annotations

import json
import math
import re

import pytest
from click.testing import CliRunner

from core.tokenizer import Tokenizer
from stages.evaluate import main
from stages.train import main as train


@pytest.fixture
def trained(ready):
    project = ready(train={"max_steps": 4}, evaluate={"prompts": ["<script>alert(1)</script>", "Günel"]})
    result = CliRunner().invoke(train, [])
    assert result.exit_code == 0, result.output
    return project


def test_writes_metrics_samples_and_report(trained):
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 0, result.output
    metrics = json.loads((trained.reports / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]), rel=1e-3)
    nats = metrics["loss"] * metrics["held_out_tokens"]
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / metrics["held_out_bytes"], rel=1e-3)
    assert metrics["held_out_tokens"] >= 2048
    assert metrics["parameters"] == 2 * 32 * 32 * 10 + 512 * 32 or metrics["parameters"] > 16384
    assert "far under-trained" in result.output
    assert "**Günel**" in (trained.reports / "samples.md").read_text(encoding="utf-8")


def test_report_stands_alone_and_escapes_the_corpus(trained):
    CliRunner().invoke(main, [])
    page = (trained.reports / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "<script" not in page and "&lt;script&gt;" in page
    outside = [u for u in re.findall(r"(?:src|href)=[\"']?([^\"' >]+)", page) if not u.startswith("#")]
    assert not outside, "nothing is loaded from elsewhere"


def test_same_model_same_bytes(trained):
    CliRunner().invoke(main, [])
    names = ("metrics.json", "samples.md", "report.html")
    first = [(trained.reports / n).read_bytes() for n in names]
    CliRunner().invoke(main, [])
    assert [(trained.reports / n).read_bytes() for n in names] == first


@pytest.mark.parametrize("damage", ["truncate", "missing", "foreign"])
def test_damaged_model(trained, damage):
    path = trained.final_model / "model.safetensors"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "missing":
        path.unlink()
    else:
        config = trained.final_model / "config.json"
        config.write_text(config.read_text().replace('"n_embd": 32', '"n_embd": 64'))
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2
    assert "models/final" in result.output.replace("\\", "/") and "Traceback" not in result.output


def test_tokens_of_another_tokenizer(trained):
    Tokenizer.train_bpe(["another text"], 300).save(trained.final_model / "tokenizer")
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2 and "was trained with another tokenizer" in result.output
    assert not (trained.reports / "metrics.json").exists()


@pytest.mark.parametrize(
    ("content", "words"), [("[]", "a list in the place"), ("{}", "without epochs, loss")]
)
def test_damaged_training_report(trained, content, words):
    (trained.reports / "train.json").write_text(content, encoding="utf-8")
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2 and words in result.output and "stages.train" in result.output
