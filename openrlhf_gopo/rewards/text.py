"""Reading replies: whether a text mentions a string, and which values (ids, numbers, prices) it states."""

from __future__ import annotations

import re
from functools import lru_cache

# The look-behinds keep both linear in long runs of digits or letters: a run is tried at its start alone.
_DOLLARS = re.compile(r"\$?(?<![\d.])(\.*)(\d[\d.]*)\s*(?:dollars?|usd|bucks)\b")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_CENTS = re.compile(r"(\d)\.00\b")
_VALUE = re.compile(r"(?<![^\W\d_])[^\W\d_]*\d+(?:[^\W_])*(?:[.:]\d+)*")


def normalise(text: str) -> str:
    """Case-folded, single-spaced; prices in one form: ``$1,200.00``, ``1200 dollars`` and ``$ 1200`` all end in 1200.

    >>> normalise("It costs  35 Dollars.")
    'it costs $35.'
    """
    text = " ".join(text.casefold().split()).replace("\u2019", "'").replace("$ ", "$")
    return _DOLLARS.sub(r"\1$\2", _CENTS.sub(r"\1", _THOUSANDS.sub("", text)))


@lru_cache(maxsize=65536)
def _finder(string: str) -> re.Pattern[str]:
    wanted = normalise(string)
    # Whole words only: A41 is not in A417, and $35 is neither in $350 nor in $35.50.
    before = r"(?<!\w)" if wanted[:1].isalnum() else ""
    return re.compile(rf"{before}{re.escape(wanted)}(?!\w|[.,:]\d)")


def mentions(text: str, string: str) -> bool:
    """True when ``text`` contains ``string`` as whole words, whatever the case, spacing and price format.

    >>> mentions("Your order a417 costs 35 dollars.", "$35"), mentions("order A417", "A41")
    (True, False)
    """
    return _finder(string).search(normalise(text)) is not None


def values(text: str) -> set[str]:
    """Every id, number and price in ``text``, without currency and percent signs: all words that hold a digit.

    >>> sorted(values("Order A417, 2-year cover, $1,200.00 at 10%"))
    ['10', '1200', '2', 'a417']
    """
    return set(_VALUE.findall(normalise(text)))
