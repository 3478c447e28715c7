"""What each credit term's gradient is on average: over every group of K dialogues, weighted by its probability, against
the policy gradient itself.

The environments are small trees whose dialogues can be written down; the policy is a softmax with its own logits at
every node, in float64. Unbiased: ``turn_advantages`` of rloo, reinforce_baseline, dr_grpo and reinforce, ``q`` with the
true Q, the critic's GAE with the true V. Biased: the others. The gradient of the logit of the second strategy, both
being equally likely, K = 4:

                        stop now with 1.0,            1 with probability 0.4,
                        go on with 0.97 in ten steps  0.3 for sure
    true                 -0.0075                       -0.0250
    group_norm           -0.0245                       +0.0441    a rare large return makes its own scale small
    flash_reinforce      +0.0129                       -0.0188    the mean over turns: long dialogues weigh more
    preference           -0.4375                       +0.0851    which return is larger, not by how much
    decision_preference  -0.4375                       +0.0875
    critic (V = 0)       -0.0554                       -0.0250    lambda 0.95: what comes late counts less
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement

import pytest
import torch

from openrlhf_gopo.core.decision_preference import decision_preference
from openrlhf_gopo.core.preference import preference_coefficients
from openrlhf_gopo.core.q import advantages, surrogate
from openrlhf_gopo.core.turn_level import gae, turn_advantages

END = None
# node -> strategy -> outcomes (probability, reward, next node)
STOP_OR_GO = {0: [[(1.0, 1.0, END)], [(1.0, 0.097, 1)]]}
STOP_OR_GO |= {n: [[(1.0, 0.097, n + 1 if n < 9 else END)]] for n in range(1, 10)}
LOTTERY = {0: [[(0.4, 1.0, END), (0.6, 0.0, END)], [(1.0, 0.3, END)]]}
TREES = {
    "two strategies: at each of three turns stop or, with luck, go on": {
        0: [[(1.0, 0.5, END)], [(0.7, 0.1, 1), (0.3, -0.2, END)]],
        1: [[(1.0, 0.4, END)], [(1.0, 0.3, 2)]],
        2: [[(1.0, 0.9, END)], [(1.0, -0.6, END)]],
    },
    "three strategies": {
        0: [[(1.0, 0.7, END)], [(1.0, 0.2, 1)], [(1.0, -0.1, 2)]],
        1: [[(1.0, 0.1, END)], [(1.0, 0.6, END)], [(1.0, 0.0, END)]],
        2: [[(1.0, 1.1, END)], [(1.0, 0.4, 3)]],
        3: [[(1.0, -0.3, END)]],
    },
    "four strategies": {
        0: [[(1.0, 0.7, END)], [(1.0, 0.0, END)], [(1.0, 0.2, 1)], [(1.0, -0.1, 2)]],
        1: [[(1.0, 0.1, END)], [(1.0, 0.8, END)]],
        2: [[(1.0, 1.1, END)], [(1.0, 0.4, END)], [(1.0, 0.4, END)], [(1.0, -0.3, END)]],
    },
    "stop now with 1.0 or go on with 0.97 in ten steps": STOP_OR_GO,
}


@dataclass(frozen=True)
class Dialogue:
    """What was met at each of its turns: node, strategy, reward; ``probability`` under the policy."""

    probability: float
    nodes: tuple[int, ...]
    chosen: tuple[int, ...]
    rewards: tuple[float, ...]


class Desk:
    """A tree and a policy on it: ``logits`` (P,) of all strategies of all nodes, ``first`` the place of each node's."""

    def __init__(self, tree: dict, uniform: bool = False) -> None:
        self.tree, self.sizes = tree, {node: len(strategies) for node, strategies in tree.items()}
        self.first = dict(zip(tree, torch.tensor([0, *self.sizes.values()]).cumsum(0).tolist(), strict=False))
        generator = torch.Generator().manual_seed(5)
        logits = torch.randn(sum(self.sizes.values()), generator=generator, dtype=torch.float64)
        self.logits = (logits * (not uniform)).requires_grad_()

    def logprobs(self, node: int) -> torch.Tensor:
        """log pi of the strategies of a node, with a graph."""
        return torch.log_softmax(self.logits[self.first[node] : self.first[node] + self.sizes[node]], dim=0)

    def values(self, node: int | None) -> torch.Tensor:
        """Q of the strategies of a node under the policy, with a graph; V is their mean under it."""
        strategies = self.tree[node]
        return torch.stack([sum(p * (r + self.value(after)) for p, r, after in outcomes) for outcomes in strategies])

    def value(self, node: int | None) -> torch.Tensor:
        return (self.logprobs(node).exp() * self.values(node)).sum() if node is not END else self.logits.new_zeros(())

    def policy_gradient(self) -> torch.Tensor:
        return torch.autograd.grad(self.value(0), self.logits)[0]

    def scores(self, node: int) -> torch.Tensor:
        """grad log pi of each strategy of a node: (strategies, P)."""
        return torch.stack([torch.autograd.grad(one, self.logits, retain_graph=True)[0] for one in self.logprobs(node)])

    def dialogues(self) -> list[Dialogue]:
        return list(self._from(0))

    def _from(self, node: int | None) -> Iterator[Dialogue]:
        if node is END:
            yield Dialogue(1.0, (), (), ())
            return
        for strategy, (chance, outcomes) in enumerate(
            zip(self.logprobs(node).exp().tolist(), self.tree[node], strict=True)
        ):
            for p, reward, after in outcomes:
                for d in self._from(after):
                    played = (node, *d.nodes), (strategy, *d.chosen), (reward, *d.rewards)
                    yield Dialogue(chance * p * d.probability, *played)

    def mean_over_groups(self, advantages, size: int) -> torch.Tensor:
        """E over groups of ``size`` dialogues of the mean over dialogues of sum_t A_t grad log pi(z_t): (P,).

        Groups are unordered, each counted as often as it can be drawn.
        """
        dialogues = self.dialogues()
        by_node = {node: self.scores(node) for node in self.tree}
        scores = [torch.stack([by_node[n][z] for n, z in zip(d.nodes, d.chosen, strict=True)]) for d in dialogues]
        assert sum(d.probability for d in dialogues) == pytest.approx(1, abs=1e-12)
        total = torch.zeros_like(self.logits)
        for members in combinations_with_replacement(range(len(dialogues)), size):
            orders = math.factorial(size)
            for count in Counter(members).values():
                orders //= math.factorial(count)
            weight = orders * math.prod(dialogues[i].probability for i in members)
            found = advantages([dialogues[i] for i in members])
            for i, a in zip(members, found, strict=True):
                total += weight / size * (a[: len(scores[i])] @ scores[i])
        return total.detach()


def by_turn(estimator):
    def advantages(group):
        return turn_advantages([d.rewards for d in group], [torch.arange(len(group))], estimator=estimator)

    return advantages


def by_preference(group):
    """c_i at the sampler, times K: the loss is a mean over pairs, not over dialogues."""
    returns = torch.tensor([sum(d.rewards) for d in group], dtype=torch.float64)
    c, _ = preference_coefficients(torch.zeros(len(group)), returns, [torch.arange(len(group))], beta=1.0)
    return [len(group) * one.repeat(len(d.rewards)) for one, d in zip(c, group, strict=True)]


def by_decision_preference(group):
    togo = torch.tensor([sum(d.rewards[t:]) for d in group for t in range(len(d.rewards))], dtype=torch.float64)
    places = [t for d in group for t in range(len(d.rewards))]
    found = decision_preference(togo, [z for d in group for z in d.chosen], places)
    return [len(group) * one for one in found.split([len(d.rewards) for d in group])]


def by_critic(desk, lambd, known=True):
    value = cache(lambda node: float(desk.value(node).detach()) * known)

    def advantages(group):
        lengths = [len(d.rewards) for d in group]
        rewards = torch.tensor([r for d in group for r in d.rewards], dtype=torch.float64)
        values = torch.tensor([value(n) for d in group for n in d.nodes], dtype=torch.float64)
        return gae(rewards, values, lengths, gamma=1.0, lambd=lambd).split(lengths)

    return advantages


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_returns_to_go_less_the_others_at_that_turn_are_unbiased(tree, size):
    desk = Desk(TREES[tree])
    true = desk.policy_gradient()
    assert float(true.abs().max()) > 1e-3
    for estimator in ("rloo", "reinforce_baseline", "dr_grpo", "reinforce"):
        assert torch.allclose(desk.mean_over_groups(by_turn(estimator), size), true, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tree", TREES)
def test_a_critic_that_knows_the_values_is_unbiased(tree):
    desk = Desk(TREES[tree])
    for lambd in (0.0, 0.95, 1.0):
        found = desk.mean_over_groups(by_critic(desk, lambd), 1)
        assert torch.allclose(found, desk.policy_gradient(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("tree", TREES)
def test_q_with_the_true_values_is_unbiased(tree):
    desk = Desk(TREES[tree])
    of_node = {}
    for node in desk.tree:
        now, everything = desk.logprobs(node).unsqueeze(0), torch.ones(1, desk.sizes[node], dtype=torch.bool)
        values = desk.values(node).detach().unsqueeze(0)
        # One decision's own root mean square is no constant of the batch: take it out again.
        pi = now.detach().exp()
        scale = (pi * (values - (pi * values).sum()).pow(2)).sum().sqrt()
        scores = scale * advantages(values, now.detach(), everything)
        loss = surrogate(now, now.detach(), scores, everything, 0.2, 0.2).sum()
        of_node[node] = -torch.autograd.grad(loss, desk.logits)[0]
    found = sum(d.probability * sum(of_node[n] for n in d.nodes) for d in desk.dialogues())
    assert torch.allclose(found, desk.policy_gradient(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("tree", "true", "biased"),
    [
        (STOP_OR_GO, -0.0075, {"group_norm": -0.0245012, "flash_reinforce": 0.0128660, "preference": -0.4375}),
        (LOTTERY, -0.025, {"group_norm": 0.0440603, "flash_reinforce": -0.01875, "preference": 0.0851}),
    ],
)
def test_biased_terms_by_their_numbers(tree, true, biased):
    """As in the table above. All but the critic prefer the worse strategy in one of the two."""
    desk = Desk(tree, uniform=True)
    assert float(desk.policy_gradient()[1]) == pytest.approx(true, abs=1e-9)
    assert float(desk.mean_over_groups(by_turn("rloo"), 4)[1]) == pytest.approx(true, abs=1e-9)
    found = {name: desk.mean_over_groups(by_turn(name), 4) for name in ("group_norm", "flash_reinforce")}
    found["preference"] = desk.mean_over_groups(by_preference, 4)
    assert {name: float(gradient[1]) for name, gradient in found.items()} == pytest.approx(biased, abs=1e-6)
    of_decisions = float(desk.mean_over_groups(by_decision_preference, 4)[1])
    assert of_decisions == pytest.approx(-0.4375 if tree is STOP_OR_GO else 0.0875, abs=1e-9)
    critic = float(desk.mean_over_groups(by_critic(desk, 0.95, known=False), 1)[1])
    # V = 0: the k-th reward of going on counts 0.95^k: 0.25 (0.097 (1 - 0.95^10) / 0.05 - 1).
    late = 0.25 * (0.097 * (1 - 0.95**10) / 0.05 - 1)
    assert critic == pytest.approx(late if tree is STOP_OR_GO else true, abs=1e-9)


def test_two_dialogues_by_hand():
    """The lottery, K = 2: one of each strategy with probability 1/2; the sure 0.3 wins 6 times of 10. The two log
    probabilities move the logit by 1/2 and -1/2, the coefficients are 1/2 and -1/2: 1/2 (0.6 - 0.4) 1/2 = 0.05."""
    desk = Desk(LOTTERY, uniform=True)
    for preference in (by_preference, by_decision_preference):
        assert float(desk.mean_over_groups(preference, 2)[1]) == pytest.approx(0.05, abs=1e-12)
