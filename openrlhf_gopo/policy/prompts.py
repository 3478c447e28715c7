"""What each role reads, as text. The constant part comes first, so that dialogues share its cached prefix.

What customer and agent said is one line each: a line break in it could begin a line that another seems to have said.
"""

from __future__ import annotations

from collections.abc import Iterable

from openrlhf_gopo.types import Strategy

LABEL_QUESTION = "Label?"  # what an expert that plans first is asked after its plan


def expert_system(
    labels: Iterable[str],
    catalogue: Iterable[Strategy],
    context: str,
    *,
    names_only: bool = False,
    plan: bool = False,
) -> str:
    """The expert's instructions: the labelled catalogue (its names, or with descriptions), then what is known."""
    order = "Pick the strategy of the agent's next turn. Answer with its label."
    if plan:
        order = f"Plan the agent's next turn in a few words. At {LABEL_QUESTION} answer with the label of its strategy."
    text = [s.name if names_only else f"{s.name}. {s.description}" for s in catalogue]
    entries = [f"{label}: {entry}" for label, entry in zip(labels, text, strict=True)]
    return "\n".join([order, *entries, context])


def expert_turn(previous_reply: str | None, user: str) -> str:
    """What happened since the expert's last choice."""
    return single_turn(user) if previous_reply is None else f"Agent: {_line(previous_reply)}\n{single_turn(user)}"


def responder_system(context: str) -> str:
    """The responder's instructions."""
    return f"You are a service agent. Write the reply that carries out the strategy.\n{context}"


def single_system(
    labels: Iterable[str], catalogue: Iterable[Strategy], context: str, *, names_only: bool = False
) -> str:
    """The instructions of one model that does both."""
    catalogued = expert_system(labels, catalogue, context, names_only=names_only)
    return f"You are a service agent. Asked for a strategy, write the reply that carries it out.\n{catalogued}"


def single_turn(user: str) -> str:
    """The utterance to pick a strategy for; what was replied before stands in the same stream."""
    return f"Customer: {_line(user)}"


def single_order(strategy: Strategy, briefing: str) -> str:
    """The strategy just picked, and the facts that may be stated."""
    return f"[{strategy.name}] {briefing}".rstrip()


def responder_turn(user: str, strategy: Strategy, briefing: str) -> str:
    """The utterance to answer, the strategy to answer under, and the facts that may be stated."""
    return f"{single_turn(user)}\n{single_order(strategy, briefing)}"


def _line(text: str) -> str:
    return " ".join(text.splitlines())
