"""Why some rows of the study end above others: how noisy each kind of credit is, before any learning.

    python examples/shop_cpu/credit_noise.py --out runs/study

In their first update all runs of a seed play the same goals with the same expert, the warm start: their batches are
samples of one gradient. Products of two batches' gradients g_i, g_j have no noise in their mean, so that

    signal     mean_{i != j} <g_i, g_j> / mean_i <g_i, g_i>: 1 without noise, 0 with nothing else
    direction  the cosine of the expected gradient and that of returns to go against the fit below, likewise

g is the gradient of the rows of the output layer that score labels, which one forward pass gives for every kind of
credit: with the hidden state h_n of decision n and its advantage A_n, g = sum_n A_n (e_{z_n} - pi_n) h_n^T.

The fit stands for the critic: the returns to go of the other batches, linear in what a reader of the dialogue knows.
With lambda 1 it is a baseline that no choice moves, so its expected gradient is the true one.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openrlhf_gopo.config import EXPERT
from openrlhf_gopo.core.categorical import masked_categorical_logprobs
from openrlhf_gopo.core.preference import decision_advantages, preference_coefficients
from openrlhf_gopo.core.turn_level import gae, returns_to_go, turn_advantages, unit_scale
from openrlhf_gopo.evaluation.records import read_trajectories
from openrlhf_gopo.platform import activate
from openrlhf_gopo.rewards.turns import turn_rewards
from openrlhf_gopo.types import Trajectory

REWARD = {"tse": 1.0, "esndcg": 1.0}  # --gopo.expert_reward of the study
UNBIASED = "fit, lambda 1"


@dataclass
class Batch:
    """The decisions of one update: N of them, in M trajectories."""

    counts: list[int]  # decisions of each trajectory
    groups: list[torch.Tensor]  # indices of the trajectories of one goal
    returns: torch.Tensor  # (M,) of the trajectories
    earned: torch.Tensor  # (N,) what was earned from one decision to the next
    against_group: torch.Tensor  # (N,) return to go less those of the goal's other dialogues at that turn
    states: torch.Tensor  # (N, F) what the fit sees
    scores: torch.Tensor  # (N, V) d log pi(z_n) / d logits
    hidden: torch.Tensor  # (N, H) last hidden states


def states_of(trajectory: Trajectory) -> list[list[float]]:
    """What is known before each decision: the turn, the weight of the subgoals done, the user's engagement."""
    rows, done, engagement = [], 0.0, 1.0
    for t, turn in enumerate(trajectory.turns):
        if not turn.forced:
            rows.append([1.0, t, t * t, done, done * t, engagement, engagement * done])
        done += sum(trajectory.goal.subgoals.get(subgoal, 0.0) for subgoal in turn.completed)
        engagement = turn.engagement
    return rows


@torch.no_grad()
def scored(model: Any, trajectory: Trajectory) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, V) d log pi(z_t) / d logits, zero outside the allowed labels, and (T, H) hidden states of the decisions."""
    stream = trajectory.streams[EXPERT]
    before = [start - 1 for start, _ in stream.spans]
    hidden = model.model(torch.tensor([stream.tokens])).last_hidden_state[0, before]
    logits = model.get_output_embeddings()(hidden)
    scores = torch.zeros_like(logits)
    for t, ((start, _), allowed) in enumerate(zip(stream.spans, stream.allowed, strict=True)):
        logprobs, _ = masked_categorical_logprobs(logits[t : t + 1], torch.tensor([allowed]))
        scores[t, allowed] = -logprobs[0].exp()
        scores[t, stream.tokens[start]] += 1.0
    return scores.double(), hidden.double()


def batch_of(model: Any, trajectories: list[Trajectory]) -> Batch:
    """Score the dialogues of one update."""
    rewards = [turn_rewards(trajectory, REWARD) for trajectory in trajectories]
    decided = [[t for t, turn in enumerate(trajectory.turns) if not turn.forced] for trajectory in trajectories]
    scores, hidden = zip(*(scored(model, trajectory) for trajectory in trajectories), strict=True)
    ids = [trajectory.goal.id for trajectory in trajectories]
    groups = [torch.tensor([i for i, other in enumerate(ids) if other == goal]) for goal in dict.fromkeys(ids)]
    parts = [
        sum(row[start:stop]) for row, turns in zip(rewards, decided, strict=True) for start, stop in _stretches(turns)
    ]
    by_turn = turn_advantages(rewards, groups)
    return Batch(
        counts=[len(turns) for turns in decided],
        groups=groups,
        returns=torch.tensor([sum(row) for row in rewards], dtype=torch.float64),
        earned=torch.tensor(parts, dtype=torch.float64),
        against_group=torch.cat([row[turns] for row, turns in zip(by_turn, decided, strict=True)]),
        states=torch.tensor([row for t in trajectories for row in states_of(t)], dtype=torch.float64),
        scores=torch.cat(scores),
        hidden=torch.cat(hidden),
    )


def _stretches(turns: list[int]) -> list[tuple[int, int | None]]:
    """From each decision's turn to the next one's, and to the end."""
    return list(zip(turns, [*turns[1:], None], strict=True))


def values_of(batch: Batch, others: list[Batch]) -> torch.Tensor:
    """(N,) values of the decisions by a fit to ``others``; the ridge is there for features that never vary."""
    states = torch.cat([other.states for other in others])
    returns = torch.cat([returns_to_go(other.earned, other.counts) for other in others])
    ridge = 0.1 * torch.eye(states.shape[1], dtype=torch.float64)
    return batch.states @ torch.linalg.solve(states.T @ states + ridge, states.T @ returns)


def credits(batch: Batch, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """(N,) advantages of every kind, each at unit root mean square, as `ExpertExperienceMaker` makes them."""
    owner = torch.repeat_interleave(torch.arange(len(batch.counts)), torch.tensor(batch.counts))
    coefficients, _ = preference_coefficients(torch.zeros_like(batch.returns), batch.returns, batch.groups, beta=0.1)
    preference = decision_advantages(coefficients, owner, torch.ones_like(batch.earned))
    against_group = unit_scale(batch.against_group)
    found = {
        "preference": preference,
        "returns to go": against_group,
        "preference + returns to go": preference + against_group,
    }
    for lambd in (1.0, 0.8):
        advantages = gae(batch.earned, values, batch.counts, gamma=1.0, lambd=lambd)
        fitted = unit_scale(advantages - advantages.mean())
        found |= {f"fit, lambda {lambd:g}": fitted, f"preference + fit, lambda {lambd:g}": preference + fitted}
    return found


def products(left: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    """Means of <g_i, g'_j> over i != j and over i = j: two (B, D) -> two numbers.

    >>> products(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    (1.0, 3.0)
    """
    table = left @ right.T
    same = table.diagonal().mean()
    return float((table.sum() - table.diagonal().sum()) / (table.numel() - len(table))), float(same)


def agreement(gradients: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Signal and direction of every kind of credit, from the gradients (B, D) of one seed's batches; the direction is
    NaN where noise hides the gradient."""
    reference, _ = products(gradients[UNBIASED], gradients[UNBIASED])
    found = {}
    for name, of_kind in gradients.items():
        apart, same = products(of_kind, of_kind)
        across, _ = products(of_kind, gradients[UNBIASED])
        visible = min(apart, reference) > 0
        found[name] = (apart / same, across / math.sqrt(apart * reference) if visible else math.nan)
    return found


def read_batches(out: Path) -> dict[str, list[Batch]]:
    """The first updates of the finished two-level runs in ``out``, by seed; seeds with one run have no pair.

    Raises:
        SystemExit: there is no seed with two.
    """
    from transformers import AutoModelForCausalLM

    found: dict[str, list[list[Trajectory]]] = {}
    for finished in sorted(out.glob("*_seed*/results/table.csv")):
        played = read_trajectories(finished.with_name("trajectories.jsonl"))
        first = [t for t in played if EXPERT in t.streams and t.turns[0].version == 0]
        if first:
            found.setdefault(re.findall(r"_seed(\d+)", str(finished))[-1], []).append(first)
    several = {seed: updates for seed, updates in sorted(found.items()) if len(updates) > 1}
    if not several:
        raise SystemExit(f"--out {out}: no two finished two-level runs of one seed; run study.py first")
    model = AutoModelForCausalLM.from_pretrained(out / "models" / "warm_expert", dtype=torch.float32)
    return {seed: [batch_of(model, update) for update in updates] for seed, updates in several.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="the folder of study.py's runs")
    activate()
    seeds = read_batches(parser.parse_args().out)
    every = [batch for batches in seeds.values() for batch in batches]
    found = []
    for batches in seeds.values():
        rows: dict[str, list[torch.Tensor]] = {}
        for batch in batches:
            values = values_of(batch, [other for other in every if other is not batch])
            for name, advantages in credits(batch, values).items():
                rows.setdefault(name, []).append(((batch.scores * advantages[:, None]).T @ batch.hidden).flatten())
        found.append(agreement({name: torch.stack(of_kind) for name, of_kind in rows.items()}))
    heads = [f"seed {seed}: {len(batches)} batches" for seed, batches in seeds.items()]
    print("| credit | " + " | ".join(heads) + " | signal | direction |")
    print("|---" * (len(found) + 3) + "|")
    for name in found[0]:
        signals, directions = zip(*(of_seed[name] for of_seed in found), strict=True)
        cells = [f"{value:.2f}" for value in (*signals, sum(signals) / len(found), sum(directions) / len(found))]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
