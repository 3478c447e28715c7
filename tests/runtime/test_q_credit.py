"""The term ``q`` in upstream's own loop, with a small model, against the surrogate as ``core.q`` writes it."""

import pytest
import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from transformers import LlamaConfig, LlamaForCausalLM

from openrlhf_gopo.core.categorical import PAD, pad_allowed
from openrlhf_gopo.core.q import fit_q
from openrlhf_gopo.runtime.models import RoleActor
from openrlhf_gopo.runtime.q_credit import MEMORY, QCreditTrainer

LABELS = [3, 4, 5, 6]
DIALOGUES = 6


@pytest.fixture
def actor() -> RoleActor:
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
    actor = RoleActor(LlamaForCausalLM(config).double(), temperature=0.7)
    actor.packing_samples = False
    return actor


def sample(number: int, *, seed: int = 0, plan: int = 0, advantage: float = 0.0, decisions: int | None = None):
    """A dialogue of 0 to 3 decisions among 2 to 4 labels, each after a plan of ``plan`` words, as the buffer holds it.

    The return to go of a decision is its number of allowed labels, and 1 more where the last of them was chosen.
    """
    generator = torch.Generator().manual_seed(100 * seed + number)
    tokens, mask, allowed, togo = [1], [], [], []
    for d in range(number % 4 if decisions is None else decisions):
        tokens += torch.randint(10, 30, (2 + plan,), generator=generator).tolist()
        labels = LABELS[: 2 + (d + number) % 3]
        tokens.append(labels[int(torch.randint(len(labels), (1,), generator=generator))])
        mask += [0] * 2 + [1] * plan + [1]
        allowed += [*([[]] * plan), labels]
        togo += [float(len(labels) + (tokens[-1] == labels[-1]))] * (plan + 1)
    if not mask:  # a quarantined dialogue: no action
        tokens.append(2)
        mask.append(0)
    return Experience(
        sequences=torch.tensor(tokens),
        attention_mask=torch.ones(len(tokens), dtype=torch.long),
        action_mask=torch.tensor(mask),
        action_log_probs=torch.zeros(len(mask)),
        advantages=torch.full((len(mask),), advantage),
        returns=torch.zeros(len(mask)),
        rewards=torch.tensor(0.0),
        total_length=torch.tensor(float(len(tokens))),
        prompts=[f"goal {number}"],
        mm_train_inputs=[{"allowed": pad_allowed(allowed, 4), "togo": torch.tensor(togo)}],
        info={"quarantined": torch.tensor(0.0)},
    )


def fill(trainer, items) -> None:
    """The buffer as upstream leaves it, with the log-probabilities of the parameters as they are."""
    trainer.replay_buffer.items = items
    with torch.no_grad():
        for item in items:
            item.action_log_probs = logprobs_of(trainer.actor, item)


def logprobs_of(actor, item) -> torch.Tensor:
    with actor.choosing(item.mm_train_inputs):
        return actor(item.sequences[None], item.action_mask[None], item.attention_mask[None])[0]


def decisions_of(actor, items) -> list[tuple[torch.Tensor, torch.Tensor, list[int], int, float]]:
    """Of every decision: hidden state, log pi of its labels (with a graph), the labels, the chosen one, return to go.

    From the model's whole output, one dialogue at a time.
    """
    found = []
    for item in items:
        inputs = item.mm_train_inputs[0]
        output = actor.model(item.sequences[None], output_hidden_states=True)
        places = item.action_mask.nonzero().flatten().tolist()
        for place, row, togo in zip(places, inputs["allowed"].tolist(), inputs["togo"].tolist(), strict=True):
            labels = [label for label in row if label != PAD]
            if labels:
                logprobs = torch.log_softmax(output.logits[0, place, labels] / 0.7, dim=0)
                hidden = output.hidden_states[-1][0, place]
                found.append((hidden, logprobs, labels, int(item.sequences[place + 1]), togo))
    return found


def written_gradient(actor, items, weight: float) -> torch.Tensor:
    """Of weight x L at the sampler, where rho = 1: -sum_z pi_old A log pi_z, over all actions of the rollout."""
    found = decisions_of(actor, items)
    hidden = torch.stack([state.detach() for state, *_ in found]).float()  # as they are kept
    chosen = torch.tensor([chosen for *_, chosen, _ in found])
    q = fit_q(hidden, chosen, torch.tensor([togo for *_, togo in found], dtype=torch.float64))
    terms, squares = [], []
    for state, (_, logprobs, labels, _, _) in zip(hidden, found, strict=True):
        values = q.values(state[None], torch.tensor([labels]))[0]
        pi = logprobs.detach().exp()
        advantages = values - (pi * values).sum()
        squares.append((pi * advantages**2).sum())
        terms.append(-(pi * advantages * logprobs).sum())
    rms = (sum(squares) / len(squares)) ** 0.5
    actions = sum(int(item.action_mask.sum()) for item in items)
    loss = weight * sum(terms) / rms / actions
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(actor.parameters()))])


@pytest.mark.parametrize("plan", [0, 2])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6])
def test_the_gradient_is_that_of_the_written_surrogate_whatever_the_micro_batch(one_process, actor, micro_batch, plan):
    """One optimizer step over all dialogues. Words of plans get nothing, but count as actions, as upstream counts."""
    items = [sample(number, plan=plan) for number in range(DIALOGUES)]
    expected = written_gradient(actor, items, weight=0.5)
    trainer = one_process(
        QCreditTrainer,
        actor,
        q_weight=0.5,
        batch_size=micro_batch,
        accumulated_gradient=DIALOGUES // micro_batch,
    )
    fill(trainer, items)
    metrics = trainer.ppo_train(0.0)
    (ours,) = trainer.strategy.gradients
    assert float(expected.abs().max()) > 1e-3
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert 0 < metrics["q_fit_r2"] < 1
    assert "q_r2" not in metrics  # nothing was known before the first rollout


def test_the_term_adds_to_the_gradient_of_the_advantages(one_process, actor):
    """With advantages of 1 for every action, upstream's loss at the sampler has the gradient of -mean log pi."""
    items = [sample(number, advantage=1.0) for number in range(DIALOGUES)]
    mean = sum((logprobs_of(actor, item) * item.action_mask).sum() for item in items)
    mean = mean / sum(int(item.action_mask.sum()) for item in items)
    alone = torch.cat([g.flatten() for g in torch.autograd.grad(-mean, list(actor.parameters()))])
    expected = alone + written_gradient(actor, items, weight=2.0)
    trainer = one_process(QCreditTrainer, actor, q_weight=2.0, accumulated_gradient=3)
    fill(trainer, items)
    trainer.ppo_train(0.0)
    assert torch.allclose(trainer.strategy.gradients[0], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_words_of_plans_and_padding_have_no_advantage(one_process, actor):
    items = [sample(number, plan=2) for number in range(DIALOGUES)]
    trainer = one_process(QCreditTrainer, actor, q_weight=1.0, accumulated_gradient=3)
    fill(trainer, items)
    trainer.ppo_train(0.0)
    total = 0.0
    for item in items:
        inputs = item.mm_train_inputs[0]
        valid = inputs["allowed"] != PAD
        advantages, pi = inputs["q_advantages"], inputs["q_logprobs"].exp()
        assert (advantages[~valid] == 0).all()
        assert (pi[~valid] == 0).all()
        total += float((pi * advantages**2).sum())
    assert total == pytest.approx(len(trainer.memory[0][0]), rel=1e-4)  # unit scale over the decisions
    assert len(trainer.memory[0][0]) == sum(number % 4 for number in range(DIALOGUES))  # words are not remembered


def test_several_steps_keep_to_the_samplers_probabilities(one_process, actor):
    """The old log-probabilities are those before the first step, so a second pass is clipped against them."""
    items = [sample(number) for number in range(DIALOGUES)]
    trainer = one_process(QCreditTrainer, actor, q_weight=1.0, batch_size=2, epochs=2)
    fill(trainer, items)
    before = [item.action_log_probs[item.action_mask.bool()] for item in items]
    trainer.ppo_train(0.0)
    assert len(trainer.strategy.gradients) == 6
    for item, old in zip(items, before, strict=True):
        inputs, mask = item.mm_train_inputs[0], item.action_mask.bool()
        tokens = item.sequences[1:][mask]
        hit = inputs["allowed"] == tokens.unsqueeze(1)
        assert torch.allclose(inputs["q_logprobs"][hit].double(), old, atol=1e-5)
    assert (
        max(
            float((logprobs_of(actor, i)[i.action_mask.bool()] - o).abs().max())
            for i, o in zip(items, before, strict=True)
            if len(o)
        )
        > 1e-3
    )


def rollout(trainer, seed: int) -> dict:
    fill(trainer, [sample(number, seed=seed) for number in range(DIALOGUES)])
    return trainer.ppo_train(0.0)


def test_q_is_fitted_to_the_last_rollouts_and_says_what_it_knew_before(one_process, actor):
    trainer = one_process(QCreditTrainer, actor, q_weight=1.0, accumulated_gradient=3)
    told = [rollout(trainer, seed) for seed in range(MEMORY + 2)]
    assert len(trainer.memory) == MEMORY
    # Returns to go are nearly a function of the choice and of how many labels there are.
    assert told[-1]["q_r2"] > 0.2
    assert told[-1]["q_fit_r2"] > told[-1]["q_r2"]
    hidden, chosen, togo = trainer.memory[-1]
    assert (hidden.shape, chosen.shape, togo.shape) == ((7, 16), (7,), (7,))
    last = decisions_of(actor, trainer.replay_buffer.items)
    assert chosen.tolist() == [label for *_, label, _ in last]
    assert togo.tolist() == [value for *_, value in last]
    assert not torch.equal(trainer.memory[0][2], trainer.memory[1][2])


def test_a_run_that_goes_on_remembers(one_process, actor, tmp_path):
    trainer = one_process(QCreditTrainer, actor, q_weight=1.0, accumulated_gradient=3)
    for seed in range(2):
        rollout(trainer, seed)
    trainer.save_memory(tmp_path / "q.pt")
    other = one_process(QCreditTrainer, actor, q_weight=1.0, accumulated_gradient=3)
    other.load_memory(tmp_path / "nosuch.pt")
    assert other.memory == []  # from before the term was used
    other.load_memory(tmp_path / "q.pt")
    for ours, theirs in zip(other.memory, trainer.memory, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    items = [sample(number, seed=2) for number in range(DIALOGUES)]
    assert trainer._judge(items) == other._judge(items)


def test_replies_of_a_model_in_both_roles_are_left_alone(one_process, actor):
    """The responder's half of a step: words without labels, without returns to go, beside what the expert remembers."""

    def replies(number):
        item = sample(number, advantage=1.0)
        count = int(item.action_mask.sum())
        item.mm_train_inputs = [{"allowed": pad_allowed([[]] * count, 0)}]
        return item

    items = [replies(number) for number in range(DIALOGUES)]
    mean = sum((logprobs_of(actor, item) * item.action_mask).sum() for item in items)
    mean = mean / sum(int(item.action_mask.sum()) for item in items)
    alone = torch.cat([g.flatten() for g in torch.autograd.grad(-mean, list(actor.parameters()))])
    trainer = one_process(QCreditTrainer, actor, q_weight=1.0, accumulated_gradient=3)
    fill(trainer, items)
    metrics = trainer.ppo_train(0.0)
    assert torch.allclose(trainer.strategy.gradients[0], alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))
    assert trainer.memory == []
    assert "q_fit_r2" not in metrics


def test_a_rollout_without_a_decision_changes_nothing(one_process, actor):
    trainer = one_process(QCreditTrainer, actor, q_weight=1.0, accumulated_gradient=3)
    fill(trainer, [sample(number, decisions=0) for number in range(DIALOGUES)])
    before = [p.detach().clone() for p in actor.parameters()]
    metrics = trainer.ppo_train(0.0)
    assert trainer.memory == []
    assert "q_fit_r2" not in metrics
    assert all(torch.equal(p, old) for p, old in zip(actor.parameters(), before, strict=True))
