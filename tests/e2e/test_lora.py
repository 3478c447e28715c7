"""LoRA end to end: what the engines sampled from is base + adapter, at every step, in both roles.

As in test_train.py the saved weights are the witnesses, here adapters loaded by PEFT on the untouched base.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openrlhf_gopo import platform

platform.activate()  # before transformers' models

from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from openrlhf_gopo.evaluation.records import read_trajectories  # noqa: E402

ROLES = ("expert", "responder")
BF16 = ("--ds.param_dtype", "bf16")  # on every machine
NOISE = 0.02  # bf16, and vLLM adds the adapter to the weights where PEFT adds it to the activations


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train, tiny_model) -> Path:
    out = tmp_path_factory.mktemp("lora")
    train(tiny_model, out, "--gopo.env", "shop", "--ds.lora.rank", 4, "--actor.adam.lr", 5e-2, *BF16)
    return out


@pytest.fixture(scope="module")
def rollouts(trained) -> list:
    """Dialogues of step 1, of step 2, and of the last evaluation."""
    both = read_trajectories(trained / "results" / "trajectories.jsonl")
    assert len(both) == 32
    return [both[:16], both[16:], read_trajectories(trained / "results" / "eval" / "step_00002.jsonl")]


@pytest.fixture(scope="module")
def policies(trained, tiny_model) -> dict[str, list[torch.nn.Module]]:
    """Per role: the base, base + adapter of step 1, base + the adapter at the end."""
    found = {}
    for role in ROLES:
        adapters = [trained / "ckpt" / role / "global_step1_hf", trained / role]
        found[role] = [load(tiny_model), *(PeftModel.from_pretrained(load(tiny_model), a).eval() for a in adapters)]
    return found


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@torch.no_grad()
def logprobs(model: torch.nn.Module, role: str, dialogue) -> torch.Tensor:
    """Log-probabilities of the dialogue's actions, (A,); the expert's over its allowed labels only."""
    stream = dialogue.streams[role]
    logits = model(torch.tensor([stream.tokens])).logits[0].float()
    values = []
    for i, (start, end) in enumerate(stream.spans):
        rows = logits[start - 1 : end - 1]
        if role == "expert":
            allowed = torch.tensor(stream.allowed[i])
            rows = torch.full_like(rows, -torch.inf).index_copy(1, allowed, rows[:, allowed])
        values.append(rows.log_softmax(-1).gather(1, torch.tensor(stream.tokens[start:end])[:, None])[:, 0])
    return torch.cat(values) if values else torch.zeros(0)


def error(model: torch.nn.Module, role: str, dialogues: list) -> float:
    """Mean |recorded - recomputed| log-probability of the actions."""
    recorded = torch.tensor(
        [v for d in dialogues for s, e in d.streams[role].spans for v in d.streams[role].logprobs[s:e]]
    )
    return float((torch.cat([logprobs(model, role, d) for d in dialogues]) - recorded).abs().mean())


@pytest.mark.parametrize("role", ROLES)
def test_the_engine_samples_from_base_plus_adapter(rollouts, policies, role):
    for sampled_at, dialogues in enumerate(rollouts):
        errors = [error(model, role, dialogues) for model in policies[role]]
        assert errors[sampled_at] < NOISE, (sampled_at, errors)
        for other in {0, 1, 2} - {sampled_at}:
            assert errors[other] > 3 * errors[sampled_at], (sampled_at, errors)


@pytest.mark.parametrize("role", ROLES)
def test_the_reference_is_the_base(trained, rollouts, policies, role):
    """KL is 0 in step 1; in step 2 it is that of base + adapter from the base, on the actions, dialogue by dialogue."""
    lines = (trained / "results" / "metrics.jsonl").read_text().splitlines()
    logged = [step[f"{role}/kl"] for step in map(json.loads, lines) if f"{role}/kl" in step]
    base, policy, _ = policies[role]
    gaps = [logprobs(policy, role, d) - logprobs(base, role, d) for d in rollouts[1]]
    expected = sum(float(gap.mean()) for gap in gaps if len(gap)) / len(gaps)
    assert len(logged) == 2
    assert abs(logged[0]) < 1e-3
    assert expected > 5 * NOISE
    assert abs(logged[1] - expected) < NOISE


@pytest.mark.parametrize("role", ROLES)
def test_the_output_folder_is_an_adapter_with_its_tokenizer(trained, tiny_model, role):
    folder = trained / role
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 16)
    assert config["base_model_name_or_path"] == str(tiny_model)
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "config.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names


def test_upstreams_combiner_makes_it_a_model(trained, rollouts, tiny_model, tmp_path):
    merge = ["--model_path", tiny_model, "--lora_path", trained / "expert", "--output_path", tmp_path]
    command = [sys.executable, "-m", "openrlhf_gopo.platform", "openrlhf.cli.lora_combiner", *map(str, merge)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert error(load(tmp_path), "expert", rollouts[2]) < NOISE
