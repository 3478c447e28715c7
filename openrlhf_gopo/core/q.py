"""The credit term ``q``: a value for every allowed strategy, not only the one that was drawn. Ours, not the paper's.

    Q(s, z) = [h; 1] . (u + v_z)                                    h: hidden state at the decision, standardised
    A(s, z) = [Q(s, z) - sum_{z' in A} pi_old(z'|s) Q(s, z')] / RMS                    RMS^2 = E_s sum_z pi_old A^2
    L       = - mean_s sum_{z in A} pi_old(z|s) min(rho_z A(s, z), clip(rho_z) A(s, z))         rho_z = pi / pi_old

At pi = pi_old the gradient of -L is that of a preference between all strategies of one state,

    1/2 sum_{z,z'} pi(z) pi(z') (A_z - A_z') grad(log pi_z - log pi_z').

With the true Q its mean is the policy gradient, without the noise of which strategy was drawn; with a fitted one it is
biased by the fit. A fit in closed form needs no learning rate and no optimizer, and is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

RIDGE_SHARED, RIDGE_OWN = 0.1, 1.0  # per feature: all strategies share u, a single one must be sure of its v_z


@dataclass(frozen=True)
class Q:
    """A fitted Q. ``mean``, ``scale`` (d,): of the hidden states; ``shared`` (d + 1,): u; ``own``: label -> v_z."""

    mean: torch.Tensor
    scale: torch.Tensor
    shared: torch.Tensor
    own: Mapping[int, torch.Tensor]

    def values(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Q(s, z): hidden (N, d), labels (N, L) token ids -> (N, L) float64; a label never chosen has v_z = 0."""
        features = _features(hidden, self.mean, self.scale)
        values = (features @ self.shared).unsqueeze(1).repeat(1, labels.shape[1])
        for label, weight in self.own.items():
            values += (labels == label) * (features @ weight).unsqueeze(1)
        return values


def fit_q(
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    togo: torch.Tensor,
    *,
    ridge_shared: float = RIDGE_SHARED,
    ridge_own: float = RIDGE_OWN,
) -> Q:
    """Fit Q to returns to go by ridge regression: u on all decisions, then each v_z on what u leaves of its own.

    Args:
        hidden: (N, d), N >= 1. chosen: (N,) label token ids. togo: (N,) returns to go.
        ridge_shared, ridge_own: penalties per feature, multiplied by d + 1.
    """
    hidden = hidden.double()
    mean, scale = hidden.mean(0), hidden.std(0, correction=0) + 1e-6
    features = _features(hidden, mean, scale)
    width = features.shape[1]
    shared = _ridge(features, togo.double(), ridge_shared * width)
    left = togo.double() - features @ shared
    rows = {int(label): chosen == label for label in chosen.unique()}
    own = {label: _ridge(features[mine], left[mine], ridge_own * width) for label, mine in rows.items()}
    return Q(mean, scale, shared, own)


def explained(values: torch.Tensor, togo: torch.Tensor) -> float:
    """Share of the variance of ``togo`` (N,) that ``values`` (N,) explain: 1 all, 0 as the mean does, below 0 worse."""
    togo = togo.double()
    variance = float((togo - togo.mean()).pow(2).mean()) if len(togo) else 0.0
    return 1.0 - float((values - togo).pow(2).mean()) / variance if variance > 0 else 0.0


def q_advantages(values: torch.Tensor, logprobs: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A(s, z) before its division by the RMS: values, logprobs (N, L) and valid (N, L), True at allowed labels.

    Returns:
        (N, L) float64, 0 where not valid.
    """
    probabilities = logprobs.double().exp() * valid
    centred = values - (probabilities * values.masked_fill(~valid, 0.0)).sum(1, keepdim=True)
    return centred.masked_fill(~valid, 0.0)


def mean_square(advantages: torch.Tensor, logprobs: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """sum_s sum_z pi_old A^2, a scalar: the square of the RMS, times the number of decisions."""
    return (logprobs.double().exp() * valid * advantages.pow(2)).sum()


def q_surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    valid: torch.Tensor,
    clip: tuple[float, float] = (0.2, 0.2),
) -> torch.Tensor:
    """The loss L of each decision: (N, L) each -> (N,); 0 for a row without a valid label (a word of a plan).

    Args:
        logprobs: at the current parameters, with a graph; old_logprobs: at the sampler's.
        clip: how far rho may move below and above 1.
    """
    ratio = (logprobs - old_logprobs).masked_fill(~valid, 0.0).clamp(-20.0, 20.0).exp()
    gain = torch.min(ratio * advantages, ratio.clamp(1.0 - clip[0], 1.0 + clip[1]) * advantages)
    return -(old_logprobs.masked_fill(~valid, float("-inf")).exp() * gain).sum(dim=1)


def _features(hidden: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    standard = (hidden.double() - mean) / scale
    return torch.cat([standard, standard.new_ones(len(standard), 1)], dim=1)


def _ridge(features: torch.Tensor, targets: torch.Tensor, penalty: float) -> torch.Tensor:
    """argmin_w |X w - y|^2 + penalty |w|^2, by the smaller of its two normal equations: X (n, d), y (n,) -> (d,)."""
    n, d = features.shape
    if d <= n:
        system = features.T @ features + penalty * torch.eye(d, dtype=features.dtype)
        return torch.linalg.solve(system, features.T @ targets)
    system = features @ features.T + penalty * torch.eye(n, dtype=features.dtype)
    return features.T @ torch.linalg.solve(system, targets)
