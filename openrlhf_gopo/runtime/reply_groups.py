"""Experiences of a responder that learns from reply groups (--gopo.reply_group)."""

from __future__ import annotations

import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController

from openrlhf_gopo.core.reply_groups import sibling_advantages
from openrlhf_gopo.core.turn_level import returns_to_go, unit_scale
from openrlhf_gopo.runtime.experience_maker import Batch, ResponderExperienceMaker
from openrlhf_gopo.runtime.models import substituted


class ReplyGroupExperienceMaker(ResponderExperienceMaker):
    """The responder's maker, with replies against their siblings; samples hold the rest of the responder's return."""

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """Sibling term + rest, less the KL penalty to go (when KL is not a loss).

        The sibling term is the same for all tokens of a reply, and 0 for a decision of single_level. The rest is what
        the estimator makes of the return without the metrics that score one reply, by --gopo.credit; it is 0 where
        that is all the return. Each is scaled to unit root mean square over the batch's actions.
        """
        batch = self._batch(experiences)
        penalties = returns_to_go(self._kl_penalties(experiences, batch), batch.counts)
        with substituted(self, kl_ctl=FixedKLController(0.0)):  # subtracted below, where it is not scaled
            experiences = super().compute_advantages_and_returns(experiences)
        rest = batch.gather([row for e in experiences for row in e.advantages])
        targets = batch.gather([row for e in experiences for row in e.returns])
        advantages = unit_scale(self._sibling_term(batch)) + unit_scale(rest) - penalties
        self._attach(experiences, batch, advantages, targets)
        return experiences

    def _sibling_term(self, batch: Batch) -> torch.Tensor:
        """The sibling advantage of every action, (N,): a token's is its reply's."""
        groups, tokens = [], []
        for trajectory in (sample.trajectory for sample in batch.samples if not sample.quarantined):
            stream, replies = trajectory.streams[self.role], iter(trajectory.turns)
            for (start, end), labels in zip(stream.spans, stream.allowed, strict=True):
                groups.append(() if labels else next(replies).reply_group)
                tokens.append(end - start)
        return torch.repeat_interleave(sibling_advantages(groups), torch.tensor(tokens, dtype=torch.long))
