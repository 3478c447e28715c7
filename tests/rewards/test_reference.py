"""BLEU and chrF against sacrebleu's own command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from openrlhf_gopo.rewards.reference import reference_scores

ENGLISH = [
    ("Your order A417 is on its way.", "Your order A417 is on its way, it arrives on Monday."),
    ("It costs $35.50, I'm afraid.", "I am afraid it costs $35.50."),
    ("Sorry,\n I could not  find it.", "Sorry, I could not find your order; could you spell the number?"),
    ("Goodbye!", "Thank you and goodbye!"),
    ("", "Anything else?"),
]
CHINESE = [
    ("您的订单A417已经发货。", "您的订单A417已发货，周一送到。"),
    ("一共35元，可以吗？", "价格是35元，您看可以吗？"),
    ("好的，再见", "好的，谢谢您，再见！"),
]


@pytest.mark.parametrize(("pairs", "language"), [(ENGLISH, "en"), (CHINESE, "zh-CN"), (ENGLISH[:1], "de")])
def test_the_figures_are_those_of_sacrebleus_command(pairs, language, tmp_path):
    for name, texts in zip(("replies", "references"), zip(*pairs, strict=True), strict=True):
        lines = "".join(" ".join(text.split()) + "\n" for text in texts)
        (tmp_path / name).write_text(lines, encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", tmp_path / "references", "-i", tmp_path / "replies"]
    command += ["-m", "bleu", "chrf", "-w", "12", "--tokenize", "zh" if language.startswith("zh") else "13a"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True, timeout=120)
    told = {entry["name"].lower().removesuffix("2"): entry["score"] for entry in json.loads(done.stdout)}
    assert reference_scores(pairs, language) == pytest.approx(told, abs=1e-9)
    assert told["bleu"] > 5


def test_chinese_words_count_in_chinese_alone():
    assert reference_scores(CHINESE, "zh")["bleu"] > reference_scores(CHINESE, "en")["bleu"]


def test_the_same_words_score_100_and_no_pairs_nothing():
    same = [(reply, reply) for reply, _ in ENGLISH]
    assert reference_scores(same) == {"bleu": pytest.approx(100.0), "chrf": pytest.approx(100.0)}
    assert reference_scores([]) == {}
