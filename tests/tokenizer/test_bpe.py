"""The BPE trainer: right merges, whatever the order, whatever the text."""

import random
import sys
import tracemalloc
import zlib
from collections import Counter
from itertools import pairwise

import pytest
import regex
from helpers import sample_text

from core import bpe


def merges(ranks):
    return [token for token, rank in sorted(ranks.items(), key=lambda item: item[1]) if rank >= 256]


def test_hand_computed_example():
    # hug 10, pug 5, hugs 5 → ug occurs 20 times, then hug 15 (p+ug 5), then hugs 5 and pug 5: the smaller ids first.
    texts = ["hug"] * 10 + ["pug"] * 5 + ["hugs"] * 5
    assert merges(bpe.train(texts, 260)) == [b"ug", b"hug", b"pug", b"hugs"]


def test_overlapping_runs_merge_from_the_left():
    # aa|aa|a: of aa+aa and aa+a, once each, the smaller ids win.
    assert merges(bpe.train(["aaaaa"], 300)) == [b"aa", b"aaa", b"aaaaa"]


def test_equals_a_slow_trainer():
    text = sample_text(6_000, seed=3)
    assert bpe.train([text], 600) == slow_train([text], 600)


def slow_train(texts, vocab_size):
    """The definition: count all pairs anew for every merge."""
    words = [([*piece.encode("utf-8", "replace")], n) for piece, n in slow_count(texts).items()]
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size:
        pairs = Counter()
        for ids, n in words:
            for pair in pairwise(ids):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids, _ in words:
            for i in range(len(ids) - 1):
                if tuple(ids[i : i + 2]) == best:
                    ids[i : i + 2] = [len(tokens)]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return {token: i for i, token in enumerate(tokens)}


def slices(text):
    """Parts of at most SLICE characters, cut before the last space after a word or line end, or after a line end."""
    while len(text) > bpe.SLICE:
        places = [(i, *text[i - 1 : i + 1]) for i in range(1, bpe.SLICE)]
        spaces = [i for i, a, b in places if b == " " and (a in "\r\n" or not a.isspace())]
        lines = [i for i, a, b in places if a in "\r\n" and b not in "\r\n"]
        end = max(spaces or lines or [bpe.SLICE])
        yield text[:end]
        text = text[end:]
    yield text


def slow_count(texts):
    """The definition: SPLIT over each slice; the rarer half goes after the slice that brought too many."""
    pieces = Counter()
    for text in texts:
        for part in slices(text):
            for piece in regex.findall(bpe.SPLIT, part):
                pieces.update(piece[i : i + bpe.LONGEST] for i in range(0, len(piece), bpe.LONGEST))
            if len(pieces) > bpe.MAX_PIECES:
                crc = {piece: zlib.crc32(piece.encode("utf-8", "replace")) for piece in pieces}
                order = sorted(pieces, key=lambda piece: (-pieces[piece], crc[piece], piece))
                pieces = Counter({piece: pieces[piece] for piece in order[: bpe.MAX_PIECES // 2]})
    return pieces


BLANKS = [chr(c) for c in range(sys.maxunicode + 1) if regex.match(r"\s", chr(c)) or chr(c).isspace()]
ALPHABETS = {
    "few letters": "ab",
    "prose": "ab ",
    "ASCII": [*map(chr, range(128)), *" " * 30],
    "words": ["the", "cat", " ", " ", " ", "sat", ". ", "\n", "don't", "(", "12"],
    "code": "if (x) {\n    y[0] += 12;\n\t}  ",
    "CRLF": "ab.  \r\n",
    "every blank": [*BLANKS, *" " * len(BLANKS), *"a1.\u200b"],
    "combining marks": "eo\u0301\u0323 \u0308.",
    "digits": "09\u0663\u216b\xbd ,",
    "emoji": "\U0001f600\u200d\U0001f469\U0001f3fd\ufe0f a",
    "no blanks": "日本語文。漢字1",
    "lone surrogates": "\ud800\udfff\udc00 a",
    "anything": [chr(c) for c in range(0, sys.maxunicode, 97)] + [" "] * 3000,
}


@pytest.mark.parametrize("name", ALPHABETS)
def test_equals_the_definition_on_random_texts(name, monkeypatch):
    rng = random.Random(name)
    for _ in range(60):
        monkeypatch.setattr(bpe, "SLICE", rng.choice([1 << 20, 1, 7, 64]))
        monkeypatch.setattr(bpe, "MAX_PIECES", rng.choice([1_000_000, 1_000_000, 10, 100]))
        size = rng.choice([3, 40, 400])
        texts = [
            "".join(rng.choices(ALPHABETS[name], k=rng.randrange(size))) for _ in range(rng.randrange(5))
        ]
        assert bpe.count_pieces(texts) == slow_count(texts)
        assert bpe.train(texts, 290) == slow_train(texts, 290)


@pytest.mark.parametrize("between", [" ", "\n", "\r\n"])
def test_slices_cut_no_word(monkeypatch, between):
    text = sample_text(2_000, seed=3).replace(" ", between)
    whole = bpe.count_pieces([text])
    monkeypatch.setattr(bpe, "SLICE", 100)
    assert bpe.count_pieces([text]) == whole


def test_no_space_is_cut_from_a_blank_before_it():
    """What `regex` takes for a blank, `re` and `str` do too; of them only line ends part from a space."""
    blanks = {c for c in BLANKS if regex.match(r"\s", c)} - set(" \r\n")
    assert blanks <= set(bpe.BLANKS)
    for blank in blanks:
        assert bpe._words(f"a{blank} b c") == [f"a{blank} b", "c"]
    for end in ("a", ".", "\r", "\n", "\u0301", "\ud800"):
        assert bpe._words(f"{end} b  c\t d") == [end, "b", " c\t d"]


def test_order_of_texts_does_not_matter():
    texts = sample_text(30_000, seed=4).split("\n\n")
    shuffled = random.Random(5).sample(texts, len(texts))
    assert bpe.train(texts, 700) == bpe.train(shuffled, 700)


def test_exact_size_and_fewer_from_a_small_corpus():
    ranks = bpe.train([sample_text(30_000, seed=6)], 555)
    assert sorted(ranks.values()) == list(range(555))
    assert len(bpe.train(["ab"], 1000)) == 257
    assert len(bpe.train([], 1000)) == len(bpe.train(["", "x"], 1000)) == 256


def test_merges_stay_within_pieces():
    compiled = regex.compile(bpe.SPLIT)
    for token in merges(bpe.train([sample_text(20_000, seed=7) + "\n  x = y[0];\r\n" * 50], 800)):
        text = token.decode("utf-8", errors="ignore")
        assert len(compiled.findall(text)) <= 1, token


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Bakı'nın küçəsi", ["Bakı", "'nın", " küçəsi"]),
        ("don't (stop)", ["don", "'t", " (", "stop", ")"]),
        ("in 1918, 3.5", ["in", " 19", "18", ",", " 3", ".", "5"]),
        ("a.\r\n\r\n    b  c", ["a", ".\r\n\r\n", "    ", "b", "  ", "c"]),
        ("i̇ş हिन्दी", ["i̇ş", " हिन्दी"]),
        ("x\x00\ufffdy\u2028z", ["x", "\x00\ufffd", "y", "\u2028z"]),
    ],
)
def test_split(text, pieces):
    assert regex.findall(bpe.SPLIT, text) == pieces


def test_split_loses_no_character():
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1, 7)]))
    shuffled = "".join(random.Random(8).sample(everything, len(everything)))
    for text in (everything, shuffled):
        assert "".join(regex.findall(bpe.SPLIT, text)) == text


def test_long_pieces_are_learned_in_parts():
    pieces = bpe.count_pieces(["a" * 1_000_000, " " * 1000])
    assert max(map(len, pieces)) == bpe.LONGEST
    assert sum(len(piece) * n for piece, n in pieces.items()) == 1_001_000
    assert b"a" * bpe.LONGEST in bpe.train(["a" * 1_000_000], 300)


def test_memory_of_a_piece():
    """MAX_PIECES of them are what training takes at most."""
    rng = random.Random(9)
    texts = [" ".join("".join(rng.choices("abcdefghijklmnop", k=8)) for _ in range(100)) for _ in range(200)]
    tracemalloc.start()
    try:
        bpe.train(texts, 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 800 * 20_000


def test_words_that_repeat_are_not_held_for_each_text():
    text = sample_text(20_000, seed=10)
    bpe.count_pieces([text])
    tracemalloc.start()
    try:
        bpe.count_pieces([text] * 3)
        few = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        bpe.count_pieces(text for _ in range(100))
        many = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert many < 1.1 * few


def test_piece_counter_is_bounded_and_keeps_the_commonest(monkeypatch):
    monkeypatch.setattr(bpe, "MAX_PIECES", 1000)
    rare = [f"{a}{b}{c}" for a in "abcdefghij" for b in "abcdefghijklmnop" for c in "abcdefghijklmnop"]
    pieces = bpe.count_pieces([f" common {word}" for word in rare])
    assert len(pieces) <= 1000
    assert pieces[" common"] == len(rare)
    first_letters = {piece[1] for piece in pieces if len(piece) == 4}
    assert len(first_letters) == 10, "the hash keeps words from all over the alphabet"


def test_lone_surrogates_do_no_harm():
    assert len(bpe.train(["a\ud800b" * 5], 258)) == 258
