"""Sampling, streaming, and the command."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from click.testing import CliRunner

from core.cli import main as tightfit
from core.generate import generate, sample
from core.model import build_model
from core.model_config import ModelConfig
from core.params import ModelParams
from core.tokenizer import Tokenizer
from stages.train import main as train


def draws(logits, n=500, **how):
    generator = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **how}
    return Counter(sample(torch.tensor(logits), generator=generator, **settings) for _ in range(n))


def test_temperature_zero_takes_the_likeliest():
    assert draws([0.0, 3.0, 2.9], temperature=0) == {1: 500}


def test_temperature_sharpens():
    assert draws([0.0, 1.0], temperature=0.2)[1] > draws([0.0, 1.0], temperature=1.0)[1]


def test_top_k_and_top_p_cut_the_tail():
    logits = [3.0, 2.0, 1.0, -9.0]
    assert set(draws(logits, top_k=2)) == {0, 1}
    assert set(draws(logits, top_p=0.9)) == {0, 1}  # 0.66 + 0.24
    assert set(draws(logits, top_p=0.01)) == {0}, "the likeliest always stays"


@pytest.fixture(scope="module")
def model():
    sizes = ModelParams(n_layer=1, n_head=2, n_embd=16, block_size=16)
    return build_model(ModelConfig.resolve(sizes, 257), seed=1).eval()


def text(model, prompt="ab", **how):
    settings = {"max_tokens": 60, "temperature": 1.0, "top_k": 0, **how}
    return list(generate(model, Tokenizer.byte(), prompt, **settings))


def test_seed_decides(model):
    assert text(model, seed=1) == text(model, seed=1)
    assert text(model, seed=1) != text(model, seed=2)


def test_goes_on_past_the_context(model):
    assert len("".join(text(model, max_tokens=60)).encode("utf-8", "replace")) >= 50


def test_prompt_longer_than_the_context(model):
    assert text(model, prompt="x" * 100, max_tokens=5)


def test_padding_rows_are_never_drawn(model):
    assert model.config.vocab_size == 320
    pieces = text(model, max_tokens=400, temperature=5.0)  # byte tokenizer would fail on ids above 256
    assert pieces


def test_pieces_hold_whole_characters(model):
    class Fixed(torch.nn.Module):
        """Says 'ş🙂' byte by byte, whatever it reads."""

        config = model.config

        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))
            self.said = iter("ş🙂".encode())

        def forward(self, tokens, cache=None):
            logits = torch.full((1, tokens.shape[1], 320), -100.0)
            logits[0, -1, next(self.said)] = 0.0
            return logits

    assert text(Fixed(), max_tokens=6) == ["ş", "🙂"]


def test_command(ready, monkeypatch):
    ready(train={"max_steps": 2})
    assert CliRunner().invoke(train, []).exit_code == 0
    run = CliRunner().invoke(tightfit, ["generate", "Aysel", "--max-tokens", "5", "--seed", "3"])
    assert run.exit_code == 0, run.output
    assert run.output.startswith("Aysel")
    name = next(p.name for p in (__import__("pathlib").Path("runs")).iterdir())
    same = CliRunner().invoke(
        tightfit,
        ["generate", "Aysel", "--max-tokens", "5", "--seed", "3", "--model", name, "--weights", "best"],
    )
    assert same.output == run.output
    monkeypatch.setattr("core.memory.compute.gpu_problem", lambda: "there is none here")
    card = CliRunner().invoke(tightfit, ["generate", "Aysel", "--device", "cuda"])
    assert card.exit_code == 2 and "--device cuda: there is none here" in card.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x"], "there is no models/final yet"),
        (["generate", "x", "--model", "nope"], "no model at 'nope'. Runs: none yet"),
        (["generate", "x", "--model", "n" * 300], "Runs: none yet"),
        (["generate", "x", "--top-p", "0"], "top-p: 0.0 should be 1e-06 to 1"),
        (["generate", "x", "--top-p", "nan"], "top-p: nan"),
        (["generate", "x", "--temperature", "nan"], "temperature: nan should be 0, or 1e-06 to 100"),
        (["generate", "x", "--temperature", "1e-45"], "temperature: 1e-45"),
        (["generate", "x", "--temperature", "inf"], "temperature: inf"),
        (["generate", "x", "--seed", "18446744073709551616"], "--seed"),
        (["generate", "x", "--temperature", "-1", "--top-k", "-1"], "top-k: -1"),
    ],
)
def test_command_errors(ready, arguments, message):
    ready()
    result = CliRunner().invoke(tightfit, arguments)
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
