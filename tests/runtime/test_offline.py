"""Offline GOPO: every optimizer step has the gradient of the loss as it is written, whatever the micro-batch."""

import random
from collections import defaultdict
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

from openrlhf_gopo.config import EXPERT, RESPONDER, PreferenceConfig
from openrlhf_gopo.core.categorical import pad_allowed
from openrlhf_gopo.core.preference import turn_weights
from openrlhf_gopo.runtime.models import RoleActor
from openrlhf_gopo.runtime.offline.config import OfflineConfig
from openrlhf_gopo.runtime.offline.data import Chunks, Sample
from openrlhf_gopo.runtime.offline.evaluation import compared, judge
from openrlhf_gopo.runtime.offline.trainer import OfflineTrainer

LABELS = [3, 4, 5, 6]
RETURNS = {"book": [0.1, 0.9, 0.4, 0.4], "cancel": [0.3, 0.8, 0.6, 0.2]}


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def sample(role: str, group: str, k: int) -> Sample:
    """A dialogue of 1 to 3 decisions, or replies of 1 to 3 words under strategies "x" and "y"."""
    rng = random.Random(f"{group}{k}")
    tokens, mask, allowed, unit, keys = [1], [False], [], [], []
    for turn in range(1 + k % 3):
        words = [rng.randrange(10, 30) for _ in range(2 + k)]
        tokens, mask = tokens + words, mask + [False] * len(words)
        if role == EXPERT:
            labels = LABELS[: 2 + (turn + k) % 3]
            action, allowed = [rng.choice(labels)], [*allowed, labels]
        else:
            action = [rng.randrange(10, 30) for _ in range(1 + turn)]
        tokens, mask = tokens + action, mask + [True] * len(action)
        unit += [turn if role == RESPONDER else 0] * len(action)
        keys.append("xy"[(turn + k) % 2])
    lengths = [len(allowed)] if role == EXPERT else [1 + turn for turn in range(len(keys))]
    return Sample(
        name=f"{group} {k}",
        group=group,
        returned=RETURNS[group][k],
        tokens=torch.tensor(tokens),
        mask=torch.tensor(mask[1:]),
        allowed=pad_allowed(allowed, 4 if role == EXPERT else 0),
        unit=torch.tensor(unit),
        weights=torch.cat([turn_weights(n, mode="mean") for n in lengths]),
        keys=keys if role == RESPONDER else [""],
        better=RETURNS[group][k] > 0.5,
    )


def make_trainer(one_process, tmp_path, config, samples, micro, eval_sets=None):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, tie_word_embeddings=True, **sizes))
    actor = RoleActor(model.double(), temperature=1.0)
    actor.packing_samples = False
    strategy = one_process(OfflineTrainer, actor, accumulated_gradient=len(samples) // micro).strategy
    args = strategy.args
    args.model = SimpleNamespace(label_smoothing=0.0, ipo_enable=False, aux_loss_coef=0, nll_loss_coef=0)
    args.logger = SimpleNamespace(wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=1)
    args.train.micro_batch_size, args.train.batch_size, args.train.seed = micro, len(samples), 0
    args.eval, args.ckpt = SimpleNamespace(steps=-1), SimpleNamespace(save_steps=-1)
    strategy.world_size, strategy.optimizer_step = 1, stepper(strategy)
    strategy.is_rank_0 = lambda: True
    chunks = Chunks(samples, config.group_size, seed=0)
    sampler = Epochs(chunks, num_replicas=1, rank=0, shuffle=False)
    return OfflineTrainer(
        config=config,
        results=tmp_path,
        model=actor,
        ref_model=None,
        strategy=strategy,
        tokenizer=SimpleNamespace(pad_token_id=0),
        optim=None,
        train_dataloader=DataLoader(chunks, batch_size=len(chunks), sampler=sampler, collate_fn=list),
        eval_dataloader=eval_sets or {},
        scheduler=SimpleNamespace(get_last_lr=lambda: [0.1]),
        max_epochs=3,
    )


class Epochs(DistributedSampler):
    """Upstream's ``set_epoch`` also takes the place to go on from."""

    def set_epoch(self, epoch, consumed_samples=0):
        assert consumed_samples == 0
        super().set_epoch(epoch)


def stepper(strategy):
    step = strategy.optimizer_step
    return lambda optim, model, scheduler: step(optim, model, scheduler, "model")


def written_loss(actor, samples, config, reference):
    """L by hand, one graph: over pairs of dialogues of a group, or of replies under one strategy; and the imitation."""
    units, said = defaultdict(list), []
    for s in samples:
        with actor.choosing([{"allowed": s.allowed}]):
            now = actor(s.tokens[None], s.mask[None], torch.ones_like(s.tokens)[None])[0][s.mask]
        said += list(now) if s.better else []
        for u, key in enumerate(s.keys):
            of = s.unit == u
            units[s.group, key].append(((now - reference[s.name])[of].mean(), s.returned))
    terms = []
    for group in units.values():
        for (m, r), (other, low) in combinations(group, 2):
            if r != low:
                gap = m - other if r > low else other - m
                terms.append(-torch.nn.functional.logsigmoid(config.pref.beta * gap))
    return config.preference * torch.stack(terms).mean() - config.imitation * torch.stack(said).mean()


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize(("role", "coefs"), [(EXPERT, (1.0, 0.0)), (EXPERT, (0.5, 0.3)), (RESPONDER, (0.8, 0.6))])
def test_every_optimizer_step_has_the_gradient_of_the_written_loss(one_process, tmp_path, role, coefs, micro):
    config = OfflineConfig(
        role=role, group_size=4, pref_coef=coefs[0], sft_coef=coefs[1], pref=PreferenceConfig(beta=2.0)
    )
    samples = [sample(role, group, k) for group in RETURNS for k in range(4)]
    trainer = make_trainer(one_process, tmp_path, config, samples, micro)
    actor, expected, step = trainer.model, [], trainer.training_step
    reference = {s.name: s.reference.double() for s in samples}

    def recording(chunks):
        loss = written_loss(actor, [s for chunk in chunks for s in chunk], config, reference)
        expected.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(actor.parameters()))]))
        metrics = step(chunks)
        assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        return metrics

    trainer.training_step = recording
    trainer.fit(trainer.args)
    assert len(expected) == len(trainer.strategy.gradients) == 3
    for ours, exact in zip(trainer.strategy.gradients, expected, strict=True):
        assert float(exact.abs().max()) > 1e-3
        # The coefficients come from log-probabilities kept in float32.
        assert torch.allclose(ours, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_dialogues_that_do_not_fill_a_step_leave_the_gradient_as_it_is(one_process, tmp_path):
    """Seven dialogues in micro-batches of four: the eighth place is a repeated dialogue of no weight."""
    config = OfflineConfig(group_size=4)
    gradients = []
    for micro, passes in ((1, 7), (4, 2)):
        samples = [sample(EXPERT, group, k) for group in RETURNS for k in range(4)][:-1]
        trainer = make_trainer(one_process, tmp_path, config, samples, 1)
        trainer.micro, trainer.strategy.accumulated_gradient = micro, passes
        trainer.training_step([samples[:4], samples[4:]])
        gradients += trainer.strategy.gradients
    assert float(gradients[0].abs().max()) > 1e-3
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-9)


def test_the_held_out_dialogues_are_judged_before_and_after(one_process, tmp_path):
    """On the very dialogues that are learnt, everything must rise; before, m is 0 and no pair is told apart."""
    samples = [sample(EXPERT, group, k) for group in RETURNS for k in range(4)]
    for s in samples:
        s.better = True
    config = OfflineConfig(group_size=4, sft_coef=1.0)
    trainer = make_trainer(one_process, tmp_path, config, samples, 4, {"same": samples})
    trainer.epochs = trainer.args.eval.steps = 60
    assert set(trainer.before["same"]["pref_accuracy"].values()) == {0.5}
    trainer.fit(trainer.args)
    told = compared(trainer.before["same"], trainer.after["same"])
    for metric in ("log_likelihood", "top1", "pref_accuracy"):
        mean, low, high = told["change"][metric]
        assert low <= mean <= high
        assert mean > 0.1, metric
    assert told["change"]["chance"] == [0, 0, 0]


def test_ranks_and_accuracies_by_hand():
    samples = [sample(EXPERT, "book", k) for k in range(3)]  # returns 0.1, 0.9, 0.4
    scored = []
    for s, (logprob, reference) in zip(samples, [(-1.0, -1.5), (-2.0, -3.0), (-0.5, -0.4)], strict=True):
        n = len(s.unit)
        s.reference = torch.full((n,), reference)
        scored.append((torch.full((n,), logprob), torch.tensor([1, 4, 2][:n])))
    values = judge(samples, scored)
    # m: 0.5, 1.0, -0.1; the pairs (1,0) and (1,2) are right, (2,0) is not.
    assert values["pref_accuracy"] == {0: 0.5, 1: 1.0, 2: 0.5}
    # By log pi alone 1 is the worst: (1,0) and (1,2) are wrong, (2,0) is right.
    assert values["likelihood_accuracy"] == {0: 0.5, 1: 0.0, 2: 0.5}
    assert values["top1"] == pytest.approx({0: 1.0, 1: 0.5, 2: 1 / 3})
    assert values["top3"] == pytest.approx({0: 1.0, 1: 0.5, 2: 2 / 3})
    assert values["log_likelihood"] == pytest.approx({0: -1.0, 1: -2.0, 2: -0.5})
