"""``--gopo.policy single_level`` is upstream's multi-turn PPO and GRPO: same advantages, losses and gradients."""

import copy
from types import SimpleNamespace

import pytest
import torch
from openrlhf.models import Actor, PolicyLoss
from openrlhf.trainer.ppo_utils import NaiveReplayBuffer
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer
from transformers import LlamaConfig, LlamaForCausalLM

from openrlhf_gopo.config import RESPONDER, GopoConfig
from openrlhf_gopo.runtime.experience_maker import ResponderExperienceMaker
from openrlhf_gopo.runtime.models import RoleActor, RolePPOTrainer
from openrlhf_gopo.runtime.samples import DialogueSample, to_experience
from openrlhf_gopo.types import Goal, StopReason, Stream, Trajectory, Turn

GOAL = Goal("g", "refund", "", {"find": 0.4, "refund": 0.6})
LABELS = [3, 4, 5, 6]
CONFIG = GopoConfig(env="shop", policy="single_level")


def dialogue(seed: int, forced: bool) -> DialogueSample:
    """Two or three turns of a context, a label among 2 to 4 (context when forced) and a reply of 2 to 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    stream, trajectory = Stream(tokens=[1]), Trajectory(GOAL, seed, 0, stop=StopReason.USER_LEFT)

    def words(count):
        return torch.randint(10, 30, (count,), generator=generator).tolist()

    for t in range(2 + seed % 2):
        stream.tokens += words(3)
        stream.tokens.append(LABELS[(seed + t) % 2])
        end = len(stream.tokens)
        if not forced:
            stream.spans.append((end - 1, end))
            stream.allowed.append(LABELS[: 2 + (seed + t) % 3])
        stream.tokens += words(2)
        reply = words(2 + (seed + t) % 3)
        stream.spans.append((len(stream.tokens), len(stream.tokens) + len(reply)))
        stream.allowed.append([])
        stream.tokens += reply
        done = ("find",) if seed % 3 == 0 and t == 0 else ()
        trajectory.turns.append(Turn("hi", ("a", "b"), "a", "ok", completed=done, engagement=1.0, on_task=True))
    stream.logprobs = [0.0] * len(stream.tokens)
    trajectory.streams = {RESPONDER: stream}
    trajectory.rewards = {"tse": 40.0 if seed % 3 == 0 else 0.0, "turns": float(len(trajectory.turns))}
    return DialogueSample.of(trajectory, {RESPONDER: {"tse": 1.0, "turns": 0.1}})


def model(cls=RoleActor):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    actor = cls(LlamaForCausalLM(config), temperature=0.8)
    actor.packing_samples, actor.temperature = False, 0.8
    return actor


def experiences(samples: list[DialogueSample], actor):
    """What the makers see after the forward passes: log-probabilities of the sampler, values, a KL estimate."""
    made = []
    generator = torch.Generator().manual_seed(5)
    for i, sample in enumerate(samples):
        experience = to_experience(sample, RESPONDER, len(LABELS))
        mask = experience.action_mask
        with torch.no_grad(), actor.choosing(experience.mm_train_inputs):
            now = actor(experience.sequences, mask, experience.attention_mask)
        noise = torch.rand(mask.shape, generator=generator)
        experience.index = [i]
        experience.action_log_probs = (now + 0.8 * (noise - 0.5)) * mask  # some ratios are clipped
        experience.values = torch.rand(mask.shape, generator=generator) * mask
        experience.kl = 0.01 * noise * mask
        made.append(experience)
    return made


def maker(cls, estimator, samples, **ours):
    args = SimpleNamespace(
        algo=SimpleNamespace(
            advantage=SimpleNamespace(estimator=estimator, gamma=0.99, lambd=0.9, no_std_norm=False),
            kl=SimpleNamespace(use_loss=False, init_coef=0.05),
        ),
        rollout=SimpleNamespace(n_samples_per_prompt=len(samples)),
        reward=SimpleNamespace(
            clip_range=(-10, 10), overlong_buffer_len=None, stop_properly_penalty_coef=None, overlong_penalty_factor=1
        ),
        ds=SimpleNamespace(ring_attn_size=1, tensor_parallel_size=1),
    )
    groups = (None, None, None, None, FixedKLController(0.05), SimpleNamespace(args=args), None)
    made = cls(*groups, **ours)
    made.advantage_estimator = estimator
    return made


ESTIMATORS = ["gae", "group_norm", "rloo", "reinforce", "reinforce_baseline", "dr_grpo"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantages_are_upstreams(estimator):
    samples = [dialogue(seed, forced=False) for seed in range(4)]
    given = experiences(samples, model())
    ours = maker(
        ResponderExperienceMaker, estimator, samples, role=RESPONDER, num_labels=len(LABELS), config=CONFIG
    ).compute_advantages_and_returns(copy.deepcopy(given))
    theirs = maker(RemoteExperienceMaker, estimator, samples).compute_advantages_and_returns(copy.deepcopy(given))
    spread = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.advantages, b.advantages)
        assert torch.equal(a.returns, b.returns)
        spread = max(spread, float(a.advantages[a.action_mask.bool()].abs().max()))
    assert spread > 0.1


@pytest.mark.parametrize("estimator", ["gae", "group_norm"])
def test_words_alone_train_as_upstreams_trainer_trains_them(one_process, estimator):
    """Where the SOP leaves no choice the stream holds replies only: loss, metrics and gradient are upstream's own."""
    samples = [dialogue(seed, forced=True) for seed in range(4)]
    made = maker(RemoteExperienceMaker, estimator, samples)
    batch = made.compute_advantages_and_returns(experiences(samples, model()))
    found = []
    for cls, actor in ((RolePPOTrainer, model()), (ActorPPOTrainer, model(Actor))):
        trainer = one_process(cls, actor)
        status = trainer.training_step(micro_batch(batch), 0.0, 0)
        found.append((trainer.strategy.gradients[0], status["metrics"]))
    (ours, our_metrics), (theirs, their_metrics) = found
    assert float(theirs.abs().max()) > 1e-3
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
    assert our_metrics.keys() == their_metrics.keys()
    for name, value in their_metrics.items():
        assert torch.allclose(torch.as_tensor(our_metrics[name]), torch.as_tensor(value), rtol=1e-5, atol=1e-7), name
    assert float(our_metrics["ppo_clip_ratio"]) > 0


@pytest.mark.parametrize("estimator", ["gae", "group_norm"])
def test_labels_and_words_share_upstreams_loss(one_process, estimator):
    """With decisions among the words: PolicyLoss over log pi worked out token by token, labels among allowed ones."""
    samples = [dialogue(seed, forced=False) for seed in range(4)]
    batch = maker(RemoteExperienceMaker, estimator, samples).compute_advantages_and_returns(
        experiences(samples, model())
    )
    trainer = one_process(RolePPOTrainer, model())
    trainer.training_step(micro_batch(batch), 0.0, 0)

    reference, rows = model(), []
    for sample, experience in zip(samples, batch, strict=True):
        stream = sample.trajectory.streams[RESPONDER]
        logits = reference.model(torch.tensor([stream.tokens])).logits[0] / 0.8
        row = torch.zeros(len(stream.tokens) - 1)
        for (start, end), allowed in zip(stream.spans, stream.allowed, strict=True):
            for place in range(start, end):
                scores = logits[place - 1].log_softmax(-1)
                if allowed:
                    scores = scores - scores[allowed].logsumexp(-1)
                row = row.index_put((torch.tensor(place - 1),), scores[stream.tokens[place]])
        rows.append((row, experience))
    padded = [
        torch.nn.utils.rnn.pad_sequence(t, batch_first=True)
        for t in zip(*((row, e.action_log_probs[0], e.advantages[0], e.action_mask[0]) for row, e in rows), strict=True)
    ]
    loss = PolicyLoss()(padded[0], padded[1], padded[2], action_mask=padded[3])[0]
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(reference.parameters()))])
    ours = trainer.strategy.gradients[0]
    assert float(exact.abs().max()) > 1e-3
    assert torch.allclose(ours, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_label_and_reply_belong_to_the_same_turn():
    """Turn-level credit: both get what came from their turn on; a decision that no turn carried out gets nothing."""
    sample = dialogue(3, forced=False)
    assert sample.earned[RESPONDER] == pytest.approx([0.5, 0.1, 0.1])
    assert sample.turns_of_spans(RESPONDER) == [0, 0, 1, 1, 2, 2]
    assert dialogue(3, forced=True).turns_of_spans(RESPONDER).count(1) == 1  # replies alone
    stream = sample.trajectory.streams[RESPONDER]
    stream.spans.append((len(stream.tokens), len(stream.tokens) + 1))
    stream.allowed.append(LABELS)
    assert sample.turns_of_spans(RESPONDER)[-1] == 3


def micro_batch(batch):
    """One padded micro-batch, as the replay buffer collates it."""
    buffer = NaiveReplayBuffer(len(batch), 0, True)
    for experience in copy.deepcopy(batch):
        experience.kl = None
        buffer.append(experience)
    return buffer.collate_fn(buffer.items)
