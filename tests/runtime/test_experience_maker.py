"""From scored dialogues to advantages, with upstream's own experience maker underneath.

There is no model: what models would give, log-probabilities and values, is set by hand.
"""

from types import SimpleNamespace

import pytest
import torch
from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController

from openrlhf_gopo.config import EXPERT, RESPONDER, GopoConfig, PreferenceConfig
from openrlhf_gopo.runtime import experience_maker
from openrlhf_gopo.runtime.experience_maker import ResponderExperienceMaker
from openrlhf_gopo.runtime.expert_experience import ExpertExperienceMaker
from openrlhf_gopo.runtime.samples import DialogueSample, to_experience
from openrlhf_gopo.types import Goal, StopReason, Stream, Trajectory, Turn

GOAL = Goal("g", "refund", "", {"find": 0.4, "refund": 0.6})
WEIGHTS = {EXPERT: {"tse": 1.0}, RESPONDER: {"tse": 1.0}}


def dialogue(*completed, forced=()):
    """One dialogue, fully engaged, so that what its turns earned is the weight of what they completed.

    Expert stream: a decision at tokens 2, 5, 8, ...; responder stream: replies of two tokens.
    """
    trajectory = Trajectory(GOAL, 0, 0, stop=StopReason.USER_LEFT)
    expert, responder = Stream(tokens=[0]), Stream(tokens=[0])
    for t, done in enumerate(completed):
        turn = Turn("hi", ("a", "b"), "a", "ok", completed=done, engagement=1.0, on_task=True, forced=t in forced)
        trajectory.turns.append(turn)
        expert.tokens += [1, 7, 9]
        if not turn.forced:
            expert.spans.append((len(expert.tokens) - 1, len(expert.tokens)))
            expert.allowed.append([9, 10])
        responder.tokens += [1, 5, 6]
        responder.spans.append((len(responder.tokens) - 2, len(responder.tokens)))
        responder.allowed.append([])
    for stream in (expert, responder):
        stream.logprobs = [0.0] * len(stream.tokens)
    trajectory.streams = {EXPERT: expert, RESPONDER: responder}
    tse = 100 * sum(GOAL.subgoals[s] for done in completed for s in done)
    trajectory.rewards = {"tse": tse}
    return DialogueSample.of(trajectory, WEIGHTS)


def quarantined():
    sample = dialogue((), ())
    sample.trajectory.stop = StopReason.FAILED
    return DialogueSample.of(sample.trajectory, WEIGHTS)


def truncated():
    sample = dialogue(("find",), ("refund",))
    sample.trajectory.stop = StopReason.MAX_TOKENS
    return DialogueSample.of(sample.trajectory, WEIGHTS)


def advantages(
    cls,
    role,
    samples,
    *,
    kl=0.0,
    stop_penalty=None,
    values=None,
    estimator="group_norm",
    gamma=1.0,
    lambd=1.0,
    **config,
):
    """Advantages of the actions of each sample; ``kl`` per token and ``values`` (of every action alike) are given."""
    args = SimpleNamespace(
        algo=SimpleNamespace(
            advantage=SimpleNamespace(estimator=estimator, gamma=gamma, lambd=lambd, no_std_norm=True),
            kl=SimpleNamespace(use_loss=False, init_coef=0.5),
        ),
        rollout=SimpleNamespace(n_samples_per_prompt=len(samples)),
        reward=SimpleNamespace(clip_range=(-10, 10), overlong_buffer_len=None, stop_properly_penalty_coef=stop_penalty),
        ds=SimpleNamespace(ring_attn_size=1, tensor_parallel_size=1),
    )
    strategy = SimpleNamespace(args=args)
    groups = (None, None, None, None, FixedKLController(0.5), strategy, None)
    maker = cls(*groups, role=role, num_labels=2, config=config_of(config))
    maker._samples = samples
    experiences = []
    for i, sample in enumerate(samples):
        experience = to_experience(sample, role, 2)
        shape = experience.action_mask.shape
        experience.index = [i]
        experience.action_log_probs = torch.zeros(shape)
        experience.kl = torch.full(shape, kl)
        experience.values = None if values is None else torch.full(shape, float(values))
        experiences.append(experience)
    made = maker.compute_advantages_and_returns(experiences)
    ours = role == EXPERT or config.get("credit") == "turn"
    for experience in made if ours else ():  # upstream leaves numbers there, which its losses mask
        assert not experience.advantages[~experience.action_mask.bool()].any()
    return [e.advantages[e.action_mask.bool()].tolist() for e in made], made


def config_of(options):
    pref = {k.removeprefix("pref_"): v for k, v in options.items() if k.startswith("pref_")}
    rest = {k: v for k, v in options.items() if not k.startswith("pref_")}
    return GopoConfig(env="shop", pref=PreferenceConfig(**pref), **rest)


BOTH, HALF = dialogue(("find",), ("refund",)), dialogue((), ("find",))


def compared(sampled, learned, mask, *, async_enable=False):
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator="group_norm")),
        train=SimpleNamespace(async_enable=async_enable),
    )
    groups = (None, None, None, None, FixedKLController(0.5), SimpleNamespace(args=args), None)
    maker = ResponderExperienceMaker(*groups, role=RESPONDER, num_labels=0, config=config_of({}))
    tensors = {"rollout_log_probs": sampled, "action_log_probs": learned, "action_mask": mask}
    maker.compare_with_sampler([SimpleNamespace(**{k: torch.tensor([v]) for k, v in tensors.items()})])
    return maker.metrics


@pytest.mark.parametrize(("async_enable", "warnings"), [(False, 1), (True, 0)])
def test_a_sampler_of_another_policy_is_told_of(async_enable, warnings, monkeypatch):
    # |-1 - -1.5| and |-2 - -2.25|; the third position is no action.
    said = []
    monkeypatch.setattr(experience_maker.logger, "warning", said.append)
    metrics = compared([-1.0, -2.0, -9.0], [-1.5, -2.25, 0.0], [1, 1, 0], async_enable=async_enable)
    assert metrics == {"sampler_mismatch": 0.375, "sampler_mismatch_max": 0.5}
    assert len(said) == warnings
    assert all("responder/sampler_mismatch 0.38 is above 0.02, its largest 0.5" in line for line in said)


def test_rounding_is_not_told_of_nor_is_a_batch_without_actions(monkeypatch):
    monkeypatch.setattr(experience_maker.logger, "warning", pytest.fail)
    assert compared([-1.0, -2.0], [-1.01, -2.0], [1, 1])["sampler_mismatch"] == pytest.approx(0.005)
    assert set(compared([-1.0, -2.0], [-1.5, -2.0], [0, 0]).values()) == {0.0}


def test_a_reply_is_credited_with_what_came_after_it():
    # Returns to go: (1, 0.6) and (0.4, 0.4), each less the other dialogue's at that turn. Two tokens a reply.
    found, _ = advantages(ResponderExperienceMaker, RESPONDER, [BOTH, HALF], estimator="dr_grpo", credit="turn")
    assert found[0] == pytest.approx([0.6, 0.6, 0.2, 0.2])
    assert found[1] == pytest.approx([-0.6, -0.6, -0.2, -0.2])


def test_trajectory_credit_is_upstreams():
    # One return per dialogue, 1 and 0.4, less their mean, at every token.
    found, _ = advantages(ResponderExperienceMaker, RESPONDER, [BOTH, HALF], estimator="dr_grpo")
    assert found[0] == pytest.approx([0.3] * 4)
    assert found[1] == pytest.approx([-0.3] * 4)


def test_the_kl_penalty_is_paid_from_each_token_on():
    plain, _ = advantages(ResponderExperienceMaker, RESPONDER, [BOTH, HALF], estimator="dr_grpo", credit="turn")
    paid, _ = advantages(ResponderExperienceMaker, RESPONDER, [BOTH, HALF], estimator="dr_grpo", credit="turn", kl=0.1)
    # 0.5 x 0.1 for each of the 4, 3, 2, 1 tokens that are left.
    assert [a - b for a, b in zip(plain[0], paid[0], strict=True)] == pytest.approx([0.2, 0.15, 0.1, 0.05])


def test_gae_of_replies_skips_the_users_words():
    # V = 0, gamma 1, lambda 1/2; rewards 0.4 at token 1, 0.6 at token 3, of four action tokens in a row:
    # A_3 = 0.6, A_2 = 0.3, A_1 = 0.4 + 0.15, A_0 = 0.275; whitening subtracts the mean 0.43125.
    options = {"estimator": "gae", "lambd": 0.5, "values": 0.0, "credit": "turn"}
    found, made = advantages(ResponderExperienceMaker, RESPONDER, [BOTH, BOTH], **options)
    assert found[0] == pytest.approx([0.275 - 0.43125, 0.55 - 0.43125, 0.3 - 0.43125, 0.6 - 0.43125])
    assert made[0].returns[made[0].action_mask.bool()].tolist() == pytest.approx([0.275, 0.55, 0.3, 0.6])


def test_gae_of_replies_with_the_kl_penalty_among_the_rewards():
    # As above, with 0.5 x 0.1 taken from every token's reward: A_3 = 0.55, A_2 = -0.05 + 0.275, A_1 = 0.35 + 0.1125,
    # A_0 = -0.05 + 0.23125; their mean is 0.3546875.
    options = {"estimator": "gae", "lambd": 0.5, "values": 0.0, "credit": "turn", "kl": 0.1}
    found, made = advantages(ResponderExperienceMaker, RESPONDER, [BOTH, BOTH], **options)
    assert found[0] == pytest.approx([a - 0.3546875 for a in (0.18125, 0.4625, 0.225, 0.55)])
    assert made[0].returns[made[0].action_mask.bool()].tolist() == pytest.approx([0.18125, 0.4625, 0.225, 0.55])


def test_reinforce_alone_discounts_from_reply_to_reply():
    # Returns to go at gamma 1/2: (0.4 + 0.3, 0.6) and (0.2, 0.4); whitening subtracts their mean 0.475.
    options = {"gamma": 0.5, "credit": "turn"}
    found, _ = advantages(ResponderExperienceMaker, RESPONDER, [BOTH, HALF], estimator="reinforce", **options)
    assert found[0] == pytest.approx([0.225, 0.225, 0.125, 0.125])
    assert found[1] == pytest.approx([-0.275, -0.275, -0.075, -0.075])
    found, _ = advantages(ResponderExperienceMaker, RESPONDER, [BOTH, HALF], estimator="dr_grpo", **options)
    assert found[0] == pytest.approx([0.6, 0.6, 0.2, 0.2])


def test_a_failed_dialogue_moves_no_mean_with_length_penalties_either():
    # 1, and 1 that is cut off and so worth 0: the failed one stands at their mean 0.5, not at 1.
    samples = [BOTH, truncated(), quarantined()]
    found, made = advantages(ResponderExperienceMaker, RESPONDER, samples, estimator="dr_grpo", stop_penalty=0.0)
    assert found == [pytest.approx([0.5] * 4), pytest.approx([-0.5] * 4), []]
    assert [float(e.info["reward"]) for e in made] == [1.0, 0.0, 0.5]


def test_the_group_term_of_the_expert():
    # Returns to go (1, 0.6) less (0.4, 0.4), and the other way round, over their root mean square, sqrt(0.2).
    found, _ = advantages(ExpertExperienceMaker, EXPERT, [BOTH, HALF], expert_credit="group=2")
    assert found[0] == pytest.approx([1.2 / 0.2**0.5, 0.4 / 0.2**0.5])
    assert found[1] == pytest.approx([-1.2 / 0.2**0.5, -0.4 / 0.2**0.5])


def test_the_terms_add_up():
    preference, _ = advantages(ExpertExperienceMaker, EXPERT, [BOTH, HALF], expert_credit="preference=1")
    turns, _ = advantages(ExpertExperienceMaker, EXPERT, [BOTH, HALF], expert_credit="group=1")
    both, _ = advantages(ExpertExperienceMaker, EXPERT, [BOTH, HALF], expert_credit="preference=3,group=0.5")
    assert preference[0] == pytest.approx([1.0, 1.0])
    assert preference[1] == pytest.approx([-1.0, -1.0])
    for i in range(2):
        assert both[i] == pytest.approx([3 * p + 0.5 * t for p, t in zip(preference[i], turns[i], strict=True)])


def labelled(sample, *labels):
    """``sample`` with these labels chosen."""
    stream = sample.trajectory.streams[EXPERT]
    for (start, _), label in zip(stream.spans, labels, strict=True):
        stream.tokens[start] = label
    return sample


def test_the_decision_preference_term_compares_the_decisions_of_a_turn():
    # Turn 0: 9 with 1 to come against 10 with 0.4: 1/2 and -1/2. Turn 1: both chose 10, so there is no pair. The root
    # mean square of (1/2, 0, -1/2, 0) is sqrt(1/8).
    samples = [labelled(dialogue(("find",), ("refund",)), 9, 10), labelled(dialogue((), ("find",)), 10, 10)]
    found, _ = advantages(ExpertExperienceMaker, EXPERT, samples, expert_credit="decision_preference=1")
    assert found == [pytest.approx([2**0.5, 0.0]), pytest.approx([-(2**0.5), 0.0])]


def test_a_turn_that_no_turn_carried_out_is_compared_with_nothing():
    samples = [labelled(with_a_decision_too_many(), 10, 9), labelled(dialogue(("find",), ("refund",)), 9, 10)]
    found, _ = advantages(ExpertExperienceMaker, EXPERT, samples, expert_credit="decision_preference=1")
    assert found == [pytest.approx([-(2**0.5), 0.0]), pytest.approx([2**0.5, 0.0])]


def test_q_gets_the_returns_to_go_and_leaves_the_advantages_alone():
    found, made = advantages(ExpertExperienceMaker, EXPERT, [BOTH, quarantined(), HALF], expert_credit="q=1")
    assert found == [[0.0, 0.0], [], [0.0, 0.0]]
    assert [e.mm_train_inputs[0]["togo"].tolist() for e in made] == [
        pytest.approx([1.0, 0.6]),
        [],
        pytest.approx([0.4, 0.4]),
    ]
    beside, _ = advantages(ExpertExperienceMaker, EXPERT, [BOTH, HALF], expert_credit="q=1,group=1")
    alone, _ = advantages(ExpertExperienceMaker, EXPERT, [BOTH, HALF], expert_credit="group=1")
    assert beside == alone


def test_the_reward_of_a_forced_turn_belongs_to_the_decision_before_it():
    sample = dialogue((), ("find",), ("refund",), forced=(1,))
    assert sample.earned[EXPERT] == pytest.approx([0.0, 0.4, 0.6])
    _, made = advantages(ExpertExperienceMaker, EXPERT, [sample, BOTH], expert_credit="q=1")
    assert made[0].mm_train_inputs[0]["togo"].tolist() == pytest.approx([1.0, 0.6])  # of turns 0 and 2
    # V = 0, lambda 0: what the critic's decisions earned until the next one.
    options = {"values": 0.0, "lambd": 0.0, "expert_credit": "critic=1"}
    _, made = advantages(ExpertExperienceMaker, EXPERT, [sample, BOTH], **options)
    assert made[0].returns[made[0].action_mask.bool()].tolist() == pytest.approx([0.4, 0.6])


def test_gae_of_decisions_and_the_critics_targets():
    # V = 0.2 everywhere, gamma 1, lambda 0: A = r + V' - V: (0.4, 0.6 - 0.2), (0, 0.4 - 0.2); targets A + V.
    options = {"values": 0.2, "lambd": 0.0, "expert_credit": "critic=1"}
    found, made = advantages(ExpertExperienceMaker, EXPERT, [BOTH, HALF], **options)
    centred = [0.4 - 0.25, 0.4 - 0.25, 0.0 - 0.25, 0.2 - 0.25]
    scale = (sum(a * a for a in centred) / 4) ** 0.5
    assert found[0] + found[1] == pytest.approx([a / scale for a in centred])
    targets = [e.returns[e.action_mask.bool()].tolist() for e in made]
    assert targets[0] == pytest.approx([0.6, 0.6])
    assert targets[1] == pytest.approx([0.2, 0.4])


def planned(*completed):
    """``dialogue`` of an expert that writes two words before each label."""
    sample = dialogue(*completed)
    stream = Stream(tokens=[0])
    for _ in completed:
        stream.tokens += [1, 5, 6, 1, 9]
        end = len(stream.tokens)
        stream.spans += [(end - 4, end - 2), (end - 1, end)]
        stream.allowed += [[], [9, 10]]
    stream.logprobs = [0.0] * len(stream.tokens)
    sample.trajectory.streams[EXPERT] = stream
    return DialogueSample.of(sample.trajectory, WEIGHTS)


def test_a_plan_weighs_what_the_label_after_it_weighs():
    """Mean weights: 1/2 of two turns, 1 of one, each for all tokens of its turn's action, a plan of two words and its
    label. Of six halves and three ones the mean square is 1/2."""
    samples = [planned(("find",), ("refund",)), planned(("find",))]
    options = {"expert_credit": "preference=1", "pref_weights": "mean"}
    found, _ = advantages(ExpertExperienceMaker, EXPERT, samples, **options)
    assert found == [pytest.approx([0.5 * 2**0.5] * 6), pytest.approx([-(2**0.5)] * 3)]


@pytest.mark.parametrize(
    "options", [{"expert_credit": "group=1"}, {"values": 0.2, "lambd": 0.0, "expert_credit": "critic=1"}]
)
def test_a_plan_earns_what_the_label_after_it_earns(options):
    plain, made = advantages(ExpertExperienceMaker, EXPERT, [BOTH, HALF], **options)
    found, again = advantages(
        ExpertExperienceMaker, EXPERT, [planned(("find",), ("refund",)), planned((), ("find",))], **options
    )
    for labels, words, one, other in zip(plain, found, made, again, strict=True):
        assert words == pytest.approx([value for value in labels for _ in range(3)])
        targets = one.returns[one.action_mask.bool()].tolist()
        assert other.returns[other.action_mask.bool()].tolist() == pytest.approx([t for t in targets for _ in range(3)])


@pytest.mark.parametrize("options", [{"expert_credit": f"{term}=1"} for term in ("preference", "group")])
def test_a_quarantined_dialogue_changes_nothing_for_the_others(options):
    without, _ = advantages(ExpertExperienceMaker, EXPERT, [BOTH, HALF], **options)
    beside, _ = advantages(ExpertExperienceMaker, EXPERT, [BOTH, quarantined(), HALF], **options)
    assert beside[1] == []
    assert beside[0] + beside[2] == pytest.approx(without[0] + without[1])


def with_a_decision_too_many():
    """One turn, and a label after it for which there was no room."""
    sample = dialogue(("find",))
    stream = sample.trajectory.streams[EXPERT]
    stream.tokens += [1, 7, 9]
    stream.logprobs += [0.0] * 3
    stream.spans.append((6, 7))
    stream.allowed.append([9, 10])
    return DialogueSample.of(sample.trajectory, WEIGHTS)


def test_a_decision_that_no_turn_carried_out_earns_nothing():
    sample = with_a_decision_too_many()
    assert sample.earned[EXPERT] == pytest.approx([0.4])
    # Its return to go is 0, against 0.6 of the other at that turn: (0.4 - 1, 0 - 0.6), both of one size.
    found, _ = advantages(ExpertExperienceMaker, EXPERT, [sample, BOTH], expert_credit="group=1")
    assert found == [pytest.approx([-1.0, -1.0]), pytest.approx([1.0, 1.0])]
