"""The two networks, under the names of their ecosystems, so that trained weights open elsewhere as what they are.

`qwen3` has the parameter names and the arithmetic of transformers' Qwen3ForCausalLM; `gpt2` those of nanoGPT.
Shapes: B sequences of T tokens, C channels, H heads of D = C / H channels, V vocabulary rows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import fused
from core.loss import chunked_cross_entropy_sum, cross_entropy_sum
from core.model_config import ModelConfig

MEASURED_CHUNK = 128
"""Tokens whose logits exist at once where nothing is learnt: few enough that memory for them is not mapped anew."""
# Keys and values of the tokens so far, per layer: what a new token attends to. Each [B, H, T, D].
Cache = list[tuple[Tensor, Tensor]]


class Network(nn.Module):
    """What both networks share: tokens in, and logits or the summed loss out."""

    config: ModelConfig
    lm_head: nn.Linear
    loss_chunk = 0
    """Tokens whose logits exist at once while training; 0: all of them."""

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, in order; each maps [B, T, C] to [B, T, C]."""
        raise NotImplementedError

    def hidden(self, tokens: Tensor, cache: Cache | None) -> Tensor:
        """[B, T] token ids → [B, T, C] final hidden states."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Return the cross entropy summed over `targets` [nats], or logits [B, T, V] where there are none.

        tokens, targets: [B, T] int64. cache: a list that generation fills and hands back with each new token; the
        logits are then those of the last token, [B, 1, V].
        """
        hidden = self.hidden(tokens, cache)
        if targets is None:  # generation looks at the last token only
            return self.lm_head(hidden if cache is None else hidden[:, -1:])
        if not torch.is_grad_enabled():
            return self._measured_loss(hidden, targets)
        if self.loss_chunk:
            return chunked_cross_entropy_sum(hidden, self.lm_head.weight, targets, self.loss_chunk)
        return cross_entropy_sum(self.lm_head(hidden), targets)

    def exported(self) -> tuple[dict[str, Tensor], ModelConfig]:
        """Weights and sizes as other programs know them; a tied head is left out."""
        state = dict(self.state_dict())
        if self.config.tie_embeddings:
            state.pop("lm_head.weight")
        return state, self.config

    def _measured_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The loss without gradients, with the logits of few tokens at a time: measuring never needs more memory."""
        tokens, wanted = hidden.flatten(0, 1), targets.reshape(-1)
        pairs = zip(tokens.split(MEASURED_CHUNK), wanted.split(MEASURED_CHUNK), strict=True)
        return torch.stack([cross_entropy_sum(self.lm_head(h), t) for h, t in pairs]).sum()


def attend(q: Tensor, k: Tensor, v: Tensor, cache: Cache | None, layer: int, dropout: float = 0.0) -> Tensor:
    """Causal attention of q [B, H, T, D] over k, v [B, H or fewer, T, D] and the cached tokens before them."""
    if cache is not None:
        if layer < len(cache):
            k, v = torch.cat((cache[layer][0], k), 2), torch.cat((cache[layer][1], v), 2)
            cache[layer] = (k, v)
        else:
            cache.append((k, v))
    # A single new token attends to everything before it; several at once only occur at the start.
    causal = q.shape[2] > 1
    assert not causal or q.shape[2] == k.shape[2], "the cache takes one token at a time"
    grouped = k.shape[1] != q.shape[1]
    if grouped and not shares_heads(q):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, enable_gqa=grouped)


def shares_heads(q: Tensor) -> bool:
    """Whether attention's kernel takes fewer heads of keys than of queries.

    On a card only flash attention does: bf16 or fp16, compute capability 8.0. Others would fall back to a path that
    holds [T, T] (pytorch#181528), which costs far more than repeated keys.
    """
    if q.device.type != "cuda":
        return True
    return q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def to_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where that is on: the matrices that read it then share one copy in memory."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def takes_apart(x: Tensor) -> bool:
    """Whether torch takes rms_norm apart here, since only a card has a kernel for it; a compiler makes its own.

    A token alone, as generation has it, is too little to gain from fewer passes. x: [B, T, …].
    """
    alone = x.shape[1] == 1 and not torch.is_grad_enabled()
    return x.device.type == "cpu" and not alone and not torch.compiler.is_compiling()


def normalized(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, in the dtype of x."""
    if takes_apart(x):
        return fused.rms_norm(x, x.new_ones(x.shape[-1]), 1e-6).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, n: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if takes_apart(x):
            return fused.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Rotary(nn.Module):
    """Rotary position embedding, halves rotated against each other (Su et al. 2021, arXiv 2104.09864)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, block_size: int, theta: float) -> None:
        super().__init__()
        frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angle = torch.outer(torch.arange(block_size).float(), frequency).repeat(1, 2)  # [T, D]
        self.register_buffer("cos", angle.cos(), persistent=False)
        sin = angle.sin()
        sin[:, : head_dim // 2].neg_()  # for the right half that comes to the left
        self.register_buffer("sin", sin, persistent=False)

    def tables(self, start: int, n: int) -> tuple[Tensor, Tensor]:
        """cos and sin at positions start to start + n: [n, D]."""
        return self.cos[start : start + n], self.sin[start : start + n]

    def forward(self, x: Tensor, start: int) -> Tensor:
        """x: [B, H, T, D] at positions start, start + 1, …"""
        cos, sin = self.tables(start, x.shape[2])
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((right, left), -1) * sin


def norm_rotate(x: Tensor, norm: RMSNorm, rotary: Rotary, start: int) -> Tensor:
    """[B, T, H, D] → [B, H, T, D] normalised per head and rotated, in x's dtype."""
    if takes_apart(x):
        cos, sin = rotary.tables(start, x.shape[1])
        return fused.norm_rotate(x, norm.weight, cos, sin, norm.eps).transpose(1, 2)
    return rotary(norm(x).transpose(1, 2), start).to(x.dtype)


class Qwen3Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, width, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.n_embd, bias=False)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)

    def forward(self, x: Tensor, rotary: Rotary, cache: Cache | None) -> Tensor:
        B, T, _ = x.shape
        D = self.config.head_dim
        q = self.q_proj(x).view(B, T, -1, D)
        k = self.k_proj(x).view(B, T, -1, D)
        v = self.v_proj(x).view(B, T, -1, D).transpose(1, 2)
        start = cache[self.layer][0].shape[2] if cache is not None and self.layer < len(cache) else 0
        q, k = norm_rotate(q, self.q_norm, rotary, start), norm_rotate(k, self.k_norm, rotary, start)
        y = attend(q, k, v, cache, self.layer)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class Qwen3MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(fused.swiglu(gate, up) if takes_apart(x) else F.silu(gate) * up)


class Qwen3Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Qwen3Attention(config, layer)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = RMSNorm(config.n_embd)
        self.post_attention_layernorm = RMSNorm(config.n_embd)

    def forward(self, x: Tensor, rotary: Rotary, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(to_autocast(self.input_layernorm(x)), rotary, cache)
        return x + self.mlp(to_autocast(self.post_attention_layernorm(x)))


class Qwen3Body(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Qwen3Layer(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)


class Qwen3(Network):
    """Qwen3's dense network (Qwen Team 2025, arXiv 2505.09388)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen3Body(config)
        self.rotary = Rotary(config.head_dim, config.block_size, config.rope_theta)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def hidden(self, tokens: Tensor, cache: Cache | None) -> Tensor:
        x: Tensor = self.model.embed_tokens(tokens)
        if self.config.normalize_embeddings:
            x = normalized(x)
        for layer in self.layers:
            x = layer(x, self.rotary, cache)
        return self.model.norm(x)

    def exported(self) -> tuple[dict[str, Tensor], ModelConfig]:
        """Normalised embeddings are saved as such, beside the head that shared them before: Qwen3 has no such norm."""
        state, config = super().exported()
        if config.normalize_embeddings:
            embedding = state["model.embed_tokens.weight"]
            state |= {
                "model.embed_tokens.weight": normalized(embedding),
                "lm_head.weight": self.lm_head.weight.detach(),
            }
            config = replace(config, normalize_embeddings=False, tie_embeddings=False)
        return state, config


class GPT2Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            t.view(B, T, self.config.n_head, self.config.head_dim).transpose(1, 2)
            for t in self.c_attn(x).split(C, dim=2)
        )
        y = attend(q, k, v, cache, self.layer, self.config.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class GPT2MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GPT2Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = GPT2MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT2Body(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(GPT2Layer(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)


class GPT2(Network):
    """GPT-2 (Radford et al. 2019) as nanoGPT and the guides that follow it write it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = GPT2Body(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    @property
    def layers(self) -> nn.ModuleList:
        return self.transformer.h

    def hidden(self, tokens: Tensor, cache: Cache | None) -> Tensor:
        start = cache[0][0].shape[2] if cache else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        body = self.transformer
        x: Tensor = body.drop(body.wte(tokens) + body.wpe(positions))
        for layer in self.layers:
            x = layer(x, cache)
        return body.ln_f(x)


ARCHITECTURES: dict[str, type[Qwen3] | type[GPT2]] = {"qwen3": Qwen3, "gpt2": GPT2}


def build_model(config: ModelConfig, seed: int) -> Network:
    """A fresh network on the CPU, in fp32, every parameter drawn from `seed`."""
    model = ARCHITECTURES[config.architecture](config)
    init_weights(model, config, seed)
    return model


@torch.no_grad()
def init_weights(model: Network, config: ModelConfig, seed: int) -> None:
    """Draw every parameter; asserts that each is reached by exactly one rule.

    Embeddings are N(0, 0.02), and gpt2's matrices too; qwen3's are N(0, 0.5 / sqrt(n)) for n inputs. Projections back
    into the residual stream are smaller by sqrt(2 L), norms 1, biases 0. An embedding that is normalised and is no head
    too is N(0, 0.2): its scale only sets how fast AdamW turns it.
    """
    generator = torch.Generator().manual_seed(seed)
    qwen3 = config.architecture == "qwen3"
    hidden = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn", "c_fc")
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2] if "." in name else ""
        rules = {
            "bias": name.endswith(".bias"),
            "norm": name.endswith(".weight") and ("norm" in module or module.startswith("ln_")),
            "residual": name.endswith(".weight") and module in ("o_proj", "down_proj", "c_proj"),
            "hidden": name.endswith(".weight") and module in hidden,
            "embedding": module in ("wte", "wpe", "embed_tokens", "lm_head"),
        }
        chosen = [rule for rule, applies in rules.items() if applies]
        assert len(chosen) == 1, f"{name} is initialised by {chosen or 'no rule'}"
        if chosen[0] == "bias":
            parameter.zero_()
        elif chosen[0] == "norm":
            parameter.fill_(1.0)
        else:
            std = 0.5 / math.sqrt(parameter.shape[1]) if qwen3 and chosen[0] != "embedding" else 0.02
            if module == "embed_tokens" and config.normalize_embeddings and not config.tie_embeddings:
                std = 0.2
            std /= math.sqrt(2 * config.n_layer) if chosen[0] == "residual" else 1.0
            parameter.normal_(0.0, std, generator=generator)
