"""The exact trust region: upstream's own loop follows the gradient of the written loss at every optimizer step."""

import pytest
import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from transformers import LlamaConfig, LlamaForCausalLM

from openrlhf_gopo.config import PreferenceConfig
from openrlhf_gopo.core.categorical import pad_allowed
from openrlhf_gopo.core.preference import (
    listwise_preference_loss,
    preference_pairs,
    trajectory_log_ratio,
    trajectory_preference_loss,
    turn_weights,
)
from openrlhf_gopo.runtime.exact import ExactPreferenceTrainer, OptimizerSteps
from openrlhf_gopo.runtime.models import RoleActor

RETURNS = [[0.1, 0.9, 0.4], [0.3, 0.3, 0.8], [0.5, 0.5, 0.5], [0.2, 0.7, 0.6]]  # 4 goals, 3 dialogues each
LABELS = [3, 4, 5, 6]


def sample(goal: int, k: int, plans: int = 0) -> Experience:
    """A dialogue of 1 to 3 decisions among 2 to 4 labels after plans of ``plans`` words, as the buffer holds it."""
    generator = torch.Generator().manual_seed(10 * goal + k)
    decisions = 1 + (goal + k) % 3
    tokens, mask, allowed = [1], [], []
    for d in range(decisions):
        plan = min(plans, 2 + k)  # the last words before a label are the expert's own
        tokens += torch.randint(10, 30, (2 + k,), generator=generator).tolist()
        labels = LABELS[: 2 + (d + k) % 3]
        tokens.append(labels[(goal + d) % len(labels)])
        mask += [0] * (2 + k - plan) + [1] * plan + [1]
        allowed += [*([[]] * plan), labels]
    return Experience(
        sequences=torch.tensor(tokens),
        attention_mask=torch.ones(len(tokens), dtype=torch.long),
        action_mask=torch.tensor(mask),
        advantages=torch.zeros(len(mask)),
        returns=torch.zeros(len(mask)),
        rewards=torch.tensor(RETURNS[goal][k]),
        total_length=torch.tensor(float(len(tokens))),
        prompts=[f"goal {goal}"],
        mm_train_inputs=[{"allowed": pad_allowed(allowed, 4)}],
        info={"quarantined": torch.tensor(0.0)},
    )


def written_loss(actor, items, pref, reference):
    """L over the dialogues as the module ``core.preference`` writes it: one graph, one batch, no coefficient."""
    ratios = []
    for item in items:
        with actor.choosing(item.mm_train_inputs):
            now = actor(item.sequences[None], item.action_mask[None], item.attention_mask[None])[0]
        mask = item.action_mask.bool()
        decisions = (item.mm_train_inputs[0]["allowed"] >= 0).any(-1).tolist()
        by_turn = turn_weights(sum(decisions), mode=pref.weights)
        weights = torch.stack([by_turn[sum(decisions[:n])] for n in range(len(decisions))])
        owner = torch.zeros(int(mask.sum()), dtype=torch.long)
        ratios.append(trajectory_log_ratio(now[mask].double(), reference[id(item)][mask].double(), owner, weights, 1))
    m, terms = torch.cat(ratios), []
    for goal in dict.fromkeys(item.prompts[0] for item in items):
        group = torch.tensor([i for i, item in enumerate(items) if item.prompts[0] == goal])
        returns = torch.stack([items[i].rewards for i in group]).double()
        pairs = preference_pairs(returns, pairing="all" if pref.pairing == "listwise" else pref.pairing)
        if pref.pairing != "listwise":
            terms.append(trajectory_preference_loss(m[group], returns, pairs, beta=pref.beta))
        elif len(pairs):
            terms.append(listwise_preference_loss(m[group], returns, beta=pref.beta).reshape(1))
    return torch.cat(terms).mean()


@pytest.mark.parametrize("pairing", ["all", "best_worst", "adjacent", "listwise"])
@pytest.mark.parametrize(("weights", "plans"), [("mean", 0), ("sum", 0), ("mean", 2)])
def test_every_optimizer_step_has_the_gradient_of_the_written_loss(one_process, pairing, weights, plans):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    actor = RoleActor(LlamaForCausalLM(config).double(), temperature=1.0)
    actor.packing_samples = False
    pref = PreferenceConfig(pairing=pairing, weights=weights, trust_region="exact", beta=2.0)
    # Micro-batches of 2, three of them, are 6 dialogues: two groups to an optimizer step.
    trainer = one_process(ExactPreferenceTrainer, actor, preference=pref, accumulated_gradient=3, epochs=2)
    items = [sample(goal, k, plans) for goal in range(len(RETURNS)) for k in range(3)]
    trainer.replay_buffer.items = items
    with torch.no_grad():
        for item in items:
            with actor.choosing(item.mm_train_inputs):
                item.action_log_probs = actor(item.sequences[None], item.action_mask[None], item.attention_mask[None])[
                    0
                ]
    reference = {id(item): item.action_log_probs.clone() for item in items}

    expected, forwards = [], []
    refresh, forward = trainer.refresh, trainer._forward

    def recording(chosen):
        """Before each step: the gradient of the written loss at the parameters as they are now."""
        loss = written_loss(actor, chosen, pref, reference)
        expected.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(actor.parameters()))]))
        refresh(chosen)

    trainer.refresh = recording
    trainer._forward = lambda chosen: (forwards.append(len(chosen)), forward(chosen))
    trainer.ppo_train(0.0)

    assert len(expected) == len(trainer.strategy.gradients) == 4  # two epochs of two steps
    assert forwards == [6, 6, 6]  # the first step needs none
    for ours, exact in zip(trainer.strategy.gradients, expected, strict=True):
        assert float(exact.abs().max()) > 1e-4
        assert torch.allclose(ours, exact, rtol=1e-4, atol=1e-6 * float(exact.abs().max()))


def test_an_optimizer_step_holds_whole_groups():
    items = [sample(goal, k) for goal in range(4) for k in range(3)]
    prepared = []
    steps = OptimizerSteps(items, 2, 3, list, lambda chosen: prepared.append([i.prompts[0] for i in chosen]))
    torch.manual_seed(1)
    batches = list(steps)
    assert len(batches) == len(steps) == 6
    assert sorted(id(i) for batch in batches for i in batch) == sorted(map(id, items))
    for names in prepared:
        assert [names.count(name) for name in names] == [3] * 6
