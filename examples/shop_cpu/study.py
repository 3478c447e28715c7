"""What each part of GOPO is worth on ``shop``: baselines and ablations, several seeds, equal numbers of dialogues.

    pip install scipy
    python examples/shop_cpu/study.py --out runs/study [--seeds 0 1 2 3 4] [--jobs 2] [--search]

For every seed examples/quickstart warm-starts a pair of its own, and a single-level model is warm-started on the same
demonstrations. Every row of ``VARIANTS`` trains from there on ``--updates`` x 64 dialogues, with as many optimizer
steps for whoever decides, and is evaluated sampled and greedy.

What finished goes into ``--record``, a JSON file, and beside it a table and a plot; what it holds is not run again.
So a study can be stopped, go on, and be carried to another machine, seed by seed.

``--search`` tunes the learning rate of every method with a seed of its own (``TUNING_SEED``), on ``SEARCH_UPDATES``:
each gets as many tries, and the rate with the highest joint return over the last quarter of its updates wins. ``RATES``
holds what it found; what a search finds elsewhere goes into the record, and into ``RATES`` by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from study_report import METRICS, write_report

from openrlhf_gopo.evaluation.records import read_trajectories
from openrlhf_gopo.evaluation.summary import summarise
from openrlhf_gopo.platform.dtype import fastest

ROOT = Path(__file__).parents[2]
GROUP = ("--algo.advantage.estimator", "group_norm")
STEPS = ("--gopo.expert_steps", "16", "--gopo.expert_passes", "2")
TWO = (*STEPS, "--gopo.credit", "turn", *GROUP)
ONE = (
    *("--gopo.policy", "single_level", "--gopo.responder_reward", "tse=1,esndcg=1,gre=0.5"),  # all that the two see
    *(
        "--train.batch_size",
        "8",
        "--train.max_epochs",
        "2",
        "--gopo.credit",
        "turn",
    ),  # steps and credit as the two have
)
CREDIT = "--gopo.expert_credit"
CRITIC_RATE = ("--critic.adam.lr", "1e-3")  # upstream's 9e-6 leaves a critic of this size at its random start
GOPO = (*TWO, CREDIT, "group=1,q=1")

VARIANTS: dict[str, tuple[str, ...]] = {
    "PPO, single level": (*ONE, "--algo.advantage.estimator", "gae", *CRITIC_RATE),
    "GRPO, single level": (*ONE, *GROUP),
    "GOPO": GOPO,
    "GOPO, preference alone": (*TWO, CREDIT, "preference=1"),
    "GOPO, decision preference alone": (*TWO, CREDIT, "decision_preference=1"),
    "GOPO, q alone": (*TWO, CREDIT, "q=1"),
    "GOPO, group alone": (*TWO, CREDIT, "group=1"),
    "GOPO, critic alone": (*TWO, CREDIT, "critic=1", *CRITIC_RATE),
    "GOPO, frozen expert": (*GOPO, "--gopo.schedule", "responder"),
    "GOPO, frozen responder": (*GOPO, "--gopo.schedule", "expert"),
}
Row = dict[str, Any]
# Learning rates: of the one model, or of expert and responder.
RATES: dict[str, tuple[str, ...]] = {"PPO, single level": ("3e-4",), "GRPO, single level": ("1e-4",)}
TWO_LEVEL_RATES = ("3e-4", "1e-4")
GRID = {1: [("3e-5",), ("1e-4",), ("3e-4",)], 2: [("1e-4", "1e-4"), ("3e-4", "1e-4"), ("1e-3", "1e-4")]}
SEARCHED = ("PPO, single level", "GRPO, single level", "GOPO")
TUNING_SEED, SEARCH_UPDATES = 100, 8
APART = {"fp32": 1e-5, "bf16": 0.02}  # log pi of vLLM and the trainer; rounding is below


def rates_of(variant: str) -> tuple[str, ...]:
    """The learning rates that a variant trains with."""
    return RATES.get(variant, TWO_LEVEL_RATES)


def command(variant: str, rates: Sequence[str], seed: int, out: Path, args: argparse.Namespace) -> list[str]:
    """The training command of one run."""
    single, models = "single level" in variant, models_of(args, seed)
    roles = {"--actor.model_name_or_path": models / ("warm_single" if single else "warm_responder")}
    if not single:
        roles["--expert.model_name_or_path"] = models / "warm_expert"
    learning = {"--actor.adam.lr": rates[-1]} | ({} if single else {"--expert.adam.lr": rates[0]})
    flags = {
        "--gopo.env": "shop",
        **roles,
        **learning,
        "--actor.lr_warmup_ratio": 0,
        "--gopo.reply_max_tokens": 32,
        "--rollout.batch_size": 8,
        "--rollout.n_samples_per_prompt": 8,
        "--rollout.micro_batch_size": 2,
        "--train.batch_size": 32,
        "--train.micro_batch_size": 2,
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


def run(name: str, arguments: Sequence[str | Path], out: Path, done: Path, **environment: str) -> None:
    """Run a command unless ``done``, which it writes last, exists; its output goes to ``out``.log."""
    if done.exists():
        return
    print(f"{name} ...", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    quiet = os.environ | {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"} | environment
    with out.with_name(out.name + ".log").open("w") as log:
        code = subprocess.run(arguments, stdout=log, stderr=subprocess.STDOUT, env=quiet).returncode
    if code:
        raise SystemExit(f"{name}: failed with status {code}; see {log.name}")


def models_of(args: argparse.Namespace, seed: int) -> Path:
    """The folder of a seed's warm starts."""
    return args.out / f"models_seed{seed}"


def warm_start(args: argparse.Namespace, seed: int) -> None:
    """Make what the runs of ``seed`` start from, if it is not there: the quickstart's pair, and the single-level model,
    which learns single replies first, as the responder does, then as many whole dialogues as the expert does."""
    models = models_of(args, seed)
    pair = ["bash", ROOT / "examples" / "quickstart" / "run.sh"]
    where = {"OUT": str(models.resolve()), "VENV": sys.prefix, "STEPS": "0", "SEED": str(seed)}
    run(f"warm start of the pair, seed {seed}", pair, models, models / "warmed", **where)
    out = models / "warm_single"
    flags = {
        "--model.model_name_or_path": models / "warm_replies",
        "--data.dataset": models / "demos" / "single_level.jsonl",
        "--ckpt.output_dir": out,
        "--data.input_key": "messages",
        "--data.max_len": 1536,
        "--data.max_samples": 2400,
        "--train.max_epochs": 1,
        "--train.batch_size": 8,
        "--train.micro_batch_size": 4,
        "--train.seed": seed,
        "--adam.lr": 1e-3,
    }
    pairs = [str(part) for pair in flags.items() for part in pair]
    sft = [sys.executable, "-m", "openrlhf_gopo.platform", "openrlhf.cli.train_sft", *pairs]
    switches = ["--data.multiturn", "--data.apply_chat_template"]
    run(f"warm start, single level, seed {seed}", [*sft, *switches], out, out / "config.json")


def train(args: argparse.Namespace, variant: str, seed: int, rates: Sequence[str]) -> Path:
    """One run, if it is not there; returns its folder."""
    name = variant.lower().replace(", ", "_").replace(" ", "_")
    out = args.out / f"{name}_{args.updates}updates_lr{'_'.join(rates)}_seed{seed}"
    arguments = command(variant, rates, seed, out, args)
    threads = str(max((os.cpu_count() or 1) // args.jobs, 1))
    run(f"{variant}, lr {' '.join(rates)}, seed {seed}", arguments, out, done(out), OMP_NUM_THREADS=threads)
    return out


def done(out: Path) -> Path:
    """The file that a run writes last."""
    return out / "results" / "table.csv"


def updates_of(out: Path) -> list[dict[str, float]]:
    """The metrics of a run's updates.

    Raises:
        SystemExit: engine and trainer did not compute the same policy, so what the run shows is not its method's.
    """
    lines = (out / "results" / "metrics.jsonl").read_text().splitlines()
    updates = [step for step in map(json.loads, lines) if "rollout/tse" in step]
    apart = max(value for step in updates for name, value in step.items() if name.endswith("/sampler_mismatch"))
    if apart > APART[fastest()]:
        raise SystemExit(f"{out}: sampler_mismatch {apart:.1g} is above {APART[fastest()]}: not recorded, a defect")
    return updates


def search(args: argparse.Namespace) -> None:
    """Train each method at every learning rate of its grid; into the record, the joint return of its last updates."""
    recorded(args)
    warm_start(args, TUNING_SEED)
    tries = [(name, rates) for name in SEARCHED for rates in GRID[1 if "single level" in name else 2]]
    brief = argparse.Namespace(**vars(args) | {"updates": SEARCH_UPDATES, "goals": 16})  # evaluations are not looked at
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(train, brief, name, TUNING_SEED, rates) for name, rates in tries]
    found: list[Row] = []
    for (name, rates), finished in zip(tries, runs, strict=True):
        steps = updates_of(finished.result())
        last = steps[-max(len(steps) // 4, 1) :]
        joint = np.mean([s["rollout/tse"] / 100 + s["rollout/esndcg"] + 0.5 * s["rollout/gre"] for s in last])
        found.append({"variant": name, "rates": list(rates), "joint": float(joint)})
    keep(args, search=found)


def row_of(variant: str, seed: int, out: Path) -> Row:
    """What a finished run showed: held-out TSE, success, ESNDCG and GRE before and after, sampled and greedy.

    Each is a mean over the same goals.
    """
    updates_of(out)
    row: Row = {"variant": variant, "seed": seed, "rates": list(rates_of(variant)), "param_dtype": fastest()}
    for decoding, end in (("step", ""), ("greedy", "_greedy")):
        first, *_, last = sorted((out / "results" / "eval").glob(f"{decoding}_*.jsonl"))
        for path, suffix in ((first, f"{end}_before"), (last, end)):
            played = summarise(read_trajectories(path)).by_goal
            row |= {name + suffix: float(np.mean(list(played[name].values()))) for name in METRICS}
    return row


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--record`` holds; a record of other sizes is not added to."""
    if not args.record.exists():
        return {"updates": args.updates, "goals": args.goals, "search": [], "runs": []}
    record = json.loads(args.record.read_text())
    for name in ("updates", "goals"):
        if record[name] != getattr(args, name):
            raise SystemExit(f"--record {args.record}: made with --{name} {record[name]}, not {getattr(args, name)}")
    return record


def keep(args: argparse.Namespace, **parts: list[Row]) -> None:
    """Replace parts of the record, and write the table and the plot beside it."""
    record = recorded(args) | parts
    rank = {name: place for place, name in enumerate(VARIANTS)}
    record["runs"].sort(key=lambda row: (rank.get(row["variant"], len(rank)), row["variant"], row["seed"]))
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(write_report(record, args.record), flush=True)


def study(args: argparse.Namespace) -> None:
    """Run what the record lacks, seeds outermost, so that a study that is stopped has the same seeds for all rows."""
    there = {(row["variant"], row["seed"]) for row in recorded(args)["runs"]}
    missing = [(name, seed) for seed in args.seeds for name in args.variants if (name, seed) not in there]
    for seed in dict.fromkeys(seed for _, seed in missing):
        warm_start(args, seed)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(train, args, name, seed, rates_of(name)): (name, seed) for name, seed in missing}
        for finished in as_completed(runs):
            keep(args, runs=[*recorded(args)["runs"], row_of(*runs[finished], finished.result())])


def main() -> None:
    """Search, or run what the record lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs and their logs")
    parser.add_argument("--record", type=Path, help="the study's JSON file; default: study.json under --out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--goals", type=int, default=200, help="held-out goals of an evaluation")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--search", action="store_true", help="tune the learning rates instead")
    args = parser.parse_args()
    args.record = args.record or args.out / "study.json"
    (search if args.search else study)(args)


if __name__ == "__main__":
    main()
