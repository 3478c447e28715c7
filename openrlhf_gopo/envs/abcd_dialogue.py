"""One ABCD conversation. It knows the case and the procedure; the agent sees observations and briefings."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from openrlhf_gopo.envs.abcd_sop import Procedure, slot_name
from openrlhf_gopo.envs.abcd_turns import ASK, MORE, REPLY
from openrlhf_gopo.envs.base import HumanDialogue
from openrlhf_gopo.envs.reading import mentions
from openrlhf_gopo.envs.replayed import BYE, ReplayDialogue
from openrlhf_gopo.rewards.text import values as stated
from openrlhf_gopo.types import Goal, Strategy
from openrlhf_gopo.users.base import Voice
from openrlhf_gopo.users.replay import ACKNOWLEDGE, Answer, Line, ReplayUser, Said

# Said where the human agent's words do not fit, or are not known.
STOCK = {
    REPLY: "One moment, please.",
    MORE: "Is there anything else I can help you with?",
    BYE: "Thank you and have a great day!",
}
ANSWERED = "I hope this answers your question."  # at the click on an FAQ's answer that was told before
QUESTION = re.compile(r"\?|^(?:what|where|when|how|who|why|which|can|could|do|does|is|are|will)\b", re.I)


@dataclass(frozen=True)
class Case:
    """One goal's human dialogue, ready to replay.

    ``required``: actions in the guidelines' order. ``needs``: by action, slot -> value that the customer has to tell.
    ``values``: all that is known of the customer. ``told``: the slots told in the opening. ``queries``: the actions
    that return something; the data holds what only in the agent's words. ``answer``: the FAQ's, "" without a search.
    """

    human: HumanDialogue
    required: tuple[str, ...]
    needs: Mapping[str, Mapping[str, str]]
    values: Mapping[str, str]
    told: frozenset[str]
    said: tuple[Said, ...]
    queries: frozenset[str]
    answer: str

    def missing(self, action: str, told: Collection[str]) -> tuple[str, ...]:
        """The slots that ``action`` takes and that are not among those ``told``."""
        return tuple(slot for slot in self.needs.get(action, ()) if slot not in told)

    def returned(self, action: str, words: str) -> str:
        """What the system returned on ``action``: the FAQ's answer, or ``words``, the agent's own at a query; or ""."""
        if action == "select-faq" or (action.startswith("search-") and action in self.required[1:]):
            return self.answer
        # The agent's thanks tell nothing of what the system said.
        return words if action in self.queries and not ACKNOWLEDGE.fullmatch(words) else ""

    def brief(self, strategy: Strategy, told: Collection[str], returned: Iterable[str]) -> str:
        """What ``strategy`` is for, what is entered or still missing of the slots ``told``, what the system returned so
        far; "" for nothing."""
        lines = [strategy.description]
        if strategy.id.startswith(ASK):
            missing = [slot_name(slot) for slot in self.missing(strategy.id.removeprefix(ASK), told)]
            lines.append(f"Missing: {', '.join(missing)}." if missing else "Nothing is missing.")
        entered = [value for slot, value in self.needs.get(strategy.id, {}).items() if slot in told]
        lines += [f"Entered: {', '.join(entered)}."] if entered else []
        lines += [f"System: {text}" for text in dict.fromkeys(returned) if text and strategy.id not in (BYE, MORE)]
        return "\n".join(lines)


class AbcdDialogue(ReplayDialogue):
    """Plays ``case`` with ``user``. Single use. ``spoken``: what the system said after each action."""

    def __init__(
        self,
        goal: Goal,
        case: Case,
        procedure: Procedure,
        user: ReplayUser,
        spoken: Mapping[str, Sequence[Line]],
        voice: Voice,
    ) -> None:
        super().__init__(goal, user, case.told, case.human.turns[0].user, voice)
        self._case, self._procedure, self._spoken = case, procedure, spoken
        self.opening = self._observe(Answer(self._words, "own", case.told))

    # -- what the agent is told ------------------------------------------------------------------------------------

    def briefing(self, strategy: str) -> str:
        """What the strategy is for, what is entered or still missing, and what the system returned."""
        chosen = next(s for s in self._procedure.strategies if s.id == strategy)
        return self._case.brief(chosen, self._told, map(self._returned, (*self._history, strategy)))

    def expected(self, strategy: str) -> tuple[str, ...]:
        """The numbers and ids that the action took or returned and the reference reply states."""
        known = stated(" ".join([*self._entered(strategy), self._returned(strategy)]))
        return tuple(sorted(known & stated(self.reference_reply(strategy))))

    def reference_reply(self, strategy: str) -> str:
        """What this dialogue's human agent said under ``strategy``, else what the system says, else a stock line."""
        own = self._human(strategy)
        turn = None if own is None else self._case.human.turns[own]
        if strategy == "select-faq" and self._case.answer:
            if not self._answered():
                return self._case.answer
            # The system's line has the number of the answer, which nobody but the system knows.
            return (turn and turn.reply) or ANSWERED
        if turn is not None:
            return turn.reply or self._confirmed(strategy, turn.events[0])
        if strategy in STOCK:
            return STOCK[strategy]
        if not strategy.startswith(ASK):
            return next(iter(self._lines(strategy)), f"One moment, please: {strategy.replace('-', ' ')}.")
        *first, last = map(slot_name, self._missing(strategy.removeprefix(ASK)) or ("details",))
        return f"Could you give me your {' and '.join([', '.join(first), last] if first else [last])}, please?"

    def relevance(self) -> Mapping[str, int]:
        """3: the answer the customer waits for, else the next step in the guidelines' order. 2: another required
        step. 1: a reply, or what the human agent did as well. 0: the rest."""
        steps = self._steps()
        required = self._required()
        best = next((s for s in steps if s in required), None)
        did = {turn.strategy for turn in self._case.human.turns} - set(self._history) - {BYE, MORE}
        return {
            s: 3 if s == best else 2 if s in required else int(s == REPLY or (s in did and not self._useless(s)))
            for s in self._allowed()
        }

    # -- playing ---------------------------------------------------------------------------------------------------

    def _play(self, strategy: str) -> tuple[Answer, list[str], list[str]]:
        required, own = strategy in self._required(), self._human(strategy)
        completed = [f"do:{strategy}"] if strategy in self._open() else []
        action = strategy.removeprefix(ASK)
        events = [f"do:{strategy}"] if strategy == action and strategy not in STOCK else []
        if strategy != action and self._missing(action):
            answer = self._user.tell(strategy, self._missing(action), self._case.values)
        elif strategy != action or (not required and strategy not in (REPLY, MORE)):
            answer = self._user.complain()
        elif strategy == MORE:
            # Who still waits does not say that this is all, unless this dialogue's customer did.
            early = own is None and self._open()
            answer = self._user.complain() if early else self._user.closing(strategy, own)
        else:
            answer = self._user.react(
                strategy, -1 if own is None else own, self._case.values, fits=required or strategy == REPLY
            )
        return answer, completed, events

    # -- what holds now --------------------------------------------------------------------------------------------

    def _missing(self, action: str) -> tuple[str, ...]:
        return self._case.missing(action, self._told)

    def _open(self) -> list[str]:
        """The required actions still to do, in the guidelines' order."""
        return [action for action in self._case.required if f"do:{action}" not in self._completed]

    def _allowed(self) -> tuple[str, ...]:
        missing = {action: self._missing(action) for action in self._case.needs}
        return self._procedure.sop.allowed(self._history, self._procedure.facts(missing))

    def _steps(self) -> list[str]:
        """What the goal needs now, best first: an answer, then each open action or the question it waits for."""
        steps = [REPLY] if self._waits() else []
        steps += [f"{ASK}{action}" if self._missing(action) else action for action in self._open()]
        if not self._open():
            steps += [MORE, BYE] if MORE not in self._history else [BYE]
        return steps

    def _required(self) -> set[str]:
        return set(self._steps()).intersection(self._allowed())

    def _waits(self) -> bool:
        """The customer asked something, and the human agent answered without an action."""
        following = self._following()
        asked = QUESTION.search(self._words)
        return asked is not None and following is not None and self._case.human.turns[following].strategy == REPLY

    def _following(self) -> int | None:
        """The human agent's turn after the customer's latest words, where these are of this dialogue."""
        turns = enumerate(self._case.human.turns)
        return next((index for index, turn in turns if turn.user and turn.user == self._words), None)

    def _human(self, strategy: str) -> int | None:
        """The human agent's own turn under ``strategy`` that fits now; None when there is none.

        A reply fits after the words it answered; the last words fit when all was done that the human had done. Of
        several clicks of an action the last one worked.
        """
        turns, following = self._case.human.turns, self._following()
        own = [index for index, turn in enumerate(turns) if turn.strategy == strategy]
        if own and strategy not in STOCK and not strategy.startswith(ASK):
            return own[-1]
        if following in own:
            return following
        if not own or strategy == REPLY:
            return None
        if strategy in STOCK:
            done = {turn.strategy for turn in turns[: own[-1]] if turn.events}
            return own[-1] if done.issubset(self._history) else None
        return own[min(self._history.count(strategy), len(own) - 1)]

    def _useless(self, strategy: str) -> bool:
        return strategy.startswith(ASK) and not self._missing(strategy.removeprefix(ASK))

    def _entered(self, strategy: str) -> list[str]:
        needs = self._case.needs.get(strategy, {})
        return [value for slot, value in needs.items() if slot in self._told]

    def _lines(self, action: str) -> list[str]:
        """What the system says after ``action`` in other dialogues, with what this customer told in it."""
        known = {slot: self._case.values[slot] for slot in sorted(self._told) if slot in self._case.values}
        return [text for entry in self._spoken.get(action, ()) if (text := entry.adapted(known))]

    def _confirmed(self, action: str, line: str) -> str:
        """The system's ``line``; another's where this one has what the human agent entered by mistake."""
        entered = self._entered(action)
        lines = [line, *self._lines(action)] if entered else []
        return next((text for text in lines if any(mentions(text, value) for value in entered)), line)

    def _answered(self) -> bool:
        """The FAQ's answer was in the human agent's words at the search, which came before."""
        turns = self._case.human.turns
        return any(turn.reply == self._case.answer and turn.strategy in self._history for turn in turns)

    def _returned(self, action: str) -> str:
        """What the system returned, in the words of this dialogue's agent; "" when that is not known."""
        own = self._human(action) if action in self._case.queries else None
        return self._case.returned(action, "" if own is None else self._case.human.turns[own].reply)
