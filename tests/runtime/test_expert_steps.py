"""``--gopo.expert_steps``: what the flags turn into, and that upstream's loop takes as many steps."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("openrlhf")

from openrlhf_gopo.cli import train_gopo
from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.runtime.dry_run import _batches
from openrlhf_gopo.runtime.models import RolePPOTrainer
from openrlhf_gopo.runtime.q_credit import QCreditTrainer
from openrlhf_gopo.runtime.roles import make_roles, role_args
from openrlhf_gopo.runtime.trainer import GOPOTrainer

from ..cli.test_train_gopo import command
from .test_q_credit import make_actor, rollout

pytestmark = pytest.mark.stack


@pytest.fixture(autouse=True)
def one_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENRLHF_GOPO_CPU", "1")  # whose defaults are one rank of everything


def parsed(*flags: object, **changes: object):
    """8 goals x 8 dialogues, micro-batches of 2, unless changed."""
    given = {"actor__model_name_or_path": "m", "train__micro_batch_size": 2, "rollout__micro_batch_size": 2} | changes
    return train_gopo.parse(command(*flags, **given))


@pytest.mark.parametrize(
    ("steps", "passes", "batch"), [(16, 1, 4), (16, 2, 8), (16, 16, 64), (1, 1, 64), (32, 1, 2), (6, 3, 32)]
)
def test_the_expert_alone_takes_them(steps, passes, batch):
    args, config = parsed("--gopo.expert_steps", steps, "--gopo.expert_passes", passes)
    roles = make_roles(args, config)
    expert, responder = roles[EXPERT].args.train, roles[RESPONDER].args.train
    assert (expert.batch_size, expert.max_epochs) == (batch, passes)
    assert (responder.batch_size, responder.max_epochs) == (32, 1)
    assert roles[EXPERT].strategy.train_batch_size == batch
    learners = {name: SimpleNamespace(args=role.args) for name, role in roles.items()}
    run = SimpleNamespace(args=args, steps_per_episode=10, config=config, learners=learners)
    assert GOPOTrainer.scheduled_steps(run, EXPERT) == 10 * steps
    assert GOPOTrainer.scheduled_steps(run, RESPONDER) == 10 * 2
    said = _batches(args, config, 80)
    assert said[1].startswith(f"  expert: {steps} optimizer step(s) of {batch} dialogues ")
    assert said[2].startswith("  responder: 2 optimizer step(s) of 32 dialogues ")


def test_without_the_flag_upstreams_arithmetic_stays():
    args, config = parsed(train__max_epochs=3)
    train = role_args(args, EXPERT, config).train
    assert (train.batch_size, train.max_epochs) == (32, 3)


@pytest.mark.parametrize("cls", [RolePPOTrainer, QCreditTrainer])
@pytest.mark.parametrize(("steps", "passes"), [(1, 1), (3, 1), (4, 2), (6, 2), (6, 6)])
def test_upstreams_loop_takes_them(one_process, cls, steps, passes):
    """12 dialogues, micro-batches of 2: each dialogue once in every pass, none dropped."""
    items, seen = rollout(12), []
    batch = 12 * passes // steps
    trainer = one_process(cls, make_actor(), q_weight=1.0, accumulated_gradient=batch // 2, epochs=passes)
    for item in items:
        item.action_log_probs = torch.zeros(len(item.action_mask), dtype=torch.float64)
    trainer.replay_buffer.items = items
    step = trainer.training_step
    trainer.training_step = lambda experience, *rest: (seen.extend(experience.prompts), step(experience, *rest))[1]
    trainer.ppo_train(0.0)
    assert len(trainer.strategy.gradients) == steps
    for one in range(passes):
        assert sorted(seen[12 * one : 12 * (one + 1)]) == sorted(map(str, range(12)))


def test_the_weight_of_q_reaches_the_actor_that_learns_it():
    args, config = parsed("--gopo.expert_credit", "q=0.5,group=1")
    assert [role_args(args, role, config).q_weight for role in (EXPERT, RESPONDER)] == [0.5, 0.0]
    args, config = parsed("--gopo.expert_credit", "q=0.5", "--gopo.sharing", "shared")
    assert role_args(args, RESPONDER, config).q_weight == 0.5
    args, config = parsed("--gopo.expert_credit", "group=1,q=0")
    assert role_args(args, EXPERT, config).q_weight == 0.0


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        (["--gopo.expert_steps", 3], {}, r"--gopo.expert_steps 3: .* use one of \[1, 2, 4, 8, 16, 32\]"),
        (["--gopo.expert_steps", 64], {}, r"micro-batches \(2 dialogues over all ranks\); use one of"),
        (["--gopo.expert_steps", 8, "--gopo.expert_passes", 3], {}, r"use one of \[3, 6, 12, 24, 48, 96\]"),
        (["--gopo.expert_steps", 16, "--expert.num_gpus_per_node", 4], {}, r"\(8 dialogues .* one of \[1, 2, 4, 8\]"),
        (
            ["--gopo.expert_steps", 16, "--gopo.expert_credit", "critic=1", "--critic.num_gpus_per_node", 4],
            {},
            r"\(8 dialogues over all ranks\)",
        ),
        (["--gopo.expert_steps", 0], {}, r"--gopo.expert_steps 0: give 1 or more"),
        (["--gopo.expert_passes", 2], {}, r"--gopo.expert_passes 2: give --gopo.expert_steps too"),
        (["--gopo.expert_steps", 4, "--gopo.sharing", "shared"], {}, r"--gopo.expert_steps 4: .*sharing shared"),
        (
            ["--gopo.expert_steps", 4, "--gopo.policy", "single_level"],
            {},
            r"--gopo.expert_steps 4: --gopo.policy single_level has no expert",
        ),
    ],
)
def test_what_cannot_work_is_said_at_once(flags, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        check(*flags, **changes)
    assert "\n" not in str(error.value)


def test_the_expert_need_not_fit_upstreams_batch():
    """--train.batch_size is the responder's: 4 dialogues are no batch of 8 ranks, and the expert has batches of 16."""
    flags = ["--expert.num_gpus_per_node", 8, "--rollout.n_samples_per_prompt", 8]
    changes = {"train__batch_size": 4, "rollout__batch_size": 8}
    with pytest.raises(ConfigError, match=r"--train.batch_size 4: does not divide over the 8 ranks"):
        check(*flags, **changes)
    check(*flags, "--gopo.expert_steps", 4, **changes)


def check(*flags: object, **changes: object) -> None:
    from openrlhf_gopo.runtime import checks

    checks.check_flags(*parsed(*flags, **changes))
