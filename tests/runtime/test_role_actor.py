"""Log-probabilities in the trainer: exact, padded or not, with the logits of actions only."""

import pytest
import torch
from openrlhf.models import PolicyLoss
from openrlhf.models.actor import Actor
from transformers import Qwen2Config, Qwen2ForCausalLM

from openrlhf_gopo.core.categorical import pad_allowed
from openrlhf_gopo.core.preference import (
    decision_advantages,
    preference_coefficients,
    preference_pairs,
    trajectory_log_ratio,
    trajectory_preference_loss,
    turn_weights,
)
from openrlhf_gopo.runtime.models import RoleActor

LENGTHS = [9, 6, 12]
DECISIONS = [[3, 7], [4], [2, 5, 11]]  # token indices of the labels
ALLOWED = [[[3, 5], [5, 6, 7]], [[4, 9]], [[3, 4], [8, 9, 10, 11], [5, 12]]]


@pytest.fixture
def actor() -> RoleActor:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    actor = RoleActor(Qwen2ForCausalLM(config).double(), temperature=0.7)
    actor.packing_samples = False
    return actor.eval()


def batch(rows: list[int]):
    width = max(LENGTHS[r] for r in rows)
    generator = torch.Generator().manual_seed(3)
    everything = [torch.randint(13, 40, (n,), generator=generator) for n in LENGTHS]
    sequences = torch.zeros(len(rows), width, dtype=torch.long)
    attention = torch.zeros_like(sequences)
    mask = torch.zeros_like(sequences)
    for i, r in enumerate(rows):
        sequences[i, : LENGTHS[r]] = everything[r]
        attention[i, : LENGTHS[r]] = 1
        for place, allowed in zip(DECISIONS[r], ALLOWED[r], strict=True):
            sequences[i, place] = allowed[-1]
            mask[i, place] = 1
    inputs = [{"allowed": pad_allowed(ALLOWED[r], width=5)} for r in rows]
    return sequences, mask[:, 1:], attention, inputs


def brute_force(actor: RoleActor, row: int) -> torch.Tensor:
    sequences, _, _, _ = batch([row])
    logits = actor.model(sequences).logits[0]
    values = []
    for place, allowed in zip(DECISIONS[row], ALLOWED[row], strict=True):
        scores = torch.log_softmax(logits[place - 1, allowed].float() / 0.7, -1)
        values.append(scores[allowed.index(int(sequences[0, place]))])
    return torch.stack(values)


@pytest.mark.parametrize("rows", [[0], [1], [0, 1, 2], [2, 0]])
def test_equals_full_logits_whatever_the_batch(actor, rows):
    sequences, mask, attention, inputs = batch(rows)
    with actor.choosing(inputs):
        logprobs, output = actor(sequences, mask, attention, return_output=True, return_entropy=True)
    assert logprobs.shape == mask.shape
    assert (logprobs[mask == 0] == 0).all()
    assert (output.entropy[mask == 1] > 0).all()
    for i, row in enumerate(rows):
        assert torch.allclose(logprobs[i][mask[i] == 1].double(), brute_force(actor, row).double(), atol=1e-6)


def plain(actor: RoleActor) -> Actor:
    """Upstream's actor with the same weights."""
    plain = Actor(actor.model, temperature=actor.temperature)
    plain.packing_samples = False
    return plain


def gradients(actor: Actor, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(actor.parameters()))
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("inputs", [[None, None], [{"allowed": pad_allowed([[]] * n, width=0)} for n in (2, 3)]])
def test_words_are_scored_as_upstream_scores_them(actor, inputs):
    """Values, entropies and gradients, and nothing but the actions' hidden states went through the head."""
    sequences, mask, attention, _ = batch([0, 2])
    theirs, output = plain(actor)(sequences, mask, attention, return_output=True, return_entropy=True)
    with actor.choosing(inputs):
        ours, found = actor(sequences, mask, attention, return_output=True, return_entropy=True)
    assert torch.allclose(ours, theirs.double(), atol=1e-6)
    actions = mask == 1
    assert torch.allclose(found.entropy[actions].double(), output.entropy[actions].double(), atol=1e-5)
    assert found.logits.shape == (1, int(mask.sum()), 40)
    assert torch.allclose(
        gradients(actor, ours.sum() + found.entropy[actions].sum()),
        gradients(actor, theirs.sum() + output.entropy[actions].sum()),
        atol=1e-5,
    )


def test_one_stream_may_hold_words_and_decisions(actor):
    """The second action of each dialogue is a word, the others are decisions; both in one batch."""
    rows = [0, 2]
    sequences, mask, attention, inputs = batch(rows)
    for given in inputs:
        given["allowed"][1] = -1  # PAD: the whole vocabulary was open
    words = plain(actor)(sequences, mask, attention)
    with actor.choosing(inputs):
        mixed, output = actor(sequences, mask, attention, return_output=True, return_entropy=True)
    for i, row in enumerate(rows):
        expected = brute_force(actor, row).double()
        expected[1] = words[i][mask[i] == 1][1]
        assert torch.allclose(mixed[i][mask[i] == 1], expected, atol=1e-6)
        # a word's entropy is over 40 tokens, a decision's over at most 5
        assert (output.entropy[i][mask[i] == 1] > torch.tensor(5.0).log()).tolist() == [
            n == 1 for n in range(len(expected))
        ]
    assert mixed.sum().requires_grad


def test_only_action_positions_reach_the_head(actor):
    seen = []
    actor.model.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape))
    sequences, mask, attention, inputs = batch([0, 1, 2])
    with actor.choosing(inputs):
        actor(sequences, mask, attention)
    assert seen == [(1, sum(map(len, DECISIONS)), 32)]
    assert actor.model(sequences).logits.shape == (3, max(LENGTHS), 40)  # and the model is as it was


@pytest.mark.parametrize("vision", [False, True])
def test_positions_are_upstreams(actor, vision):
    """Counted over the attention mask, or left to a vision-language model."""
    seen = []
    actor.model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["position_ids"]), with_kwargs=True)
    sequences, mask, attention, _ = batch([0, 1])
    theirs = plain(actor)
    actor.is_vlm = theirs.is_vlm = vision
    theirs(sequences, mask, attention)
    actor(sequences, mask, attention)
    upstreams, ours = seen
    assert (upstreams is None) == (ours is None) == vision
    assert vision or torch.equal(upstreams, ours)


@pytest.mark.parametrize("width", [0, 5])
def test_a_role_that_never_acted_has_a_graph_and_no_gradient(actor, width):
    sequences, mask, attention, _ = batch([1])
    with actor.choosing([{"allowed": pad_allowed([], width=width)}]):
        logprobs = actor(sequences, torch.zeros_like(mask), attention)
    logprobs.sum().backward()
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in actor.parameters())


def test_first_clipped_step_has_the_gradient_of_the_preference_loss(actor):
    """Coefficients as advantages in upstream's PolicyLoss: L's own gradient, up to one positive factor."""
    rows, returns = [0, 1, 2], torch.tensor([0.2, 0.9, 0.5])
    sequences, mask, attention, inputs = batch(rows)
    counts = torch.tensor([len(d) for d in DECISIONS])
    owner = torch.repeat_interleave(torch.arange(3), counts)
    weights = torch.cat([turn_weights(int(n), mode="mean") for n in counts])
    parameters = list(actor.parameters())

    def logprobs():
        with actor.choosing(inputs):
            return actor(sequences, mask, attention)

    now = logprobs()
    m = trajectory_log_ratio(now[mask == 1].double(), now[mask == 1].detach().double(), owner, weights, 3)
    pairs = preference_pairs(returns)
    loss = trajectory_preference_loss(m, pairs, beta=0.5).mean()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])

    c, _ = preference_coefficients(m, returns, [torch.arange(3)], beta=0.5)
    advantages = torch.zeros(mask.shape, dtype=torch.float64)
    advantages[mask == 1] = decision_advantages(c, owner, weights)
    clipped = PolicyLoss()(now, now.detach(), advantages, action_mask=mask)[0]
    ours = torch.cat([g.flatten() for g in torch.autograd.grad(clipped, parameters)])
    factor = (ours @ exact) / (exact @ exact)
    assert factor > 0
    assert torch.allclose(ours, factor * exact, atol=1e-9 + 1e-5 * float(ours.abs().max()))
