"""Pure functions on text: what the filters of `data.filters` do, and repairs that every source gets."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

# UTF-8 read as cp1252, latin-1 or cp1254 leaves a lead byte (C2 to EF shown as Â to ï, and F0 9F of emoji) followed
# by a continuation byte (80 to BF: a C1 control or cp1252's sign for it, or no-break space to ¿). Clean text hardly
# ever has such a pair, so one search decides whether ftfy looks at a line at all. Ç, Ö and Ü are left out: as lead
# bytes they stand for rare letters, but in Turkish capitals they come before a closing quote.
_SUSPECT = re.compile(
    r"[ÂÃÄÅÆÈÉÊËÎÏÐÑÒÓ×ØÙÚÛà-ðğ][\x80-¿ŒœŠšŸŽžƒˆ˜–—‘’‚“”„†‡•…‰‹›€™]"
    r"(?<![ðğ][^Ÿ])"  # an alternative would make the search four times slower
)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def fix_mojibake(text: str) -> tuple[str, int]:
    """Undo UTF-8 that was once read as cp1252 or a relative ("gÃ¶zÉ™l" for "gözəl").

    Each line is judged alone by ftfy.fix_encoding, which changes it only when it looks wrong before and right
    after; "CAFÉ™" stays. Returns the text and the number of lines changed.
    """
    if text.isascii() or not _SUSPECT.search(text):
        return text, 0
    from ftfy import fix_encoding

    lines = text.split("\n")
    fixed = [fix_encoding(line) if _SUSPECT.search(line) else line for line in lines]
    changed = sum(old != new for old, new in zip(lines, fixed, strict=True))
    return "\n".join(fixed), changed


def normalize(text: str, form: Literal["none", "NFC", "NFKC"]) -> str:
    """Unicode normalisation: NFC composes letters and their marks, NFKC also replaces look-alikes (ﬁ, ²)."""
    return text if form == "none" else unicodedata.normalize(form, text)


def lowercase(text: str, mode: Literal["none", "default", "turkic"]) -> str:
    """Lower-case text.

    "default" follows Unicode's root rules, where İ becomes two code points (i and a dot above) and I becomes i.
    "turkic" lowers I to ı and İ to i, composed or not, and leaves no "i" with a separate dot above.
    """
    if mode == "none":
        return text
    if mode == "default":
        return text.lower()
    text = text.replace("I\u0307", "i").replace("İ", "i").replace("I", "ı").lower()
    return text.replace("i\u0307", "i")


def unify_newlines(text: str) -> tuple[str, int]:
    """CRLF and lone CR → LF. Returns the text and the number of line ends changed."""
    changed = text.count("\r")  # each CR, with or without its LF, ends one line
    return (text.replace("\r\n", "\n").replace("\r", "\n"), changed) if changed else (text, 0)


def remove_bom(text: str) -> tuple[str, int]:
    """Remove byte order marks (U+FEFF), also those that joined files carry inside. Returns text and count."""
    return text.replace("\ufeff", ""), text.count("\ufeff")


def remove_nul(text: str) -> tuple[str, int]:
    """Remove NUL characters. Returns the text and their number."""
    return text.replace("\0", ""), text.count("\0")


def replace_surrogates(text: str) -> tuple[str, int]:
    """Replace lone surrogates, which no UTF-8 file can hold, by U+FFFD. Returns the text and their number."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _LONE_SURROGATE.subn("\ufffd", text)
    return text, 0
