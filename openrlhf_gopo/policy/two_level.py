"""The policy of one dialogue, two-level or single-level: who is asked what, in which stream, decoding which tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.policy import prompts
from openrlhf_gopo.policy.labels import choose_labels
from openrlhf_gopo.policy.template import ChatTemplate
from openrlhf_gopo.types import Goal, Strategy, Stream, Trajectory


class StreamBuilder:
    """Grows one ``Stream``: messages are context, actions are spans. Tokens are only ever appended."""

    def __init__(self, template: ChatTemplate, system: str) -> None:
        self.template = template
        self.system = system
        self.stream = Stream()

    def message(self, text: str) -> list[int]:
        """The tokens that asking ``text`` now would append: what opens the dialogue or ends the last action, the
        message, the prompt."""
        tokens = self.stream.tokens
        if not tokens:
            return self.template.first(self.system, text)
        stop = self.template.stop_token
        return [*([] if tokens[-1] == stop else [stop]), *self.template.next(text)]

    def ask(self, message: list[int]) -> None:
        """Append a message made by ``message``."""
        self._context(message)

    def act(self, tokens: Sequence[int], logprobs: Sequence[float], allowed: Sequence[int] = ()) -> None:
        """Append what the role sampled, with the sampler's log-probabilities and, for a decision, the allowed ids."""
        if not tokens or len(tokens) != len(logprobs):
            raise ValueError(f"the engine returned {len(tokens)} tokens with {len(logprobs)} log-probabilities")
        start = len(self.stream.tokens)
        self.stream.tokens.extend(tokens)
        self.stream.logprobs.extend(logprobs)
        self.stream.spans.append((start, len(self.stream.tokens)))
        self.stream.allowed.append(list(allowed))

    def force(self, token: int) -> None:
        """Append a choice that was no choice (one allowed label): context, no span."""
        self._context([token])

    def _context(self, tokens: Sequence[int]) -> None:
        self.stream.tokens.extend(tokens)
        self.stream.logprobs.extend([0.0] * len(tokens))


class TwoLevelPolicy:
    """Templates, labels and prompts of both roles; holds no model.

    Args:
        expert_tokenizer, responder_tokenizer: Hugging Face tokenizers with a chat template.
        catalogue_size: the largest catalogue of the environment.
        labels: ``--gopo.labels`` or None. names_only: ``--gopo.names_only``.
        plan_tokens: the cap of the words that the expert writes before each label; 0: none.
    """

    roles: tuple[str, ...] = (EXPERT, RESPONDER)  # whose streams a trajectory has

    def __init__(
        self,
        expert_tokenizer: Any,
        responder_tokenizer: Any,
        catalogue_size: int,
        labels: str | None = None,
        names_only: bool = False,
        plan_tokens: int = 0,
    ) -> None:
        self.names_only, self.plan_tokens = names_only, plan_tokens
        self.expert = ChatTemplate(expert_tokenizer)
        self.responder = self.expert if responder_tokenizer is expert_tokenizer else ChatTemplate(responder_tokenizer)
        self.labels = choose_labels(expert_tokenizer, catalogue_size, labels)

    def streams(self, goal: Goal, catalogue: Sequence[Strategy]) -> tuple[StreamBuilder, StreamBuilder]:
        """Fresh (expert, responder) streams for one dialogue."""
        labels, plan = self._labels(catalogue), self.plan_tokens > 0
        system = prompts.expert_system(labels, catalogue, goal.context, names_only=self.names_only, plan=plan)
        return (
            StreamBuilder(self.expert, system),
            StreamBuilder(self.responder, prompts.responder_system(goal.context)),
        )

    def decision_text(self, previous_reply: str | None, user: str) -> str:
        """The message that asks for a strategy."""
        return prompts.expert_turn(previous_reply, user)

    def room_to_plan(self) -> int:
        """Tokens that a plan and the question after it can take, a stop token between them included."""
        cap = self.plan_tokens
        return cap + 1 + len(self.expert.next(prompts.LABEL_QUESTION)) if cap else 0

    def reply_text(self, user: str, strategy: Strategy, briefing: str) -> str:
        """The message that asks for the reply under ``strategy``."""
        return prompts.responder_turn(user, strategy, briefing)

    def label_ids(self, catalogue: Sequence[Strategy]) -> dict[str, int]:
        """Strategy id -> label token id."""
        return {s.id: token for s, token in zip(catalogue, self.labels.values(), strict=False)}

    def replay(self, trajectory: Trajectory, catalogue: Sequence[Strategy]) -> dict[str, Stream]:
        """The streams by role that a rollout with the turns of ``trajectory`` has, with log-probabilities of 0.

        Plans are none: a trajectory that was not rolled out has no tokens of its own. What a logged turn may lack:
        where nobody said what was allowed, the whole catalogue was; a strategy that was not allowed is no decision, but
        stands in the stream; without a strategy the turn has no label there, and no reply in the responder's stream.
        """
        deciding, writing = self.streams(trajectory.goal, catalogue)
        ids, by_id, previous = self.label_ids(catalogue), {s.id: s for s in catalogue}, None
        for turn in trajectory.turns:
            deciding.ask(deciding.message(self.decision_text(previous, turn.user)))
            previous, allowed = turn.reply, turn.allowed or tuple(by_id)
            if not turn.strategy:
                continue
            if turn.forced or turn.strategy not in allowed:
                deciding.force(ids[turn.strategy])
            else:
                deciding.act([ids[turn.strategy]], [0.0], [ids[s] for s in allowed])
            writing.ask(writing.message(self.reply_text(turn.user, by_id[turn.strategy], turn.briefing)))
            reply = writing.template.reply(turn.reply)
            writing.act(reply, [0.0] * len(reply))
        builders = {EXPERT: deciding, RESPONDER: writing}
        return {role: builders[role].stream for role in self.roles}

    def _labels(self, catalogue: Sequence[Strategy]) -> list[str]:
        return list(self.labels)[: len(catalogue)]


class SingleLevelPolicy(TwoLevelPolicy):
    """One model in one stream: at every turn the label of a strategy, then the reply under it.

    The ablation without the expert: same decisions, same hard rules, same facts, but one policy that learns both from
    one return. With ``--algo.advantage.estimator gae`` it is multi-turn PPO, with ``group_norm`` GRPO.
    """

    roles = (RESPONDER,)

    def streams(self, goal: Goal, catalogue: Sequence[Strategy]) -> tuple[StreamBuilder, StreamBuilder]:
        """One fresh stream, twice."""
        system = prompts.single_system(self._labels(catalogue), catalogue, goal.context, names_only=self.names_only)
        stream = StreamBuilder(self.responder, system)
        return stream, stream

    def decision_text(self, previous_reply: str | None, user: str) -> str:
        return prompts.single_turn(user)

    def reply_text(self, user: str, strategy: Strategy, briefing: str) -> str:
        return prompts.single_order(strategy, briefing)
