"""The controller's own arithmetic; whole runs are in tests/e2e."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("openrlhf")

from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.runtime.models import RolePPOTrainer
from openrlhf_gopo.runtime.roles import make_roles, role_args
from openrlhf_gopo.runtime.trainer import GOPOTrainer

from ..cli.test_train_gopo import command

pytestmark = pytest.mark.stack


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        # 30 rollouts of 64 dialogues, two optimizer steps each.
        ("", (60, 60)),
        ("--gopo.schedule expert", (60, 0)),
        ("--gopo.schedule alternate", (30, 30)),
        ("--gopo.schedule alternate --gopo.schedule_steps 10", (40, 20)),
        # 7 + 7 + 2 against 7 + 7 rollouts
        ("--gopo.schedule alternate --gopo.schedule_steps 7", (32, 28)),
        ("--gopo.expert_steps 16 --gopo.expert_passes 2", (480, 60)),
        ("--gopo.expert_steps 16 --gopo.schedule alternate", (240, 30)),
    ],
)
def test_a_schedule_spans_the_steps_that_a_role_takes(flags, steps):
    from openrlhf_gopo.cli import train_gopo

    given = command("--train.num_episodes", "3", *flags.split(), actor__model_name_or_path="m")
    args, config = train_gopo.parse(given)
    learners = {role: SimpleNamespace(args=role_args(args, role, config)) for role in (EXPERT, RESPONDER)}
    trainer = SimpleNamespace(args=args, learners=learners, steps_per_episode=10, config=config)
    assert tuple(GOPOTrainer.scheduled_steps(trainer, role) for role in (EXPERT, RESPONDER)) == steps


def test_the_expert_has_its_own_batch_and_passes_and_the_weight_of_q():
    from openrlhf_gopo.cli import train_gopo

    given = ("--gopo.expert_steps", "16", "--gopo.expert_passes", "2", "--gopo.expert_credit", "group=1,q=0.5")
    args, config = train_gopo.parse(command(*given, actor__model_name_or_path="m"))
    found = {role: role_args(args, role, config) for role in (EXPERT, RESPONDER)}
    assert {role: (own.train.batch_size, own.train.max_epochs, own.q_weight) for role, own in found.items()} == {
        EXPERT: (8, 2, 0.5),  # 64 dialogues twice, in 16 steps
        RESPONDER: (32, 1, 0.0),
    }
    shared = train_gopo.parse(
        command("--gopo.expert_credit", "q=2", "--gopo.sharing", "shared", actor__model_name_or_path="m")
    )
    assert role_args(shared[0], RESPONDER, shared[1]).q_weight == 2.0


def test_the_logged_entropy_is_a_mean_over_decisions():
    """Two micro-batches of an optimizer step: 1 action of entropy 0.5 and 7 of 1.0, mean 7.5 / 8.

    Upstream has each as its share of the step's mean times the number of micro-batches: 0.5 / 4 and 7 / 4.
    """
    trainer = SimpleNamespace(
        args=SimpleNamespace(algo=SimpleNamespace(kl=SimpleNamespace(use_loss=False))),
        actor_loss_fn=SimpleNamespace(token_level_loss=True),
    )
    info = {"batch_num_tokens": torch.tensor(8.0 / 2), "dp_size": 1}
    seen = []
    for share, actions in ((0.125, 1.0), (1.75, 7.0)):
        status = {
            "metrics": {"entropy_loss": torch.tensor(share), "kl": torch.tensor(9.0)},
            "num_action_tokens": actions,
        }
        RolePPOTrainer._local_means(trainer, status, info)
        assert float(status["metrics"]["kl"]) == 9.0  # a mean already
        seen.append((float(status["metrics"]["entropy_loss"]), actions))
    assert seen == [(0.5, 1.0), (1.0, 7.0)]


def test_a_role_without_a_critic_is_not_frozen_for_one():
    from openrlhf_gopo.cli import train_gopo

    gae = ("--algo.advantage.estimator", "gae", "--critic.freezing_steps", "10")
    roles = make_roles(*train_gopo.parse(command(*gae, actor__model_name_or_path="m")))
    assert {name: role.args.critic.freezing_steps for name, role in roles.items()} == {EXPERT: -1, RESPONDER: 10}
    shared = make_roles(*train_gopo.parse(command(*gae, "--gopo.sharing", "shared", actor__model_name_or_path="m")))
    assert {name: role.args.critic.freezing_steps for name, role in shared.items()} == {EXPERT: -1, RESPONDER: 10}
