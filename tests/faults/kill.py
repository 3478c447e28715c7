"""Kills processes of real training runs at random moments, lets the runs go on, and checks that nothing was lost.

    python tests/faults/kill.py --kills 50 --seed 0 [-- further flags of the training command]

One uninterrupted run comes first. Then the same run is started, and its processes get SIGKILL: the driver, a policy
actor, a rollout actor or a vLLM engine, in turn. The run survives the last two: the actor starts again, gets the
weights of now and plays its dialogues again. After the first two, and whatever dies while the run starts, the same
command with --ckpt.load_enable goes on, and so forth until it ends; as many such runs as the kills take. Moments are
drawn from the seed: while starting, or some time after a step. Checked after each kill and at each end:

- a run that ends, ends by itself, not by a time limit, with a message that names what died, and leaves no process
  behind; nor does an actor that dies leave its engine behind;
- it goes on from the newest complete set, and does at most --ckpt.save_steps steps again;
- every line of trajectories.jsonl and metrics.jsonl is whole, and none stands twice;
- the metrics of every step and evaluation are those of the uninterrupted run, to the last digit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from training_run import FLAGS, PATIENCE, STEPS, Run, build, end, family, titles, wait

# Words of their titles: Ray's actors are called by their class, or by the class of the method that they are in.
VICTIMS = {
    "policy": ("_RolePolicy", "PolicyModelActor"),
    "rollout": ("_RolloutActor", "RolloutRayActor"),
    "engine": ("VLLM::EngineCore",),
}
NAMED = {"policy": "policy actor", "rollout": "rollout actor", "engine": "rollout actor"}
RESTARTS = "rollout/engine_restarts"
RESTARTED = ("rollout", "engine")
ORPHANS = 120.0  # seconds in which a process ends whose parent was killed
STARTING = 0.25  # share of kills while the run starts
# A machine that does other work beside: Ray gives its own processes 30 s to start, and kills when the memory is full.
CROWDED = ("The current node timed out during startup", "the machine's memory was full")


@dataclass
class Tally:
    """What happened so far."""

    kills: Counter = field(default_factory=Counter)
    survived: Counter = field(default_factory=Counter)
    moments: Counter = field(default_factory=Counter)
    runs: int = 0
    steps_again: int = 0
    dialogues_again: int = 0
    started: float = field(default_factory=time.time)

    def table(self) -> str:
        """Markdown."""
        rows = [
            f"| {victim} | {count} | {self.survived[victim]} | {count - self.survived[victim]} |"
            for victim, count in sorted(self.kills.items())
        ]
        return "\n".join(
            [
                "| SIGKILL to | times | the run went on | it ended, and went on from the newest complete set |",
                "|---|---|---|---|",
                *rows,
                f"| all | {self.kills.total()} | {self.survived.total()} | {(self.kills - self.survived).total()} |",
                "",
                f"{self.runs} runs of {STEPS} steps ended with the metrics of an uninterrupted one; "
                f"{self.moments['start']} kills while starting, {self.moments['step']} while training; steps done "
                f"again: {self.steps_again}; dialogues played again, first version kept: {self.dialogues_again}; "
                f"{(time.time() - self.started) / 60:.0f} minutes",
            ]
        )


def kill(run: Run, process: subprocess.Popen, victim: str, rng: random.Random, tally: Tally, *, first: bool) -> str:
    """Kill ``victim`` at a random moment: the run "survived" it, or "ended"; "over" when it had done its work before.

    ``first`` of this start: the moment may be while it starts. A run that survives has made another step when this
    returns.
    """
    known = run.step()
    starting = first and ((victim == "driver" and rng.random() < 2 * STARTING) or rng.random() < STARTING / 2)
    if starting:
        ready = (lambda: True) if victim == "driver" else (lambda: titles(family(process), VICTIMS[victim]))
        delay = rng.uniform(0, 25 if victim == "driver" else 5)
    else:
        ready, delay = (lambda: run.step() > known), rng.uniform(0, 5)
    assert wait(process, PATIENCE, ready), f"no step in {PATIENCE} s: {run.tail()}"
    if wait(process, delay):
        return "over"
    below = family(process)
    targets = [psutil.Process(process.pid)] if victim == "driver" else titles(below, VICTIMS[victim])
    if not targets:
        return "over"
    target = rng.choice(sorted(targets, key=lambda p: p.pid))
    with_it, reached = target.children(recursive=True), run.step()
    target.kill()
    if victim != "driver":
        orphans = psutil.wait_procs(with_it, timeout=ORPHANS)[1]
        assert not orphans, f"{victim} killed, and left behind: {orphans}"
    if not wait(process, PATIENCE, lambda: victim in RESTARTED and run.step() > reached):
        end(process, below)
        raise AssertionError(f"{victim} killed, and the run neither goes on nor ends in {PATIENCE} s: {run.tail()}")
    survived = process.poll() in (None, 0)
    if survived and victim not in RESTARTED:
        return "over"  # it had done its work
    tally.kills[victim] += 1
    tally.survived[victim] += survived
    tally.moments["start" if starting else "step"] += 1
    if survived:
        return "survived"
    check_ended(run, process, victim, below)
    return "ended"


def check_ended(run: Run, process: subprocess.Popen, victim: str, below: list[psutil.Process]) -> None:
    """The run ended by itself, said what died, and left nothing behind."""
    _, alive = psutil.wait_procs(below, timeout=ORPHANS)
    left = [one for one in alive if not titles([one], ("Agent",))]  # Ray's own agents look for their node now and then
    end(process, alive)
    assert not left, f"{victim} killed, and left behind: {left}"
    if victim == "driver":
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode > 0, run.tail()
    last = [line for line in run.log.read_text().splitlines() if line.startswith("train_gopo: error: ")]
    assert last, f"{victim} killed, no error message: {run.tail()}"
    assert re.search(NAMED[victim], last[-1]), last[-1]


def check_resumed(run: Run, expected: dict | None, reached: int, tally: Tally) -> None:
    """After a start with --ckpt.load_enable: it said where it goes on, and that is the newest complete set."""
    said = re.findall(r"going on from (\S+) of", run.log.read_text())
    if not said:  # killed before it came that far
        return
    assert expected is not None
    assert said == [expected["tag"]], (said, expected["tag"])
    again = reached - expected["step"]
    assert 0 <= again <= FLAGS["--ckpt.save_steps"], f"step {reached} was reached, {expected['tag']} is the newest"
    tally.steps_again += again


def check_end(run: Run, reference: list[dict], tally: Tally) -> None:
    """The logs of a run that ended are whole, and its metrics those of the uninterrupted one."""
    dialogues = [json.loads(line) for line in (run.results / "trajectories.jsonl").read_text().splitlines()]
    keys = Counter((d["goal"]["id"], d["sample"], d["seed"]) for d in dialogues)
    assert keys.total() == STEPS * 4, f"{keys.total()} dialogues of {STEPS * 4}"
    assert max(keys.values()) == 1, keys.most_common(3)
    compare(comparable(run.records()), reference)
    lost = run.results / "trajectories.lost.jsonl"
    if lost.is_file():
        tally.dialogues_again += len([json.loads(line) for line in lost.read_text().splitlines()])
    tally.runs += 1


def comparable(records: list[dict]) -> list[dict]:
    """What has to be equal: everything but clocks and the count of restarts."""
    clock = re.compile(r"time$|timing/|.*/time_")
    kept = [{k: v for k, v in r.items() if not clock.match(k) and k != RESTARTS} for r in records]
    return [r for r in kept if len(r) > 1]  # a start logs only how long it took


def compare(got: list[dict], expected: list[dict]) -> None:
    """Equal to the last digit, record by record."""
    assert [r["global_step"] for r in got] == [r["global_step"] for r in expected]
    for one, other in zip(got, expected, strict=True):
        differ = {k: (one.get(k), other.get(k)) for k in {*one, *other} if repr(one.get(k)) != repr(other.get(k))}
        assert not differ, f"step {one['global_step']}: {dict(list(differ.items())[:5])} (this run, uninterrupted)"


def campaign(kills: int, seed: int, folder: Path, extra: tuple[str, ...] = (), say: Callable = print) -> Tally:
    """As many runs as ``kills`` kills take; raises AssertionError at the first thing that is not as it should be."""
    started: list[subprocess.Popen] = []
    model = build(folder)
    try:
        return _campaign(kills, random.Random(seed), lambda name: Run(model, folder / name, extra), say, started)
    finally:  # leave nothing running when a check fails
        for process in started:
            end(process, family(process))


def _campaign(
    kills: int, rng: random.Random, make: Callable[[str], Run], say: Callable, started: list[subprocess.Popen]
) -> Tally:
    tally, whole = Tally(), make("uninterrupted")
    if not (whole.results / "table.md").is_file():
        started[:] = [process := whole.start()]
        assert wait(process, 4 * PATIENCE), whole.tail()
        assert process.returncode == 0, whole.tail()
    reference = comparable(whole.records())
    assert [r["global_step"] for r in reference if "expert/policy_loss" in r] == list(range(1, STEPS + 1))
    say(f"uninterrupted run: {time.time() - tally.started:.0f} s")
    victims: list[str] = []
    while tally.kills.total() < kills:
        run, expected, reached = make(f"run{tally.runs}"), None, 0
        while True:
            process = run.start()
            started[:] = [process]
            outcome, first = "survived", True
            while outcome == "survived" and tally.kills.total() < kills:
                victims = victims or rng.sample(["driver", *VICTIMS], 4)
                outcome = kill(run, process, victims[-1], rng, tally, first=first)
                first = False
                if outcome != "over":
                    killed = f"{tally.kills.total()}: {victims.pop()} killed, {outcome}"
                    say(f"{killed}; step {run.step()}; {time.ctime()}", flush=True)
            if outcome != "ended":
                assert wait(process, 4 * PATIENCE), run.tail()
                assert process.returncode == 0 or any(one in run.tail() for one in CROWDED), run.tail()
            if expected is not None:
                check_resumed(run, expected, reached, tally)
            if process.returncode == 0:
                break
            expected, reached = run.newest(), run.step()
        check_end(run, reference, tally)
        say(f"run {tally.runs} ended as the uninterrupted one, after {run.starts} starts")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the runs there, and use the whole one that is there")
    parser.add_argument("flags", nargs="*", help="of the training command, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        print(campaign(options.kills, options.seed, folder, tuple(options.flags)).table())


if __name__ == "__main__":
    os.environ["PYTHONUNBUFFERED"] = "1"
    main()
