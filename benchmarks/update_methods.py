"""The updates that ``update.py`` compares, each through upstream's own ``ppo_train`` loop, in one process.

Model, dialogues, micro-batches, loss and AdamW are the same for all; what differs is the trainer and the stream.

- ``responder``: this project's trainer on the responder's streams: logits of reply tokens alone.
- ``expert``: this project's trainer on the expert's streams: logits of the decisions alone, one a turn.
- ``both``: the one after the other, two models.
- ``upstream``: OpenRLHF's ``ActorPPOTrainer`` and ``Actor`` on the responder's streams: one policy, same dialogues.
- ``upstream_expert``: the same on the expert's streams.
- ``per_turn``: OpenRLHF's on one sample for each turn, its history repeated: what a framework
  without multi-turn streams trains on.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from openrlhf_gopo import platform

platform.activate()  # before transformers looks for what a machine without a GPU lacks

import torch  # noqa: E402
from openrlhf.models import Actor, PolicyLoss  # noqa: E402
from openrlhf.trainer.ppo_utils import NaiveReplayBuffer  # noqa: E402
from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from openrlhf_gopo.config import EXPERT, RESPONDER  # noqa: E402
from openrlhf_gopo.runtime.models import RoleActor, RolePPOTrainer  # noqa: E402
from openrlhf_gopo.runtime.samples import DialogueSample, to_experience  # noqa: E402
from openrlhf_gopo.types import Goal, StopReason, Stream, Trajectory, Turn  # noqa: E402

LABELS = list(range(3, 29))
# tokens: a context, then per turn what is read and what is sampled
SYSTEM = {EXPERT: 150, RESPONDER: 60}
READS = {EXPERT: 56, RESPONDER: 40}  # the expert reads the previous reply too
REPLY = 24
METHODS = ("responder", "expert", "both", "upstream", "upstream_expert", "per_turn")
GOAL = Goal("g", "buy", "", {"all": 1.0})
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Strategy:
    """What upstream's loop asks of DeepSpeed, on one device: plain backward, AdamW."""

    ring_attn_group = None

    def __init__(self, args: SimpleNamespace, accumulated_gradient: int) -> None:
        self.args, self.accumulated_gradient, self._calls = args, accumulated_gradient, 0

    def is_rank_0(self) -> bool:
        return False  # no progress bar

    def all_reduce(self, data: Any, op: str = "mean") -> Any:
        return data

    def backward(self, loss: torch.Tensor, model: Any, optim: Any) -> None:
        (loss / self.accumulated_gradient).backward()
        self._calls += 1

    def optimizer_step(self, optim: torch.optim.Optimizer, model: Any, scheduler: Any, name: str) -> None:
        if self._calls % self.accumulated_gradient == 0:
            optim.step()
            optim.zero_grad()

    def get_grad_norm(self, model: Any) -> float:
        return 0.0


def dialogue(turns: int, vocabulary: int) -> DialogueSample:
    """A dialogue with the streams of both roles, of random tokens."""
    trajectory = Trajectory(GOAL, 0, 0, stop=StopReason.MAX_TURNS, rewards={"tse": 50.0})
    for role, sampled in ((EXPERT, 1), (RESPONDER, REPLY)):
        stream = Stream(tokens=_words(SYSTEM[role], vocabulary))
        for _ in range(turns):
            stream.tokens += _words(READS[role], vocabulary)
            start = len(stream.tokens)
            stream.tokens += [LABELS[0]] if role == EXPERT else _words(sampled, vocabulary)
            stream.spans.append((start, start + sampled))
            stream.allowed.append(LABELS[:13] if role == EXPERT else [])
        stream.logprobs = [0.0] * len(stream.tokens)
        trajectory.streams[role] = stream
    trajectory.turns = [Turn("", ("a",), "a", "") for _ in range(turns)]
    return DialogueSample.of(trajectory, {role: {"tse": 1.0} for role in SYSTEM})


def _words(count: int, vocabulary: int) -> list[int]:
    return torch.randint(LABELS[-1] + 1, vocabulary, (count,)).tolist()


def cut_into_turns(sample: DialogueSample) -> list[DialogueSample]:
    """One sample for each reply: everything before it, then the reply."""
    whole, cut = sample.trajectory.streams[RESPONDER], []
    for start, end in whole.spans:
        stream = Stream(whole.tokens[:end], [(start, end)], whole.logprobs[:end], [[]])
        turn = Trajectory(GOAL, 0, 0, stop=StopReason.MAX_TURNS, rewards={"tse": 50.0}, streams={RESPONDER: stream})
        cut.append(DialogueSample(turn, sample.returns, {RESPONDER: [0.0]}))
    return cut


class Updates:
    """Models of one size, the same dialogues for all methods."""

    def __init__(self, vocabulary: int, turns: int, dialogues: int, micro_batch: int, hidden: int, layers: int) -> None:
        torch.manual_seed(0)
        self.micro_batch, self.sizes = micro_batch, (vocabulary, hidden, layers)
        samples = [dialogue(turns, vocabulary) for _ in range(dialogues)]
        turned = [cut for sample in samples for cut in cut_into_turns(sample)]
        self._samples = {RESPONDER: (samples, RESPONDER), EXPERT: (samples, EXPERT), "per_turn": (turned, RESPONDER)}
        self._trainers: dict[tuple, Any] = {}

    def step(self, method: str) -> None:
        """One optimizer step over all dialogues."""
        for trainer in self.trainers(method):
            trainer.ppo_train(0.0)

    def tokens(self, method: str) -> int:
        """Tokens that one step reads."""
        buffers = [trainer.replay_buffer for trainer in self.trainers(method)]
        return sum(len(item.sequences.flatten()) for buffer in buffers for item in buffer.items)

    def trainers(self, method: str) -> list[Any]:
        ours, theirs = (RolePPOTrainer, RoleActor), (ActorPPOTrainer, Actor)
        made = {
            "responder": [(ours, RESPONDER)],
            "expert": [(ours, EXPERT)],
            "both": [(ours, EXPERT), (ours, RESPONDER)],
            "upstream": [(theirs, RESPONDER)],
            "upstream_expert": [(theirs, EXPERT)],
            "per_turn": [(theirs, "per_turn")],
        }
        return [self._trainer(*classes, stream) for classes, stream in made[method]]

    def _trainer(self, cls: Any, actor_class: Any, stream: str) -> Any:
        if (cls, stream) not in self._trainers:
            self._trainers[cls, stream] = self._made(cls, actor_class, *self._samples[stream])
        return self._trainers[cls, stream]

    def _made(self, cls: Any, actor_class: Any, samples: list[DialogueSample], role: str) -> Any:
        """Upstream's constructor opens the weight-sync group; what its training loop needs is put in place here."""
        args = SimpleNamespace(
            preference=None,
            train=SimpleNamespace(max_epochs=1, dynamic_batch_enable=False, enable_ema=False),
            ds=SimpleNamespace(packing_samples=False, tensor_parallel_size=1),
            actor=SimpleNamespace(entropy_coef=None, aux_loss_coef=0),
            algo=SimpleNamespace(kl=SimpleNamespace(use_loss=False, init_coef=0)),
        )
        actor = actor_class(_model(*self.sizes), temperature=1.0)
        actor.packing_samples, actor.temperature = False, 1.0
        trainer = object.__new__(cls)
        trainer.strategy, trainer.args, trainer.actor = Strategy(args, len(samples) // self.micro_batch), args, actor
        trainer.actor_loss_fn = PolicyLoss()
        trainer.actor_optim, trainer.ema_model = torch.optim.AdamW(actor.parameters(), lr=1e-4), None
        trainer.actor_scheduler = SimpleNamespace(get_last_lr=lambda: [1e-4])
        trainer.aux_loss, trainer.max_epochs, trainer.dataloader_pin_memory = False, 1, False
        trainer.replay_buffer = NaiveReplayBuffer(self.micro_batch, 0, True)
        for experience in self._experiences(samples, role, actor):
            trainer.replay_buffer.append(experience)
        return trainer

    @staticmethod
    def _experiences(samples: list[DialogueSample], role: str, actor: Any) -> list[Experience]:
        made = []
        for sample in samples:
            experience = to_experience(sample, role, len(LABELS) if role == EXPERT else 0)
            shape = experience.action_mask.shape
            experience.action_log_probs = torch.full(shape, -3.0)
            experience.advantages, experience.returns = torch.randn(shape), torch.zeros(shape)
            experience.rewards = experience.kl = None
            if not isinstance(actor, RoleActor):
                experience.mm_train_inputs = [None]
            made.append(experience)
        return made


def _model(vocabulary: int, hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(DEVICE)
