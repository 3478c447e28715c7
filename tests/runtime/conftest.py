"""These tests import OpenRLHF; without a GPU that takes the CPU platform."""

from openrlhf_gopo import platform

platform.activate()

from types import SimpleNamespace  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from openrlhf.models import PolicyLoss  # noqa: E402
from openrlhf.trainer.ppo_utils import NaiveReplayBuffer  # noqa: E402


class Strategy:
    """What upstream's loop asks of a strategy in one process; gradients go into a list, and a step is plain SGD."""

    ring_attn_group = None

    def __init__(self, args, actor, accumulated_gradient):
        self.args, self.actor, self.gradients, self._calls = args, actor, [], 0
        self.accumulated_gradient = accumulated_gradient

    def is_rank_0(self):
        return False

    def all_reduce(self, data, op="mean"):
        return data

    def backward(self, loss, model, optim):
        (loss / self.accumulated_gradient).backward()  # as DeepSpeed scales it
        self._calls += 1

    def optimizer_step(self, optim, model, scheduler, name):
        if self._calls % self.accumulated_gradient:
            return
        parameters = list(self.actor.parameters())
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        with torch.no_grad():
            for p in parameters:
                p -= 0.1 * p.grad
                p.grad = None

    def get_grad_norm(self, model):
        return 1.0


@pytest.fixture
def one_process():
    """Upstream's PPO trainer, or one of ours, around an actor, without Ray and DeepSpeed; see ``_one_process``."""
    return _one_process


def _one_process(cls, actor, *, q_weight=0.0, accumulated_gradient=1, epochs=1, batch_size=2):
    """Upstream's constructor opens the weight-sync group, so what its training loop needs is put in place here."""
    args = SimpleNamespace(
        q_weight=q_weight,
        train=SimpleNamespace(max_epochs=epochs, dynamic_batch_enable=False, enable_ema=False),
        ds=SimpleNamespace(packing_samples=False, tensor_parallel_size=1),
        actor=SimpleNamespace(entropy_coef=None, aux_loss_coef=0, eps_clip_low_high=(0.2, 0.2)),
        algo=SimpleNamespace(kl=SimpleNamespace(use_loss=False, init_coef=0)),
    )
    trainer = object.__new__(cls)
    trainer.strategy, trainer.args, trainer.actor = Strategy(args, actor, accumulated_gradient), args, actor
    trainer.actor_loss_fn = PolicyLoss()
    trainer.actor_optim = trainer.ema_model = None
    trainer.actor_scheduler = SimpleNamespace(get_last_lr=lambda: [0.1])
    trainer.aux_loss, trainer.max_epochs, trainer.dataloader_pin_memory = False, epochs, False
    trainer.replay_buffer = NaiveReplayBuffer(batch_size, 0, True)
    return trainer
