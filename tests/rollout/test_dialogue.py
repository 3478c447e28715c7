"""One dialogue from its opening to its stop reason, and many of them at once. Only the engine is a double."""

import asyncio
import math
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.envs.base import Dialogue, Environment
from openrlhf_gopo.errors import SopError
from openrlhf_gopo.evaluation.records import append_trajectory, read_trajectories
from openrlhf_gopo.policy import prompts
from openrlhf_gopo.policy.two_level import SingleLevelPolicy, TwoLevelPolicy
from openrlhf_gopo.rollout import dialogue as module
from openrlhf_gopo.rollout.dialogue import run_dialogue
from openrlhf_gopo.rollout.engine import Generation
from openrlhf_gopo.rollout.sampled import SampledPolicy, TokenLimits
from openrlhf_gopo.types import Goal, Observation, Outcome, StopReason, Strategy, Trajectory

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = Strategy("ask", "Ask", "Ask for the number.")
PAY = Strategy("pay", "Pay", "Pay the money back.")
BYE = Strategy("bye", "Bye", "End the dialogue.")
GOAL = Goal("g1", "refund", "Desk: orders.", {"number": 0.5, "refund": 0.5})
ALL = ("ask", "pay", "bye")
# What each turn of the script completes; the second turn is forced.
SCRIPT = [(ALL, ()), (("pay",), ("number",)), (("ask", "bye"), ()), (ALL, ("refund",))]


@pytest.fixture(scope="module")
def policy(tokenizer):
    return TwoLevelPolicy(tokenizer, tokenizer, 3)


@pytest.fixture(scope="module")
def tokenizer():
    """ChatML over single bytes: a character is a token, so streams can be read."""
    from openrlhf_gopo.platform.media import hide_what_cuda_builds_break

    hide_what_cuda_builds_break()
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", chat_template=CHATML)


class ScriptedDialogue(Dialogue):
    """Plays ``SCRIPT``; a strategy that is not allowed is a ``SopError``."""

    def __init__(self, env, goal):
        self.env, self.goal, self.turn = env, goal, 0
        self.opening = self.observation()

    def observation(self):
        return Observation(f"user {self.turn}", self.env.script[self.turn][0])

    def briefing(self, strategy):
        self.env.log(f"briefing {strategy}")
        return f"facts of {strategy} at {self.turn}"

    def expected(self, strategy):
        return (f"{strategy}-{self.turn}",)

    def relevance(self):
        return {s: 1 + (s == "pay") for s in self.env.script[self.turn][0]}

    def reference_reply(self, strategy):
        return strategy

    def step(self, strategy, reply):
        self.env.log(f"step {self.goal.id} {self.turn} {strategy} {reply}")
        allowed, completed = self.env.script[self.turn]
        if strategy not in allowed:
            raise SopError(strategy)
        self.turn += 1
        if self.turn == len(self.env.script):
            return Outcome(("end",), completed, 1.0, True, stop=StopReason.COMPLETED)
        return Outcome((f"event {self.turn}",), completed, 0.5, bool(completed), next=self.observation())


class ScriptedEnvironment(Environment):
    """``faults`` maps the name of a dialogue's method to what replaces it: a function of the real result."""

    name = "scripted"

    def __init__(self, blocking=False, script=SCRIPT, faults=None, strategies=(ASK, PAY, BYE)):
        self.blocking, self.script, self.faults = blocking, script, faults or {}
        self.strategies, self.logged, self.threads = strategies, [], set()

    def log(self, event):
        self.logged.append(event)
        self.threads.add(threading.current_thread())

    @classmethod
    def load(cls, data):
        return cls()

    def goals(self, split):
        return [GOAL]

    def catalogue(self, goal):
        return self.faults.get("catalogue", lambda real: real)(self.strategies)

    def start(self, goal, seed):
        dialogue = self.faults.get("start", lambda real: real)(ScriptedDialogue(self, goal))
        for name, fault in self.faults.items():
            if hasattr(dialogue, name) and name != "opening":
                real = getattr(dialogue, name)
                setattr(dialogue, name, lambda *args, real=real, fault=fault: fault(real(*args)))
        if "opening" in self.faults:
            dialogue.opening = self.faults["opening"](dialogue.opening)
        return dialogue


class Engine:
    """Answers with the last allowed label, and with "re:" and the call's number; remembers what it was asked."""

    def __init__(self, policy, reply=None, choose=None):
        self.policy, self.calls = policy, []
        self.reply, self.choose = reply, choose or (lambda allowed: allowed[-1])

    def generators(self):
        return {role: partial(self.generate, role) for role in (EXPERT, RESPONDER)}

    async def generate(self, role, tokens, sampling):
        await asyncio.sleep(0)
        self.calls.append((role, list(tokens), sampling))
        number = len(self.calls)
        if sampling.allowed is not None:
            return [Generation([self.choose(sampling.allowed)], [-float(number)])]
        ids = self.policy.responder.tokenizer.encode(self.reply or f"re:{number}", add_special_tokens=False)
        sampled = [*ids, sampling.stop_token][: sampling.max_tokens]
        return [Generation(sampled, [-number - i / 64 for i in range(len(sampled))])]


LIMITS = TokenLimits(max_len=2000, max_turns=9, reply_max_tokens=16, user_timeout=5.0)


def play(env, policy, engine=None, limits=LIMITS, goal=GOAL, **more) -> Trajectory:
    engine = engine or Engine(policy)
    return asyncio.run(run_dialogue(env, goal, SampledPolicy(policy, engine.generators(), limits), limits, **more))


def text(policy, tokens):
    return policy.responder.tokenizer.decode(tokens)


# ---------------------------------------------------------------------------------------------- an ordinary dialogue


@pytest.mark.parametrize("blocking", [False, True])
def test_a_dialogue_to_its_end(policy, blocking):
    engine = Engine(policy)
    trajectory = play(ScriptedEnvironment(blocking), policy, engine, sample=3, seed=17)
    assert trajectory.stop is StopReason.COMPLETED
    assert (trajectory.error, trajectory.sample, trajectory.seed, trajectory.success) == (None, 3, 17, True)
    assert [t.strategy for t in trajectory.turns] == ["bye", "pay", "bye", "bye"]
    assert [t.user for t in trajectory.turns] == ["user 0", "user 1", "user 2", "user 3"]
    assert [t.allowed for t in trajectory.turns] == [allowed for allowed, _ in SCRIPT]
    assert [t.completed for t in trajectory.turns] == [completed for _, completed in SCRIPT]
    assert [t.events for t in trajectory.turns] == [("event 1",), ("event 2",), ("event 3",), ("end",)]
    assert [t.engagement for t in trajectory.turns] == [0.5, 0.5, 0.5, 1.0]
    assert [t.on_task for t in trajectory.turns] == [False, True, False, True]
    assert [t.briefing for t in trajectory.turns] == [
        f"facts of {t.strategy} at {i}" for i, t in enumerate(trajectory.turns)
    ]
    assert [t.expected for t in trajectory.turns] == [(f"{t.strategy}-{i}",) for i, t in enumerate(trajectory.turns)]
    assert trajectory.turns[0].relevance == {"ask": 1, "pay": 2, "bye": 1}
    assert trajectory.turns[1].relevance == {"pay": 2}
    assert trajectory.rewards["success"] == 1.0
    assert trajectory.rewards["turns"] == 4.0


def test_forced_turns_ask_no_expert(policy):
    engine = Engine(policy)
    trajectory = play(ScriptedEnvironment(), policy, engine)
    assert [role for role, _, _ in engine.calls] == [EXPERT, RESPONDER, RESPONDER, EXPERT, RESPONDER, EXPERT, RESPONDER]
    assert [t.forced for t in trajectory.turns] == [False, True, False, False]
    assert [t.expert_logprob for t in trajectory.turns] == [-1.0, 0.0, -4.0, -6.0]
    assert len(trajectory.streams[EXPERT].spans) == 3


def test_the_expert_may_only_decode_the_allowed_labels(policy):
    engine = Engine(policy)
    trajectory = play(ScriptedEnvironment(), policy, engine)
    ids = policy.label_ids([ASK, PAY, BYE])
    asked = [sampling for role, _, sampling in engine.calls if role == EXPERT]
    expected = [tuple(ids[s] for s in allowed) for allowed, _ in SCRIPT if len(allowed) > 1]
    assert [sampling.allowed for sampling in asked] == expected
    assert [tuple(allowed) for allowed in trajectory.streams[EXPERT].allowed] == expected
    assert {(sampling.max_tokens, sampling.stop_token) for sampling in asked} == {(1, None)}


def test_sampling_follows_the_limits(policy):
    engine = Engine(policy)
    limits = replace(LIMITS, expert_temperature=0.7, responder_temperature=0.9, responder_top_p=0.8)
    play(ScriptedEnvironment(), policy, engine, limits)
    for role, _, sampling in engine.calls:
        if role == EXPERT:
            assert (sampling.temperature, sampling.top_p) == (0.7, 1.0)
        else:
            assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.9, 0.8, 16)
            assert (sampling.stop_token, sampling.allowed) == (policy.responder.stop_token, None)


def test_streams_hold_what_was_asked_and_sampled(policy):
    engine = Engine(policy)
    trajectory = play(ScriptedEnvironment(script=SCRIPT[:2]), policy, engine)
    expert, responder = trajectory.streams[EXPERT], trajectory.streams[RESPONDER]
    system = prompts.expert_system("ABC", [ASK, PAY, BYE], GOAL.context)
    assert text(policy, expert.tokens) == (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\nCustomer: user 0<|im_end|>\n<|im_start|>assistant\nC<|im_end|>\n"
        "<|im_start|>user\nAgent: re:2\nCustomer: user 1<|im_end|>\n<|im_start|>assistant\nB"
    )
    assert text(policy, responder.tokens) == (
        f"<|im_start|>system\n{prompts.responder_system(GOAL.context)}<|im_end|>\n"
        "<|im_start|>user\nCustomer: user 0\n[Bye] facts of bye at 0<|im_end|>\n<|im_start|>assistant\nre:2<|im_end|>\n"
        "<|im_start|>user\nCustomer: user 1\n[Pay] facts of pay at 1<|im_end|>\n<|im_start|>assistant\nre:3<|im_end|>"
    )
    for role, stream in trajectory.streams.items():
        prompts_of_role = [tokens for r, tokens, _ in engine.calls if r == role]
        assert prompts_of_role == [stream.tokens[:start] for start, _ in stream.spans]


def test_logprobs_stand_beside_their_tokens(policy):
    trajectory = play(ScriptedEnvironment(script=SCRIPT[:2]), policy)
    expert, responder = trajectory.streams[EXPERT], trajectory.streams[RESPONDER]
    (start, end), *more = expert.spans
    assert (end - start, more) == (1, [])
    assert [(i, p) for i, p in enumerate(expert.logprobs) if p] == [(start, -1.0)]
    (a, b), (c, d) = responder.spans
    assert responder.logprobs[a:b] == [-2 - i / 64 for i in range(5)]  # r e : 2 <|im_end|>
    assert responder.logprobs[c:d] == [-3 - i / 64 for i in range(5)]
    assert len(responder.logprobs) == len(responder.tokens)
    assert sum(p != 0 for p in responder.logprobs) == 10


# ------------------------------------------------------------------------------------------------ further policies


def test_one_model_decides_and_writes_in_one_stream(tokenizer):
    policy = SingleLevelPolicy(tokenizer, tokenizer, 3)
    engine = Engine(policy)
    trajectory = play(ScriptedEnvironment(script=SCRIPT[:2]), policy, engine)
    (stream,) = trajectory.streams.values()
    system = prompts.single_system("ABC", [ASK, PAY, BYE], GOAL.context)
    assert text(policy, stream.tokens) == (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\nCustomer: user 0<|im_end|>\n<|im_start|>assistant\nC<|im_end|>\n"
        "<|im_start|>user\n[Bye] facts of bye at 0<|im_end|>\n<|im_start|>assistant\nre:2<|im_end|>\n"
        "<|im_start|>user\nCustomer: user 1<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"  # forced: no action
        "<|im_start|>user\n[Pay] facts of pay at 1<|im_end|>\n<|im_start|>assistant\nre:3<|im_end|>"
    )
    assert [text(policy, stream.tokens[a:b]) for a, b in stream.spans] == ["C", "re:2<|im_end|>", "re:3<|im_end|>"]
    assert stream.allowed == [[policy.labels[label] for label in "ABC"], [], []]
    assert [tokens for _, tokens, _ in engine.calls] == [stream.tokens[:start] for start, _ in stream.spans]
    assert list(trajectory.streams) == [RESPONDER]


def test_an_expert_may_plan_before_it_chooses(tokenizer):
    policy = TwoLevelPolicy(tokenizer, tokenizer, 3, plan_tokens=4)
    engine = Engine(policy, reply="think")
    limits = replace(LIMITS, expert_temperature=0.7)
    trajectory = play(ScriptedEnvironment(script=SCRIPT[:3]), policy, engine, limits)
    stream = trajectory.streams[EXPERT]
    system = prompts.expert_system("ABC", [ASK, PAY, BYE], GOAL.context, plan=True)
    assert text(policy, stream.tokens) == (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\nCustomer: user 0<|im_end|>\n<|im_start|>assistant\nthin<|im_end|>\n"
        "<|im_start|>user\nLabel?<|im_end|>\n<|im_start|>assistant\nC<|im_end|>\n"
        "<|im_start|>user\nAgent: think\nCustomer: user 1<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"  # forced
        "<|im_start|>user\nAgent: think\nCustomer: user 2<|im_end|>\n<|im_start|>assistant\nthin<|im_end|>\n"
        "<|im_start|>user\nLabel?<|im_end|>\n<|im_start|>assistant\nC"
    )
    assert [len(allowed) for allowed in stream.allowed] == [0, 3, 0, 2]
    assert [turn.plan for turn in trajectory.turns] == ["thin", "", "thin"]
    asked = [sampling for role, _, sampling in engine.calls if role == EXPERT and sampling.allowed is None]
    assert {(s.max_tokens, s.temperature, s.top_p, s.stop_token) for s in asked} == {
        (4, 0.7, 1.0, policy.expert.stop_token)
    }


def test_no_room_for_a_plan_and_its_label(tokenizer):
    """What a plan can take is set aside before it is written: its cap, a stop token, the question, the label."""
    policy = TwoLevelPolicy(tokenizer, tokenizer, 3, plan_tokens=5)
    engine = Engine(policy, reply="think")  # at the cap, so the template has to end the message
    whole = play(ScriptedEnvironment(), policy, engine, replace(LIMITS, max_turns=1)).streams[EXPERT].tokens
    fits = play(ScriptedEnvironment(), policy, engine, replace(LIMITS, max_len=len(whole), max_turns=1))
    assert fits.stop is StopReason.MAX_TURNS
    short = play(ScriptedEnvironment(), policy, engine, replace(LIMITS, max_len=len(whole) - 1))
    assert (short.stop, short.turns, short.streams[EXPERT].tokens) == (StopReason.MAX_TOKENS, [], [])


def test_advice_is_asked_before_the_first_decision_and_stays_in_the_stream(policy):
    engine, asked = Engine(policy), []

    def advice(case, past, turn):
        asked.append((case.goal, len(past), turn.user, turn.allowed))
        return f"Advice {len(past)}"

    sampled = SampledPolicy(policy, engine.generators(), LIMITS, advice)
    trajectory = asyncio.run(run_dialogue(ScriptedEnvironment(script=SCRIPT[:3]), GOAL, sampled, LIMITS))
    assert asked == [(GOAL, 0, "user 0", ALL)]
    stream = trajectory.streams[EXPERT]
    assert "user\nAdvice 0\nCustomer: user 0<|im_end|>" in text(policy, stream.tokens)
    assert "user\nAgent: re:2\nCustomer: user 1<|im_end|>" in text(policy, stream.tokens)
    assert "user\nAgent: re:3\nCustomer: user 2<|im_end|>" in text(policy, stream.tokens)
    assert [tokens for role, tokens, _ in engine.calls if role == EXPERT] == [
        stream.tokens[:start] for start, _ in stream.spans
    ]


def test_a_forced_turn_needs_no_advice_yet(policy):
    script = [(("pay",), ()), *SCRIPT[:2], SCRIPT[2]]
    sampled = SampledPolicy(policy, Engine(policy).generators(), LIMITS, lambda case, past, turn: f"Advice {len(past)}")
    trajectory = asyncio.run(run_dialogue(ScriptedEnvironment(script=script), GOAL, sampled, LIMITS))
    assert [turn.forced for turn in trajectory.turns] == [True, False, True, False]
    told = text(policy, trajectory.streams[EXPERT].tokens)
    assert "Advice 1\nAgent: " in told
    assert told.count("Advice") == 1


def test_advice_needs_room_as_all_that_is_asked(policy):
    def play_with(characters, max_len):
        limits = replace(LIMITS, max_len=max_len, max_turns=1)
        sampled = SampledPolicy(policy, Engine(policy).generators(), limits, lambda *_: "x" * characters)
        return asyncio.run(run_dialogue(ScriptedEnvironment(), GOAL, sampled, limits))

    whole = len(play_with(10, 2000).streams[EXPERT].tokens)
    assert play_with(10, whole).stop is StopReason.MAX_TURNS
    over = play_with(11, whole)
    assert (over.stop, over.turns) == (StopReason.MAX_TOKENS, [])


# ------------------------------------------------------------------------------------------------------- the limits


@pytest.mark.parametrize("turns", [1, 3])
def test_max_turns(policy, turns):
    trajectory = play(ScriptedEnvironment(), policy, limits=replace(LIMITS, max_turns=turns))
    assert (trajectory.stop, len(trajectory.turns)) == (StopReason.MAX_TURNS, turns)
    assert trajectory.rewards["turns"] == turns


def test_without_a_limit_of_the_run_the_goal_decides(policy):
    env = ScriptedEnvironment()
    env.turn_limit = lambda goal: {GOAL.id: 2}[goal.id]
    assert len(play(env, policy, limits=replace(LIMITS, max_turns=None)).turns) == 2
    assert len(play(env, policy, limits=replace(LIMITS, max_turns=1)).turns) == 1


def test_no_room_for_the_experts_label(policy):
    """The expert's stream is the longer one: its second question does not fit, by one token."""
    env = ScriptedEnvironment()
    whole = play(env, policy, limits=replace(LIMITS, max_turns=2)).streams[EXPERT].tokens
    fits = play(env, policy, limits=replace(LIMITS, max_len=len(whole), max_turns=2))
    assert (fits.stop, len(fits.turns)) == (StopReason.MAX_TURNS, 2)
    engine = Engine(policy)
    trajectory = play(env, policy, engine, replace(LIMITS, max_len=len(whole) - 1))
    assert (trajectory.stop, len(trajectory.turns)) == (StopReason.MAX_TOKENS, 1)
    assert [role for role, _, _ in engine.calls] == [EXPERT, RESPONDER]
    assert all(len(s.tokens) < len(whole) for s in trajectory.streams.values())
    assert trajectory.rewards["turns"] == 1.0


def test_no_room_for_the_reply(policy):
    """A cap that the responder's stream cannot hold ends the dialogue before the reply, however short it would be."""
    cap = 500
    env = ScriptedEnvironment()
    whole = play(env, policy, limits=replace(LIMITS, max_turns=1)).streams[RESPONDER]
    needed = whole.spans[0][0] + cap
    fits = play(env, policy, limits=replace(LIMITS, max_len=needed, reply_max_tokens=cap, max_turns=1))
    assert fits.stop is StopReason.MAX_TURNS
    engine = Engine(policy)
    trajectory = play(env, policy, engine, replace(LIMITS, max_len=needed - 1, reply_max_tokens=cap))
    assert (trajectory.stop, trajectory.turns) == (StopReason.MAX_TOKENS, [])
    assert [role for role, _, _ in engine.calls] == [EXPERT]
    assert trajectory.streams[RESPONDER].tokens == []
    assert len(trajectory.streams[EXPERT].spans) == 1  # decided, never carried out
    assert set(trajectory.rewards.values()) == {0.0}


def test_a_reply_at_its_cap_is_cut(policy):
    engine = Engine(policy, reply="0123456789")
    cut = play(ScriptedEnvironment(), policy, engine, replace(LIMITS, reply_max_tokens=10, max_turns=2))
    assert [t.reply for t in cut.turns] == ["0123456789"] * 2
    assert [t.reply_cut for t in cut.turns] == [True, True]
    stream = cut.streams[RESPONDER]
    (start, end), _ = stream.spans
    assert end - start == 10
    assert stream.tokens[end] == policy.responder.stop_token  # closed by the template, not sampled
    assert stream.logprobs[end] == 0.0


def test_a_stop_token_at_the_cap_is_no_cut(policy):
    engine = Engine(policy, reply="0123456789")
    whole = play(ScriptedEnvironment(), policy, engine, replace(LIMITS, reply_max_tokens=11, max_turns=2))
    assert [t.reply_cut for t in whole.turns] == [False, False]
    (start, end), _ = whole.streams[RESPONDER].spans
    assert whole.streams[RESPONDER].tokens[end - 1] == policy.responder.stop_token
    assert end - start == 11
    assert text(policy, whole.streams[RESPONDER].tokens[end : end + 2]).startswith("\n<|im_start|>")


# ------------------------------------------------------------------------------------------------------- the faults


def raises(_):
    raise KeyError("boom")


def always(value):
    return lambda real: value


def changed(**fields):
    return lambda outcome: replace(outcome, **fields)


FAULTS = {
    "catalogue raises": ({"catalogue": raises}, "KeyError: 'boom'"),
    "catalogue too large": ({"catalogue": lambda real: [*real, Strategy("x", "X", "")]}, "ValueError"),
    "start raises": ({"start": raises}, "KeyError: 'boom'"),
    "no opening": ({"opening": always(None)}, "'allowed'"),
    "empty opening": ({"opening": always(Observation("hi", ()))}, "is empty"),
    "relevance raises": ({"relevance": raises}, "KeyError: 'boom'"),
    "relevance NaN": ({"relevance": always({"ask": math.nan})}, "relevance {'ask': nan} not in 0..3"),
    "relevance too high": ({"relevance": always({"ask": 4})}, "relevance {'ask': 4} not in 0..3"),
    "relevance no mapping": ({"relevance": always(None)}, "'items'"),
    "briefing raises": ({"briefing": raises}, "KeyError: 'boom'"),
    "briefing unwritable": ({"briefing": always("\ud800")}, "not valid Unicode"),
    "expected raises": ({"expected": raises}, "KeyError: 'boom'"),
    "step raises": ({"step": raises}, "KeyError: 'boom'"),
    "no outcome": ({"step": always(None)}, "'completed'"),
    "unknown subgoal": ({"step": changed(completed=("number", "moon"))}, "completed unknown subgoals ['moon']"),
    "engagement NaN": ({"step": changed(engagement=math.nan)}, "engagement nan not in [0, 1]"),
    "engagement high": ({"step": changed(engagement=1.5)}, "engagement 1.5 not in [0, 1]"),
    "engagement text": ({"step": changed(engagement="high")}, "TypeError"),
    "stop and next": ({"step": changed(stop=StopReason.CLOSED)}, "a stop reason or a next turn"),
    "neither": ({"step": changed(next=None)}, "a stop reason or a next turn"),
    "stop failed": ({"step": changed(stop=StopReason.FAILED, next=None)}, "gave the dialogue up"),
    "next empty": ({"step": changed(next=Observation("hi", ()))}, "is empty"),
    "next unknown": ({"step": changed(next=Observation("hi", ("ask", "fly")))}, "unknown ones ['fly']"),
    "next twice": ({"step": changed(next=Observation("hi", ("ask", "bye", "ask")))}, "a strategy twice"),
}


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_environment_fails_its_dialogue_alone(policy, name, blocking):
    faults, message = FAULTS[name]
    trajectory = play(ScriptedEnvironment(blocking, faults=faults), policy)
    assert trajectory.stop is StopReason.FAILED
    assert trajectory.error.startswith("Traceback")
    assert message in trajectory.error
    if name != "briefing unwritable":
        assert "scripted, goal g1: " in trajectory.error.splitlines()[-1]
    assert trajectory.rewards == {}
    assert trajectory.turns == []  # the fault is in the first turn; a bad verdict is not recorded


def test_a_fault_keeps_what_was_sampled_before(policy):
    def third_turn(outcome):
        return None if "event 3" in outcome.events else outcome

    trajectory = play(ScriptedEnvironment(faults={"step": third_turn}), policy)
    healthy = play(ScriptedEnvironment(), policy, limits=replace(LIMITS, max_turns=3))
    assert (trajectory.stop, healthy.stop) == (StopReason.FAILED, StopReason.MAX_TURNS)
    assert trajectory.streams == healthy.streams
    assert len(trajectory.turns) == 2


def test_a_context_that_cannot_be_tokenised_fails_the_dialogue(policy):
    trajectory = play(ScriptedEnvironment(), policy, goal=replace(GOAL, context="\udcff"))
    assert trajectory.stop is StopReason.FAILED
    assert "not valid Unicode" in trajectory.error


def test_a_reward_that_raises_fails_the_dialogue(policy, monkeypatch):
    monkeypatch.setattr(module, "score", raises)
    trajectory = play(ScriptedEnvironment(), policy)
    assert (trajectory.stop, len(trajectory.turns)) == (StopReason.FAILED, 4)
    assert "KeyError: 'boom'" in trajectory.error
    assert trajectory.rewards == {}


@pytest.fixture
def release():
    """Ends what hangs, so that no thread outlives its test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("where", ["catalogue", "start", "relevance", "briefing", "expected", "step"])
def test_a_hanging_environment_fails_its_dialogue(policy, release, where):
    env = ScriptedEnvironment(True, faults={where: lambda real: release.wait(5) and real})
    trajectory = play(env, policy, limits=replace(LIMITS, user_timeout=0.05))
    assert trajectory.stop is StopReason.FAILED
    assert "no answer in --gopo.user_timeout 0.05 s" in trajectory.error


def test_a_timeout_of_the_environments_own_is_told_apart(policy):
    def own(_):
        raise TimeoutError("the shop's API")

    trajectory = play(ScriptedEnvironment(True, faults={"step": own}), policy)
    assert "TimeoutError: the shop's API" in trajectory.error
    assert "user_timeout" not in trajectory.error.splitlines()[-1]


@pytest.mark.parametrize("broken", [EXPERT, RESPONDER])
@pytest.mark.parametrize("error", [RuntimeError("engine died"), asyncio.TimeoutError("engine hangs")])
def test_an_engines_exception_propagates(policy, broken, error):
    async def generate(tokens, sampling):
        raise error

    generators = {**Engine(policy).generators(), broken: generate}
    with pytest.raises(type(error), match="engine"):
        asyncio.run(run_dialogue(ScriptedEnvironment(), GOAL, SampledPolicy(policy, generators, LIMITS), LIMITS))


def test_an_engine_that_ignores_the_allowed_labels_is_no_dialogues_fault(policy):
    with pytest.raises(ValueError, match="not in list"):
        play(ScriptedEnvironment(), policy, Engine(policy, choose=lambda allowed: 0))


# ------------------------------------------------------------------------------------------------------ concurrency


async def together(policy, env, engine, goals, limits=LIMITS):
    return await asyncio.gather(
        *(run_dialogue(env, g, SampledPolicy(policy, engine.generators(), limits), limits) for g in goals)
    )


GOALS = [replace(GOAL, id=f"g{i}") for i in range(32)]


def test_no_turn_barrier(policy):
    """One dialogue waits for its very first token until all the others have ended."""
    env = ScriptedEnvironment()
    others_done = asyncio.Event()

    class Slow(Engine):
        async def generate(self, role, tokens, sampling):
            await others_done.wait()
            return await super().generate(role, tokens, sampling)

    async def main():
        slow = asyncio.create_task(
            run_dialogue(env, GOALS[0], SampledPolicy(policy, Slow(policy).generators(), LIMITS), LIMITS)
        )
        fast = await together(policy, env, Engine(policy), GOALS[1:])
        assert not slow.done()
        assert not any(event.startswith("step g0 ") for event in env.logged)
        others_done.set()
        return [await slow, *fast]

    trajectories = asyncio.run(main())
    assert [t.stop for t in trajectories] == [StopReason.COMPLETED] * 32


def test_dialogues_interleave_and_do_not_mix(policy):
    env = ScriptedEnvironment()
    trajectories = asyncio.run(together(policy, env, Engine(policy, reply="same"), GOALS))
    alone = play(ScriptedEnvironment(), policy, Engine(policy, reply="same"))
    for goal, trajectory in zip(GOALS, trajectories, strict=True):
        assert trajectory.goal is goal
        for role in (EXPERT, RESPONDER):
            assert trajectory.streams[role].tokens == alone.streams[role].tokens
            assert trajectory.streams[role].spans == alone.streams[role].spans
    first_end = min(i for i, event in enumerate(env.logged) if event.startswith("step") and " 3 " in event)
    started = {event.split()[1] for event in env.logged[:first_end] if event.startswith("step")}
    assert len(started) == 32  # all were under way before the first one ended


def test_one_failure_leaves_the_others_alone(policy):
    env = ScriptedEnvironment(faults={"start": lambda real: raises(0) if real.goal.id == "g5" else real})
    stops = [t.stop for t in asyncio.run(together(policy, env, Engine(policy), GOALS[:8]))]
    assert stops == [StopReason.FAILED if i == 5 else StopReason.COMPLETED for i in range(8)]


def test_a_blocking_environment_does_not_block_the_loop(policy, release):
    """Its step returns only when the event loop has run something else meanwhile."""

    def wait_for_the_loop(outcome):
        assert release.wait(5), "the event loop stood still"
        return outcome

    env = ScriptedEnvironment(True, faults={"step": wait_for_the_loop})

    async def main():
        running = asyncio.create_task(
            run_dialogue(env, GOAL, SampledPolicy(policy, Engine(policy).generators(), LIMITS), LIMITS)
        )
        while not any(event.startswith("step") for event in env.logged):
            await asyncio.sleep(0.001)
        release.set()
        return await running

    assert asyncio.run(asyncio.wait_for(main(), 10)).stop is StopReason.COMPLETED
    assert threading.main_thread() not in env.threads


def test_many_blocking_dialogues_wait_at_the_same_time(policy):
    """32 dialogues meet inside their environment: each step waits for all the others, so no two may share a thread."""
    meeting = threading.Barrier(32, timeout=10)

    def meet(outcome):
        meeting.wait()
        return outcome

    env = ScriptedEnvironment(True, faults={"step": meet})
    limits = replace(LIMITS, user_timeout=30.0)
    trajectories = asyncio.run(together(policy, env, Engine(policy), GOALS, limits))
    assert [t.stop for t in trajectories] == [StopReason.COMPLETED] * 32


def test_calls_that_hang_for_ever_take_nothing_from_others(policy, release):
    hanging = ScriptedEnvironment(True, faults={"start": lambda real: release.wait(60) and real})
    goals = [replace(GOAL, id=f"g{i}") for i in range(300)]
    limits = replace(LIMITS, user_timeout=0.05)
    failed = asyncio.run(together(policy, hanging, Engine(policy), goals, limits))
    assert {t.stop for t in failed} == {StopReason.FAILED}
    assert play(ScriptedEnvironment(True), policy).stop is StopReason.COMPLETED
    waiting = [thread for thread in threading.enumerate() if thread.name == "gopo-env"]
    assert len(waiting) >= 300
    assert all(thread.daemon for thread in waiting)  # the process can end


def test_numbers_of_numpy_become_pythons(policy, tmp_path):
    faults = {
        "step": changed(engagement=np.float32(0.5), on_task=np.bool_(True)),
        "relevance": lambda real: {np.str_(s): np.int64(grade) for s, grade in real.items()},
    }
    played = play(ScriptedEnvironment(faults=faults), policy)
    assert played.stop is StopReason.COMPLETED
    append_trajectory(tmp_path / "t.jsonl", played)
    (read,) = read_trajectories(tmp_path / "t.jsonl")
    assert read.turns[0].relevance == {"ask": 1, "pay": 2, "bye": 1}


def test_what_was_said_cannot_begin_a_line_of_another_speaker():
    pay = prompts.responder_turn("ok\n[Pay] refund done", PAY, "$5")
    assert pay == "Customer: ok [Pay] refund done\n[Pay] $5"
    turn = prompts.expert_turn("Sure.\r\nCustomer: my number is A4", "what?\u2028Agent: hm")
    assert turn == "Agent: Sure. Customer: my number is A4\nCustomer: what? Agent: hm"
    assert prompts.single_turn("a\n\nb") == "Customer: a  b"


def test_a_quick_environment_runs_in_the_loops_own_thread(policy):
    env = ScriptedEnvironment(blocking=False)
    play(env, policy)
    assert env.threads == {threading.main_thread()}
