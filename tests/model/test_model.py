"""Both networks: sizes, initialisation, causality, and generation's cache."""

from __future__ import annotations

import math

import pytest
import torch

from core.errors import UserError
from core.model import build_model
from core.model_config import PRESETS, ModelConfig
from core.params import ModelParams

SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32}


def config(n_vocab: int = 500, **given) -> ModelConfig:
    return ModelConfig.resolve(ModelParams(**{**SMALL, **given}), n_vocab)


ARCHITECTURES = pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])


@ARCHITECTURES
@pytest.mark.parametrize("tie", [True, False])
def test_parameter_count_without_torch_is_the_networks(architecture, tie):
    sizes = config(architecture=architecture, tie_embeddings=tie)
    model = build_model(sizes, seed=1)
    assert sizes.n_params == sum(p.numel() for p in model.parameters())
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert sizes.matmul_params == matrices


def test_presets_have_the_sizes_of_gpt2():
    # Radford et al. 2019; released models: 124M, 355M, 774M, 1558M parameters with 50,257 tokens.
    for preset, millions in (("124m", 124.4), ("350m", 354.8), ("774m", 774.0), ("1.5b", 1557.6)):
        sizes = ModelConfig.resolve(ModelParams(preset=preset, architecture="gpt2"), 50257)
        assert sizes.n_params / 1e6 == pytest.approx(millions, rel=1e-3)


def test_every_preset_resolves_for_both_architectures():
    for preset in PRESETS:
        for architecture in ("qwen3", "gpt2"):
            assert (
                ModelConfig.resolve(ModelParams(preset=preset, architecture=architecture), 8192).n_params > 0
            )


def test_vocabulary_is_padded_to_64():
    assert config(n_vocab=50257).vocab_size == 50304
    assert config(n_vocab=8192).vocab_size == 8192


@ARCHITECTURES
def test_first_loss_is_near_ln_v(architecture):
    sizes = config(architecture=architecture)
    tokens = torch.randint(0, sizes.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    loss = build_model(sizes, seed=1)(tokens, tokens.roll(-1)) / tokens.numel()
    assert loss.item() == pytest.approx(math.log(sizes.vocab_size), abs=0.15)


@ARCHITECTURES
def test_a_token_does_not_see_the_future(architecture):
    model = build_model(config(architecture=architecture), seed=1).eval()
    tokens = torch.randint(0, 500, (1, 32), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 500
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


@ARCHITECTURES
@pytest.mark.parametrize("n_kv_head", [None, 2])
def test_cache_gives_the_same_logits(architecture, n_kv_head):
    if architecture == "gpt2" and n_kv_head:
        pytest.skip("gpt2 has no grouped-query attention")
    model = build_model(config(architecture=architecture, n_kv_head=n_kv_head), seed=1).eval()
    tokens = torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    cache: list = []
    pieces = [model(tokens[:, :7], cache=cache)] + [
        model(tokens[:, t : t + 1], cache=cache) for t in range(7, 32)
    ]
    whole = model(tokens)[:, 6:]  # with a cache, each call gives its last token's
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)


@ARCHITECTURES
def test_same_seed_same_weights(architecture):
    one, two, other = (build_model(config(architecture=architecture), seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


@ARCHITECTURES
def test_initial_weights(architecture):
    sizes = config(architecture=architecture, n_layer=4, n_embd=128)
    for name, p in build_model(sizes, seed=1).named_parameters():
        if p.dim() == 2:
            embedding = any(word in name for word in ("embed", "wte", "wpe", "lm_head"))
            std = 0.02 if embedding or architecture == "gpt2" else 0.5 / math.sqrt(p.shape[1])
            if "embed_tokens" in name and not sizes.tie_embeddings:
                std = 0.2
            if name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight")):
                std /= math.sqrt(8)
            assert p.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)), name


def test_a_parameter_without_a_rule_is_noticed(monkeypatch):
    from core import model as module

    class Odd(module.Qwen3):
        def __init__(self, sizes):
            super().__init__(sizes)
            self.gain = torch.nn.Parameter(torch.ones(1))

    monkeypatch.setitem(module.ARCHITECTURES, "qwen3", Odd)
    with pytest.raises(AssertionError, match="gain is initialised by no rule"):
        build_model(config(), seed=1)


def test_dropout_acts_in_training_only():
    model = build_model(config(architecture="gpt2", dropout=0.5), seed=1)
    tokens = torch.zeros(1, 32, dtype=torch.long)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "125m"}, "Did you mean '124m'"),
        ({"n_embd": 65}, "n_embd: 65 is not a multiple of n_head 4; 64 is"),
        ({"n_kv_head": 3}, "n_kv_head: 3 does not divide n_head 4"),
        ({"architecture": "gpt2", "n_kv_head": 2}, "needs model.architecture: qwen3"),
        ({"dropout": 0.1}, "qwen3 has none"),
        ({"n_embd": 68, "n_head": 4}, "rotary embeddings need an even number"),
    ],
)
def test_sizes_that_do_not_work(given, message):
    with pytest.raises(UserError, match=message):
        config(**given)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_qwen3_is_transformers_qwen3(tie, normalize):
    """What is saved: embeddings that are normalised in training are so in the file."""
    transformers = pytest.importorskip("transformers")
    sizes = config(n_kv_head=2, tie_embeddings=tie, normalize_embeddings=normalize)
    ours = build_model(sizes, seed=1).eval()
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.n_embd,
            intermediate_size=sizes.n_inner,
            num_hidden_layers=sizes.n_layer,
            num_attention_heads=sizes.n_head,
            num_key_value_heads=sizes.n_kv_head,
            head_dim=sizes.head_dim,
            max_position_embeddings=sizes.block_size,
            rms_norm_eps=1e-6,
            tie_word_embeddings=ours.exported()[1].tie_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        )
    ).eval()
    state, saved = ours.exported()
    assert not saved.normalize_embeddings and saved.tie_embeddings == (tie and not normalize)
    state |= {} if "lm_head.weight" in state else {"lm_head.weight": state["model.embed_tokens.weight"]}
    theirs.load_state_dict(state)
    tokens = torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-5, atol=1e-5)
