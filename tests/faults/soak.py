"""Trains asynchronously for a long time with a faulty simulator, a faulty reward and killed processes.

    python tests/faults/soak.py --minutes 30 --seed 0

Runs of ``STEPS`` steps follow each other, with --train.partial_rollout_enable and either --gopo.version_switch,
until the time is over. In each the driver or a policy actor gets SIGKILL once, and the same command with
--ckpt.load_enable goes on. Checked all the time and at each end:

- there is a new step, or a new dialogue, every ``STALL`` seconds: nothing waits for ever;
- every step was done once, on whole groups, with weights no older than --train.async_queue_size updates;
- a dialogue's versions never go back, and with ``dialogue`` there is one version in each;
- every dialogue that failed has its traceback, and the others stayed whole.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
from kill import VICTIMS
from training_run import Run, build, end, family, titles, wait

from openrlhf_gopo.evaluation.records import read_trajectories
from openrlhf_gopo.types import StopReason

STEPS = 100
STALL = 180.0
GROUP, GOALS = 4, 2
QUEUE = 2
FAULTY = Path(__file__).with_name("faulty_shop.py")
FLAGS = {
    "--gopo.env": f"{FAULTY}:FaultyShop",
    "--gopo.reward": f"{FAULTY}:brief",
    "--gopo.expert_reward": "tse=1,esndcg=1,brief=0.1",
    "--gopo.user_timeout": 2,
    "--gopo.reward_timeout": 2,
    "--gopo.max_failure_rate": 1,
    "--gopo.max_turns": 6,
    "--rollout.batch_size": GOALS,
    "--rollout.n_samples_per_prompt": GROUP,
    "--train.batch_size": GOALS * GROUP,
    "--train.num_episodes": 1,
    "--data.max_samples": STEPS * GOALS,
    "--data.max_len": 2048,
    "--train.async_queue_size": QUEUE,
    "--algo.advantage.is_correction_level": "token",
    "--ckpt.save_steps": 5,
    "--eval.steps": 20,
}
ASYNC = ("--train.async_enable", "--train.partial_rollout_enable")


def watch(run: Run, process: subprocess.Popen, step: int) -> bool:
    """Wait until the run has made ``step`` steps or ended; True when it ended.

    Raises:
        AssertionError: nothing happened for ``STALL`` seconds.
    """
    while run.step() < step or step == STEPS:
        before = progress(run)
        news = wait(process, STALL, lambda before=before: progress(run) != before)
        assert news, f"nothing new in {STALL} s: {run.tail()}"
        if process.poll() is not None:
            return True
    return False


def progress(run: Run) -> tuple[int, int]:
    """Bytes of dialogues and of output so far."""
    log = run.results / "trajectories.jsonl"
    return log.stat().st_size if log.is_file() else 0, run.log.stat().st_size


def check(run: Run, switch: str) -> Counter:
    """A run that ended is whole; returns what its failed dialogues failed of."""
    steps = [r for r in run.records() if "expert/policy_loss" in r]
    assert [r["global_step"] for r in steps] == list(range(1, STEPS + 1))
    for role in ("expert", "responder"):
        assert max(r[f"{role}/staleness_max"] for r in steps) <= QUEUE
    dialogues = read_trajectories(run.results / "trajectories.jsonl")
    assert len(dialogues) == STEPS * GOALS * GROUP
    assert set(Counter(d.goal.id for d in dialogues).values()) == {GROUP}
    causes: Counter = Counter()
    for dialogue in dialogues:
        versions = [turn.version for turn in dialogue.turns]
        assert versions == sorted(versions)
        assert switch == "turn" or len(set(versions)) <= 1
        if dialogue.stop is StopReason.FAILED:
            assert "Traceback" in dialogue.error
            causes[dialogue.cause.rpartition(": ")[2][:60]] += 1
    assert sum(r["rollout/failures"] for r in steps) == causes.total()
    return causes


def one_run(run: Run, switch: str, rng: random.Random, say: Callable) -> Counter:
    """From the first start to the end, killed once."""
    process = run.start()
    try:
        victim = rng.choice(["driver", "policy"])
        assert not watch(run, process, rng.randrange(STEPS - 10)), run.tail()
        below = family(process)
        target = psutil.Process(process.pid) if victim == "driver" else rng.choice(titles(below, VICTIMS[victim]))
        say(f"{victim} killed after step {run.step()}", flush=True)
        target.kill()
        assert wait(process, STALL), f"{victim} killed, and the run does not end: {run.tail()}"
        end(process, below)
        process = run.start()
        assert watch(run, process, STEPS)
        assert process.returncode == 0, run.tail()
    finally:
        end(process, family(process))
    return check(run, switch)


def soak(minutes: float, seed: int, folder: Path, say: Callable = print) -> None:
    """Runs until the time is over; prints what was injected and what came of it."""
    rng, over, started = random.Random(seed), time.monotonic() + 60 * minutes, time.monotonic()
    model, faults, causes, runs = build(folder), folder / "faults.txt", Counter(), 0
    os.environ["GOPO_FAULTS_LOG"] = str(faults)
    while time.monotonic() < over:
        switch = ("turn", "dialogue")[runs % 2]
        flags = [str(word) for pair in FLAGS.items() for word in pair]
        run = Run(model, folder / f"run{runs}", (*flags, *ASYNC, "--gopo.version_switch", switch), deterministic=False)
        causes += one_run(run, switch, rng, say)
        runs += 1
        say(f"run {runs} whole, after {(time.monotonic() - started) / 60:.0f} minutes", flush=True)
    injected = Counter(faults.read_text().splitlines())
    say(f"{runs} runs, {runs * STEPS} steps, {runs * STEPS * GOALS * GROUP} dialogues, {runs} kills; faults injected:")
    say("\n".join(f"  {count:5d} {name}" for name, count in sorted(injected.items())))
    say(f"quarantined after {causes.total()} second failures:")
    say("\n".join(f"  {count:5d} {name}" for name, count in causes.most_common(12)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the runs there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        soak(options.minutes, options.seed, folder)


if __name__ == "__main__":
    main()
