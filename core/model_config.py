"""Sizes of a network: presets, what follows from them, and counts that need no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from core.params import ModelParams

# GPT-2's four sizes (Radford et al. 2019, table 2; the parameter counts are those of the released models) and two
# that a CPU trains in minutes. n_layer, n_head, n_embd, block_size.
PRESETS = {
    "nano": (4, 4, 192, 256),
    "micro": (6, 6, 384, 256),
    "124m": (12, 12, 768, 1024),
    "350m": (24, 16, 1024, 1024),
    "774m": (36, 20, 1280, 1024),
    "1.5b": (48, 25, 1600, 1024),
}

SMALL_VOCABULARY = 4
"""Ids per channel up to which qwen3's output head is a matrix of its own, unless params say otherwise."""


@dataclass(frozen=True)
class ModelConfig:
    """A network's sizes. V is `vocab_size`, T `block_size`, C `n_embd`."""

    architecture: str
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    n_inner: int
    block_size: int
    vocab_size: int
    """Rows of the embedding: the tokenizer's ids rounded up to 64, which keeps matmuls on fast paths."""
    tie_embeddings: bool = True
    normalize_embeddings: bool = False
    """qwen3: tokens enter the first layer with an rms of 1. Not in a saved network, whose embeddings are normalised."""
    rope_theta: float = 10_000.0
    dropout: float = 0.0

    @classmethod
    def resolve(cls, params: ModelParams, n_vocab: int) -> ModelConfig:
        """Fill in the preset and what follows from it for a tokenizer of `n_vocab` ids.

        Raises UserError naming every size that does not work.
        """
        if params.preset not in PRESETS:
            near = did_you_mean(params.preset, PRESETS)
            raise UserError(f"model.preset: no preset {params.preset!r}.{near} Known: {', '.join(PRESETS)}")
        n_layer, n_head, n_embd, block_size = PRESETS[params.preset]
        n_head = params.n_head or n_head
        n_embd = params.n_embd or n_embd
        qwen3 = params.architecture == "qwen3"
        vocab_size = round_up(n_vocab, 64)
        # A head of its own learned faster with 4 ids per channel, and slower, besides its memory, with 43
        # (docs/lab-log.md).
        tie = params.tie_embeddings
        tie = (not qwen3 or vocab_size > SMALL_VOCABULARY * n_embd) if tie is None else tie
        config = cls(
            architecture=params.architecture,
            n_layer=params.n_layer or n_layer,
            n_head=n_head,
            n_kv_head=params.n_kv_head or n_head,
            n_embd=n_embd,
            # Three matrices of 8/3 C hold as many parameters as two of 4 C (Shazeer 2020, arXiv 2002.05202).
            n_inner=params.n_inner or (round_up(8 * n_embd // 3, 64) if qwen3 else 4 * n_embd),
            block_size=params.block_size or block_size,
            vocab_size=vocab_size,
            tie_embeddings=tie,
            normalize_embeddings=params.normalize_embeddings and qwen3,
            rope_theta=params.rope_theta,
            dropout=params.dropout,
        )
        config._check()
        return config

    def _check(self) -> None:
        problems = []
        if self.n_embd % self.n_head:
            problems.append(
                f"model.n_embd: {self.n_embd} is not a multiple of n_head {self.n_head}; "
                f"{self.n_head * round(self.n_embd / self.n_head)} is"
            )
        elif self.architecture == "qwen3" and self.head_dim % 2:
            problems.append(
                f"model.n_head: n_embd / n_head is {self.head_dim}; rotary embeddings need an even number"
            )
        if self.n_head % self.n_kv_head:
            problems.append(f"model.n_kv_head: {self.n_kv_head} does not divide n_head {self.n_head}")
        if self.architecture == "gpt2" and self.n_kv_head != self.n_head:
            problems.append(
                "model.n_kv_head: grouped-query attention needs model.architecture: qwen3; remove it"
            )
        if self.architecture == "qwen3" and self.dropout:
            problems.append("model.dropout: qwen3 has none; set it to 0 or take model.architecture: gpt2")
        if problems:
            raise UserError(problems, title="model sizes that do not work" if len(problems) > 1 else "")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_params(self) -> int:
        """Parameters, tied ones counted once."""
        return (
            self._embedding_params + self.matmul_params - (self.vocab_size * self.n_embd) + self._other_params
        )

    @property
    def matmul_params(self) -> int:
        """Parameters that take part in a matrix product per token: blocks and output head, no embedding."""
        attention = self.n_embd * self.head_dim * (2 * self.n_head + 2 * self.n_kv_head)
        mlp = (3 if self.architecture == "qwen3" else 2) * self.n_embd * self.n_inner
        return self.n_layer * (attention + mlp) + self.vocab_size * self.n_embd

    @property
    def _embedding_params(self) -> int:
        positions = self.block_size * self.n_embd if self.architecture == "gpt2" else 0
        return self.vocab_size * self.n_embd * (1 if self.tie_embeddings else 2) + positions

    @property
    def _other_params(self) -> int:
        """Norms and biases."""
        if self.architecture == "qwen3":
            return self.n_layer * (2 * self.n_embd + 2 * self.head_dim) + self.n_embd
        return self.n_layer * (9 * self.n_embd + self.n_inner) + 2 * self.n_embd

    @property
    def flops_per_token(self) -> int:
        """Forward and backward of one token: 6 N + 12 L T C (PaLM, arXiv 2204.02311, appendix B)."""
        return 6 * self.matmul_params + 12 * self.n_layer * self.block_size * self.head_dim * self.n_head

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def round_up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple
