"""Repairs and filters on text: what they change, what they count, what they leave alone."""

from __future__ import annotations

import pydoc_data.topics

import pytest
from helpers import sample_text

from core.text import (
    fix_mojibake,
    lowercase,
    normalize,
    remove_bom,
    remove_nul,
    replace_surrogates,
    unify_newlines,
)


def as_cp1252(text: str) -> str:
    """UTF-8 bytes read as cp1252, as editors do: bytes that it lacks become control characters."""
    return "".join(bytes([b]).decode("cp1252", "replace").replace("\ufffd", chr(b)) for b in text.encode())


@pytest.mark.parametrize(
    "line",
    [
        "Azərbaycan gözəl ölkədir",
        "Əli gəldi",
        "İstanbul'da ığdır, Ağrı Dağı’nın",
        "ŞƏHƏR İÇİN ÇAĞRI",
        "dəniz – “yaxşı”…",
        "Привет мир",
    ],
)
def test_mojibake_is_undone_and_clean_text_is_not_touched(line: str) -> None:
    assert fix_mojibake(as_cp1252(line)) == (line, 1)
    assert fix_mojibake(line) == (line, 0)


def test_mojibake_counts_lines_and_keeps_the_others() -> None:
    text = f"clean\n{as_cp1252('gözəl')}\nCAFÉ™\n\n{as_cp1252('şəhər')}\n"
    assert fix_mojibake(text) == ("clean\ngözəl\nCAFÉ™\n\nşəhər\n", 2)


@pytest.mark.parametrize(
    "text", ["CAFÉ™", "VOILÀ… ÇA", "“TÜRKÇÜ”NÜN", "GÖZÜ”nü", "«İŞÇİ»nin", "À “a”", "№ 5", ""]
)
def test_mojibake_leaves_odd_but_right_text(text: str) -> None:
    assert fix_mojibake(text) == (text, 0)


def test_mojibake_leaves_real_text() -> None:
    for text in (sample_text(200_000, seed=3), "\n".join(pydoc_data.topics.topics.values())):
        assert fix_mojibake(text) == (text, 0)


def test_turkic_lowercase() -> None:
    assert lowercase("DIŞ İŞLERİ IĞDIR Əli", "turkic") == "dış işleri ığdır əli"
    assert lowercase("I\u0307stanbul", "turkic") == "istanbul"
    assert lowercase("i\u0307stanbul", "turkic") == "istanbul"  # what str.lower() made of it elsewhere
    assert lowercase("ÇĞÖŞÜÂ", "turkic") == "çğöşüâ"


def test_other_lowercase() -> None:
    assert lowercase("İI", "default") == "i\u0307i"
    assert lowercase("İI", "none") == "İI"


def test_normalize() -> None:
    assert normalize("s\u0327 ﬁ", "NFC") == "ş ﬁ"
    assert normalize("s\u0327 ﬁ", "NFKC") == "ş fi"
    assert normalize("s\u0327 ﬁ", "none") == "s\u0327 ﬁ"


def test_small_repairs_count() -> None:
    assert unify_newlines("a\r\nb\rc\n\r\n") == ("a\nb\nc\n\n", 3)
    assert unify_newlines("a\n") == ("a\n", 0)
    assert remove_bom("\ufeffa\ufeffb") == ("ab", 2)
    assert remove_nul("a\0b\0") == ("ab", 2)
    assert replace_surrogates("a\ud800b") == ("a\ufffdb", 1)
