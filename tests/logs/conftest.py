"""A good dialogue, and files of dialogues."""

import copy
import json

import pytest

GOOD = {
    "id": "c-17",
    "source": "chat export",
    "language": "en",
    "goal": {
        "intent": "refund",
        "context": "The customer is known.",
        "subgoals": {"find": 0.4, "refund": 0.6},
        "facts": {"order": "A1"},
    },
    "turns": [
        {
            "user": "My mug broke.",
            "strategy": "look_up_order",
            "reply": "I found order A1.",
            "briefing": "Order A1: one mug.",
            "events": ["answer"],
            "completed": ["find"],
            "allowed": ["look_up_order", "close"],
        },
        {"user": "Please.", "strategy": "give_refund", "reply": "Done.", "completed": ["refund"], "engagement": 1.0},
    ],
    "outcome": {"stop": "completed", "success": True},
}


@pytest.fixture
def good():
    return copy.deepcopy(GOOD)


@pytest.fixture
def write(tmp_path):
    """Write records (objects, or bytes as they are) as the lines of a file; its path."""

    def write_lines(*records, name="logs.jsonl"):
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write_lines
