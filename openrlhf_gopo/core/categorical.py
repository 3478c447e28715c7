"""The expert's policy: an exact categorical over the labels that the SOP allows."""

from __future__ import annotations

import torch

PAD = -1  # fills the rows of an ``allowed`` matrix; never a token id. A row of nothing else is no decision at all


def pad_allowed(allowed: list[list[int]], width: int | None = None) -> torch.Tensor:
    """Stack per-action label ids into a LongTensor (N, L) filled with ``PAD``; L = ``width`` or the longest row."""
    width = max((len(row) for row in allowed), default=0) if width is None else width
    rows = [row + [PAD] * (width - len(row)) for row in allowed]
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), width)


def turn_of_actions(allowed: torch.Tensor) -> torch.Tensor:
    """Which decision each action belongs to: (N, L) -> (N,) LongTensor, counting from 0.

    Words (rows of ``PAD``) are the plan of the decision that follows them.
    """
    decision = (allowed != PAD).any(dim=-1).long()
    return decision.cumsum(0) - decision


def masked_categorical_logprobs(
    logits: torch.Tensor, allowed: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(z | h, A) = l_z / tau - logsumexp_{z' in A} l_{z'} / tau, and its entropy.

    Args:
        logits: (N, V) at the decision positions.
        allowed: (N, L) label token ids, ``PAD`` where a row has fewer; every row has at least one id.
        temperature: tau > 0, the sampler's.

    Returns:
        log-probabilities (N, L), -inf at the padding; entropies (N,) in nats. Both float32 or wider.

    Raises:
        ValueError: a row of ``allowed`` is empty.
    """
    valid = allowed != PAD
    if not bool(valid.any(dim=-1).all()):
        raise ValueError("masked_categorical_logprobs: a decision has no allowed label")
    scores = logits.gather(-1, allowed.clamp(min=0)).to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logprobs = torch.log_softmax(scores.masked_fill(~valid, float("-inf")), dim=-1)
    # 0 * -inf is nan, also in the backward pass: the padding is replaced before the product, not after.
    finite = logprobs.masked_fill(~valid, 0.0)
    return logprobs, -(finite.exp() * finite * valid).sum(dim=-1)


def chosen_logprobs(logprobs: torch.Tensor, allowed: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """log pi of the chosen label of each decision: (N, L), (N, L), (N,) token ids -> (N,).

    Raises:
        ValueError: a chosen token is not among the allowed ones: the stream and its masks disagree.
    """
    hit = allowed == chosen.unsqueeze(-1)
    if not bool(hit.any(dim=-1).all()):
        row = int((~hit.any(dim=-1)).nonzero()[0])
        raise ValueError(f"decision {row}: token {int(chosen[row])} is not an allowed label {allowed[row].tolist()}")
    return logprobs.gather(-1, hit.long().argmax(dim=-1, keepdim=True)).squeeze(-1)
