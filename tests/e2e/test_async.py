"""Asynchronous training of two policies on the real stack: what each turn was sampled from, and how old it was.

Every checkpoint is kept as a Hugging Face folder, so each recorded log-probability can be computed again with the
weights of the version that its turn names: of both roles, in dialogues that met a change of weights, too.
"""

import json
from pathlib import Path

import pytest
import torch

from openrlhf_gopo import platform

platform.activate()  # before transformers' models

from transformers import AutoModelForCausalLM  # noqa: E402

from openrlhf_gopo.evaluation.records import read_trajectories  # noqa: E402
from openrlhf_gopo.platform.dtype import fastest  # noqa: E402

ROLES = ("expert", "responder")
NOISE = {"bf16": 0.02, "fp32": 1e-5}[fastest()]  # of the engine, which holds weights as the trainer does
STEPS = 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train, tiny_model):
    out = tmp_path_factory.mktemp("async")
    ahead = ("--train.async_enable", "--train.partial_rollout_enable", "--algo.advantage.is_correction_level", "token")
    longer = ("--gopo.max_turns", 8, "--data.max_samples", 4 * STEPS, "--ckpt.max_num", 100, "--eval.steps", -1)
    longer += ("--algo.kl.init_coef", 0)  # two processes less to start
    # Dialogues that outlast an update on any machine: only then do some meet new weights on their way.
    slow = ("--gopo.user", f"{Path(__file__).with_name('slow_user.py')}:Slow")
    train(tiny_model, out, "--gopo.env", "shop", *slow, *ahead, *longer)
    return out


@pytest.fixture(scope="module")
def dialogues(trained):
    return read_trajectories(trained / "results" / "trajectories.jsonl")


def test_every_batch_is_trained_on_and_none_is_too_old(trained, dialogues):
    steps = [json.loads(line) for line in (trained / "results" / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "expert/policy_loss" in step]
    assert [step["global_step"] for step in steps] == list(range(1, STEPS + 1))
    for role in ROLES:
        assert all(step[f"{role}/staleness_max"] <= 1 for step in steps)
        assert max(step[f"{role}/staleness"] for step in steps) > 0  # it did roll out while it learned
        assert all(f"{role}/vllm_kl" in step for step in steps)  # the correction was on
    assert len(dialogues) == 16 * STEPS


def test_some_dialogues_met_new_weights_between_turns(dialogues):
    versions = [[turn.version for turn in dialogue.turns] for dialogue in dialogues]
    assert all(found == sorted(found) for found in versions)
    assert any(len(set(found)) > 1 for found in versions)


@pytest.mark.parametrize("role", ROLES)
def test_each_turn_was_sampled_from_the_weights_of_its_version(trained, dialogues, tiny_model, role):
    wrong, checked = {}, set()
    for version in {turn.version for dialogue in dialogues for turn in dialogue.turns}:
        folder = trained / "ckpt" / role / f"global_step{version}_hf" if version else tiny_model
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for offset in (0, -1):  # the turns of this version, and, as a control, those of the next one
            errors = [e for dialogue in dialogues for e in turn_errors(model, dialogue, role, version - offset)]
            if errors:
                wrong.setdefault(offset, []).append(sum(errors) / len(errors))
                checked.add((offset, version))
    assert len(checked) >= 4
    assert max(wrong[0]) < NOISE
    assert min(wrong[-1]) > 2 * max(wrong[0])


def turn_errors(model, dialogue, role, version):
    """|recorded - recomputed| log-probability of the actions in the turns of ``version``."""
    stream = dialogue.streams[role]
    turns = [turn for turn in dialogue.turns if role == "responder" or not turn.forced]
    places = [
        (place, allowed)
        for turn, (start, end), allowed in zip(turns, stream.spans, stream.allowed, strict=False)
        if turn.version == version
        for place in range(start, end)
    ]
    if not places:
        return
    with torch.no_grad():
        logits = model(torch.tensor([stream.tokens])).logits[0].float()
    for place, allowed in places:
        row = logits[place - 1]
        chosen = torch.log_softmax(row[allowed], -1) if allowed else torch.log_softmax(row, -1)
        at = allowed.index(stream.tokens[place]) if allowed else stream.tokens[place]
        yield abs(float(chosen[at]) - stream.logprobs[place])
