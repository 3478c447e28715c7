"""The real stack through the command line: Ray, DeepSpeed, vLLM, on CPU where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAR = Path(os.environ.get("GOPO_STAR_DATA", ROOT.parent / "shared" / "data" / "star"))


def run(*command: object, timeout: float = 400) -> subprocess.CompletedProcess:
    """Run a command; its output goes into the assertion when it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done


@pytest.fixture(scope="session")
def star_data() -> Path:
    """The real STAR data where there is some, else the fixture in its layout."""
    return STAR if STAR.is_dir() else ROOT / "tests" / "envs" / "star_fixture"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """An untrained chat model of 0.3 M parameters with a tied head: an untied one hides a stale head in vLLM."""
    folder = tmp_path_factory.mktemp("model")
    builder = ROOT / "examples" / "quickstart" / "build_model.py"
    run(builder, "--env", "shop", "--out", folder, "--hidden", 64, "--layers", 2, "--max_len", 4096)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return folder


@pytest.fixture(scope="session")
def python():
    """Python with the given arguments as a function; its output goes into the assertion when it fails."""
    return run


@pytest.fixture(scope="session")
def train():
    """The training command as a function of (model, output folder, further flags)."""
    return _train


def _train(model: Path, out: Path, *extra: object) -> subprocess.CompletedProcess:
    """Two updates of both roles, large enough to tell synced weights from stale ones; a checkpoint after each."""
    flags = {
        "--actor.model_name_or_path": model,
        "--rollout.batch_size": 4,
        "--rollout.n_samples_per_prompt": 4,
        "--rollout.micro_batch_size": 4,
        "--train.batch_size": 16,
        "--train.micro_batch_size": 4,
        "--data.max_samples": 8,
        "--data.max_len": 2048,
        "--gopo.reply_max_tokens": 12,
        "--gopo.max_turns": 4,
        "--actor.adam.lr": 1e-2,
        "--actor.lr_scheduler": "constant",
        "--actor.lr_warmup_ratio": 0,
        "--algo.advantage.estimator": "group_norm",
        "--ckpt.output_dir": out,
        "--ckpt.path": out / "ckpt",
        "--ckpt.save_steps": 1,
        "--eval.steps": 100,
        "--eval.n_samples_per_prompt": 1,
        "--eval.temperature": 1.0,
        "--gopo.eval_goals": 4,
    }
    arguments = [part for pair in flags.items() for part in pair]
    module = ("-m", "openrlhf.cli.train_gopo")
    return run(*module, *arguments, "--ckpt.save_hf", "--vllm.enable_prefix_caching", *extra)
