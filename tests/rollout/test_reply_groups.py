"""Several replies to one history, one of them said. Only the engine and the environment are doubles."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.policy.two_level import SingleLevelPolicy, TwoLevelPolicy
from openrlhf_gopo.rewards.response import candidate_scores, reply_scores
from openrlhf_gopo.rollout.dialogue import run_dialogue
from openrlhf_gopo.rollout.engine import Generation
from openrlhf_gopo.rollout.sampled import ReplyGroup, SampledPolicy

from .test_dialogue import GOAL, LIMITS, SCRIPT, Engine, ScriptedEnvironment, play, text, tokenizer

__all__ = ["tokenizer"]
GROUP = replace(LIMITS, reply_group=ReplyGroup(3, {"gre": 2.0, "realised": 1.0}))


class Several(Engine):
    """Every call for words gets ``replies``, the i-th with log-probabilities -i."""

    replies = ("all done now", "it is bye-0 for you", "77 things")

    async def generate(self, role, tokens, sampling):
        if sampling.allowed is not None or sampling.n == 1:
            return await super().generate(role, tokens, sampling)
        self.calls.append((role, list(tokens), sampling))
        encode = self.policy.responder.tokenizer.encode
        ids = [[*encode(reply, add_special_tokens=False), sampling.stop_token] for reply in self.replies[: sampling.n]]
        ids = [one[: sampling.max_tokens] for one in ids]
        return [Generation(one, [-float(i)] * len(one)) for i, one in enumerate(ids)]


@pytest.fixture
def policy(tokenizer):
    return TwoLevelPolicy(tokenizer, tokenizer, 3)


def group_of(policy, seed, limits=GROUP, **more):
    engine = Several(policy)
    env = ScriptedEnvironment(script=SCRIPT[:1])
    limits = replace(limits, reply_max_tokens=40)
    return play(env, policy, engine, limits, seed=seed, **more), engine


def test_one_call_draws_all_and_one_is_said(policy):
    env, engine = ScriptedEnvironment(script=SCRIPT[:2]), Several(policy)
    trajectory = play(env, policy, engine, replace(GROUP, reply_max_tokens=40), seed=5)
    asked = [sampling.n for role, _, sampling in engine.calls if role == RESPONDER]
    assert asked == [3, 3]
    assert {sampling.n for role, _, sampling in engine.calls if role == EXPERT} == {1}
    stream = trajectory.streams[RESPONDER]
    for turn, (start, end) in zip(trajectory.turns, stream.spans, strict=True):
        number = Several.replies.index(turn.reply)
        assert text(policy, stream.tokens[start:end]) == turn.reply + "<|im_end|>"
        assert stream.logprobs[start:end] == [-float(number)] * (end - start)
        assert f"step g1 {trajectory.turns.index(turn)} {turn.strategy} {turn.reply}" in env.logged
    unsaid = set(Several.replies) - {turn.reply for turn in trajectory.turns}
    assert unsaid
    assert not any(reply in text(policy, stream.tokens) for reply in unsaid)


def test_scores_by_hand(policy):
    """bye is chosen; its expected string is bye-0. The context and the customer's "user 0" know no 77.

    "all done now": realised 0, grounded 1, new 1: gre 2/3, so 2 x 2/3. "it is bye-0 for you": 1, 1, 1: 2 + 1.
    "77 things": 0, 0, 1: 2/3.
    """
    trajectory, _ = group_of(policy, 5)
    (turn,) = trajectory.turns
    worth = dict(zip(Several.replies, (4 / 3, 3.0, 2 / 3), strict=True))
    assert turn.reply_group[0] == pytest.approx(worth[turn.reply])
    others = [worth[reply] for reply in Several.replies if reply != turn.reply]
    assert list(turn.reply_group[1:]) == pytest.approx(others)


def test_which_is_said_follows_from_the_dialogue_alone_and_favours_none(policy):
    said = Counter(group_of(policy, seed)[0].turns[0].reply for seed in range(150))
    assert set(said) == set(Several.replies)
    assert min(said.values()) > 30  # 50 each, standard deviation 5.8
    assert group_of(policy, 7)[0] == group_of(policy, 7)[0]
    users = {group_of(policy, 7, sample=sample)[0].turns[0].reply for sample in range(12)}
    assert len(users) > 1  # dialogues with one user's noise still draw for themselves


def test_a_reply_scores_in_its_group_what_it_scores_in_its_dialogue(policy):
    env, engine = ScriptedEnvironment(), Several(policy)
    trajectory = play(env, policy, engine, replace(GROUP, reply_max_tokens=40), seed=2)
    assert len(trajectory.turns) == 4
    scores = reply_scores(trajectory)
    for t, turn in enumerate(trajectory.turns):
        assert turn.reply_group[0] == pytest.approx(2 * scores[t]["gre"] + scores[t]["realised"])
        (again,) = candidate_scores(GOAL.context, trajectory.turns[:t], turn, [turn.reply])
        assert again == scores[t]


def test_without_a_group_one_reply_is_drawn(policy):
    trajectory, engine = group_of(policy, 5, limits=LIMITS)
    assert {sampling.n for _, _, sampling in engine.calls} == {1}
    assert [turn.reply_group for turn in trajectory.turns] == [()]
    assert "reply_group" not in trajectory.to_json()["turns"][0]


def test_a_reply_of_a_group_at_its_cap_is_cut(policy):
    env, engine = ScriptedEnvironment(script=SCRIPT[:1]), Several(policy)
    engine.replies = ("0123456789", "012345678", "x")  # with their stop tokens 11, 10 and 2
    found = {}
    for seed in range(20):
        (turn,) = play(env, policy, engine, replace(GROUP, reply_max_tokens=10), seed=seed).turns
        found[turn.reply] = turn.reply_cut
    assert found == {"0123456789": True, "012345678": False, "x": False}


def test_one_model_in_one_stream_draws_replies_not_decisions(tokenizer):
    policy = SingleLevelPolicy(tokenizer, tokenizer, 3)
    trajectory, engine = group_of(policy, 5)
    assert [(sampling.n, sampling.allowed is None) for _, _, sampling in engine.calls] == [(1, False), (3, True)]
    assert len(trajectory.turns[0].reply_group) == 3
    assert [len(labels) for labels in trajectory.streams[RESPONDER].allowed] == [3, 0]


def test_dialogues_beside_each_other(policy):
    """No state is shared: what a dialogue says does not depend on who else plays."""
    alone = [group_of(policy, seed)[0].turns[0].reply for seed in range(6)]
    engine = Several(policy)

    async def all_at_once():
        limits = replace(GROUP, reply_max_tokens=40)
        sampled = SampledPolicy(policy, engine.generators(), limits)
        env = ScriptedEnvironment(script=SCRIPT[:1])
        return await asyncio.gather(*(run_dialogue(env, GOAL, sampled, limits, seed=s) for s in range(6)))

    assert [trajectory.turns[0].reply for trajectory in asyncio.run(all_at_once())] == alone
