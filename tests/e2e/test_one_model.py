"""One model that decides and writes, through the command line.

``--gopo.policy single_level``: in one stream, and it learns as in PPO. ``--gopo.sharing shared``: in two roles, each
with a stream and a loss of its own.
"""

import json

import pytest
import torch

from openrlhf_gopo import platform

platform.activate()  # before transformers' models

from transformers import AutoModelForCausalLM  # noqa: E402

from openrlhf_gopo.evaluation.records import read_trajectories  # noqa: E402
from openrlhf_gopo.platform.dtype import fastest  # noqa: E402

NOISE = {"bf16": 0.02, "fp32": 1e-5}[fastest()]  # of the engine, which holds weights as the trainer does


@pytest.fixture(scope="module")
def single_level(tmp_path_factory, train, tiny_model):
    out = tmp_path_factory.mktemp("single_level")
    train(
        tiny_model,
        out,
        *("--gopo.env", "shop", "--gopo.policy", "single_level", "--gopo.responder_reward", "tse=1,esndcg=1"),
        *("--algo.advantage.estimator", "gae", "--critic.adam.lr", 1e-3),
    )
    return out


@pytest.fixture(scope="module")
def shared(tmp_path_factory, train, tiny_model):
    out = tmp_path_factory.mktemp("shared")
    train(tiny_model, out, "--gopo.env", "shop", "--gopo.sharing", "shared", "--algo.kl.init_coef", 0)
    return out


def error(folder, streams) -> float:
    """Mean |recorded - recomputed| log-probability of the actions, of decisions over their allowed labels."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    errors = []
    for stream in streams:
        with torch.no_grad():
            logits = model(torch.tensor([stream.tokens])).logits[0].float()
        for (start, end), allowed in zip(stream.spans, stream.allowed, strict=True):
            for place in range(start, end):
                scores = logits[place - 1].log_softmax(-1)
                if allowed:
                    scores = scores - scores[allowed].logsumexp(-1)
                errors.append(abs(float(scores[stream.tokens[place]]) - stream.logprobs[place]))
    return sum(errors) / len(errors)


@pytest.mark.parametrize(
    ("run", "role"), [("single_level", "responder"), ("shared", "expert"), ("shared", "responder")]
)
def test_the_engine_samples_labels_and_words_from_the_synced_weights(run, role, tiny_model, request):
    trained = request.getfixturevalue(run)
    both = read_trajectories(trained / "results" / "trajectories.jsonl")
    last = read_trajectories(trained / "results" / "eval" / "step_00002.jsonl")
    versions = [tiny_model, trained / "ckpt" / "responder" / "global_step1_hf", trained / "responder"]
    for sampled_at, dialogues in enumerate((both[:16], both[16:], last)):
        errors = [error(folder, [dialogue.streams[role] for dialogue in dialogues]) for folder in versions]
        assert errors[sampled_at] < NOISE, (sampled_at, errors)
        for other in {0, 1, 2} - {sampled_at}:
            assert errors[other] > 3 * errors[sampled_at], (sampled_at, errors)


def test_both_roles_of_one_model_learn_from_what_it_was_when_they_sampled(shared):
    """The first role's update must not move the log-probabilities that the second one starts from."""
    steps = [json.loads(line) for line in (shared / "results" / "metrics.jsonl").read_text().splitlines()]
    updates = [step for step in steps if "responder/policy_loss" in step]
    assert len(updates) == 2
    for step in updates:
        for role in ("expert", "responder"):
            assert step[f"{role}/actor_grad_norm"] > 0
            assert step[f"{role}/sampler_mismatch"] < NOISE
    assert not (shared / "expert").exists()


def test_a_dialogue_has_one_stream_of_decisions_and_replies(single_level):
    for dialogue in read_trajectories(single_level / "results" / "trajectories.jsonl"):
        assert list(dialogue.streams) == ["responder"]
        stream = dialogue.streams["responder"]
        actions = [what for turn in dialogue.turns for what in ([] if turn.forced else [True]) + [False]]
        assert [bool(allowed) for allowed in stream.allowed] == actions
        assert all(turn.strategy in turn.allowed for turn in dialogue.turns)


def test_the_critic_learns_and_there_is_no_expert(single_level):
    steps = [json.loads(line) for line in (single_level / "results" / "metrics.jsonl").read_text().splitlines()]
    updates = [step for step in steps if "responder/policy_loss" in step]
    assert len(updates) == 2
    assert all(step["responder/critic_grad_norm"] > 0 for step in updates)
    assert all(step["responder/sampler_mismatch"] < NOISE for step in updates)
    assert not [key for step in steps for key in step if key.startswith("expert/")]
    assert not (single_level / "expert").exists()
    assert (single_level / "results" / "learning_curves.png").stat().st_size > 0
