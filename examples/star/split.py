"""Splits a file of STAR's logged dialogues: train.jsonl, and what is held out: dialogues.jsonl, tasks.jsonl.

usage: python split.py LOGS.jsonl OUT

Whole tasks are held out, with every dialogue that touches one of them; of the other tasks the dialogues that the
environment itself holds out.
"""

import json
import sys
from pathlib import Path

from openrlhf_gopo.envs.reading import split_of

TASKS = {"doctor_schedule", "plane_search", "restaurant_book"}


def part(record: dict) -> str:
    if TASKS & set(record["goal"]["intent"].split("+")):
        return "tasks" if record["goal"]["intent"] in TASKS else "left_out"
    return "train" if split_of(record["id"].removeprefix("star-")) == "train" else "dialogues"


def main(source: str, out: str) -> None:
    parts: dict[str, list[str]] = {"train": [], "dialogues": [], "tasks": [], "left_out": []}
    for line in Path(source).read_text(encoding="utf-8").splitlines():
        parts[part(json.loads(line))].append(line + "\n")
    Path(out).mkdir(parents=True, exist_ok=True)
    for name in ("train", "dialogues", "tasks"):
        (Path(out) / f"{name}.jsonl").write_text("".join(parts[name]), encoding="utf-8")
    print({name: len(lines) for name, lines in parts.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
