"""The trajectory-level preference loss. The formulas are ours: the paper's abstract names the method without them.

For a trajectory tau with T decisions, w_t the turn weights,

    m(tau) = sum_t w_t [log pi(z_t|h_t,A_t) - log pi_ref(z_t|h_t,A_t)]
    L      = mean over pairs (w, l) of  -log sigmoid(beta (m(tau_w) - m(tau_l)))

over all pairs of trajectories of one goal with R_w > R_l. With T = 1 and two trajectories this is DPO (arXiv
2305.18290, eq. 7). As a policy gradient it is biased: it follows which return is larger, not by how much.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

TIE = 1e-9  # returns nearer than this are equal: rounding must not become a preference


def turn_weights(num_turns: int, *, mode: str) -> torch.Tensor:
    """w_t for t = 0..T-1, shape (T,), float64: 1 ("sum") or 1/T ("mean").

    Raises:
        ValueError: unknown ``mode``.
    """
    if mode not in ("sum", "mean"):
        raise ValueError(f"turn_weights: unknown mode {mode!r}")
    return torch.full((num_turns,), 1.0 if mode == "sum" else 1.0 / max(num_turns, 1), dtype=torch.float64)


def action_weights(turns: torch.Tensor, *, mode: str) -> torch.Tensor:
    """w_t of each action of one trajectory, (N,) float64; ``turns`` (N,) is its decision (``turn_of_actions``).

    The words of a plan weigh what the label after them weighs: together they are the action of their turn.
    """
    return turn_weights(int(turns[-1]) + 1 if len(turns) else 0, mode=mode)[turns]


def trajectory_log_ratio(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, trajectory: torch.Tensor, weights: torch.Tensor, count: int
) -> torch.Tensor:
    """m(tau) of ``count`` trajectories: (N,) decisions -> (count,); ``trajectory`` (N,) says whose decision each is."""
    ratios = weights * (logprobs - ref_logprobs)
    return ratios.new_zeros(count).index_add(0, trajectory, ratios)


def preference_pairs(returns: torch.Tensor) -> torch.Tensor:
    """Every pair of one group: returns (K,) -> LongTensor (P, 2) of (winner, loser), R_winner - R_loser > ``TIE``.

    A group without spread gives P = 0.
    """
    order = torch.argsort(returns, descending=True, stable=True)
    winners, losers = torch.triu_indices(len(order), len(order), offset=1)
    pairs = torch.stack([order[winners], order[losers]], dim=1)
    return pairs[returns[pairs[:, 0]] - returns[pairs[:, 1]] > TIE]


def trajectory_preference_loss(log_ratios: torch.Tensor, pairs: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Loss of each pair: log_ratios (M,), pairs (P, 2) -> (P,). The mean over a batch's pairs is L."""
    return -logsigmoid(beta * (log_ratios[pairs[:, 0]] - log_ratios[pairs[:, 1]]))


def preference_coefficients(
    log_ratios: torch.Tensor, returns: torch.Tensor, groups: list[torch.Tensor], *, beta: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """c_i = -dL/dm(tau_i), so that the gradient of L is -sum_i c_i grad m(tau_i), whatever the micro-batching.

    Args:
        log_ratios: (M,) m(tau_i) at the parameters where the gradient is wanted.
        returns: (M,) R_i.
        groups: LongTensors of trajectory indices; trajectories of one goal. A quarantined trajectory is in none.

    Returns:
        coefficients (M,) in float64, and metrics: ``pref_loss``, ``pref_accuracy`` (share of pairs whose winner has
        the larger m; ties count half), ``pref_margin`` and ``pref_return_gap`` (mean m_w - m_l and R_w - R_l),
        ``pref_pairs`` (what L is the mean of) and ``pref_groups_without_spread`` as counts.
    """
    m = log_ratios.detach().double().requires_grad_(True)
    returns = returns.double()
    pairs = [group[preference_pairs(returns[group])] for group in groups]
    # The comparisons need gradients even when a caller (upstream's experience maker) switched them off.
    with torch.enable_grad():
        terms = [trajectory_preference_loss(m, of_group, beta=beta) for of_group in pairs if len(of_group)]
        loss = torch.cat(terms).mean() if terms else (m * 0.0).sum()
        (gradient,) = torch.autograd.grad(loss, m)
    metrics = {"pref_loss": float(loss.detach())}
    metrics["pref_groups_without_spread"] = float(sum(len(of_group) == 0 for of_group in pairs))
    return -gradient, metrics | _pair_metrics(m.detach(), returns, pairs)


def _pair_metrics(m: torch.Tensor, returns: torch.Tensor, pairs: list[torch.Tensor]) -> dict[str, float]:
    if not sum(map(len, pairs)):
        return {"pref_accuracy": 0.5, "pref_margin": 0.0, "pref_return_gap": 0.0, "pref_pairs": 0.0}
    winner, loser = torch.cat(pairs).T
    gap = m[winner] - m[loser]
    return {
        "pref_accuracy": float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean()),
        "pref_margin": float(gap.mean()),
        "pref_return_gap": float((returns[winner] - returns[loser]).mean()),
        "pref_pairs": float(len(gap)),
    }


def decision_advantages(
    coefficients: torch.Tensor, trajectory: torch.Tensor, weights: torch.Tensor, eps: float = 1e-12
) -> torch.Tensor:
    """Spread c_i over the decisions: A_n = c_{i(n)} w_n, divided by the root mean square over the batch -> (N,).

    One positive factor for the whole batch: on the first step the clipped policy loss with these advantages has the
    gradient of L up to that factor. All zeros stay zeros.
    """
    spread = coefficients[trajectory] * weights
    if len(spread) == 0:
        return spread
    return spread / spread.pow(2).mean().sqrt().clamp(min=eps)
