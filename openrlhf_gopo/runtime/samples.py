"""From trajectories to upstream's ``Experience``: one per role, tokens and masks as they were sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from openrlhf.trainer.ppo_utils.experience import Experience

from openrlhf_gopo.config import EXPERT
from openrlhf_gopo.core.categorical import pad_allowed
from openrlhf_gopo.rewards.joint import joint
from openrlhf_gopo.rewards.turns import turn_rewards
from openrlhf_gopo.types import StopReason, Stream, Trajectory


@dataclass
class DialogueSample:
    """One trajectory and its return under each role's reward weights (0 when quarantined).

    ``earned``: by role, the same return turn by turn (see ``rewards.turns``), forced turns included; empty when
    quarantined.
    """

    trajectory: Trajectory
    returns: dict[str, float]
    earned: dict[str, list[float]]

    @property
    def quarantined(self) -> bool:
        """True when the dialogue failed: it keeps its place in the group and is never trained on."""
        return self.trajectory.stop is StopReason.FAILED

    @property
    def scores(self) -> torch.Tensor:
        """Success as 0/1, shape (1,): what upstream's dynamic filtering averages over a group."""
        return torch.tensor([float(self.trajectory.success)])

    @classmethod
    def of(cls, trajectory: Trajectory, weights: Mapping[str, Mapping[str, float]]) -> DialogueSample:
        """Attach the returns; ``weights`` maps a role to its reward weights."""
        if trajectory.stop is StopReason.FAILED:
            return cls(trajectory, dict.fromkeys(weights, 0.0), {role: [] for role in weights})
        returns = {role: joint(trajectory.rewards, of_role) for role, of_role in weights.items()}
        return cls(trajectory, returns, {role: turn_rewards(trajectory, w) for role, w in weights.items()})

    def turns_of_spans(self, role: str) -> list[int]:
        """The turn, 0..T-1, of each span of the role's stream; T of one that no turn carried out, for want of room.

        A decision belongs to a turn that was not forced, the words of a plan to the decision after them, and the k-th
        reply to turn k.
        """
        turns, stream = self.trajectory.turns, self.trajectory.streams.get(role, Stream())
        if self.quarantined:
            return []
        end = len(turns)
        open_turns = iter([t for t, turn in enumerate(turns) if not turn.forced])
        labels = [next(open_turns, end) for ids in stream.allowed if ids]
        decided = replied = 0
        found = []
        for ids in stream.allowed:
            if ids or role == EXPERT:
                found.append(labels[decided] if decided < len(labels) else end)
                decided += bool(ids)
            else:
                found.append(min(replied, end))
                replied += 1
        return found


def to_experience(sample: DialogueSample, role: str, num_labels: int) -> Experience:
    """A one-sample ``Experience`` of ``role``; a quarantined sample has an all-zero action mask.

    sequences (1, S); action_mask and rollout_log_probs (1, S-1), aligned with the token they predict;
    ``mm_train_inputs[0]["allowed"]`` (N, num_labels) holds the allowed label ids of each action token, none where the
    whole vocabulary was open. ``num_labels`` is 0 for a role that decides nothing.
    """
    stream = sample.trajectory.streams.get(role, Stream())
    tokens = torch.tensor(stream.tokens or [0, 0], dtype=torch.long)
    action_mask = torch.zeros(len(tokens), dtype=torch.long)
    if not sample.quarantined:
        for start, end in stream.spans:
            action_mask[start:end] = 1
    logprobs = torch.tensor(stream.logprobs or [0.0, 0.0], dtype=torch.float32)
    spans = [] if sample.quarantined else zip(stream.spans, stream.allowed, strict=True)
    allowed = [ids for (start, end), ids in spans for _ in range(start, end)]
    reward = torch.tensor([sample.returns[role]], dtype=torch.float32)
    return Experience(
        sequences=tokens.unsqueeze(0),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        action_mask=action_mask[1:].unsqueeze(0),
        rollout_log_probs=(logprobs * action_mask)[1:].unsqueeze(0),
        mm_train_inputs=[{"allowed": pad_allowed(allowed, num_labels)}],
        images=[None],
        prompts=[sample.trajectory.goal.id],
        labels=[sample.trajectory.stop.value],
        rewards=reward,
        scores=sample.scores,
        response_length=action_mask.sum().float().reshape(1),
        total_length=torch.tensor([float(len(tokens))]),
        truncated=torch.tensor([sample.trajectory.stop.truncated]),
        info={"reward": reward.clone(), "quarantined": torch.tensor([float(sample.quarantined)])},
    )
