"""Advantages of replies against their siblings, beside what the responder's other metrics earn."""

import pytest

from openrlhf_gopo.cli import train_gopo
from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.rollout.sampled import ReplyGroup
from openrlhf_gopo.runtime.experience_maker import ResponderExperienceMaker
from openrlhf_gopo.runtime.expert_experience import ExpertExperienceMaker
from openrlhf_gopo.runtime.launch import rollout_spec
from openrlhf_gopo.runtime.learner import Learner
from openrlhf_gopo.runtime.reply_groups import ReplyGroupExperienceMaker
from openrlhf_gopo.runtime.restarts import Restarts
from openrlhf_gopo.runtime.roles import make_roles
from openrlhf_gopo.runtime.samples import DialogueSample

from .test_experience_maker import WEIGHTS, advantages, dialogue, quarantined

# By hand: 1 - 0.25, 0.2 - 0.4; 0.5 - 0.5, 0 - 0.6. Two tokens a reply, so the mean square is that of the replies.
GROUPS = [[(1.0, 0.5, 0.0), (0.2, 0.4)], [(0.5, 0.5), (0.0, 0.6)]]
SIBLINGS = [[0.75, 0.75, -0.2, -0.2], [0.0, 0.0, -0.6, -0.6]]
SCALE = ((0.5625 + 0.04 + 0.36) / 4) ** 0.5


def samples(weights=WEIGHTS, groups=GROUPS):
    made = [dialogue(("find",), ("refund",)), dialogue((), ("find",))]
    for sample, of_one in zip(made, groups, strict=True):
        for turn, scores in zip(sample.trajectory.turns, of_one, strict=True):
            turn.reply_group = scores
    return [DialogueSample.of(sample.trajectory, weights) for sample in made]


def unit(rows):
    values = [value for row in rows for value in row]
    scale = (sum(value**2 for value in values) / len(values)) ** 0.5
    return [[value / scale for value in row] for row in rows]


@pytest.mark.parametrize("credit", ["trajectory", "turn"])
@pytest.mark.parametrize("estimator", ["group_norm", "rloo", "dr_grpo", "reinforce", "reinforce_baseline", "gae"])
def test_both_terms_have_unit_scale_and_add_up(estimator, credit):
    options = {"estimator": estimator, "credit": credit, "lambd": 0.5, "gamma": 0.9}
    options["values"] = 0.3 if estimator == "gae" else None
    rest, critic = advantages(ResponderExperienceMaker, RESPONDER, samples(), **options)
    found, made = advantages(ReplyGroupExperienceMaker, RESPONDER, samples(), reply_group=3, kl=0.1, **options)
    togo = [0.2, 0.15, 0.1, 0.05]  # 0.5 x 0.1 for each token that is left
    for i, (one, own) in enumerate(zip(unit(rest), SIBLINGS, strict=True)):
        expected = [a / SCALE + r - k for a, r, k in zip(own, one, togo, strict=True)]
        assert found[i] == pytest.approx(expected, abs=1e-6)
        assert not made[i].advantages[~made[i].action_mask.bool()].any()
        if estimator == "gae":
            mask = made[i].action_mask.bool()
            assert made[i].returns[mask].tolist() == pytest.approx(critic[i].returns[mask].tolist())


@pytest.mark.parametrize("credit", ["trajectory", "turn"])
@pytest.mark.parametrize("estimator", ["group_norm", "rloo", "dr_grpo", "reinforce", "reinforce_baseline"])
def test_with_scores_of_replies_alone_the_siblings_are_all(estimator, credit):
    """No other metric: the estimator has nothing to say, and nothing is made of its nothing."""
    only = samples({EXPERT: {"tse": 1.0}, RESPONDER: {}})
    found, made = advantages(
        ReplyGroupExperienceMaker, RESPONDER, only, estimator=estimator, credit=credit, reply_group=3
    )
    for row, own in zip(found, SIBLINGS, strict=True):
        assert row == pytest.approx([a / SCALE for a in own])
    assert [float(e.rewards) for e in made] == [0.0, 0.0]


def test_replies_that_all_score_alike_leave_the_rest():
    alike = samples(groups=[[(1.0, 1.0), (0.2, 0.2)], [(0.5, 0.5), (0.0, 0.0)]])
    rest, _ = advantages(ResponderExperienceMaker, RESPONDER, samples(), credit="turn")
    found, _ = advantages(ReplyGroupExperienceMaker, RESPONDER, alike, credit="turn", reply_group=2)
    assert [pytest.approx(row) for row in unit(rest)] == found


def test_a_failed_dialogue_has_no_part_in_it():
    options = {"credit": "turn", "reply_group": 3}
    without, _ = advantages(ReplyGroupExperienceMaker, RESPONDER, samples(), **options)
    found, _ = advantages(ReplyGroupExperienceMaker, RESPONDER, [*samples(), quarantined()], **options)
    assert found == [*without, []]


def test_decisions_of_one_model_stand_against_no_sibling():
    """single_level: one decision and one reply of two tokens a turn, in one stream. The decision's own term is 0."""
    made = samples()
    for sample in made:
        stream = sample.trajectory.streams[RESPONDER]
        spans = [(start - 1, start) for start, _ in stream.spans]
        stream.spans = sorted([*stream.spans, *spans])
        stream.allowed = [[1, 2], []] * 2
    made = [DialogueSample.of(sample.trajectory, {RESPONDER: {}}) for sample in made]
    found, _ = advantages(ReplyGroupExperienceMaker, RESPONDER, made, estimator="dr_grpo", reply_group=3)
    scale = SCALE * (2 / 3) ** 0.5  # a third of the actions are 0
    for row, own in zip(found, SIBLINGS, strict=True):
        assert row == pytest.approx([0.0, own[0] / scale, own[1] / scale, 0.0, own[2] / scale, own[3] / scale])


FLAGS = "--gopo.env shop --rollout.n_samples_per_prompt 2 --algo.advantage.estimator group_norm"


@pytest.mark.parametrize(("size", "kind"), [("1", ResponderExperienceMaker), ("4", ReplyGroupExperienceMaker)])
def test_the_responder_alone_learns_from_groups(size, kind, monkeypatch):
    monkeypatch.setenv("OPENRLHF_GOPO_CPU", "1")
    args, config = train_gopo.parse([*FLAGS.split(), "--actor.model_name_or_path", "m", "--gopo.reply_group", size])
    roles = make_roles(args, config)
    makers = {name: Learner(role, config, 2, None, Restarts(roles)).experience_maker for name, role in roles.items()}
    assert {name: type(maker) for name, maker in makers.items()} == {EXPERT: ExpertExperienceMaker, RESPONDER: kind}


@pytest.mark.parametrize(
    ("size", "group", "rest"),
    [
        ("1", None, {"tse": 0.5, "gre": 1.0, "realised": 2.0}),
        ("4", ReplyGroup(4, {"gre": 1.0, "realised": 2.0}), {"tse": 0.5}),
    ],
)
def test_what_scores_one_reply_is_taken_out_of_the_return(size, group, rest, monkeypatch):
    monkeypatch.setenv("OPENRLHF_GOPO_CPU", "1")
    reward = ["--gopo.responder_reward", "tse=0.5,gre=1,realised=2", "--gopo.reply_group", size]
    spec = rollout_spec(*train_gopo.parse([*FLAGS.split(), *reward]))
    assert spec.limits.reply_group == group
    assert spec.reward_weights == {EXPERT: {"tse": 1.0, "esndcg": 1.0}, RESPONDER: rest}
