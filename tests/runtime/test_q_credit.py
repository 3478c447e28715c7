"""The term ``q`` in upstream's own loop: its gradient by brute force, what it must not depend on, what it remembers."""

import copy

import pytest
import torch
from openrlhf.models import PolicyLoss
from openrlhf.trainer.ppo_utils.experience import Experience
from transformers import LlamaConfig, LlamaForCausalLM

from openrlhf_gopo.core.categorical import pad_allowed
from openrlhf_gopo.core.q import advantages, fit, surrogate
from openrlhf_gopo.runtime.models import RoleActor, RolePPOTrainer
from openrlhf_gopo.runtime.q_credit import MEMORY, QCreditTrainer

LABELS = [3, 4, 5, 6]
TAU = 0.7


def make_actor() -> RoleActor:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.3}
    actor = RoleActor(LlamaForCausalLM(LlamaConfig(**sizes, **heads)).double(), temperature=TAU)
    actor.packing_samples = False
    return actor


def sample(k: int, plans: int = 0, seed: int = 0, failed: bool = False) -> Experience:
    """A dialogue of 1 to 3 decisions among 1 to 4 labels, after plans of ``plans`` words, as the buffer holds it."""
    generator = torch.Generator().manual_seed(100 * seed + k)
    tokens, mask, allowed, togo = [1], [], [], []
    for d in range(1 + k % 3):
        plan = min(plans, 2 + k % 2)
        tokens += torch.randint(10, 30, (2 + k % 2,), generator=generator).tolist()
        labels = LABELS[: 1 + (d + k) % 4]
        tokens.append(labels[int(torch.randint(len(labels), (), generator=generator))])
        mask += [0] * (2 + k % 2 - plan) + [1] * plan + [1]
        allowed += [*([[]] * plan), labels]
        togo += [*([0.0] * plan), float(torch.randn((), generator=generator))]
    mask = torch.zeros(len(mask), dtype=torch.long) if failed else torch.tensor(mask)
    inputs = {"allowed": pad_allowed([] if failed else allowed, 4), "togo": torch.tensor([] if failed else togo)}
    return Experience(
        sequences=torch.tensor(tokens),
        attention_mask=torch.ones(len(tokens), dtype=torch.long),
        action_mask=mask,
        advantages=torch.randn(len(mask), generator=generator, dtype=torch.float64) * mask,
        returns=torch.zeros(len(mask)),
        rewards=torch.zeros(()),
        total_length=torch.tensor(float(len(tokens))),
        prompts=[str(k)],
        mm_train_inputs=[inputs],
        info={},
    )


def rollout(n: int = 6, **options) -> list[Experience]:
    return [sample(k, **options) for k in range(n)]


def train(one_process, items, actor=None, *, cls=QCreditTrainer, weight=1.0, upstream=True, micro=2, **options):
    """One rollout's updates; ``upstream`` False leaves only the term. Returns the trainer and what it reports."""
    items = copy.deepcopy(items)
    actor = actor or make_actor()
    with torch.no_grad():
        for item in items:
            item.advantages = item.advantages * upstream
            with actor.choosing(item.mm_train_inputs):
                batch = item.sequences[None], item.action_mask[None], item.attention_mask[None]
                item.action_log_probs = actor(*batch)[0]
    options = {"accumulated_gradient": len(items) // micro} | options
    trainer = one_process(cls, actor, q_weight=weight, batch_size=micro, **options)
    return trainer, learn(trainer, items)


def learn(trainer, items) -> dict:
    trainer.replay_buffer.items = items
    return trainer.ppo_train(0.0)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    assert float(other.abs().max()) > 1e-4
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


def by_hand(actor: RoleActor, items: list[Experience]) -> tuple[torch.Tensor, ...]:
    """Hidden states, label log-probabilities (N, 4), valid, chosen, returns to go of the decisions alone, from whole
    logits, dialogue by dialogue."""
    states, logprobs, valid, chosen, togo = [], [], [], [], []
    for item in items:
        output = actor.model(item.sequences[None], output_hidden_states=True)
        places = item.action_mask.nonzero().flatten().tolist()
        inputs = item.mm_train_inputs[0]
        for place, row, g in zip(places, inputs["allowed"].tolist(), inputs["togo"], strict=True):
            ids = [label for label in row if label >= 0]
            if not ids:
                continue
            states.append(output.hidden_states[-1][0, place])
            scores = torch.log_softmax(output.logits[0, place, ids] / TAU, -1)
            logprobs.append(torch.cat([scores, torch.full((4 - len(ids),), -torch.inf)]))
            valid.append([n < len(ids) for n in range(4)])
            chosen.append(int(item.sequences[place + 1]))
            togo.append(g)
    return torch.stack(states), torch.stack(logprobs), torch.tensor(valid), torch.tensor(chosen), torch.stack(togo)


def flat(loss: torch.Tensor, actor: RoleActor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(actor.parameters()))])


@pytest.mark.parametrize("plans", [0, 2])
def test_the_first_step_has_the_gradient_of_the_written_loss(one_process, plans):
    items = rollout(plans=plans)
    reference = make_actor()
    states, logprobs, valid, chosen, togo = by_hand(reference, items)
    q = fit(states.detach().float(), chosen, togo)
    old = logprobs.detach()
    values = q.values(states.detach(), torch.tensor([LABELS] * len(togo)))
    credit = advantages(values, old, valid)
    pi = old.exp().where(valid, torch.zeros(()))
    assert float((pi * credit**2).sum(-1).mean()) == pytest.approx(1.0)
    actions = sum(int(item.action_mask.sum()) for item in items)
    loss = 0.7 * surrogate(logprobs, old, credit, valid, 0.2, 0.2).sum() / actions
    trainer, status = train(one_process, items, weight=0.7, upstream=False)
    assert len(trainer.strategy.gradients) == 1
    assert same(trainer.strategy.gradients[0], flat(loss, reference))
    assert status["q_loss"] == pytest.approx(0.0, abs=1e-9)  # sum_z pi_old A = 0
    predicted = q.values(states.detach(), chosen.unsqueeze(-1)).squeeze(-1)
    residual = float((predicted - togo).pow(2).sum() / (togo - togo.mean()).pow(2).sum())
    assert status["q_fit_r2"] == pytest.approx(1 - residual, abs=1e-5)
    assert "q_r2" not in status


@pytest.mark.parametrize("per_token", [True, False])
def test_micro_batches_change_nothing(one_process, monkeypatch, per_token):
    """Over two steps, so that ratios have left 1 and some are clipped; also as a mean over dialogues."""
    monkeypatch.setattr(
        PolicyLoss.__init__, "__defaults__", (0.2, 0.2, None, per_token, *PolicyLoss.__init__.__defaults__[4:])
    )
    found = [train(one_process, rollout(), micro=micro, epochs=2) for micro in (1, 2, 3, 6)]
    for trainer, status in found[1:]:
        for one, other in zip(trainer.strategy.gradients, found[0][0].strategy.gradients, strict=True):
            assert same(one, other)
        assert status["q_loss"] == pytest.approx(found[0][1]["q_loss"])
    assert abs(found[0][1]["q_loss"]) > 1e-3  # of the second step; at the first one it is 0


def test_the_term_adds_to_upstreams_loss(one_process):
    items = rollout(plans=2)
    (both, _), (term, _) = (train(one_process, items, weight=0.5, upstream=given) for given in (True, False))
    alone, _ = train(one_process, items, cls=RolePPOTrainer)
    assert same(both.strategy.gradients[0], alone.strategy.gradients[0] + term.strategy.gradients[0])


def test_failed_dialogues_have_no_decisions(one_process):
    items = [*rollout(5), sample(5, failed=True)]
    with_failed, status = train(one_process, items, upstream=False, micro=1)
    without, expected = train(one_process, items[:5], upstream=False, micro=1)
    assert same(with_failed.strategy.gradients[0], without.strategy.gradients[0])
    assert status["q_fit_r2"] == pytest.approx(expected["q_fit_r2"])
    trainer, status = train(one_process, [sample(k, failed=True) for k in range(2)])
    assert trainer.memory == ()
    assert not [name for name in status if name.startswith("q_")]


def test_a_shared_model_is_trained_in_its_other_role_as_before(one_process):
    """The responder's samples bring neither labels nor returns to go."""
    items = rollout()
    for item in items:
        item.mm_train_inputs = [{"allowed": pad_allowed([[]] * int(item.action_mask.sum()), 0)}]
    ours, status = train(one_process, items)
    theirs, _ = train(one_process, items, cls=RolePPOTrainer)
    assert same(ours.strategy.gradients[0], theirs.strategy.gradients[0])
    assert ours.memory == ()
    assert not [name for name in status if name.startswith("q_")]


def test_nothing_of_a_step_stays_in_the_actor(one_process):
    trainer, _ = train(one_process, rollout())
    assert trainer.actor.label_logprobs is trainer.actor.states is None
    assert trainer.actor.inputs == {}
    assert not any(rows.requires_grad for one in trainer.memory for rows in vars(one).values())
    assert isinstance(trainer.actor_loss_fn, PolicyLoss)


def test_q_remembers_the_last_rollouts_and_is_judged_on_the_next(one_process):
    trainer, _ = train(one_process, rollout())
    for seed in range(1, MEMORY + 2):
        before = [copy.deepcopy(one) for one in trainer.memory]
        items = rollout(seed=seed)
        states, _, _, chosen, togo = by_hand(trainer.actor, items)
        known = [torch.cat(parts) for parts in zip(*(vars(one).values() for one in before), strict=True)]
        left = fit(*known).values(states.detach(), chosen.unsqueeze(-1)).squeeze(-1) - togo
        for item in items:
            item.action_log_probs = torch.zeros(len(item.action_mask), dtype=torch.float64)
        status = learn(trainer, items)
        assert len(trainer.memory) == min(seed + 1, MEMORY)
        expected = 1 - float(left.pow(2).sum() / (togo - togo.mean()).pow(2).sum())
        assert status["q_r2"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert torch.equal(trainer.memory[-1].togo, togo.float())
        if len(before) == MEMORY:
            assert torch.equal(trainer.memory[0].togo, before[1].togo)


def test_a_restored_memory_goes_on_to_the_last_bit(one_process, tmp_path):
    whole, _ = train(one_process, rollout(), weight=0.3)
    whole.save_memory(tmp_path / "q_memory.pt")
    resumed = one_process(QCreditTrainer, copy.deepcopy(whole.actor), q_weight=0.3, accumulated_gradient=3)
    fresh = one_process(QCreditTrainer, copy.deepcopy(whole.actor), q_weight=0.3, accumulated_gradient=3)
    resumed.load_memory(tmp_path / "q_memory.pt")
    fresh.load_memory(tmp_path / "missing.pt")
    results = []
    for trainer in (whole, resumed, fresh):
        items = rollout(seed=1)
        for item in items:
            item.action_log_probs = torch.zeros(len(item.action_mask), dtype=torch.float64)
        torch.manual_seed(3)
        results.append((learn(trainer, items), trainer.strategy.gradients[-1]))
    (first, one), (second, other), (third, unlike) = results
    assert first == second
    assert torch.equal(one, other)
    assert "q_r2" not in third
    assert not torch.allclose(one, unlike)
