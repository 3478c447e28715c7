"""The words of MultiWOZ's user where a human's own do not do: attributes asked for, and a wish instead of another."""

from __future__ import annotations

from collections.abc import Sequence

from openrlhf_gopo.envs.multiwoz_db import says
from openrlhf_gopo.envs.multiwoz_sop import LABELS
from openrlhf_gopo.envs.reading import mentions

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
UNITS = {"people": "guests", "stay": "nights", "stars": "stars"}
FACILITIES = ("internet", "parking")  # there or not


def request(attributes: Sequence[str]) -> str:
    """The question for ``attributes``."""
    *names, last = [f"if it has {a}" if a in FACILITIES else f"the {LABELS.get(a, a)}" for a in attributes]
    return f"Could you tell me {', '.join(names)}{' and ' if names else ''}{last}?"


def phrase(slot: str, value: str) -> str:
    """The wish for ``value`` as the object of "How about"."""
    if slot in FACILITIES:
        return f"one {'with' if value == 'yes' else 'without'} {slot}"
    unit = UNITS.get(slot, "")
    return f"{value} {unit.removesuffix('s') if value == '1' else unit}".strip()


def heard(text: str, slot: str, value: str) -> bool:
    """Whether ``text`` has the wish for ``value`` already."""
    if slot in FACILITIES:
        return slot in text or (slot == "internet" and "wifi" in text)
    word = NUMBERS[int(value)] if value.isdigit() and int(value) < len(NUMBERS) else value
    return mentions(text, value) or mentions(text, word) or says(text, value)
