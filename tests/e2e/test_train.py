"""Training end to end: what the command leaves on disk is checked against an independent Hugging Face forward pass.

The dialogues of step 1 were sampled with the initial weights, those of step 2 with the weights saved after step 1, the
last evaluation with the final ones. So the recorded log-probabilities of each rollout must be those of one set of saved
weights and no other: that proves the sync of both roles, and that it happened when it should.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from openrlhf_gopo import platform

platform.activate()  # before transformers' models

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from openrlhf_gopo.envs import load_environment  # noqa: E402
from openrlhf_gopo.evaluation.records import read_trajectories  # noqa: E402
from openrlhf_gopo.platform.dtype import fastest  # noqa: E402
from openrlhf_gopo.policy import prompts  # noqa: E402
from openrlhf_gopo.policy.two_level import TwoLevelPolicy  # noqa: E402

ROLES = ("expert", "responder")
NOISE = {"bf16": 0.02, "fp32": 1e-5}[fastest()]  # of the engine, which holds weights as the trainer does


# What the two runs train with besides the defaults: between them every path of the objective runs for real.
OBJECTIVES = {
    "shop": ["--algo.advantage.is_correction_level", "token", "--expert.entropy_coef", 0.01, "--gopo.user", "agenda"],
    "star": [
        *("--train.batch_size", 8),  # two optimizer steps per rollout
        *("--gopo.expert_credit", "preference=1,q=1,critic=0.5", "--gopo.credit", "turn"),
        *("--gopo.expert_mode", "plan", "--gopo.expert_plan_tokens", 6),
    ],
}
PLAN_TOKENS = {"shop": 0, "star": 6}


@pytest.fixture(scope="module", params=["shop", "star"])
def trained(request, tmp_path_factory, train, tiny_model, star_data):
    out = tmp_path_factory.mktemp(request.param)
    # STAR's longest goals (several tasks in one dialogue) need more room than a shop's.
    data = ["--gopo.data", star_data, "--data.max_len", 4096] if request.param == "star" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(out))
        patch.setenv("WANDB_API_KEY", "0" * 40)  # upstream asks for one, offline too
        trackers = ["--logger.tensorboard_dir", out / "tensorboard", "--logger.wandb.key", "0" * 40]
        done = train(tiny_model, out, "--gopo.env", request.param, *data, *OBJECTIVES[request.param], *trackers)
    return request.param, (str(star_data) if data else None), tiny_model, out, done


@pytest.fixture(scope="module")
def rollouts(trained):
    """Dialogues of step 1, of step 2, and of the last evaluation, in that order."""
    out = trained[3]
    both = read_trajectories(out / "results" / "trajectories.jsonl")
    assert len(both) == 32
    return both[:16], both[16:], read_trajectories(out / "results" / "eval" / "step_00002.jsonl")


def weights(trained, role: str) -> list[Path]:
    """Folders of the role's weights before step 1, after it, and at the end."""
    _, _, model, out, _ = trained
    return [model, out / "ckpt" / role / "global_step1_hf", out / role]


def logprob_error(folder: Path, role: str, dialogues) -> float:
    """Mean |recorded - recomputed| log-probability of the actions; of decisions over the allowed labels only."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    errors = []
    for dialogue in dialogues:
        stream = dialogue.streams[role]
        with torch.no_grad():
            logits = model(torch.tensor([stream.tokens])).logits[0].float()
        for i, (start, end) in enumerate(stream.spans):
            for place in range(start, end):
                row = logits[place - 1]
                if stream.allowed[i]:
                    row = torch.full_like(row, -torch.inf).index_copy(
                        0, torch.tensor(stream.allowed[i]), row[stream.allowed[i]]
                    )
                value = torch.log_softmax(row, -1)[stream.tokens[place]]
                errors.append(abs(float(value) - stream.logprobs[place]))
    assert errors
    return sum(errors) / len(errors)


@pytest.mark.parametrize("role", ROLES)
def test_the_engine_samples_from_the_synced_weights(trained, rollouts, role):
    versions = weights(trained, role)
    for sampled_at, dialogues in enumerate(rollouts):
        errors = [logprob_error(folder, role, dialogues) for folder in versions]
        assert errors[sampled_at] < NOISE, (sampled_at, errors)
        for other in {0, 1, 2} - {sampled_at}:
            assert errors[other] > 3 * errors[sampled_at], (sampled_at, errors)


@pytest.mark.parametrize("role", ROLES)
def test_the_parameters_of_both_roles_changed(trained, role):
    before, _, after = weights(trained, role)
    old = AutoModelForCausalLM.from_pretrained(before).state_dict()
    new = AutoModelForCausalLM.from_pretrained(after).state_dict()
    unchanged = [name for name in old if torch.equal(old[name].float(), new[name].float())]
    assert not unchanged
    AutoTokenizer.from_pretrained(after)


def test_the_roles_became_different_models(trained):
    expert, responder = (AutoModelForCausalLM.from_pretrained(weights(trained, role)[2]).state_dict() for role in ROLES)
    assert any(not torch.equal(expert[name], responder[name]) for name in expert)


def test_every_choice_was_allowed_and_every_other_token_is_the_templates(trained, rollouts):
    """Rebuild both streams from the recorded turns: outside the actions they must be equal token by token."""
    name, data, model, _, _ = trained
    env = load_environment(name, data)
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = TwoLevelPolicy(tokenizer, tokenizer, env.catalogue_size(), plan_tokens=PLAN_TOKENS[name])
    goals = {goal.id: goal for split in ("train", "heldout") for goal in env.goals(split)}
    for dialogue in (d for rollout in rollouts for d in rollout):
        catalogue = env.catalogue(goals[dialogue.goal.id])
        labels = policy.label_ids(catalogue)
        expert, responder = policy.streams(dialogue.goal, catalogue)
        choices, replies = (iter(spans_of(dialogue.streams[role])) for role in ROLES)
        previous = None
        for turn in dialogue.turns:
            assert turn.strategy in turn.allowed
            expert.ask(expert.message(prompts.expert_turn(previous, turn.user)))
            if turn.forced:
                assert turn.allowed == (turn.strategy,)
                expert.force(labels[turn.strategy])
            else:
                if policy.plan_tokens:
                    plan = next(choices)
                    assert 1 <= len(plan) <= policy.plan_tokens
                    assert turn.plan == policy.expert.decode(plan)
                    expert.act(plan, [0.0] * len(plan))
                    expert.ask(expert.message(prompts.LABEL_QUESTION))
                assert next(choices) == [labels[turn.strategy]]
                expert.act([labels[turn.strategy]], [0.0], [labels[s] for s in turn.allowed])
            strategy = next(s for s in catalogue if s.id == turn.strategy)
            responder.ask(responder.message(prompts.responder_turn(turn.user, strategy, turn.briefing)))
            reply = next(replies)
            assert 1 <= len(reply) <= 12
            responder.act(reply, [0.0] * len(reply))
            previous = turn.reply
        assert expert.stream.tokens == dialogue.streams["expert"].tokens
        assert expert.stream.allowed == dialogue.streams["expert"].allowed
        assert responder.stream.tokens == dialogue.streams["responder"].tokens
        assert responder.stream.spans == dialogue.streams["responder"].spans


def test_evaluations_record_the_experts_probabilities(rollouts):
    """Of all allowed strategies, from the distribution that it sampled from; rollouts do without."""
    first, second, evaluated = rollouts
    chosen = [turn for d in evaluated for turn in d.turns if not turn.forced]
    assert chosen
    for turn in chosen:
        assert tuple(turn.probabilities) == turn.allowed
        assert sum(turn.probabilities.values()) == pytest.approx(1.0, abs=1e-3)
        assert turn.probabilities[turn.strategy] == pytest.approx(math.exp(turn.expert_logprob), rel=1e-4)
    assert not any(turn.probabilities for d in (*first, *second) for turn in d.turns)


def spans_of(stream) -> list[list[int]]:
    return [stream.tokens[start:end] for start, end in stream.spans]


def test_the_results_folder_is_complete(trained):
    _, _, _, out, done = trained
    results = out / "results"
    for name in ("table.md", "table.csv", "learning_curves.png", "transcripts.html", "metrics.jsonl"):
        assert (results / name).stat().st_size > 0
        if name != "table.csv":
            assert name in done.stdout
    steps = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    updates = [step for step in steps if "expert/policy_loss" in step]
    assert [step["global_step"] for step in updates] == [1, 2]
    for step in updates:
        assert step["expert/actor_grad_norm"] > 0
        assert step["responder/actor_grad_norm"] > 0
        assert step["rollout/failures"] == 0
        assert all(step[f"{role}/sampler_mismatch"] < NOISE for role in ROLES)
        assert ("expert/vllm_kl" in step) == ("--algo.advantage.is_correction_level" in OBJECTIVES[trained[0]])
        assert ("expert/critic_loss" in step) == any("critic=" in str(o) for o in OBJECTIVES[trained[0]])
    table = (results / "table.md").read_text()
    for decoding in ("sampled", "greedy"):
        assert f"| after training, {decoding} - before training, {decoding} | 4 |" in table
    assert {path.name for path in (results / "eval").glob("*.jsonl")} == {
        f"{name}_{step:05d}.jsonl" for name in ("step", "greedy") for step in (0, 2)
    }
    evaluated = [step for step in steps if "eval_greedy_tse" in step]
    assert [step["global_step"] for step in evaluated] == [0, 2]
    assert all(f"eval_greedy_{metric}" in step for step in evaluated for metric in ("success", "esndcg", "gre"))
    for step in (0, 2):
        greedy = read_trajectories(results / "eval" / f"greedy_{step:05d}.jsonl")
        decided = [turn for t in greedy for turn in t.turns if not turn.forced]
        assert all(turn.probabilities[turn.strategy] == max(turn.probabilities.values()) for turn in decided)


def test_trackers_receive_the_metrics_under_stable_names(trained):
    """TensorBoard's events and W&B's offline file; both get an example as text."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = trained[3]
    (events,) = (out / "tensorboard").iterdir()
    tags = EventAccumulator(str(events)).Reload().Tags()
    stable = {"train/rollout/tse", "train/expert/q_fit_r2", "train/responder/policy_loss", "eval/eval_tse"}
    assert stable <= set(tags["scalars"])
    assert [tag for tag in tags["tensors"] if "generated_samples" in tag]
    (offline,) = out.glob("wandb/offline-run-*/*.wandb")
    logged = offline.read_bytes()
    assert not [name for name in stable if name.encode() not in logged]
    assert b"generated_samples" in logged
    example = (out / "results" / "eval" / "step_00002.txt").read_text()
    assert example.count("goal ") >= 4
    assert "customer: " in example


def test_an_evaluation_of_the_saved_pair_meets_the_same_users(trained, tiny_model, tmp_path, python):
    """eval_gopo on what training saved: its weights decide, on the goals and users of training's evaluations."""
    name, _, _, out, _ = trained
    if name != "shop":
        pytest.skip("once is enough")
    command = ("-m", "openrlhf.cli.eval_gopo", "--gopo.env", name, "--out", tmp_path, "--gopo.eval_goals", 4)
    flags = ("--data.max_len", 2048, "--gopo.reply_max_tokens", 12, "--gopo.max_turns", 4)
    policies = ("--policy", f"saved=pair:{out / 'expert'},{out / 'responder'}", "--policy", f"one=single:{tiny_model}")
    policies += ("--policy", f"mixed=pair:{out / 'expert'},scripted", "--policy", "random")
    python(*command, *flags, *policies)
    rows = {"saved, sampled": "saved/sampled", "one, sampled": "one/sampled", "mixed, sampled": "mixed/sampled"}
    rows |= {"random": "random", "saved, greedy": "saved/greedy"}
    files = {n: tmp_path / "policies" / folder / "trajectories.jsonl" for n, folder in rows.items()}
    played = {n: read_trajectories(file) for n, file in files.items()}
    trained_on = read_trajectories(out / "results" / "eval" / "step_00002.jsonl")
    users = {(t.goal.id, t.seed, t.turns[0].user) for t in trained_on}
    for trajectories in played.values():
        assert {(t.goal.id, t.seed, t.turns[0].user) for t in trajectories} == users
    for role in ROLES:
        assert logprob_error(out / role, role, played["saved, sampled"]) < NOISE
    assert logprob_error(out / "expert", "expert", played["mixed, sampled"]) < NOISE
    streams = [{"expert", "responder"}, {"responder"}, {"expert"}, set(), {"expert", "responder"}]
    assert [set(played[n][0].streams) for n in files] == streams
    first = {n: {t.turns[0].reply for t in played[n]} for n in files}
    assert first["mixed, sampled"] != first["saved, sampled"]
    decided = [turn for t in played["saved, greedy"] for turn in t.turns if not turn.forced]
    assert all(turn.probabilities[turn.strategy] == max(turn.probabilities.values()) for turn in decided)
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {n} | 4 |" in table for n in files)
    before = {n: file.read_bytes() for n, file in files.items()}
    again = python(*command, *flags, *policies)
    assert {n: file.read_bytes() for n, file in files.items()} == before
    assert "Started a local Ray" not in again.stderr + again.stdout  # nothing to play, no engine
