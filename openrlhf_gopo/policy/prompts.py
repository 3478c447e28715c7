"""What each role reads, as text. The constant part comes first, so that dialogues share its cached prefix."""

from __future__ import annotations

from collections.abc import Iterable

from openrlhf_gopo.types import Strategy


def expert_system(labels: Iterable[str], catalogue: Iterable[Strategy], context: str) -> str:
    """The expert's instructions: the labelled catalogue, then what is known of the goal."""
    entries = [f"{label}: {s.name}. {s.description}" for label, s in zip(labels, catalogue, strict=True)]
    return "\n".join(["Pick the strategy of the agent's next turn. Answer with its label.", *entries, context])


def expert_turn(previous_reply: str | None, user: str) -> str:
    """What happened since the expert's last choice."""
    return f"Customer: {user}" if previous_reply is None else f"Agent: {previous_reply}\nCustomer: {user}"


def responder_system(context: str) -> str:
    """The responder's instructions."""
    return f"You are a service agent. Write the reply that carries out the strategy.\n{context}"


def responder_turn(user: str, strategy: Strategy, briefing: str) -> str:
    """The utterance to answer, the strategy to answer under, and the facts that may be stated."""
    order = f"[{strategy.name}] {briefing}".rstrip()
    return f"Customer: {user}\n{order}"
