"""One GOPO update of expert and responder against OpenRLHF's own update of one policy, and against per-turn samples.

    python benchmarks/update.py [--quick]

Prints two tables and writes JSON. README.md beside this file says what is measured, and how.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

from measuring import (
    FOR_MEMORY,
    RESULTS,
    described,
    in_fresh_process,
    peak,
    print_tables,
    reset_peak,
    shown,
    spread,
    table,
    timed,
    write,
)
from update_methods import METHODS, Updates, torch

# numerator, denominator, the most it may be (issue's goal; None: shown only)
RATIOS = {
    "responder / upstream": ("responder", "upstream", 1.0),
    "expert / upstream, its stream": ("expert", "upstream_expert", 0.5),
    "both / upstream": ("both", "upstream", 1.1),
    "per turn / upstream": ("per_turn", "upstream", None),
}


def time_cell(repeats: int, **shape: int) -> dict:
    """Methods take turns within each round, forwards and backwards, so that load hits all of them alike."""
    updates = Updates(**shape)
    rounds: dict[str, list] = {method: [] for method in METHODS}
    for method in METHODS:
        updates.step(method)  # warm up
    for number in range(repeats):
        for method in METHODS if number % 2 == 0 else reversed(METHODS):
            rounds[method].append(timed(lambda method=method: _synchronised(updates, method)))
    return {"rounds": rounds, "tokens": {method: updates.tokens(method) for method in METHODS}}


def _synchronised(updates: Updates, method: str) -> None:
    updates.step(method)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_cell(method: str, **shape: int) -> float:
    """MiB that an update adds to models, optimizer states and data. Call it in a fresh process."""
    Updates(**(shape | {"vocabulary": 64, "dialogues": 2, "micro_batch": 1})).step(method)  # lazy imports, thread pools
    updates = Updates(**shape)
    for trainer in updates.trainers(method):
        for parameter in trainer.actor.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trainer.actor_optim.step()  # makes its state
        trainer.actor_optim.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        updates.step(method)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    baseline = reset_peak()
    updates.step(method)
    return peak() - baseline


def measure(args: argparse.Namespace) -> dict:
    """One cell per vocabulary; the file is written after each."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results = described(device=device, threads=args.threads, cells=[])
    for vocabulary in args.vocabulary:
        names = ("turns", "dialogues", "micro_batch", "hidden", "layers")
        shape = {"vocabulary": vocabulary, **{name: getattr(args, name) for name in names}}
        results["cells"].append(measure_cell(shape, args))
        write(args.out, results)
        print(f"vocabulary {vocabulary}: done", flush=True)
    return results


def measure_cell(shape: dict[str, int], args: argparse.Namespace) -> dict:
    def own_process(what: str, **more: Any) -> Any:
        return in_fresh_process(__file__, [what, args.threads, shape | more], FOR_MEMORY if what == "memory" else None)

    timings = own_process("time", repeats=args.repeats)
    rounds, tokens = timings["rounds"], timings["tokens"]
    seconds = {method: spread(once["wall"] for once in rounds[method]) for method in METHODS}
    ratios = {
        name: {
            clock: spread(a[clock] / b[clock] for a, b in zip(rounds[over], rounds[under], strict=True))
            for clock in ("wall", "cpu")
        }
        for name, (over, under, _) in RATIOS.items()
    }
    memory = {m: spread(own_process("memory", method=m) for _ in range(args.memory_repeats)) for m in METHODS}
    body, head = _parameters(**shape)
    return {
        **shape,
        "head_share": head / (body + head),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": {method: tokens[method] / seconds[method]["median"] for method in METHODS},
        "ratios": ratios,
        "peak_mib": memory,
    }


def _parameters(vocabulary: int, hidden: int, layers: int, **_: int) -> tuple[int, int]:
    """Of the layers, and of the head: where the multiplications of a forward pass go."""
    return layers * (4 * hidden**2 + 3 * hidden * 3 * hidden), vocabulary * hidden


def tables(results: dict) -> list:
    names = [method.replace("_", " ") for method in METHODS]
    seconds = table("seconds of one update", "vocabulary", "head's share", *names)
    speed = table("tokens read per second", "vocabulary", *names)
    memory = table("peak memory above models and optimizer states, MiB", "vocabulary", *names)
    goals = [f"{name} (<= {most})" if most else name for name, (_, _, most) in RATIOS.items()]
    ratios = table("ratios, by this process's CPU time and by the wall", "vocabulary", "clock", *goals)
    for cell in results["cells"]:
        vocabulary = str(cell["vocabulary"])
        seconds.add_row(vocabulary, f"{cell['head_share']:.0%}", *[shown(cell["seconds"][m], 2) for m in METHODS])
        speed.add_row(vocabulary, *[f"{cell['tokens_per_second'][m]:,.0f}" for m in METHODS])
        memory.add_row(vocabulary, *[shown(cell["peak_mib"][m], 0) for m in METHODS])
        for clock in ("cpu", "wall"):
            ratios.add_row(vocabulary, clock, *[shown(cell["ratios"][name][clock], 2) for name in RATIOS])
    return [seconds, speed, memory, ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="vocabulary 2000, 2 dialogues, 3 repeats")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[2000, 50_000, 150_000])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--dialogues", type=int, default=4)
    parser.add_argument("--micro_batch", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory_repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "update.json")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        what, threads, arguments = json.loads(args.cell)
        torch.set_num_threads(threads)
        print(json.dumps({"time": time_cell, "memory": memory_cell}[what](**arguments)))
        return
    if args.quick:
        args.vocabulary, args.dialogues, args.repeats = [2000], 2, 3
    print_tables(tables(measure(args)), f"written to {args.out}")


if __name__ == "__main__":
    main()
