"""The schema of a logged dialogue: one JSON object per line of a UTF-8 file.

    {"id": "c-17", "source": "chat export", "language": "en",
     "goal": {"intent": "refund", "context": "The customer is known.", "subgoals": {"find": 0.4, "refund": 0.6}},
     "turns": [{"user": "My mug broke.", "strategy": "look_up_order", "reply": "I found order A1.",
                "briefing": "Order A1: one mug.", "completed": ["find"], "events": ["answer"]},
               {"user": "Please.", "strategy": "give_refund", "reply": "Done.", "completed": ["refund"],
                "engagement": 1.0}],
     "outcome": {"stop": "completed", "success": true}}

Nothing is converted on the way in: ``1`` is no string and ``"1"`` no number; unknown fields are errors. A ``Dialogue``
that exists is free of contradictions. The command ``logs schema`` prints the JSON schema, which cannot express the
contradictions (``contradictions`` below lists them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from openrlhf_gopo.types import StopReason

MAX_TEXT = 100_000  # characters of one text: more than any stream holds; a longer one is a pasted file
MAX_TURNS = 1_000
MAX_NAMES = 1_000  # of one list or map
CONTRADICTION = "contradiction"  # the error type that carries the problems which ``contradictions`` found

Problem = tuple[str, str, str]  # field, what is wrong, what to do

# Regular expressions of the Rust kind, which take linear time.
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT, pattern=r"^[^\x00]*$")]
Words = Annotated[str, StringConstraints(max_length=MAX_TEXT, pattern=r"^[^\x00]*\S[^\x00]*$")]
Name = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\s\x00-\x1f\x7f]([^\x00-\x1f\x7f]*\S)?$")]
Names = Annotated[tuple[Name, ...], Field(max_length=MAX_NAMES)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class LoggedGoal(_Strict):
    """What the customer wanted."""

    id: Name | None = None
    """Goals with one id are one goal in every table and interval; default: the dialogue's id."""
    intent: Name
    """The task; with an environment, one of its goals' intents."""
    context: Text
    """All that the agent knew of the goal when the dialogue began."""
    subgoals: Annotated[dict[Name, Annotated[float, Field(gt=0, le=1)]], Field(min_length=1, max_length=MAX_NAMES)]
    """Subgoal -> weight. The weights sum to 1."""
    facts: Annotated[dict[Name, Text], Field(max_length=MAX_NAMES)] = {}
    """What the customer knew and could tell."""


class LoggedTurn(_Strict):
    """The customer's words, what the agent chose to do, the agent's words, and what came of it."""

    user: Text
    """Empty where the agent spoke first, or twice in a row."""
    strategy: Name | None
    """The strategy of the reply; null where nobody labelled it."""
    reply: Words
    """What the agent said."""
    briefing: Text = ""
    """What the agent was told for this reply: tool results and facts it could state."""
    events: Names = ()
    """How the customer reacted to the reply: purchase, thanks, cart, click, positive, answer, question, reply, refuse,
    object, negative, confused, leave (``trajectory.ENGAGEMENT`` grades them); other names are kept and mean nothing."""
    completed: Names = ()
    """Subgoals that this turn completed, each once in a dialogue."""
    allowed: Annotated[Names, Field(min_length=1)] | None = None
    """The strategies that the rules allowed here; default: unknown."""
    engagement: Annotated[float, Field(ge=0, le=1)] | None = None
    """The customer's engagement after the reply, in [0, 1]; default: from the events."""
    on_task: bool | None = None
    """The turn was a step that the task still required; default: it completed a subgoal."""


class Result(_Strict):
    """How the dialogue ended."""

    stop: StopReason
    """Why it ended: failed ones are counted and enter no metric."""
    success: bool
    """True when every subgoal was completed, which is also what ``completed`` says."""
    rating: Annotated[float, Field(ge=0, le=1)] | None = None
    """The customer's own answer to how it went, in [0, 1]; default: nobody asked."""


class Dialogue(_Strict):
    """One logged dialogue of an agent (a person or a program) with a customer."""

    id: Name
    """Unique in the file."""
    source: Name
    """Where the dialogue comes from, as a slice of the tables."""
    language: Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")]
    """BCP 47: ``en``, ``zh-Hans``."""
    goal: LoggedGoal
    turns: Annotated[tuple[LoggedTurn, ...], Field(min_length=1, max_length=MAX_TURNS)]
    """In order."""
    outcome: Result

    @model_validator(mode="after")
    def _consistent(self) -> Dialogue:
        problems = list(contradictions(self))
        if problems:
            raise PydanticCustomError(CONTRADICTION, "{text}", {"text": problems[0][1], "problems": problems})
        return self


def contradictions(dialogue: Dialogue) -> Iterator[Problem]:
    """What no single field shows: weights, subgoals completed, and an outcome that says otherwise."""
    weights = dialogue.goal.subgoals
    total = math.fsum(weights.values())
    if abs(total - 1.0) > 1e-6:
        yield "goal.subgoals", f"the weights sum to {total:.6g}", "divide each weight by that sum"
    done: dict[str, int] = {}
    for index, turn in enumerate(dialogue.turns):
        for subgoal in turn.completed:
            field = f"turns[{index}].completed"
            if subgoal not in weights:
                known = ", ".join(list(weights)[:10])
                yield field, f"{subgoal!r} is no subgoal of the goal", f"use one of: {known}"
            elif subgoal in done:
                yield field, f"{subgoal!r} was already completed at turns[{done[subgoal]}]", "list a subgoal once"
            else:
                done[subgoal] = index
        if turn.allowed and len(set(turn.allowed)) < len(turn.allowed):
            yield f"turns[{index}].allowed", "a strategy is listed twice", "list a strategy once"
    left = [subgoal for subgoal in weights if subgoal not in done]
    outcome, state = dialogue.outcome, f"{', '.join(left[:10])} not completed" if left else "every subgoal is completed"
    if outcome.success == bool(left):
        remedy = "list each subgoal under the turn that completed it, or correct success"
        yield "outcome.success", f"{str(outcome.success).lower()}, but {state}", remedy
    elif (outcome.stop is StopReason.COMPLETED) == bool(left) and outcome.stop is not StopReason.FAILED:
        remedy = "stop is completed when, and only when, every subgoal is"
        yield "outcome.stop", f"{outcome.stop.value}, but {state}", remedy
