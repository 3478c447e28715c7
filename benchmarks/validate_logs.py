"""Time and peak memory of checking logged dialogues, at two sizes: time grows with the file, memory does not.

    python benchmarks/validate_logs.py [--sizes 10000 100000]

Each file is written to a temporary folder and checked in a process of its own, with a progress bar on a terminal.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from openrlhf_gopo.logs import validate

TEXT = "my order has not come yet could you please look where it is and send the refund to my card thank you café"
WORDS = TEXT.split()
STEPS = ("look_up_order", "verify_identity", "explain_policy", "give_refund")


def dialogue(number: int, rng: random.Random) -> dict[str, Any]:
    """One valid dialogue of 4 to 12 turns, about 3 kB."""
    length = rng.randint(4, 12)
    turns = [
        {
            "user": " ".join(rng.choices(WORDS, k=12)),
            "strategy": rng.choice(STEPS),
            "reply": " ".join(rng.choices(WORDS, k=18)),
            "briefing": f"Order A{number}: {rng.choice(WORDS)}, {rng.randint(1, 99)} dollars.",
            "events": ["reply"],
            "completed": [f"step{index}"] if index < 2 else [],
            "allowed": list(STEPS),
        }
        for index in range(length)
    ]
    goal = {"intent": "refund", "context": "The customer is known.", "subgoals": {"step0": 0.4, "step1": 0.6}}
    outcome = {"stop": "completed", "success": True}
    return {"id": f"c{number}", "source": "made", "language": "en", "goal": goal, "turns": turns, "outcome": outcome}


def measure(path: str) -> dict[str, float]:
    """Check ``path``: seconds, and the resident set in MiB before and at its peak."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    report = validate(path, progress=True)
    seconds = time.perf_counter() - start
    if report.found:
        raise SystemExit(report.problems[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"dialogues": report.dialogues, "seconds": seconds, "before": before, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one file, in a process of its own
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    table = Table("dialogues", "file, MB", "seconds", "dialogues/s", "RSS after imports, MiB", "peak RSS, MiB")
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            path, rng = Path(folder) / f"{size}.jsonl", random.Random(0)
            with path.open("w", encoding="utf-8") as file:
                for number in range(size):
                    file.write(json.dumps(dialogue(number, rng), ensure_ascii=False) + "\n")
            command = [sys.executable, __file__, "--measure", str(path)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            cells = (path.stat().st_size / 1e6, found["seconds"], size / found["seconds"], found["before"])
            table.add_row(f"{size:,}", *(f"{cell:,.1f}" for cell in cells), f"{found['peak']:,.1f}")
            path.unlink()
    Console().print(table)


if __name__ == "__main__":
    main()
