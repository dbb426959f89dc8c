"""Byte-level BPE, learned in plain Python: count the pieces of a text, then merge the commonest pair, again and again.

The method is that of Sennrich et al. 2016 (arXiv 1508.07909) over bytes, as GPT-2 has it. The result depends on the
text alone: not on the order of the documents, threads or hash seeds.
"""

from __future__ import annotations

import heapq
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

from core.garbage import uncollected

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
# Some 0.7 KB each, as tests/tokenizer/test_bpe.py measures on random words: 0.7 GB at most.
MAX_PIECES = 1_000_000

# Characters cut at once: their words are counted while they are still in the processor's cache.
SLICE = 1 << 14

# A space after a letter, mark or line end begins a piece: only other blanks share one with a space behind them. SPLIT
# looks neither back nor ahead, so a text can be cut before each such space first, at the speed of `re` or `str`, and
# SPLIT is left with the distinct words. `re` takes a few more characters for blanks than `regex`, never fewer.
BLANKS = [c for c in map(chr, range(0x3001)) if c.isspace() and c not in " \r\n"]
_cut_words = re.compile(r" (?<=[\S\r\n] )").split

# SPLIT where all is ASCII, for `re`, which is faster than `regex`.
_ascii_pieces = re.compile(
    SPLIT.replace(r"\p{L}", "a-zA-Z").replace(r"\p{M}", "").replace(r"\p{N}", r"\d"), re.ASCII
).findall


@uncollected()  # there are many lists and no cycles
def train(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Return {token bytes: id}, ids 0 … n-1 with the 256 bytes first: what tiktoken calls mergeable ranks.

    vocab_size is the number of ids, at least 256; fewer come back when no pair is left to merge. Of equally common
    pairs the one with the smaller ids is merged first.
    """
    assert 256 <= vocab_size <= sys.maxunicode, "every byte is a token, every id a character"
    pieces = count_pieces(texts)
    # An id is a character here: pairs are strings and sort by their ids, and `str` finds and replaces them.
    words = [piece.encode("utf-8", "replace").decode("latin-1") for piece in pieces]
    counts = list(pieces.values())
    pieces.clear()

    tokens = [bytes([i]) for i in range(256)]
    holders: dict[str, list[int]] = defaultdict(list)  # in which words a pair occurs, once for each time
    for i, word in enumerate(words):
        for a, b in pairwise(word):
            holders[a + b].append(i)
    pair_counts = {pair: _total(counts, where) for pair, where in holders.items()}
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    while len(tokens) < vocab_size and heap:
        count, pair = heap[0]
        if -count != pair_counts[pair]:  # some of its neighbours have been merged away since: back in line
            heapq.heapreplace(heap, (-pair_counts[pair], pair))
            continue
        if not count:
            break  # no pair is left
        heapq.heappop(heap)
        new = chr(len(tokens))
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        for born in _merge(pair, new, words, counts, pair_counts, holders):
            heapq.heappush(heap, (-pair_counts[born], born))

    ranks = {token: i for i, token in enumerate(tokens)}
    assert len(ranks) == len(tokens), "equal bytes go through equal merges, so no token comes twice"
    return ranks


def count_pieces(texts: Iterable[str]) -> Counter[str]:
    """Count the distinct pieces of all texts, at most MAX_PIECES of them."""
    pieces: Counter[str] = Counter()
    words: Counter[str] = Counter()  # not yet cut into pieces, each without the space before it
    waiting = 0  # characters that they came from: no more pieces wait in them
    for text in texts:
        start = 0
        while start < len(text):
            part = text[start : start + SLICE]
            start += len(part)
            cut = _words(part)
            if start < len(text):  # the slice may end within a piece, which then begins the next one
                whole = part.rstrip("\r\n")
                line = max(whole.rfind("\n"), whole.rfind("\r")) + 1
                if len(cut[-1]) + 1 < len(part):
                    start -= len(cut.pop()) + 1  # from its space on
                elif line:
                    start -= len(part) - line
                    cut = [part[:line]]
            _add(cut.pop(0), 1, pieces)
            if cut:  # the last one may end in a blank, which no other word's space may follow
                _add(" " + cut.pop(), 1, pieces)
            words.update(cut)
            waiting += len(part)
            if len(pieces) + waiting > MAX_PIECES:
                waiting = sum(map(len, words)) + len(words)  # fewer, as words repeat
                if waiting > (MAX_PIECES - len(pieces)) // 2:
                    _add_words(words, pieces)
                    words.clear()
                    waiting = 0
            if len(pieces) > MAX_PIECES:
                pieces = _commonest(pieces)
    _add_words(words, pieces)
    return pieces


def _words(text: str) -> list[str]:
    """Cut before each space that begins a piece, and take that space away."""
    if "  " in text or any(blank in text for blank in BLANKS):
        return _cut_words(text)
    return text.split(" ")


def _add_words(words: Counter[str], pieces: Counter[str]) -> None:
    """Add the pieces of words. Those that occur equally often are put together: fewer and longer searches."""
    alike = defaultdict(list)
    for word, n in words.items():
        alike[n, word.isascii()].append(word)
    for (n, _), some in alike.items():
        _add(" ".join(["", *some]), n, pieces)


def _add(text: str, n: int, pieces: Counter[str]) -> None:
    """Add the pieces of a text, which occurs n times."""
    import regex

    found = _ascii_pieces(text) if text.isascii() else regex.findall(SPLIT, text)
    for piece, times in Counter(found).items():
        for i in range(0, len(piece), LONGEST):
            pieces[piece[i : i + LONGEST]] += n * times


def _commonest(pieces: Counter[str]) -> Counter[str]:
    """Keep half of MAX_PIECES. Of equally common ones a hash decides, so that no letter of the alphabet is favoured."""

    def rank(piece: str) -> tuple[int, int, str]:
        return -pieces[piece], zlib.crc32(piece.encode("utf-8", "replace")), piece

    order = sorted(pieces, key=rank)
    return Counter({piece: pieces[piece] for piece in order[: MAX_PIECES // 2]})


def _total(counts: list[int], where: list[int]) -> int:
    return sum(map(counts.__getitem__, where))


def _merge(
    pair: str,
    new: str,
    words: list[str],
    counts: list[int],
    pair_counts: dict[str, int],
    holders: dict[str, list[int]],
) -> list[str]:
    """Replace `pair` by `new` in every word that holds it, from the left. Return the pairs that this brought about."""
    # The words by what stands beside `new` in them: "" is a word's end or another `new`, and twins hold the latter.
    before: dict[str, list[int]] = defaultdict(list)
    after: dict[str, list[int]] = defaultdict(list)
    twins: list[int] = []
    for i in holders.pop(pair):
        parts = words[i].split(pair)
        if len(parts) == 2:  # most often; the loops below do the same in longer time
            left, right = parts
            words[i] = f"{left}{new}{right}"
            if left:
                before[left[-1]].append(i)
            if right:
                after[right[0]].append(i)
        elif len(parts) > 2:
            words[i] = new.join(parts)
            for left in parts[:-1]:
                before[left[-1:]].append(i)
            for right in parts[1:]:
                after[right[:1]].append(i)
            twins += [i] * parts[1:-1].count("")
    a, b = pair[0], pair[1]
    changed = [(x + a, x + new, at) for x, at in before.items() if x]
    changed += [(b + x, new + x, at) for x, at in after.items() if x]
    if twins:
        changed.append((b + a, new + new, twins))
    for old, born, at in changed:
        n = _total(counts, at)
        pair_counts[old] -= n
        pair_counts[born] = n
        holders[born] = at
    del pair_counts[pair]
    return [born for _, born, _ in changed]
