"""The two-level rollout against what its engine can do at best, lockstep batches and OpenRLHF's stock executor.

    python benchmarks/rollout.py --model DIR [--quick]

DIR: a chat model; left out, one of 2.6 M parameters is built. Prints tables and writes JSON. README.md beside this file
says what is measured, and how.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import RESULTS, described, in_fresh_process, print_tables, shown, spread, table, write

BUILD = Path(__file__).parents[1] / "examples" / "quickstart" / "build_model.py"
ALL = ["ours", "chains", "bag", "lockstep", "stock"]
PAIR = ["ours", "chains"]


def cells(quick: bool) -> list[dict]:
    """What is run: engine settings, the load, the ways. Everything varies around one load."""
    cached, plain = {"prefix_caching": True, "block_size": 32}, {"prefix_caching": False, "block_size": 32}
    if quick:
        load = {"dialogues": 8, "k": 4, "turns": 2, "reply": 8}
        return [{"engine": cached, "load": load, "modes": ALL}]
    main = {"dialogues": 32, "k": 8, "turns": 3, "reply": 24}
    loads = [(main, ALL), (main | {"lengths": "tail"}, ALL)]
    loads += [(main | {"dialogues": n, "k": min(n, 8)}, PAIR) for n in (1, 8, 64, 128, 256)]
    loads += [(main | {"turns": 1, "reply": 74}, PAIR)]  # as many tokens as in 3 turns of 1 + 24
    loads += [(main | {"turns": n}, ["ours"]) for n in (1, 8, 16)]
    loads += [(main | {"k": n}, ["ours"]) for n in (1, 32)]
    return [
        *({"engine": cached, "load": load, "modes": modes} for load, modes in loads),
        {"engine": plain, "load": main, "modes": PAIR},
        {"engine": {"prefix_caching": True, "block_size": None}, "load": main, "modes": PAIR},
    ]


async def play(model: str, engine: dict, jobs: list[dict], repeats: int) -> list[dict]:
    """All jobs of one engine. The ways take turns within each round, forwards and backwards."""
    from rollout_host import Bench, Load, start

    bench, played = Bench(await start(model, **engine), model), []
    for job in jobs:
        load = Load(**job["load"])
        await bench.run("ours", load)  # warms up, and records what the others replay first
        if not played:
            await bench.check()
        rounds: dict[str, list] = {mode: [] for mode in job["modes"]}
        for number in range(repeats):
            for mode in job["modes"] if number % 2 == 0 else reversed(job["modes"]):
                rounds[mode].append(asdict(await bench.run(mode, load)))
        played.append(rounds)
        print(job, {mode: round(of[-1]["seconds"], 2) for mode, of in rounds.items()}, file=sys.stderr, flush=True)
    bench.host.llm.shutdown()
    return played


def measure(args: argparse.Namespace) -> dict:
    """One process per engine setting."""
    results = described(model=args.about, cells=[])
    todo = cells(args.quick)
    engines = [dict(items) for items in dict.fromkeys(tuple(cell["engine"].items()) for cell in todo)]
    for engine in engines:
        jobs = [cell for cell in todo if cell["engine"] == engine]
        played = in_fresh_process(__file__, [args.model, engine, jobs, args.repeats])
        for job, rounds in zip(jobs, played, strict=True):
            results["cells"].append(job | {"modes": {mode: summary(job["load"], of) for mode, of in rounds.items()}})
            if "chains" in rounds:
                pairs = {m: zip(rounds["chains"], of, strict=True) for m, of in rounds.items() if m != "chains"}
                results["cells"][-1]["of_the_limit"] = {
                    mode: spread(limit["seconds"] / it["seconds"] for limit, it in both) for mode, both in pairs.items()
                }
        write(args.out, results)
    if not args.quick:
        results["goals"] = goals(results["cells"])
        write(args.out, results)
    return results


def summary(load: dict, runs: list[dict]) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs]
    tokens = sum(run["generated"] for run in runs) / len(runs)
    return {
        "seconds": spread(seconds),
        "dialogues_per_second": spread(load["dialogues"] / s for s in seconds),
        "tokens_per_second": spread(run["generated"] / run["seconds"] for run in runs),
        "generated": tokens,
        "prompt_tokens": sum(run["prompt"] for run in runs) / len(runs),
        "prefix_hits": sum(r["hit"] for r in runs) / max(1.0, sum(r["queried"] for r in runs)),
    }


def goals(found: list[dict]) -> dict[str, Any]:
    """The figures that the goals are about."""

    def seconds(**load: Any) -> float:
        default = {"dialogues": 32, "k": 8, "turns": 3, "reply": 24}
        cell = next(c for c in found if c["load"] == default | load)
        return cell["modes"]["ours"]["seconds"]["median"]

    many = [c for c in found if c["load"]["dialogues"] >= 32 and "of_the_limit" in c and c["engine"]["block_size"]]
    turns = {n: seconds(turns=n) for n in (1, 3, 8, 16)}
    return {
        "share_of_the_limit_at_32_and_more": min(c["of_the_limit"]["ours"]["median"] for c in many),
        "three_turns_over_one_at_equal_tokens": turns[3] / seconds(turns=1, reply=74),
        "prefix_hits": found[0]["modes"]["ours"]["prefix_hits"],
        "exponent_in_turns": _slope(turns),
        "lockstep_over_ours_tailed": found[1]["modes"]["lockstep"]["seconds"]["median"]
        / found[1]["modes"]["ours"]["seconds"]["median"],
    }


def _slope(points: dict[int, float]) -> float:
    """Least squares of log seconds on log turns."""
    xs, ys = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def tables(results: dict) -> list:
    made = table(
        "the engine's limit is `chains`: the same requests straight into vLLM",
        *("in flight", "K", "turns", "reply", "lengths", "caching", "way", "seconds", "dialogues/s", "tokens/s"),
        *("limit's time / its time", "prefix hits"),
    )
    for cell in results["cells"]:
        load, engine = cell["load"], cell["engine"]
        caching = f"blocks of {engine['block_size'] or 'default size'}" if engine["prefix_caching"] else "off"
        head = [load["dialogues"], load["k"], load["turns"], load["reply"], load.get("lengths", "fixed"), caching]
        for mode, of in cell["modes"].items():
            made.add_row(
                *map(str, head),
                mode,
                shown(of["seconds"], 2),
                f"{of['dialogues_per_second']['median']:.1f}",
                f"{of['tokens_per_second']['median']:.0f}",
                shown(cell.get("of_the_limit", {}).get(mode), 2),
                f"{of['prefix_hits']:.1%}",
            )
    return [made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small load")
    parser.add_argument("--model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "rollout.json")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(asyncio.run(play(*json.loads(args.cell)))))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.about = args.model or "2.6 M parameters, untrained"
        if not args.model:
            args.model = folder
            size = ["--hidden", "256", "--layers", "3", "--max_len", "4096"]
            subprocess.run([sys.executable, BUILD, "--env", "shop", *size, "--out", folder], check=True)
        results = measure(args)
    print_tables(tables(results), json.dumps(results.get("goals", {}), indent=1), f"written to {args.out}")


if __name__ == "__main__":
    main()
