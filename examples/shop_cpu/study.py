"""What each part of GOPO is worth on ``shop``: baselines and ablations, several seeds, equal numbers of dialogues.

    pip install scipy
    python examples/shop_cpu/study.py --models runs/quickstart --out runs/study [--seeds 0 1 2 3 4] [--search]

Every run starts from the models that examples/quickstart made and sees ``--updates`` x 64 dialogues; single-level
runs start from a model that is warm-started here on the same demonstrations. Runs that are there already are not
repeated, so the study can be stopped and go on. It writes study.json, study.md and study.png beside the runs.

``--search`` tunes the learning rate of every method on a seed of its own (``TUNING_SEED``): each gets as many tries,
and the rate with the highest joint return over the last quarter of its updates wins. ``RATES`` holds what it found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.evaluation.records import read_trajectories
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play
from openrlhf_gopo.evaluation.summary import summarise

GROUP = ("--algo.advantage.estimator", "group_norm")
TWO = ("--gopo.expert_reward", "tse=1,esndcg=1", "--gopo.responder_reward", "tse=0.5,gre=1", *GROUP)
ONE = ("--gopo.policy", "single_level", "--gopo.responder_reward", "tse=1,esndcg=1,gre=0.5")  # all that the two see
TURNS = ("--gopo.expert_pg_coef", "1")  # returns to go against the group, beside the preference loss
CRITIC = (*TURNS, "--gopo.expert_pg", "gae")

VARIANTS: dict[str, tuple[str, ...]] = {
    "PPO, single level": (*ONE, "--algo.advantage.estimator", "gae", "--critic.adam.lr", "1e-3"),
    "GRPO, single level": (*ONE, *GROUP),
    "GOPO": (*TWO, *TURNS),
    "GOPO, preference alone": TWO,
    "GOPO, turns alone": (*TWO, *TURNS, "--gopo.pref.coef", "0"),
    "GOPO, critic alone": (*TWO, *CRITIC, "--gopo.pref.coef", "0"),
    "GOPO, frozen expert": (*TWO, *TURNS, "--gopo.schedule", "responder"),
    "GOPO, frozen responder": (*TWO, *TURNS, "--gopo.schedule", "expert"),
}
# Learning rates: of the one model, or of expert and responder.
RATES: dict[str, tuple[str, ...]] = {"PPO, single level": ("1e-4",), "GRPO, single level": ("1e-4",)}
TWO_LEVEL_RATES = ("3e-4", "1e-4")
GRID = {1: [("3e-5",), ("1e-4",), ("3e-4",)], 2: [("1e-4", "1e-4"), ("3e-4", "1e-4"), ("1e-3", "1e-4")]}
TUNING_SEED = 100


def rates_of(variant: str) -> tuple[str, ...]:
    """The learning rates that a variant trains with."""
    return RATES.get(variant, TWO_LEVEL_RATES)


def command(variant: str, rates: Sequence[str], seed: int, out: Path, args: argparse.Namespace) -> list[str]:
    """The training command of one run."""
    single = "single level" in variant
    models = {"--actor.model_name_or_path": args.out / "warm_single" if single else args.models / "warm_responder"}
    if not single:
        models["--expert.model_name_or_path"] = args.models / "warm_expert"
    learning = {"--actor.adam.lr": rates[-1]} | ({} if single else {"--expert.adam.lr": rates[0]})
    flags = {
        "--gopo.env": "shop",
        **models,
        **learning,
        "--actor.lr_warmup_ratio": 0,
        "--gopo.reply_max_tokens": 32,
        "--rollout.batch_size": 8,
        "--rollout.n_samples_per_prompt": 8,
        "--rollout.micro_batch_size": 8,
        "--train.batch_size": 32,
        "--train.micro_batch_size": 8,
        "--train.seed": seed,
        "--data.max_samples": 8 * args.updates,
        "--data.max_len": 1536,
        "--eval.steps": 1000,
        "--eval.temperature": 1.0,
        "--eval.n_samples_per_prompt": 1,
        "--gopo.eval_goals": args.goals,
        "--ckpt.path": out / "checkpoints",
        "--ckpt.output_dir": out,
    }
    switches = ["--gopo.names_only", "--gopo.common_random_numbers", "--vllm.enable_prefix_caching"]
    pairs = [str(part) for pair in flags.items() for part in pair]
    return [sys.executable, "-m", "openrlhf.cli.train_gopo", *pairs, *switches, *VARIANTS[variant]]


def run(name: str, arguments: list[str], out: Path, done: Path) -> None:
    """Run a command unless ``done`` exists; its output goes to ``out``.log."""
    if done.exists():
        return
    print(f"{name} ...", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    quiet = os.environ | {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    with out.with_name(out.name + ".log").open("w") as log:
        code = subprocess.run(arguments, stdout=log, stderr=subprocess.STDOUT, env=quiet).returncode
    if code:
        sys.exit(f"{name}: failed with status {code}; see {log.name}")


def warm_single(args: argparse.Namespace) -> None:
    """Behaviour cloning of the single-level model: single replies first, as the responder's, then whole dialogues."""
    demos = args.models / "demos" / "single_level.jsonl"
    if not demos.exists():
        sys.exit(
            f"--models {args.models}: no {demos.name} there; run examples/quickstart/run.sh with OUT={args.models}"
        )
    out = args.out / "warm_single"
    flags = {
        "--model.model_name_or_path": args.models / "warm_replies",
        "--data.dataset": demos,
        "--ckpt.output_dir": out,
        "--data.input_key": "messages",
        "--data.max_len": 1536,
        "--train.max_epochs": 1,
        "--train.batch_size": 8,
        "--train.micro_batch_size": 8,
        "--adam.lr": 1e-3,
    }
    pairs = [str(part) for pair in flags.items() for part in pair]
    sft = [sys.executable, "-m", "openrlhf_gopo.platform", "openrlhf.cli.train_sft", *pairs]
    run("warm start, single level", [*sft, "--data.multiturn", "--data.apply_chat_template"], out, out / "config.json")


def folder(args: argparse.Namespace, variant: str, seed: int, rates: Sequence[str]) -> Path:
    """Where a run lives."""
    name = variant.lower().replace(", ", "_").replace(" ", "_")
    return args.out / f"{name}_lr{'_'.join(rates)}_seed{seed}"


def train(args: argparse.Namespace, variant: str, seed: int, rates: Sequence[str]) -> Path:
    """One run, if it is not there; returns its folder."""
    out = folder(args, variant, seed, rates)
    run(f"{variant}, lr {' '.join(rates)}, seed {seed}", command(variant, rates, seed, out, args), out, done(out))
    return out


def done(out: Path) -> Path:
    """The file that a run writes last."""
    return out / "results" / "table.csv"


def search(args: argparse.Namespace) -> None:
    """Print each method's joint return, over the last quarter of the updates, at every learning rate of its grid."""
    for variant in ("PPO, single level", "GRPO, single level", "GOPO"):
        for rates in GRID[1 if "single level" in variant else 2]:
            out = train(args, variant, TUNING_SEED, rates)
            lines = (out / "results" / "metrics.jsonl").read_text().splitlines()
            steps = [step for step in map(json.loads, lines) if "rollout/tse" in step]
            last = steps[-max(len(steps) // 4, 1) :]
            joint = np.mean([s["rollout/tse"] / 100 + s["rollout/esndcg"] + 0.5 * s["rollout/gre"] for s in last])
            print(f"{variant:20} lr {' '.join(rates):12} joint return {joint:.3f}", flush=True)


def played(out: Path) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Per metric and goal, before and after training, on the same held-out goals."""
    first, *_, last = sorted((out / "results" / "eval").glob("step_*.jsonl"))
    return summarise(read_trajectories(first)).by_goal, summarise(read_trajectories(last)).by_goal


def collect(args: argparse.Namespace) -> list[dict]:
    """One row per finished run: held-out TSE, ESNDCG and GRE before and after."""
    rows = []
    for variant in VARIANTS:
        for seed in args.seeds:
            out = folder(args, variant, seed, rates_of(variant))
            if not done(out).exists():
                continue
            before, after = played(out)
            row = {"variant": variant, "seed": seed, "goals": len(after["tse"]), "rates": rates_of(variant)}
            for metric in ("tse", "esndcg", "gre"):
                row[f"{metric}_before"] = float(np.mean(list(before[metric].values())))
                row[metric] = float(np.mean(list(after[metric].values())))
            rows.append(row)
    return rows


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds with its 95% t interval; NaN bounds for one seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


def references(goals: int) -> dict[str, float]:
    """TSE of scripts that look at the hidden goal, on the same goals: what random choices give, what is achievable."""
    env = load_environment("shop")
    held = env.goals("heldout")[:goals]
    scripts = {"random": ScriptedPolicy(0.0, slip=0.0), "demonstrations": ScriptedPolicy(0.7, slip=0.0)}
    return {
        name: float(np.mean([play(env, goal, 0, 1, script).rewards["tse"] for goal in held]))
        for name, script in scripts.items()
    }


def write(args: argparse.Namespace) -> None:
    """study.json, study.md and study.png from the runs that are there."""
    rows = collect(args)
    if not rows:
        sys.exit(f"--out {args.out}: no finished run there")
    lines = [
        f"TSE on {rows[0]['goals']} held-out goals of `shop` after {args.updates} updates of 64 dialogues:",
        "mean over seeds [95% t interval over seeds], and per seed.\n",
        "| policy | seeds | TSE before | TSE after | gain | gain per seed | ESNDCG after | GRE after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        gains = [row["tse"] - row["tse_before"] for row in mine]
        after, gain = interval([row["tse"] for row in mine]), interval(gains)
        lines.append(
            f"| {variant} | {len(mine)} | {np.mean([r['tse_before'] for r in mine]):.1f} | "
            f"{after[0]:.1f} [{after[1]:.1f}, {after[2]:.1f}] | {gain[0]:+.1f} [{gain[1]:+.1f}, {gain[2]:+.1f}] | "
            f"{', '.join(f'{g:+.1f}' for g in gains)} | {np.mean([r['esndcg'] for r in mine]):.3f} | "
            f"{np.mean([r['gre'] for r in mine]):.3f} |"
        )
    scripts = references(args.goals)
    lines.append("\nScripts that see the hidden goal: " + ", ".join(f"{k} {v:.1f}" for k, v in scripts.items()) + ".")
    report = {"updates": args.updates, "runs": rows, "scripts": scripts}
    (args.out / "study.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "study.md").write_text("\n".join(lines) + "\n")
    plot(rows, scripts, args.out / "study.png")
    print("\n".join(lines))


def plot(rows: list[dict], scripts: dict[str, float], path: Path) -> None:
    """One line per policy: every seed's TSE after training, their mean and interval, and the warm start it left."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["variant"] for row in rows))[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(names) + 1.6), layout="constrained")
    for y, name in enumerate(names):
        mine = [row for row in rows if row["variant"] == name]
        mean, low, high = interval([row["tse"] for row in mine])
        axes.plot([row["tse_before"] for row in mine], [y] * len(mine), "|", color="#888888", markersize=14)
        axes.plot([row["tse"] for row in mine], [y] * len(mine), "o", color="#2563eb", alpha=0.45, markersize=5)
        axes.plot([low, high], [y, y], color="#2563eb", linewidth=2)
        axes.plot([mean], [y], "D", color="#1e3a8a", markersize=7)
    for name, value in scripts.items():
        axes.axvline(value, color="#bbbbbb", linestyle=":", linewidth=1)
        axes.text(
            value, len(names) - 0.4, f" {name} ", fontsize=8, color="#666666", ha="left" if value < 50 else "right"
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names))
    axes.set_xlabel("held-out TSE: warm start (bar), seeds (dots), mean with 95% interval over seeds (diamond)")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Search, or run what is missing and write the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, default=Path("runs/quickstart"), help="OUT of examples/quickstart/run.sh"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--goals", type=int, default=200, help="held-out goals of an evaluation")
    parser.add_argument("--search", action="store_true", help="tune the learning rates instead")
    parser.add_argument(
        "--report", action="store_true", help="write the study of the runs that are there; train nothing"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        warm_single(args)
        if args.search:
            search(args)
            return
        for seed in args.seeds:  # seeds outermost: a study that is stopped has the same seeds for all
            for variant in args.variants:
                train(args, variant, seed, rates_of(variant))
    write(args)


if __name__ == "__main__":
    main()
