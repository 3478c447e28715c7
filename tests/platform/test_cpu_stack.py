"""The real stack on CPU: upstream's SFT program, and weight sync into a vLLM engine with a tied head."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_gopo import platform

SCRIPT = str(Path(__file__).with_name("stack_script.py"))
STACK = ("openrlhf", "vllm", "deepspeed", "transformers")

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(not all(map(importlib.util.find_spec, STACK)), reason="the training stack is not installed"),
    pytest.mark.skipif(not platform.is_cpu(), reason="there is a GPU"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("model"))
    run(SCRIPT, "build", folder)
    return folder


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_upstreams_sft_trains_and_saves_a_model(model: str, tmp_path: Path, dtype: str) -> None:
    data = ["--data.dataset", f"{model}/dialogues.jsonl", "--data.input_key", "messages", "--data.max_len", "128"]
    size = ["--train.micro_batch_size", "4", "--train.batch_size", "8", "--train.max_epochs", "1", "--adam.lr", "1e-3"]
    run(
        *["-m", "openrlhf_gopo.platform", "openrlhf.cli.train_sft", "--ds.param_dtype", dtype],
        *["--model.model_name_or_path", model, "--data.multiturn", "--data.apply_chat_template", *data, *size],
        *["--ckpt.output_dir", str(tmp_path / "out"), "--ckpt.path", str(tmp_path / "ckpt"), "--ckpt.disable_ds"],
    )
    result = json.loads(run(SCRIPT, "compare", model, str(tmp_path / "out")))
    assert result["moved"] == result["of"] > 20
    assert result["dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    assert result["tokens"] == len("hello")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "exact"), [("bfloat16", 0.02), ("float32", 1e-4)])  # the noise of each
def test_an_engine_with_a_tied_head_gets_the_trainers_weights(model: str, dtype: str, exact: float) -> None:
    gaps = json.loads(run(SCRIPT, "sync", model, dtype))
    assert gaps["start"] < exact
    assert gaps["not synced"] > 0.1
    assert gaps["head not repacked"] > 0.1  # vLLM 0.29.0's own reload; once this fails, drop the repacking
    assert gaps["synced"] < exact
    assert gaps["synced again"] < exact


def run(*args: str) -> str:
    """The last line that ``python *args`` prints."""
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.strip().rpartition("\n")[2]
