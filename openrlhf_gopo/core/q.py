"""A value per strategy, Q(s, z), and what the expert learns from it: a term over all allowed labels, not the drawn one.

All formulas here are ours, not the paper's. With h the hidden state at a decision, standardised over the rows of the
fit and divided by sqrt(d), x = [h; 1]:

    Q(s, z) = mean(G) + h . u + x . v_z                          ridge regressions in closed form
    A(s, z) = (Q(s, z) - sum_{z' in A} pi_old(z'|s) Q(s, z')) / RMS
    L = -sum_{z in A} pi_old(z) min(rho_z A_z, clip(rho_z) A_z)   rho_z = pi(z) / pi_old(z), per decision

At pi = pi_old the gradient of -L is a preference between the strategies of one state:

    sum_z pi_z A_z grad log pi_z = 1/2 sum_{z,z'} pi_z pi_z' (Q_z - Q_z') grad(log pi_z - log pi_z') / RMS

so what is added to all Q of a state, u included, moves nothing. With the true Q of pi it is the policy gradient, with
the choice of the label summed out instead of sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Noise in G over what the features explain of it: penalties of |u|^2 and of |v_z|^2. For any d, as |h|^2 is about 1.
RIDGE_STATE, RIDGE_LABEL = 0.1, 1.0
MAX_LOG_RATIO = 20.0  # upstream's clamp, so that exp stays finite


@dataclass(frozen=True)
class QFit:
    """A fitted Q. ``mean``, ``scale``: (d,), of the features. ``base``: mean return. ``u``: (d,). ``labels``: (K,) ids,
    sorted. ``v``: (K + 1, d + 1), whose last row, zeros, is that of every other label."""

    mean: torch.Tensor
    scale: torch.Tensor
    base: torch.Tensor
    u: torch.Tensor
    labels: torch.Tensor
    v: torch.Tensor

    def values(self, h: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Q(s, z): hidden states (N, d), label ids (N, L) -> (N, L), float64; any value at ids that are no labels."""
        x = (h.double() - self.mean) / self.scale
        place = torch.searchsorted(self.labels, z.contiguous()).clamp(max=len(self.labels) - 1)
        place = torch.where(self.labels[place] == z, place, len(self.labels))
        return (self.base + x @ self.u).unsqueeze(-1) + (_with_bias(x) @ self.v.T).gather(-1, place)


def fit(
    h: torch.Tensor,
    z: torch.Tensor,
    togo: torch.Tensor,
    *,
    ridge_state: float = RIDGE_STATE,
    ridge_label: float = RIDGE_LABEL,
) -> QFit:
    """First u on all rows, then the v_z of each label on what is left of the rows that chose it.

    u minimises sum_n (G_n - mean(G) - h_n . u)^2 + ridge_state |u|^2, and v_z the same over its rows with x. A label
    that no row chose has v_z = 0. There is no learning rate and no noise: equal rows give an equal Q.

    Args:
        h: (N, d) hidden states, N >= 1. z: (N,) ids of the chosen labels. togo: (N,) returns to go.
        ridge_state: penalty of |u|^2, positive. ridge_label: penalty of |v_z|^2, positive.

    Raises:
        ValueError: there are no rows.
    """
    if len(h) == 0:
        raise ValueError("fit: no decision to learn a value from")
    h, togo = h.double(), togo.double()
    mean, deviation = h.mean(dim=0), h.std(dim=0, unbiased=False)
    # A feature that does not vary says nothing; divided by its rounding noise it would.
    varies = deviation > 1e-6 * h.abs().amax(dim=0).clamp(min=1e-12)
    scale = torch.where(varies, deviation, torch.full_like(deviation, float("inf"))) * h.shape[1] ** 0.5
    x, base = (h - mean) / scale, togo.mean()
    u = _ridge(x, togo - base, ridge_state)
    left, x = togo - base - x @ u, _with_bias(x)
    labels = z.unique()
    own = [_ridge(x[mine], left[mine], ridge_label) for mine in (z == label for label in labels)]
    return QFit(mean, scale, base, u, labels, torch.stack([*own, torch.zeros_like(own[0])]))


def explained_variance(predicted: torch.Tensor, togo: torch.Tensor) -> float | None:
    """1 - sum (G - predicted)^2 / sum (G - mean(G))^2 of (N,) rows; None where G does not vary."""
    togo = togo.double()
    total = float((togo - togo.mean()).pow(2).sum()) if len(togo) else 0.0
    return 1.0 - float((togo - predicted.double()).pow(2).sum()) / total if total > 0 else None


def advantages(
    q: torch.Tensor,
    logprobs: torch.Tensor,
    valid: torch.Tensor,
    everywhere: Callable[[torch.Tensor], torch.Tensor] = lambda squares: squares,
) -> torch.Tensor:
    """A(s, z) = Q(s, z) - sum_{z'} pi_old(z') Q(s, z'), over the root of E_n sum_z pi_old(z) A^2: (N, L), float64.

    Zero at the padding. A batch of zeros, where no decision had a choice, stays zero.

    Args:
        q: (N, L). logprobs: (N, L), log pi_old. valid: (N, L), True at the allowed labels, False at the padding; rows
            without any are words, no decisions, and count in no mean.
        everywhere: gathers the decisions of all processes, (M,) -> (M',), for the mean.
    """
    zero = q.new_zeros((), dtype=torch.float64)
    pi = torch.where(valid, logprobs.double().exp(), zero)
    pi = pi / pi.sum(dim=-1, keepdim=True).clamp(min=1e-300)  # of float32 the sum is 1 up to 1e-7
    q = torch.where(valid, q.double(), zero)
    centred = torch.where(valid, q - (pi * q).sum(dim=-1, keepdim=True), zero)
    squares = everywhere((pi * centred.pow(2)).sum(dim=-1)[valid.any(dim=-1)])
    # Where all labels have one value, what is left is rounding noise: it must not become an advantage.
    noise = 1e-12 * max(1.0, float(q.abs().max()) if q.numel() else 0.0)
    return centred / squares.mean().sqrt() if len(squares) and float(squares.mean()) > noise**2 else centred * 0.0


def surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    valid: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """L of each decision, PPO's clipped loss in expectation over pi_old: (N, L) each -> (N,).

    L_n = -sum_{z in A_n} pi_old(z) min(rho_z A_z, clip(rho_z, 1 - clip_low, 1 + clip_high) A_z). Rows without an
    allowed label (words of a plan) give 0.

    Args:
        logprobs: log pi, with its graph; anything at the padding. old_logprobs: log pi_old.
        advantages: A, e.g. of ``advantages``. valid: True at the allowed labels, False at the padding.
    """
    # -inf - -inf is nan, also in the backward pass: the padding is replaced before, not after.
    now, old = logprobs.masked_fill(~valid, 0.0), old_logprobs.masked_fill(~valid, 0.0)
    ratio = (now - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    return -(old.exp() * gain * valid).sum(dim=-1)


def _with_bias(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=-1)


def _ridge(x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
    """argmin_w |y - x w|^2 + penalty |w|^2, (n, d), (n,) -> (d,), by the smaller of the two systems of equations."""
    n, d = x.shape
    gram = x.T @ x if d <= n else x @ x.T
    gram.diagonal().add_(penalty)
    factor = torch.linalg.cholesky(gram)
    if d <= n:
        return torch.cholesky_solve((x.T @ y).unsqueeze(-1), factor).squeeze(-1)
    return x.T @ torch.cholesky_solve(y.unsqueeze(-1), factor).squeeze(-1)
