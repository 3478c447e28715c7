"""The trajectory-level preference loss. The formulas are ours: the paper's abstract names the method without them.

For a trajectory tau with T decisions, w_t the turn weights,

    m(tau) = sum_t w_t [log pi(z_t|h_t,A_t) - log pi_ref(z_t|h_t,A_t)]
    L      = mean over pairs (w, l) of  (R_w - R_l)^g [-(1-eps) log sigmoid(x) - eps log sigmoid(-x)],
    x      = beta (m(tau_w) - m(tau_l)) - offset (R_w - R_l)

With T = 1, two trajectories, offset = 0 and g = 0 (``gap_weight``) this is DPO (arXiv 2305.18290, eq. 7). ``listwise``
replaces the pairs of a group by one Plackett-Luce term over its trajectories in order of return.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def turn_weights(num_turns: int, *, mode: str, discount: float = 0.95) -> torch.Tensor:
    """w_t for t = 0..T-1, shape (T,), float64: 1 ("sum"), 1/T ("mean"), g^t (1-g^(T-t)) / (1-g^T) ("dmpo").

    The dmpo weights are those of DMPO (arXiv 2406.14868) with discount g = ``discount`` in (0, 1).
    """
    t = torch.arange(num_turns, dtype=torch.float64)
    if mode == "sum":
        return torch.ones(num_turns, dtype=torch.float64)
    if mode == "mean":
        return torch.full((num_turns,), 1.0 / max(num_turns, 1), dtype=torch.float64)
    if mode == "dmpo":
        return discount**t * (1 - discount ** (num_turns - t)) / (1 - discount**num_turns)
    raise ValueError(f"turn_weights: unknown mode {mode!r}")


def action_weights(turns: torch.Tensor, *, mode: str, discount: float = 0.95) -> torch.Tensor:
    """w_t of each action of one trajectory, (N,) float64; ``turns`` (N,) is its decision (``turn_of_actions``).

    The words of a plan weigh what the label after them weighs: together they are the action of their turn.
    """
    return turn_weights(int(turns[-1]) + 1 if len(turns) else 0, mode=mode, discount=discount)[turns]


def trajectory_log_ratio(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, trajectory: torch.Tensor, weights: torch.Tensor, count: int
) -> torch.Tensor:
    """m(tau) of ``count`` trajectories: (N,) decisions -> (count,); ``trajectory`` (N,) says whose decision each is."""
    ratios = weights * (logprobs - ref_logprobs)
    return ratios.new_zeros(count).index_add(0, trajectory, ratios)


def preference_pairs(returns: torch.Tensor, *, pairing: str, margin: float = 0.0) -> torch.Tensor:
    """Pairs of one group: returns (K,) -> LongTensor (P, 2) of (winner, loser), R_winner - R_loser > ``margin``.

    ``all``: every such pair; ``best_worst``: the first best against the first worst; ``adjacent``: neighbours in the
    stable order of falling return. A group without spread gives P = 0.
    """
    if len(returns) == 0:  # a group of which every trajectory was quarantined: there is no best one to look for
        return torch.empty((0, 2), dtype=torch.long, device=returns.device)
    order = torch.argsort(returns, descending=True, stable=True)
    if pairing == "all":
        winners, losers = torch.triu_indices(len(order), len(order), offset=1)
        pairs = torch.stack([order[winners], order[losers]], dim=1)
    elif pairing == "adjacent":
        pairs = torch.stack([order[:-1], order[1:]], dim=1)
    elif pairing == "best_worst":
        pairs = torch.stack([returns.argmax(), returns.argmin()]).unsqueeze(0)
    else:
        raise ValueError(f"preference_pairs: unknown pairing {pairing!r}")
    return pairs[returns[pairs[:, 0]] - returns[pairs[:, 1]] > margin]


def trajectory_preference_loss(
    log_ratios: torch.Tensor,
    returns: torch.Tensor,
    pairs: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    offset: float = 0.0,
    gap_weight: float = 0.0,
) -> torch.Tensor:
    """Loss of each pair: log_ratios (M,), returns (M,), pairs (P, 2) -> (P,). The mean over a batch's pairs is L."""
    winner, loser = pairs[:, 0], pairs[:, 1]
    gap = returns[winner] - returns[loser]
    x = beta * (log_ratios[winner] - log_ratios[loser]) - offset * gap
    return -(gap**gap_weight) * ((1 - label_smoothing) * logsigmoid(x) + label_smoothing * logsigmoid(-x))


def listwise_preference_loss(
    log_ratios: torch.Tensor, returns: torch.Tensor, *, beta: float, margin: float = 0.0
) -> torch.Tensor:
    """Plackett-Luce loss of one group of K trajectories, a scalar: -(1/(K-1)) sum_k log p(k-th best | the rest).

    Equal returns carry no preference: each trajectory competes only against those that are worse by more than
    ``margin``.
    """
    scores = beta * log_ratios
    worse = returns.unsqueeze(1) - returns.unsqueeze(0) > margin  # [i, j]: j is worse than i
    rows = worse.any(dim=1)
    if not bool(rows.any()):
        return (scores * 0.0).sum()
    field = worse | torch.eye(len(returns), dtype=torch.bool, device=returns.device)
    chances = scores - scores.unsqueeze(0).masked_fill(~field, float("-inf")).logsumexp(dim=1)
    return -chances[rows].sum() / (len(returns) - 1)


def preference_coefficients(
    log_ratios: torch.Tensor,
    returns: torch.Tensor,
    groups: list[torch.Tensor],
    *,
    pairing: str,
    beta: float,
    margin: float = 0.0,
    **pair_options: float,
) -> tuple[torch.Tensor, dict[str, float]]:
    """c_i = -dL/dm(tau_i), so that the gradient of L is -sum_i c_i grad m(tau_i), whatever the micro-batching.

    Args:
        log_ratios: (M,) m(tau_i) at the parameters where the gradient is wanted.
        returns: (M,) R_i.
        groups: LongTensors of trajectory indices; trajectories of one goal. A quarantined trajectory is in none.
        pair_options: label_smoothing, offset and gap_weight of ``trajectory_preference_loss``; not for ``listwise``.

    Returns:
        coefficients (M,) in float64, and metrics: ``pref_loss``, ``pref_accuracy`` (share of pairs whose winner has
        the larger m; ties count half), ``pref_margin`` and ``pref_return_gap`` (mean m_w - m_l and R_w - R_l),
        ``pref_pairs``, ``pref_groups_without_spread`` and ``pref_terms`` (pairs, or groups with listwise: what
        L is the mean of) as counts.
    """
    m = log_ratios.detach().double().requires_grad_(True)
    returns = returns.double()
    terms, pairs = [], []
    # The comparisons need gradients even when a caller (upstream's experience maker) switched them off.
    with torch.enable_grad():
        for group in groups:
            found = preference_pairs(returns[group], pairing="all" if pairing == "listwise" else pairing, margin=margin)
            pairs.append(group[found])
            if len(found) and pairing == "listwise":
                terms.append(listwise_preference_loss(m[group], returns[group], beta=beta, margin=margin).reshape(1))
            elif len(found):
                terms.append(trajectory_preference_loss(m, returns, pairs[-1], beta=beta, **pair_options))
        loss = torch.cat(terms).mean() if terms else (m * 0.0).sum()
        (gradient,) = torch.autograd.grad(loss, m)
    metrics = {"pref_loss": float(loss.detach()), "pref_terms": float(sum(len(term) for term in terms))}
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
