"""The controller's own arithmetic; whole runs are in tests/e2e."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("openrlhf")

from openrlhf_gopo.config import EXPERT, RESPONDER, GopoConfig
from openrlhf_gopo.runtime.models import RolePPOTrainer
from openrlhf_gopo.runtime.roles import make_roles
from openrlhf_gopo.runtime.trainer import GOPOTrainer

from ..cli.test_train_gopo import command

pytestmark = pytest.mark.stack


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        # 30 rollouts of 8 dialogues, two optimizer steps each.
        ({}, (60, 60)),
        ({"schedule": "expert"}, (60, 0)),
        ({"schedule": "alternate"}, (30, 30)),
        ({"schedule": "alternate", "schedule_steps": 10}, (40, 20)),
        ({"schedule": "alternate", "schedule_steps": 7}, (32, 28)),  # 7 + 7 + 2 against 7 + 7 rollouts
    ],
)
def test_a_schedule_spans_the_steps_that_a_role_takes(flags, steps):
    args = SimpleNamespace(
        rollout=SimpleNamespace(batch_size=2, n_samples_per_prompt=4),
        train=SimpleNamespace(batch_size=4, max_epochs=1, num_episodes=3),
    )
    trainer = SimpleNamespace(args=args, steps_per_episode=10, config=GopoConfig(env="shop", **flags))
    assert tuple(GOPOTrainer.scheduled_steps(trainer, role) for role in (EXPERT, RESPONDER)) == steps


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
