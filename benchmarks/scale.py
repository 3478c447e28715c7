"""Where the controller saturates: a simulation of 1 to 256 engines and up to 100,000 dialogues, with measured costs.

    python benchmarks/scale.py --model DIR [--quick]

Measures what a dialogue costs the driver and an engine's event loop (``scale_costs.py``), then plays rollouts with
these costs in a discrete-event model. Prints tables and writes JSON. README.md beside this file says what is assumed.
"""

from __future__ import annotations

import argparse
import heapq
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from measuring import RESULTS, described, print_tables, table, write

BUILD = Path(__file__).parents[1] / "examples" / "quickstart" / "build_model.py"
SLOTS = 256  # requests that an engine continues at once (vLLM's max_num_seqs)


@dataclass(frozen=True)
class Costs:
    """Seconds. ``turn``: of the engine's event loop, a turn. ``dispatch``, ``receive``: of the driver, a dialogue,
    before and after it is played. ``token``: between two tokens of a reply. ``tail``: sigma of a reply's log length."""

    turn: float
    dispatch: float
    receive: float
    token: float
    reply: int
    turns: int
    tail: float = 0.8


@dataclass
class Outcome:
    """``seconds``: of the rollout. The rest: busy shares of it, of the driver and of the mean event loop."""

    seconds: float
    driver: float
    loop: float


def simulate(costs: Costs, engines: int, dialogues: int, k: int, seed: int = 0) -> Outcome:
    """One rollout: the driver hands out groups by turns; dialogues advance on their engines; the driver takes each
    group once its last dialogue has ended.

    An engine is an event loop that does one thing at a time before ``SLOTS`` places in which replies grow.
    """
    chance = random.Random(seed)
    groups = dialogues // k
    waiting: list[list[tuple[float, int]]] = [[] for _ in range(engines)]
    for group in range(groups):
        waiting[group % engines].append(((group + 1) * k * costs.dispatch, group))
    ended, busy = [0.0] * groups, 0.0
    for arrivals in waiting:
        busy += _engine(costs, arrivals, k, chance, ended)
    free = groups * k * costs.dispatch
    for end in sorted(ended):
        free = max(free, end) + k * costs.receive
    return Outcome(free, groups * k * (costs.dispatch + costs.receive) / free, busy / engines / free)


def _engine(
    costs: Costs, arrivals: list[tuple[float, int]], k: int, chance: random.Random, ended: list[float]
) -> float:
    """Seconds that the loop was busy; writes when each group ended."""
    # (when it wants its next turn, a tie-breaker, group, turns left)
    events = [(when, i * k + j, group, costs.turns) for i, (when, group) in enumerate(arrivals) for j in range(k)]
    heapq.heapify(events)
    slots, loop_free, busy = [0.0] * SLOTS, 0.0, 0.0
    mu = -(costs.tail**2) / 2
    while events:
        when, who, group, left = heapq.heappop(events)
        loop_free = max(when, loop_free) + costs.turn
        busy += costs.turn
        tokens = 1 + costs.reply * chance.lognormvariate(mu, costs.tail)  # the label, then the reply
        end = max(slots[0], loop_free) + tokens * costs.token
        heapq.heapreplace(slots, end)
        if left > 1:
            heapq.heappush(events, (end, who, group, left - 1))
        else:
            ended[group] = max(ended[group], end)
    return busy


def grid(quick: bool) -> list[tuple[int, int]]:
    """(engines, dialogues)"""
    sizes = [1, 4, 16, 64, 256]
    if quick:
        return [(e, 1000) for e in sizes]
    # An engine cannot be kept busy by a few dialogues, nor does one play 100,000 of them in anyone's lifetime.
    return [(e, n) for n in (1000, 10_000, 100_000) for e in sizes if 4 <= n / e <= 25_000]


def measure(args: argparse.Namespace) -> dict:
    from scale_costs import measure as measured

    found = measured(args.model, args.turns, args.reply, args.k)
    driver, loop = found["driver"], found["loop"]
    receive = sum(driver[name] for name in ("fetch", "jsonl", "sample", "experiences", "summary"))
    costs = Costs(
        turn=loop["dialogue"] / args.turns + 2 * (loop["sampling_params"] + loop["copied_params"]) + loop["generation"],
        dispatch=driver["dispatch"],
        receive=receive,
        token=args.token_ms / 1000,
        reply=args.reply,
        turns=args.turns,
    )
    results = described(costs=found, simulated=asdict(costs), k=args.k, cells=[])
    for engines, dialogues in grid(args.quick):
        outcome = simulate(costs, engines, dialogues, args.k)
        results["cells"].append({"engines": engines, "dialogues": dialogues, **asdict(outcome)})
        write(args.out, results)
    return results


def tables(results: dict) -> list:
    parts = table("CPU microseconds a dialogue", "process", "what", "microseconds")
    for process, found in results["costs"].items():
        for name, seconds in found.items():
            parts.add_row(process, name, f"{seconds:,.0f}" if name == "bytes" else f"{seconds * 1e6:,.0f}")
    columns = ("engines", "dialogues", "seconds", "dialogues/s", "driver busy", "loop busy")
    simulated = table("simulated rollouts", *columns)
    for cell in results["cells"]:
        simulated.add_row(
            str(cell["engines"]),
            f"{cell['dialogues']:,}",
            f"{cell['seconds']:.1f}",
            f"{cell['dialogues'] / cell['seconds']:,.0f}",
            f"{cell['driver']:.0%}",
            f"{cell['loop']:.0%}",
        )
    return [parts, simulated]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000 dialogues only")
    parser.add_argument("--model")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--reply", type=int, default=64, help="mean tokens of a reply")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--token_ms", type=float, default=25.0, help="assumed: a full batch of a 7 B model on one GPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            args.model = folder
            size = ["--hidden", "64", "--layers", "1", "--max_len", "4096"]
            subprocess.run([sys.executable, BUILD, "--env", "shop", *size, "--out", folder], check=True)
        results = measure(args)
    print_tables(tables(results), f"written to {args.out}")


if __name__ == "__main__":
    main()
