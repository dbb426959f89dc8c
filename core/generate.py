"""Text from a model: temperature, top-k, top-p, one token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from core.errors import UserError
from core.params import HOTTEST, LEAST

if TYPE_CHECKING:
    from torch import Tensor

    from core.tokenizer import Tokenizer


def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece, until `max_tokens` or the end of the document.

    A piece holds whole characters: bytes of a character that is not complete yet wait for the next token. The same
    seed gives the same text on the same machine. Past the context, the older half of the tokens is forgotten.
    """
    import torch

    ids = [tokenizer.bos, *map(int, tokenizer.encode(prompt))]
    generator = torch.Generator().manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    device = next(model.parameters()).device
    cache: list[tuple[Tensor, Tensor]] = []
    fresh = ids[-(model.config.block_size - 1) :]
    with torch.inference_mode():
        for _ in range(max_tokens):
            if cache and cache[0][0].shape[2] + 1 > model.config.block_size:
                cache, fresh = [], ids[-(model.config.block_size // 2) :]
            logits = model(torch.tensor([fresh], device=device), cache=cache)[0, -1].float().cpu()
            logits[tokenizer.n_vocab :] = -torch.inf  # rows that pad the vocabulary to a multiple of 64
            token = sample(logits, temperature, top_k, top_p, generator)
            if token == tokenizer.bos:
                break
            ids.append(token)
            fresh = [token]
            if text := decoder.decode(tokenizer.decode_bytes([token])):
                yield text
    if text := decoder.decode(b"", final=True):
        yield text


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: Any) -> int:
    """Draw a token from logits [V]. temperature 0 takes the likeliest; top_k 0 and top_p 1 switch those off.

    top-p: Holtzman et al. 2020, arXiv 1904.09751.
    """
    import torch

    if temperature == 0:
        return int(logits.argmax())
    ids = torch.arange(logits.numel())
    if top_k or top_p < 1.0:  # the likeliest first, and only those that may be drawn
        logits, ids = logits.topk(min(top_k or logits.numel(), logits.numel()))
    probabilities = (logits / temperature).softmax(0)
    if top_p < 1.0:
        # A token stays while the likelier ones before it have not reached top_p together; the first always stays.
        probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise UserError naming every setting that is out of range."""
    problems = []
    if not (temperature == 0 or LEAST <= temperature <= HOTTEST):  # also where it is no number
        problems.append(f"temperature: {temperature} should be 0, or {LEAST:g} to {HOTTEST}")
    if top_k < 0:
        problems.append(f"top-k: {top_k} should be 0 (off) or more")
    if not LEAST <= top_p <= 1:
        problems.append(f"top-p: {top_p} should be {LEAST:g} to 1")
    if problems:
        raise UserError(problems, title="sampling settings" if len(problems) > 1 else "")
