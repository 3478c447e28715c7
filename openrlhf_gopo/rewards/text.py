"""Reading replies: whether a text mentions a string, and which values (ids, numbers, prices) it states.

Chinese and Japanese are written without spaces: there every character is a word of its own, and a Latin word or a
number ends where one of their characters begins.
"""

from __future__ import annotations

import re
from functools import lru_cache

_UNSPACED = r"\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Chinese characters and kana
_WORD = rf"[^\W{_UNSPACED}]"  # a character of a word that ends at a space
_WIDE = {ord(wide): chr(ord(wide) - 0xFEE0) for wide in "０１２３４５６７８９＄％．"}
_WIDE |= {wide: chr(wide - 0xFEE0) for wide in range(0xFF41, 0xFF5B)} | {0xFFE5: "\u00a5"}  # a to z; a yen sign

_CHARACTER = re.compile(rf"[{_UNSPACED}]")
_LOOSE = re.compile(rf"(?<=[{_UNSPACED}]) | (?=[{_UNSPACED}])")
_NUMBER = r"(\d+(?:\.\d+)?)"
# The look-behinds keep these linear in long runs of digits or letters: a run is tried at its start alone.
_YUAN = re.compile(rf"\u00a5 ?{_NUMBER}元?|(?<!\d){_NUMBER}(?:块钱|块(?!{_WORD}|[{_UNSPACED}]))")
_DOLLARS = re.compile(rf"\$?(?<![\d.])(\.*)(\d[\d.]*)\s*(?:(?:dollars?|usd|bucks)(?!{_WORD})|美元|美金)")
_THOUSANDS = re.compile(rf"(?<=\d),(?=\d{{3}}(?!{_WORD}))")
_CENTS = re.compile(rf"(\d)\.00(?!{_WORD})")
_VALUE = re.compile(rf"(?<![^\W\d_{_UNSPACED}])[^\W\d_{_UNSPACED}]*\d+[^\W_{_UNSPACED}]*(?:[.:]\d+)*")
_PUNCTUATION = ".,;:!?\"'()\u3001\u3002\u300a\u300b\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f\u201c\u201d"


def normalise(text: str) -> str:
    """Case-folded, single-spaced; prices in one form: ``$1,200.00``, ``1200 dollars`` and ``$ 1200`` all end in 1200.

    No space beside a Chinese character, full-width digits and letters as plain ones, and yuan as ``35元``.

    >>> normalise("It costs  35 Dollars.")
    'it costs $35.'
    >>> normalise("价格是 ￥３５")
    '价格是35元'
    """
    text = " ".join(text.casefold().split()).replace("\u2019", "'")
    if not text.isascii():
        text = _LOOSE.sub("", text.translate(_WIDE))
    text = _DOLLARS.sub(r"\1$\2", _CENTS.sub(r"\1", _THOUSANDS.sub("", text.replace("$ ", "$"))))
    return text if text.isascii() else _YUAN.sub(r"\1\2元", text)


@lru_cache(maxsize=65536)
def _finder(string: str) -> re.Pattern[str]:
    wanted = normalise(string)
    # Whole words only: A41 is not in A417, and $35 is neither in $350 nor in $35.50.
    before = rf"(?<!{_WORD})" if wanted[:1].isalnum() and not _CHARACTER.match(wanted) else ""
    before += r"(?<!\d\.)" if wanted[:1].isdigit() else ""  # nor is 5 weeks in 2.5 weeks
    after = "" if _CHARACTER.fullmatch(wanted[-1:]) else rf"(?!{_WORD}|[.,:]\d)"
    return re.compile(before + re.escape(wanted) + after)


def mentions(text: str, string: str) -> bool:
    """True when ``text`` contains ``string`` as whole words, whatever the case, spacing and price format.

    >>> mentions("Your order a417 costs 35 dollars.", "$35"), mentions("order A417", "A41")
    (True, False)
    >>> mentions("订单A5的价格是35元", "A5"), mentions("订单A5的价格是135元", "35元")
    (True, False)
    >>> mentions("It takes 2.5 weeks.", "5 weeks"), mentions("In 2. 5 weeks", "5 weeks")
    (False, True)
    """
    return _finder(string).search(normalise(text)) is not None


def values(text: str) -> set[str]:
    """Every id, number and price in ``text``, without currency and percent signs: all words that hold a digit.

    >>> sorted(values("Order A417, 2-year cover, $1,200.00 at 10%"))
    ['10', '1200', '2', 'a417']
    >>> sorted(values("订单A5的价格是$35"))
    ['35', 'a5']
    """
    return set(_VALUE.findall(normalise(text)))


def words(text: str) -> list[str]:
    """The words of ``text`` in order, without punctuation.

    >>> words("Order A5, please."), words("订单A5，谢谢")
    (['order', 'a5', 'please'], ['订', '单', 'a5', '谢', '谢'])
    """
    spaced = _CHARACTER.sub(r" \g<0> ", normalise(text)).split()
    return [bare for word in spaced if (bare := word.strip(_PUNCTUATION))]
