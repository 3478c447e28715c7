"""A training step from end to end: GOPO's two policies against OpenRLHF's ``train_ppo_ray`` with its stock executor.

    python benchmarks/step.py --model DIR [--quick]

DIR: a chat model; left out, one of 2.6 M parameters is built. Both programs run as they do for a user, Ray, DeepSpeed
and vLLM included, by turns; also measured: the time from the command to the first rollout. Prints tables, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import RESULTS, described, print_tables, shown, spread, table, write

HERE = Path(__file__).parent
BUILD = HERE.parent / "examples" / "quickstart" / "build_model.py"
PHASES = ("rollout", "experience", "update", "sync")
STATUS = re.compile(r"Global step \d+: (\{.*\})")
NUMBER = re.compile(r"'timing/(\w+)': ([\d.e-]+)")
THEIRS = {"generation": "rollout", "make_experience": "experience", "ppo_train": "update", "broadcast": "sync"}


def flags(model: str, folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """What both programs are given."""
    return {
        "--actor.model_name_or_path": model,
        "--rollout.batch_size": args.goals,
        "--rollout.n_samples_per_prompt": args.k,
        "--rollout.micro_batch_size": 4,
        "--train.batch_size": args.goals * args.k,
        "--train.micro_batch_size": 4,
        "--data.max_samples": args.goals * args.steps,
        "--data.max_len": 2048,
        "--algo.advantage.estimator": "group_norm",
        "--algo.advantage.is_correction_level": "off",
        "--ckpt.output_dir": folder,
        "--ckpt.path": folder / "ckpt",
    }


def gopo(model: str, folder: Path, args: argparse.Namespace) -> dict:
    """Two policies, two engines, through the command line."""
    given = flags(model, folder, args) | {
        "--gopo.env": f"{HERE / 'synthetic.py'}:Synthetic",
        "--gopo.data": f"turns={args.turns},goals={args.goals * args.steps}",
        "--gopo.reply_max_tokens": args.reply,
        # Turns alone: every dialogue is a success, and a group without any spread would teach nothing.
        "--gopo.expert_reward": "tse=1,esndcg=1",
    }
    began = time.time()
    run(["-m", "openrlhf.cli.train_gopo", *_arguments(given), "--vllm.enable_prefix_caching"], folder)
    lines = [json.loads(line) for line in (folder / "results" / "metrics.jsonl").read_text().splitlines()]
    steps = []
    for line in lines:
        if "timing/learn" in line:
            # The roles learn at the same time: a phase takes what the slower one takes.
            made = max(line[f"{role}/time_experience"] for role in ("expert", "responder"))
            timing = {"rollout": line["timing/rollout"], "experience": made, "sync": line["timing/sync"]}
            steps.append(timing | {"update": line["timing/learn"] - made})
    parts = {key.removeprefix("timing/"): lines[0][key] for key in lines[0] if key.startswith("timing/")}
    return {"startup": lines[0]["time"] - began, "startup_parts": parts, "steps": steps}


def stock(model: str, folder: Path, args: argparse.Namespace) -> dict:
    """One policy, one engine: upstream's own program on this machine's platform (``stock_train.py``)."""
    folder.mkdir(parents=True)
    data = folder / "prompts.jsonl"
    prompts = [{"input": f"goal {i}", "label": f"train-{i}:0"} for i in range(args.goals * args.steps)]
    data.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    given = flags(model, folder, args) | {
        "--data.prompt_dataset": data,
        "--data.input_key": "input",
        "--data.label_key": "label",
        "--train.agent_func_path": HERE / "stock_agent.py",
        "--rollout.max_new_tokens": args.reply,
    }
    goals = args.goals * args.steps
    environment = {"STOCK_DATA": f"turns={args.turns},goals={goals}", "STOCK_REPLY": str(args.reply)}
    began, ends, steps = time.time(), [], []
    script = [str(HERE / "stock_train.py"), *_arguments(given), "--vllm.enable_prefix_caching"]
    for when, line in run(script, folder, environment):
        found = STATUS.search(line)
        if found:
            timing = {THEIRS[name]: float(value) for name, value in NUMBER.findall(found[1]) if name in THEIRS}
            steps.append(timing)
            ends.append(when)
    return {"startup": ends[0] - began - sum(steps[0].values()), "steps": steps}


def run(command: list, folder: Path, environment: dict[str, str] | None = None) -> list[tuple[float, str]]:
    """Its lines with the time of each; the whole output goes to ``folder``.log."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    seen = []
    with folder.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONWARNINGS": "ignore"} | (environment or {}),
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            seen.append((time.time(), line))
    if process.wait():
        raise SystemExit(f"exit status {process.returncode}, see {log.name}:\n" + "".join(t for _, t in seen[-15:]))
    return seen


def _arguments(given: dict[str, object]) -> list[object]:
    return [part for pair in given.items() for part in pair]


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """The programs by turns; the first step of each run warms up and is left out."""
    names = ("goals", "k", "turns", "reply", "steps", "rounds")
    results = described(shape={name: getattr(args, name) for name in names}, runs={"gopo": [], "stock": []})
    for number in range(args.rounds):
        programs = [("gopo", gopo), ("stock", stock)]
        for name, program in programs if number % 2 == 0 else reversed(programs):
            results["runs"][name].append(program(args.model, folder / f"{name}{number}", args))
            write(args.out, results)
            print(f"{name}, round {number + 1}: done", file=sys.stderr, flush=True)
    results["phases"] = {
        name: {phase: spread(step[phase] for once in runs for step in once["steps"][1:]) for phase in PHASES}
        | {"step": spread(sum(step.values()) for once in runs for step in once["steps"][1:])}
        for name, runs in results["runs"].items()
    }
    median = {
        name: [statistics.median(sum(s.values()) for s in once["steps"][1:]) for once in runs]
        for name, runs in results["runs"].items()
    }
    results["gopo_over_stock"] = spread(a / b for a, b in zip(median["gopo"], median["stock"], strict=True))
    results["startup"] = {name: spread(once["startup"] for once in runs) for name, runs in results["runs"].items()}
    write(args.out, results)
    return results


def tables(results: dict) -> list:
    steps = table("seconds of one training step", "program", *PHASES, "step", "command to first rollout")
    for name, phases in results["phases"].items():
        cells = [shown(phases[phase], 2) for phase in (*PHASES, "step")]
        steps.add_row(name, *cells, shown(results["startup"][name], 1))
    return [steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of two small steps")
    parser.add_argument("--model")
    parser.add_argument("--goals", type=int, default=4)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--reply", type=int, default=24)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "step.json")
    args = parser.parse_args()
    if args.quick:
        args.goals, args.k, args.steps, args.rounds = 2, 4, 2, 1
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            args.model = f"{folder}/model"
            size = ["--hidden", "256", "--layers", "3", "--max_len", "4096"]
            subprocess.run([sys.executable, BUILD, "--env", "shop", *size, "--out", args.model], check=True)
        results = measure(args, Path(folder) / "runs")
    ratio = f"GOPO's step over upstream's: {shown(results['gopo_over_stock'], 2)} (goal: at most 1.15)"
    print_tables(tables(results), ratio, f"written to {args.out}")


if __name__ == "__main__":
    main()
