"""One conversation of the environment ``shop``; the rules of the game are in ``shop.py``."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping

from openrlhf_gopo.envs.base import Dialogue
from openrlhf_gopo.envs.shop_catalogue import FACTS, SOP, STRATEGIES
from openrlhf_gopo.envs.shop_tasks import NEEDS_IDENTITY, TASKS, WRAPPED, Step
from openrlhf_gopo.envs.shop_texts import Script, Texts
from openrlhf_gopo.errors import DialogueError, SopError
from openrlhf_gopo.rewards.text import mentions
from openrlhf_gopo.types import Goal, Observation, Outcome, StopReason
from openrlhf_gopo.users.agenda import AgendaUser
from openrlhf_gopo.users.base import Voice

_DESKS = {desk: SOP.part(desk) for desk in ("presale", "orders", "payment")}
_PERSONAL = frozenset({"identity", "budget", "address"})  # facts that a customer without trust keeps back
_SALE_READY = frozenset({"item_found", "compared", "warranty_known"})  # from here on a coupon is welcome
_TOO_OLD = frozenset({"order_found", "terms_known"})  # who knows both knows that their order is too old to return
_BAD_NEWS = frozenset({"coupon_checked", "payment_checked"})  # of use, but nothing to be glad about
_RELUCTANT = frozenset({"expensive", "misfit", "pushy", "unsure"})  # who says so does not ask for more
_BLOWS = frozenset({"confused", "held", "misfit", "pushy", "sold_out", "wrong"})  # what a good apology can make up for
_MIN_TRUST_TO_BUY = 0.25
# Told before; else the desk cannot name the product, or not the right one.
_KNOWN = {"ask_use": {"need"}, "ask_budget": {"need"}, "recommend": {"use", "budget"}, "compare": {"use"}}


class ShopDialogue(Dialogue):
    """One customer at one desk; single use."""

    def __init__(self, goal: Goal, seed: int, texts: Texts, voice: Voice) -> None:
        self.goal = goal
        self._texts = texts
        self.user, self._voice, self._heard = voice.name, voice, ""
        self._key = f"{goal.id}/{seed}"
        self._task = TASKS[goal.intent]
        self._steps = self._task.steps_for(goal.data)
        self._sop = _DESKS[self._task.desk]
        upset = self._task.upset or goal.persona["type"] == "angry"
        self._user = AgendaUser(goal.persona, texts.phrases, texts.flavour, upset=upset, comma=texts.comma)
        self._history: list[str] = []
        self._marks: set[str] = set()
        self._objects = False  # the price met an objection that is still open
        self._discount = False
        self._spoiled = False  # a coupon came too early
        self._held = False  # something was on hold for lack of an identity
        self._last = ""  # kind of the last reaction
        self._ended = False
        self.opening = self._open()

    # What the agent can see -------------------------------------------------------------------------------------

    def briefing(self, strategy: str) -> str:
        return self._script(strategy).briefing.format_map(self._slots)

    def expected(self, strategy: str) -> tuple[str, ...]:
        return tuple(string.format_map(self._slots) for string in self._script(strategy).expected)

    def reference_reply(self, strategy: str) -> str:
        replies = self._script(strategy).replies
        # Fixed by the dialogue, and another wording each time the strategy is used again.
        first = zlib.crc32(f"{self._key}/{strategy}".encode())
        return replies[(first + self._history.count(strategy)) % len(replies)].format_map(self._slots)

    # The turn ---------------------------------------------------------------------------------------------------

    def step(self, strategy: str, reply: str) -> Outcome:
        if self._ended:
            raise DialogueError(f"shop, goal {self.goal.id}: step({strategy!r}) after the dialogue ended")
        if strategy not in self._allowed:
            reason = self._sop.why_not(strategy, self._history, self._facts())
            raise SopError(f"shop, goal {self.goal.id}: {strategy!r} is not allowed now: it {reason}")
        rng = random.Random(f"{self._key}/{len(self._history)}")
        before = frozenset(self._marks)
        due = self.relevance()[strategy] >= 2
        understood = self._understood(strategy, reply)
        self._history.append(strategy)
        self._heard = reply
        kind, acts = self._play(strategy, rng) if understood or strategy == "close" else ("confused", ["confused"])
        reaction = self._user.feel(kind)
        self._last = kind
        new = self._marks - before
        stop = self._stop(strategy)
        self._ended = stop is not None
        return Outcome(
            events=(reaction.event, "leave") if stop is StopReason.USER_LEFT else (reaction.event,),
            completed=tuple(mark for mark in self.goal.subgoals if mark in new),
            engagement=round(reaction.engagement, 4),
            on_task=bool(new) or (due and understood),
            stop=stop,
            next=None if stop else self._observe(self._answer(acts, rng)),
        )

    def _play(self, strategy: str, rng: random.Random) -> tuple[str, list[str]]:
        """The effect of an understood turn: (kind of reaction, what the customer says)."""
        step = self._step_of(strategy)
        if strategy == "close":
            return self._close()
        if strategy == "apologise":
            return self._apologise(step)
        if strategy == "offer_coupon":
            return self._coupon(step, rng)
        if strategy == "suggest_extra":
            welcome = "bought" in self._marks and self._user.trust > 0.6 and self._user.price_sensitivity < 0.6
            return ("extra_ok", ["extra_ok"]) if welcome else ("pushy", ["pushy"])
        if step is not None and step.mark in self._marks:
            return "repeat", ["repeat"]
        if strategy in NEEDS_IDENTITY and "identity" not in self._marks:
            self._held = True
            return "held", ["held"]
        if strategy == "give_refund" and self.goal.data["too_old"]:
            return "wrong", ["no_refund"]
        if step is None:
            return _off_task(strategy)
        if not self._marks.issuperset(step.needs):
            return ("misfit", ["misfit"]) if strategy == "recommend" else ("unsure", ["unsure"])
        if strategy == "invite_to_buy":
            return self._invite(step, rng)
        return self._deliver(step, rng)

    def _close(self) -> tuple[str, list[str]]:
        if self._only_close_left():
            self._marks.add(WRAPPED)
            return "bye", []
        return "cut_off", []

    def _apologise(self, step: Step | None) -> tuple[str, list[str]]:
        due = self._user.upset or self._last in _BLOWS
        if step is not None and step.mark not in self._marks:
            self._marks.add(step.mark)
            due = True
        return ("care", ["cared"]) if due else ("idle", ["idle"])

    def _coupon(self, step: Step | None, rng: random.Random) -> tuple[str, list[str]]:
        if self._objects:
            self._objects, self._discount = False, True
            return "cart", ["progress"]
        if step is not None and step.mark not in self._marks and self._marks.issuperset(step.needs):
            if self._spoiled and rng.random() < 0.5:
                return "expensive", ["unsure"]  # they expect more than the coupon they were offered before
            self._discount = True
            self._marks.add(step.mark)
            return "progress", ["progress"]
        if self._discount:
            return "repeat", ["repeat"]
        if not self._marks.isdisjoint(_SALE_READY):
            self._discount = True
            return ("cart", ["progress"]) if self._user.price_sensitivity > 0.5 else ("idle", ["progress"])
        self._spoiled = True
        return "pushy", ["pushy"]

    def _invite(self, step: Step, rng: random.Random) -> tuple[str, list[str]]:
        if self._user.trust < _MIN_TRUST_TO_BUY:
            return "unsure", ["unsure"]
        if self.goal.data["stock"] != "here" and "stock_known" not in self._marks:
            return "sold_out", ["sold_out"]
        spoiled = self._spoiled or self.goal.data["stock"] == "back"  # to wait for it makes it less worth, too
        if self._user.finds_it_expensive(rng, discount=self._discount, spoiled=spoiled):
            self._objects = True
            return "expensive", ["expensive"]
        self._objects = False
        self._marks.add(step.mark)
        return "buy", ["buy"]

    def _deliver(self, step: Step, rng: random.Random) -> tuple[str, list[str]]:
        if step.mark in _PERSONAL and self._user.keeps_back(rng):
            return "refuse", ["refuse"]
        self._marks.add(step.mark)
        if step.mark in self.goal.facts:
            late = step.mark == "identity" and self._held
            return ("late_step" if late else "step"), self._telling(step.mark)
        if step.mark == "stock_known" and self.goal.data["stock"] != "here":
            return "letdown", ["letdown"]
        if step.mark in _TOO_OLD and self.goal.data["too_old"] and self._marks >= _TOO_OLD:
            return "letdown", ["too_late"]
        if step.mark in _BAD_NEWS:
            return "progress", ["noted"]
        return ("find" if step.strategy in ("recommend", "compare") else "progress"), ["progress"]

    # Grades and texts -------------------------------------------------------------------------------------------

    def relevance(self) -> Mapping[str, int]:
        """3: completes a subgoal if all goes well; 2: brings a fact that is needed; 1: may help; 0: of no use now."""
        return {strategy: self._grade(strategy) for strategy in self._allowed}

    def _grade(self, strategy: str) -> int:
        step = self._step_of(strategy)
        if strategy == "close":
            return 3 if self._only_close_left() else 0
        if strategy == "offer_coupon" and self._objects:
            return 3
        if step is None or step.mark in self._marks:
            helps = strategy == "apologise" and self._task.upset and strategy not in self._history
            return 1 if helps or (strategy == "offer_coupon" and self._sells()) else 0
        if strategy == "offer_coupon" and not self._marks.issuperset(step.needs):
            return 0
        on_hold = strategy in NEEDS_IDENTITY and "identity" not in self._marks
        blind = strategy == "invite_to_buy" and self.goal.data["wish"] and "stock_known" not in self._marks
        if on_hold or blind or self._objects or not self._marks.issuperset(step.needs):
            return 1
        return 3 if step.weight else 2

    def _step_of(self, strategy: str) -> Step | None:
        return next((step for step in self._steps if step.strategy == strategy), None)

    def _sells(self) -> bool:
        return not self._discount and "bought" not in self._marks and not self._marks.isdisjoint(_SALE_READY)

    def _only_close_left(self) -> bool:
        return self.goal.subgoals.keys() - self._marks <= {WRAPPED}

    def _script(self, strategy: str) -> Script:
        return self._texts.scripts[self._script_name(strategy)]

    def _script_name(self, strategy: str) -> str:
        data, marks = self.goal.data, self._marks
        if strategy in NEEDS_IDENTITY and "identity" not in marks:
            return "on_hold"
        if not marks.issuperset(_KNOWN.get(strategy, ())):
            return f"{strategy}_early"
        if strategy == "check_stock" and data["stock"] != "here":
            return f"check_stock_{data['stock']}"
        if strategy == "invite_to_buy" and data["stock"] == "other" and "stock_known" in marks:
            return "invite_to_buy_other"
        if strategy == "look_up_order" and self.goal.intent == "refund":
            return "look_up_order_age"
        if strategy == "give_refund" and data["too_old"]:
            return "give_refund_late"
        return strategy

    @property
    def _slots(self) -> dict[str, object]:
        data = self.goal.data
        return {**data, "now": data["total"] if self._discount else data["price"]}

    def _understood(self, strategy: str, reply: str) -> bool:
        """Whether the customer gets from ``reply`` what ``strategy`` is to ask or tell."""
        topic = self._script(strategy).topic
        if not reply.strip() or (topic and not any(word in reply.casefold() for word in topic)):
            return False
        return all(mentions(reply, string) for string in self.expected(strategy))

    # The customer's side ----------------------------------------------------------------------------------------

    def _open(self) -> Observation:
        rng = random.Random(f"{self._key}/opening")
        acts = [f"vague.{self._task.desk}"]
        if not self.goal.data["vague"]:
            acts = self._telling("need")
            self._marks.add("need")
            if self.goal.data["talks"]:
                acts += [act for fact in self._task.told for act in self._telling(fact)]
                self._marks.update(self._task.told)
        # A fact told unasked is no subgoal completed by the agent; marks made here count as done from the start.
        return self._observe(self._say(rng, acts, flavour=0.7))

    def _telling(self, fact: str) -> list[str]:
        if fact != "need":
            return [f"tell.{fact}"]
        return [f"need.{self.goal.intent}", *(["tell.wish"] if self.goal.data["wish"] else [])]

    def _answer(self, acts: list[str], rng: random.Random) -> str:
        """What the customer says, often with a hint at what they wait for."""
        if "need" in self._marks and rng.random() < 0.6 and _RELUCTANT.isdisjoint(acts):
            waiting = (f"want.{step.mark}" for step in self._steps if step.mark not in self._marks)
            acts = acts + [act for act in waiting if act in self._texts.phrases][:1]
        return self._say(rng, acts)

    def _say(self, rng: random.Random, acts: list[str], flavour: float = 0.1) -> str:
        draft = self._user.say(rng, acts, self._slots, flavour)
        values = self._user.values(acts, self._slots, draft)
        told = {fact: value for fact, value in self.goal.facts.items() if fact in self._marks}
        return self._voice.say(draft, values=values, acts=acts, told=told, heard=self._heard)

    def _observe(self, user: str) -> Observation:
        self._allowed = self._sop.allowed(self._history, self._facts())
        return Observation(user, self._allowed)

    def _facts(self) -> set[str]:
        return self._marks.intersection(FACTS)

    def _stop(self, strategy: str) -> StopReason | None:
        if strategy == "close":
            return StopReason.COMPLETED if WRAPPED in self._marks else StopReason.CLOSED
        if self._user.gone:
            return StopReason.USER_LEFT
        return None


def _off_task(strategy: str) -> tuple[str, list[str]]:
    """The customer's reaction to a strategy that has no place in their task."""
    if strategy == "invite_to_buy":
        return "pushy", ["pushy"]
    acts_on_order = next(s for s in STRATEGIES if s.id == strategy).does
    return ("wrong", ["wrong"]) if acts_on_order else ("idle", ["idle"])
