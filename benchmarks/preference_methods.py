"""The ways to take one expert update that ``preference_step.py`` compares, on one group of K trajectories.

- ``ours``: the clipped form. Coefficients from the rollout's log-probabilities, then one trajectory at a time, with
  the logits of its decision positions alone.
- ``exact``: the same at parameters that have moved: a forward pass without graph comes first.
- ``policy_gradient``: ``ours`` with group-normalised returns instead of coefficients; what the preference costs.
- ``pairwise``: both trajectories of a pair in one graph, all logits, backward pair by pair over all pairs.
- ``group``: the loss as it is written: all K trajectories in one graph, all logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from openrlhf_gopo import platform

platform.activate()  # before transformers looks for what a machine without a GPU lacks

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from openrlhf_gopo.core.categorical import chosen_logprobs, masked_categorical_logprobs, pad_allowed  # noqa: E402
from openrlhf_gopo.core.preference import (  # noqa: E402
    decision_advantages,
    preference_coefficients,
    preference_pairs,
    trajectory_log_ratio,
    trajectory_preference_loss,
    turn_weights,
)

LABELS, BETA, CLIP = 26, 1.0, 0.2
METHODS = ("ours", "exact", "policy_gradient", "pairwise", "group")
NAIVE = ("pairwise", "group")


@dataclass
class Stream:
    """One trajectory: tokens (S,), positions (T,) whose next token is a label, allowed (T, 26), w_t (T,), and the
    sampler's and the reference's log-probabilities (T,)."""

    tokens: torch.Tensor
    positions: torch.Tensor
    allowed: torch.Tensor
    weights: torch.Tensor
    old: torch.Tensor
    reference: torch.Tensor


class Update:
    """The model, its optimizer and a group of K trajectories."""

    def __init__(self, vocabulary: int, k: int, tokens: int = 300, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=512,
                tie_word_embeddings=True,
            )
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.streams = [self._stream(vocabulary, tokens + int(torch.randint(-20, 21, ()))) for _ in range(k)]
        self.returns = torch.rand(k, dtype=torch.float64)
        self.owner = torch.cat([torch.full((len(s.positions),), i) for i, s in enumerate(self.streams)])
        self.weights = torch.cat([s.weights for s in self.streams])
        with torch.no_grad():
            for stream in self.streams:
                stream.old = self.decision_logprobs(stream)
                stream.reference = stream.old + 0.3 * torch.randn(len(stream.old))

    @staticmethod
    def _stream(vocabulary: int, length: int) -> Stream:
        tokens = torch.randint(LABELS, vocabulary, (length,))
        turns = int(torch.randint(5, 10, ()))
        positions = (torch.arange(1, turns + 1) * (length - 2) // turns).clamp(max=length - 2)
        allowed = pad_allowed(
            [torch.randperm(LABELS)[: int(torch.randint(2, LABELS + 1, ()))].tolist() for _ in range(turns)], LABELS
        )
        tokens[positions + 1] = allowed[:, 0]
        nothing = torch.zeros(turns)
        return Stream(tokens, positions, allowed, turn_weights(turns, mode="mean"), nothing, nothing)

    def decision_logprobs(self, stream: Stream) -> torch.Tensor:
        """(T,), as ``RoleActor`` computes them: no logits but those of the decisions."""
        inputs = stream.tokens.unsqueeze(0)
        output = self.model(inputs, attention_mask=torch.ones_like(inputs), logits_to_keep=stream.positions)
        return self._chosen(output.logits[0], stream)

    def full_logprobs(self, streams: list[Stream]) -> list[torch.Tensor]:
        """[(T,)], from the logits of every position of a padded batch."""
        inputs = torch.nn.utils.rnn.pad_sequence([s.tokens for s in streams], batch_first=True)
        lengths = torch.tensor([len(s.tokens) for s in streams])
        mask = (torch.arange(inputs.shape[1]) < lengths.unsqueeze(1)).long()
        logits = self.model(inputs, attention_mask=mask).logits
        return [self._chosen(row[s.positions], s) for row, s in zip(logits, streams, strict=True)]

    @staticmethod
    def _chosen(logits: torch.Tensor, stream: Stream) -> torch.Tensor:
        logprobs, _ = masked_categorical_logprobs(logits, stream.allowed)
        return chosen_logprobs(logprobs, stream.allowed, stream.tokens[stream.positions + 1])

    def log_ratio(self, logprobs: list[torch.Tensor], streams: list[Stream]) -> torch.Tensor:
        """m(tau), (len(streams),)"""
        owner = torch.cat([torch.full((len(s.positions),), i) for i, s in enumerate(streams)])
        reference, weights = (torch.cat([getattr(s, name) for s in streams]) for name in ("reference", "weights"))
        return trajectory_log_ratio(torch.cat(logprobs).double(), reference, owner, weights, len(streams))

    def coefficients(self, logprobs: list[torch.Tensor]) -> torch.Tensor:
        m = self.log_ratio(logprobs, self.streams)
        everyone = [torch.arange(len(self.streams))]
        return preference_coefficients(m, self.returns, everyone, beta=BETA)[0]

    def preference_advantages(self) -> torch.Tensor:
        """What the preference adds to a policy gradient on the first update after a rollout, (N,)"""
        return decision_advantages(self.coefficients([s.old for s in self.streams]), self.owner, self.weights)

    def clipped(self, advantages: torch.Tensor) -> None:
        parts = advantages.float().split([len(s.positions) for s in self.streams])
        for stream, advantage in zip(self.streams, parts, strict=True):
            ratio = (self.decision_logprobs(stream) - stream.old).exp()
            loss = -torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            (loss.sum() / len(self.owner)).backward()

    def ours(self) -> None:
        self.clipped(self.preference_advantages())

    def policy_gradient(self) -> None:
        score = (self.returns - self.returns.mean()) / self.returns.std()
        self.clipped(score[self.owner])

    def exact(self) -> None:
        with torch.no_grad():
            current = [self.decision_logprobs(s) for s in self.streams]
        for c, stream in zip(self.coefficients(current).tolist(), self.streams, strict=True):
            (-c * self.log_ratio([self.decision_logprobs(stream)], [stream])[0]).backward()

    def pairwise(self) -> None:
        pairs = preference_pairs(self.returns)
        for pair in pairs:
            both = [self.streams[i] for i in pair]
            m = self.log_ratio(self.full_logprobs(both), both)
            loss = trajectory_preference_loss(m, torch.tensor([[0, 1]]), beta=BETA)
            (loss.sum() / len(pairs)).backward()

    def group(self) -> None:
        pairs = preference_pairs(self.returns)
        m = self.log_ratio(self.full_logprobs(self.streams), self.streams)
        trajectory_preference_loss(m, pairs, beta=BETA).mean().backward()

    def gradient(self, method: str) -> torch.Tensor:
        self.optimizer.zero_grad()
        getattr(self, method)()
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def step(self, method: str) -> None:
        self.optimizer.zero_grad()
        getattr(self, method)()
        self.optimizer.step()


def check() -> dict[str, float]:
    """All ways have one gradient: largest difference to ``group``'s, over its largest element."""
    update = Update(vocabulary=2000, k=4)
    expected = update.gradient("group")
    error = {}
    for method in ("pairwise", "exact", "ours"):
        found = update.gradient(method)
        if method == "ours":  # up to the one positive factor of the advantages' normalisation
            found = found * (found @ expected) / (found @ found)
        error[method] = float((found - expected).abs().max() / expected.abs().max())
    if max(error.values()) > 1e-3:
        raise SystemExit(f"the methods' gradients differ: {error}")
    return error
