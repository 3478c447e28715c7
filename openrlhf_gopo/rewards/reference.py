"""BLEU and chrF of replies against a human's, by sacrebleu: the figures of its own command line.

    python -m sacrebleu references.txt -i replies.txt -m bleu chrf -b -w 10

BLEU (13a tokenisation, Chinese: zh) and chrF2, both of the corpus, in [0, 100].
"""

from __future__ import annotations

from collections.abc import Sequence

from sacrebleu.metrics import BLEU, CHRF


def reference_scores(pairs: Sequence[tuple[str, str]], language: str = "en") -> dict[str, float]:
    """``bleu`` and ``chrf`` of (reply, reference) pairs as one corpus; nothing without pairs.

    White space inside a text counts as single blanks: sacrebleu's files have one text per line.

    Args:
        language: of the texts, as in "en" or "zh-CN"; decides the words that BLEU counts.

    Seven words, all as in the reference's eight: every precision is 1, the brevity penalty exp(1 - 8/7) = 0.8669.

    >>> scores = reference_scores([("your order A5 is on its way", "your order A5 is on its way now")])
    >>> round(scores["bleu"], 2)
    86.69
    """
    if not pairs:
        return {}
    replies, references = ([" ".join(text.split()) for text in texts] for texts in zip(*pairs, strict=True))
    tokenize = "zh" if language.lower().startswith("zh") else "13a"
    return {
        "bleu": BLEU(tokenize=tokenize).corpus_score(replies, [references]).score,
        "chrf": CHRF().corpus_score(replies, [references]).score,
    }
