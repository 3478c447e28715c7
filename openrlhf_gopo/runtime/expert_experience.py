"""From dialogues to the expert's advantages: a weighted sum of credit terms, one method each."""

from __future__ import annotations

from typing import Any

import torch
from openrlhf.trainer.ppo_utils.experience import Experience

from openrlhf_gopo.config import EXPERT
from openrlhf_gopo.core.decision_preference import decision_preference
from openrlhf_gopo.core.preference import (
    action_weights,
    decision_advantages,
    preference_coefficients,
    trajectory_log_ratio,
)
from openrlhf_gopo.core.turn_level import gae, returns_to_go, turn_advantages, unit_scale
from openrlhf_gopo.runtime.experience_maker import Batch, GOPOExperienceMaker, spans_of
from openrlhf_gopo.runtime.samples import DialogueSample


class ExpertExperienceMaker(GOPOExperienceMaker):
    """The expert's maker: a weighted sum of credit terms (``--gopo.expert_credit``)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reference_refs: list = []
        self._targets: torch.Tensor | None = None  # of the critic, (N,); None without one

    def _dispatch_forward(self, group: Any, sync_condition: bool, **kwargs: Any) -> list:
        refs = super()._dispatch_forward(group, sync_condition, **kwargs)
        if group is self.initial_model_group:
            self._reference_refs = refs  # upstream drops these log-probabilities unless KL is a loss
        return refs

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """Advantages (B, A) of the decisions, zero elsewhere: the sum of weight x term, less the KL penalty to go.

        Each term is scaled to unit root mean square over the batch, so that the weights compare. The term ``q`` is part
        of the actor's loss (``runtime.q_credit``), which needs the returns to go.
        """
        self._impute(experiences)
        batch = self._batch(experiences)
        makers = {
            "preference": self._preference_term,
            "decision_preference": self._decision_preference_term,
            "group": self._group_term,
            "critic": self._critic_term,
        }
        advantages = torch.zeros(sum(batch.counts), dtype=torch.float64)
        for name, weight in self.config.expert_terms.items():
            if name != "q":
                advantages += weight * unit_scale(makers[name](experiences, batch))
        if "q" in self.config.expert_terms:
            self._hand_on_returns(experiences, batch)
        advantages -= returns_to_go(self._kl_penalties(experiences, batch), batch.counts)
        self._attach(experiences, batch, advantages, self._targets)
        return experiences

    def _preference_term(self, experiences: list[Experience], batch: Batch) -> torch.Tensor:
        """The trust-region form of the preference loss: c_i at the sampler's parameters, spread by w_t, (N,)."""
        pref = self.config.pref
        weights = torch.cat([action_weights(t, mode=pref.weights) for t in batch.turns])
        owner = torch.repeat_interleave(torch.arange(len(batch.counts)), torch.tensor(batch.counts))
        current, reference = self._logprobs(experiences, batch)
        log_ratios = trajectory_log_ratio(current, reference, owner, weights, len(batch.counts))
        returns = torch.cat([e.rewards for e in experiences])
        coefficients, metrics = preference_coefficients(log_ratios, returns, batch.groups, beta=pref.beta)
        self.metrics |= metrics
        return decision_advantages(coefficients, owner, weights)

    def _decision_preference_term(self, experiences: list[Experience], batch: Batch) -> torch.Tensor:
        """Preferences between decisions at the same turn of one goal's dialogues, (N,)."""
        goal = {int(i): g for g, members in enumerate(batch.groups) for i in members}
        rows, places, chosen = self._decisions(batch), [], []
        for i, (sample, turns) in enumerate(zip(batch.samples, rows, strict=True)):
            places += [(goal[i], t) if i in goal and t < len(sample.trajectory.turns) else None for t in turns]
            chosen += _labels(sample)
        return self._spread(decision_preference(self._togo(batch, rows), chosen, places), batch)

    def _group_term(self, experiences: list[Experience], batch: Batch) -> torch.Tensor:
        """Returns to go less those of the goal's other dialogues at that turn, (N,)."""
        rewards = [sample.earned[EXPERT] for sample in batch.samples]
        by_turn = turn_advantages(rewards, batch.groups, gamma=self.args.algo.advantage.gamma)
        return self._spread(
            torch.cat([row[turns] for row, turns in zip(by_turn, self._decisions(batch), strict=True)]), batch
        )

    def _critic_term(self, experiences: list[Experience], batch: Batch) -> torch.Tensor:
        """GAE on decisions, (N,); its critic's targets go to ``_targets``.

        The value of a decision is that of its first action: the label, or the first word of the plan before it.
        """
        options, rows = self.args.algo.advantage, self._decisions(batch)
        togo, counts = self._togo(batch, rows, gamma=1.0), [len(row) for row in rows]
        following = torch.cat([torch.cat([mine[1:], mine.new_zeros(1)])[: len(mine)] for mine in togo.split(counts)])
        earned = togo - following  # from one decision to the next
        first = torch.searchsorted(self._decision_of_actions(batch), torch.arange(len(earned)))
        values = batch.gather([row for e in experiences for row in e.values])[first]
        advantages = gae(earned, values, counts, gamma=options.gamma, lambd=options.lambd)
        self._targets = self._spread(advantages + values, batch)
        return self._spread(advantages - advantages.mean(), batch)

    def _hand_on_returns(self, experiences: list[Experience], batch: Batch) -> None:
        """Put the return to go of each action's decision, (count,), beside its allowed labels."""
        togo = self._spread(self._togo(batch, self._decisions(batch)), batch).float().split(batch.counts)
        inputs = [given for e in experiences for given in e.mm_train_inputs]
        for given, mine in zip(inputs, togo, strict=True):
            given["togo"] = mine

    def _decisions(self, batch: Batch) -> list[list[int]]:
        """Per dialogue, the turn of each of its decisions."""
        return [
            [turn for turn, ids in zip(sample.turns_of_spans(EXPERT), _allowed(sample), strict=True) if ids]
            for sample in batch.samples
        ]

    def _togo(self, batch: Batch, decisions: list[list[int]], gamma: float | None = None) -> torch.Tensor:
        """Return to go of every decision of the batch, float64; 0 of one that no turn carried out."""
        gamma = self.args.algo.advantage.gamma if gamma is None else gamma
        rewards = [sample.earned[EXPERT] for sample in batch.samples]
        flat = torch.tensor([r for row in rewards for r in row], dtype=torch.float64)
        by_dialogue = returns_to_go(flat, [len(row) for row in rewards], gamma).split([len(row) for row in rewards])
        rows = [torch.cat([row, row.new_zeros(1)])[turns] for row, turns in zip(by_dialogue, decisions, strict=True)]
        return torch.cat(rows)

    def _decision_of_actions(self, batch: Batch) -> torch.Tensor:
        """The decision of the batch that each action belongs to, (N,)."""
        counts = [len(row) for row in self._decisions(batch)]
        starts = torch.tensor([0, *counts]).cumsum(0)
        return torch.cat([start + turn for start, turn in zip(starts, batch.turns, strict=False)])

    def _spread(self, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        """From one value per decision to one per action: words of a plan have that of the label after them."""
        return values[self._decision_of_actions(batch)]

    def _logprobs(self, experiences: list[Experience], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi and log pi_ref of every action of the batch, (N,) each: equal when the sampler is the reference."""
        current = [row for e in experiences for row in e.action_log_probs]
        if self.config.pref.reference == "sampler":
            reference = current
        else:
            copies = self.args.ds.ring_attn_size * self.args.ds.tensor_parallel_size
            batches = self._flatten_results(self._reference_refs, copies)
            for experience, rows in zip(experiences, batches, strict=True):
                experience.base_action_log_probs = rows
            reference = [row for rows in batches for row in rows]
        return batch.gather(current), batch.gather(reference)


def _allowed(sample: DialogueSample) -> list[list[int]]:
    return [] if sample.quarantined else sample.trajectory.streams[EXPERT].allowed


def _labels(sample: DialogueSample) -> list[int]:
    """The token of each decision."""
    stream = sample.trajectory.streams[EXPERT]
    return [
        stream.tokens[end - 1] for (_, end), ids in zip(spans_of(sample, EXPERT), _allowed(sample), strict=True) if ids
    ]
