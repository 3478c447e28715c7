"""One small training run of the real stack that can be killed and started again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PATIENCE = 600.0  # seconds that a run may take to make a step, or to notice a death, on a full machine
STEPS = 6
FLAGS = {
    "--gopo.env": "shop",
    "--rollout.batch_size": 2,
    "--rollout.n_samples_per_prompt": 2,
    "--rollout.micro_batch_size": 2,
    "--train.batch_size": 4,
    "--train.micro_batch_size": 2,
    "--train.num_episodes": 2,
    "--data.max_samples": STEPS,  # of two goals each, twice
    "--data.max_len": 1024,
    "--gopo.reply_max_tokens": 8,
    "--gopo.max_turns": 3,
    "--gopo.expert_reward": "tse=1,esndcg=1",
    "--actor.adam.lr": 1e-3,
    "--actor.lr_warmup_ratio": 0,
    "--algo.advantage.estimator": "group_norm",
    "--algo.kl.init_coef": 0,
    "--ckpt.save_steps": 1,
    "--ckpt.max_num": 2,
    "--eval.steps": 2,
    "--eval.n_samples_per_prompt": 1,
    "--eval.temperature": 1.0,
    "--gopo.eval_goals": 2,
    "--gopo.engine_restarts": 100,
}


class Run:
    """One training run in a folder: started, killed and started again."""

    def __init__(self, model: Path, out: Path, extra: tuple[str, ...] = (), *, deterministic: bool = True) -> None:
        self.model, self.out, self.extra = model, out, extra + ("--train.full_determinism_enable",) * deterministic
        self.results, self.sets = out / "results", out / "ckpt"
        self.starts = 0

    def start(self) -> subprocess.Popen:
        """The training command, with --ckpt.load_enable from the second time on."""
        flags = FLAGS | {
            "--actor.model_name_or_path": self.model,
            "--ckpt.output_dir": self.out,
            "--ckpt.path": self.sets,
        }
        words = [str(word) for pair in flags.items() for word in pair]
        words += [*self.extra] + ["--ckpt.load_enable"] * (self.starts > 0)
        self.starts += 1
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = self.out / f"start{self.starts}.log"
        with self.log.open("w") as log:
            command = [sys.executable, "-m", "openrlhf.cli.train_gopo", *words]
            # Workers find the package by path too: an editable install may be of another checkout.
            env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
            options = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": env, "start_new_session": True}
            return subprocess.Popen(command, **options)

    def records(self) -> list[dict]:
        """Whole lines of metrics.jsonl."""
        path = self.results / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def step(self) -> int:
        """The last step that was logged."""
        return max((r["global_step"] for r in self.records() if "expert/policy_loss" in r), default=0)

    def newest(self) -> dict | None:
        """The newest complete set, found without the code under test."""
        found = [json.loads(path.read_text()) for path in self.sets.glob("*.manifest.json")]
        for manifest in sorted(found, key=lambda m: -m["sequence"]):
            sizes = {
                self.sets / part / name: n for part, files in manifest["parts"].items() for name, n in files.items()
            }
            if all(path.is_file() and path.stat().st_size == size for path, size in sizes.items()):
                return manifest
        return None

    def tail(self) -> str:
        """The end of the last start's output."""
        return self.log.read_text(errors="replace")[-3000:]


def wait(process: subprocess.Popen, seconds: float, done=lambda: False) -> bool:
    """Wait until the process ends or ``done()``; False when neither came in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None or done():
            return True
        time.sleep(0.1)
    return False


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """All processes below the driver."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def titles(processes: list[psutil.Process], words: tuple[str, ...]) -> list[psutil.Process]:
    """Those with one of ``words`` in their title."""
    found = []
    for one in processes:
        try:
            title = " ".join([*one.cmdline(), one.name()])
            if any(word in title for word in words):
                found.append(one)
        except psutil.Error:
            continue
    return found


def end(process: subprocess.Popen, processes: list[psutil.Process]) -> None:
    """Kill what this run has started."""
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    if process.poll() is None:
        process.kill()
        process.wait()


def build(folder: Path) -> Path:
    """An untrained chat model of 0.2 M parameters below ``folder``."""
    builder = ROOT / "examples" / "quickstart" / "build_model.py"
    sizes = ["--env", "shop", "--out", folder / "model", "--hidden", "64", "--layers", "2"]
    subprocess.run([sys.executable, builder, *map(str, sizes)], check=True, stdout=subprocess.DEVNULL)
    return folder / "model"
