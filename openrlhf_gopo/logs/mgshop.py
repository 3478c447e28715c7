"""MG-ShopDial (Bernard and Balog, SIGIR 2023): 64 human dialogues of clients with a shopping assistant.

The layout, as published in MGShopDial/MGShopDial.json of its repository:

    [{"id": "Books:45:109:118", "metadata": {"id": "45", "desc": "You are looking for ...", ...},
      "utterances": [{"participant": "Wizard", "utterance": "Hello!", "goal": "meta", "intents": [["greeting", 4.0]]}]}]

The data card writes "Assistant" where the file has "Wizard": both are read. An intent comes with the number of
annotators, of five, who chose it.

How it maps is ours: the data set names no strategies, subgoals or success. The strategy of an assistant's utterance is
its intent with the most votes, the first of equals. Subgoals are in ``SUBGOALS``. Scenarios are goals: dialogues of one
scenario share a goal. Left out: the checklists (half of them were not ticked), search logs, per-utterance goals.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from openrlhf_gopo.errors import DataError
from openrlhf_gopo.logs.check import problems_of
from openrlhf_gopo.types import StopReason

FILE = "MGShopDial.json"
CONTEXT = "You help a client to shop online. Department: {}."
# Learn what is wanted, recommend, answer or explain, and please: positive feedback after a recommendation.
SUBGOALS = {"elicit": 0.2, "recommend": 0.3, "answer": 0.2, "accept": 0.3}
DOES = {"elicit": "elicit", "clarify": "elicit", "recommend": "recommend", "answer": "answer", "explain": "answer"}
# A client's intent -> the event it is (see ``trajectory.ENGAGEMENT``); other intents are a plain reply.
EVENTS = {"pf": "positive", "nf": "negative", "o_question": "question", "clarify": "question"} | dict.fromkeys(
    ("answer", "disclose"), "answer"
)


class _Layout(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Utterance(_Layout):
    participant: Literal["Client", "Wizard", "Assistant"]
    utterance: str
    intents: tuple[tuple[str, float], ...]

    def strategy(self) -> str | None:
        """The intent with the most votes; None without intents."""
        return max(self.intents, key=lambda intent: intent[1])[0] if self.intents else None


class _Scenario(_Layout):
    id: str
    desc: str


class _Conversation(_Layout):
    id: str
    metadata: _Scenario
    utterances: tuple[_Utterance, ...]


_CONVERSATIONS = TypeAdapter(tuple[_Conversation, ...])


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One record per conversation; the folder is a clone of the repository, or its MGShopDial folder.

    What the client says after the assistant's last utterance is in no turn, but counts as a reaction.

    Raises:
        DataError: no file, or one in another layout.
    """
    path = next((p for p in (folder / FILE, folder / "MGShopDial" / FILE) if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder}: no {FILE} in it; give a clone of the MG-ShopDial repository")
    try:
        conversations = _CONVERSATIONS.validate_json(path.read_bytes())
    except ValidationError as error:
        where, what, remedy = next(problems_of(error))
        raise DataError(f"{path}:{where}: {what}: {remedy}") from error
    for index, conversation in enumerate(conversations):
        yield f"{path}:[{index}]", _record(conversation)


def _record(conversation: _Conversation) -> dict[str, Any]:
    turns = _turns(conversation)
    left = [subgoal for subgoal in SUBGOALS if not any(subgoal in turn["completed"] for turn in turns)]
    client_last = bool(conversation.utterances) and conversation.utterances[-1].participant == "Client"
    stop = StopReason.USER_LEFT if client_last else StopReason.CLOSED
    department = conversation.id.partition(":")[0]
    return {
        "id": conversation.id,
        "source": "mgshop",
        "language": "en",
        "goal": {
            "id": f"mgshop-{conversation.metadata.id}",
            "intent": department,
            "context": CONTEXT.format(department),
            "subgoals": SUBGOALS,
            "facts": {"scenario": conversation.metadata.desc},
        },
        "turns": turns,
        "outcome": {"stop": (stop if left else StopReason.COMPLETED).value, "success": not left},
    }


def _turns(conversation: _Conversation) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    said: list[str] = []
    done: set[str] = set()
    for utterance in conversation.utterances:
        names = [name for name, _ in utterance.intents]
        if utterance.participant == "Client":
            said.append(utterance.utterance.strip())
            if turns:
                turns[-1]["events"] += dict.fromkeys(EVENTS.get(name, "reply") for name in names or ("reply",))
                if "pf" in names and "recommend" in done:
                    _complete(turns[-1], ["accept"], done)
            continue
        if turns and not said and utterance.strategy() is None:  # it goes on with the reply before it
            turns[-1]["reply"] += " " + utterance.utterance.strip()
            continue
        turn: dict[str, Any] = {"user": " ".join(said), "strategy": utterance.strategy(), "completed": []}
        turns.append(turn | {"reply": utterance.utterance.strip(), "events": []})
        _complete(turns[-1], [DOES[name] for name in names if name in DOES], done)
        said = []
    return turns


def _complete(turn: dict[str, Any], subgoals: list[str], done: set[str]) -> None:
    """List the subgoals that no turn completed so far."""
    turn["completed"] += [subgoal for subgoal in dict.fromkeys(subgoals) if subgoal not in done]
    done.update(subgoals)
