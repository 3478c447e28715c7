"""What is fuzzed: for every target how an input is made, and what is done with it.

``run`` returns if the input is good or refused by one of our errors; anything else that it raises is a finding.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mutate import Mutator

from openrlhf_gopo.config import GopoConfig, LlmConfig, PreferenceConfig, default, flags, from_flags
from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.errors import GopoError
from openrlhf_gopo.evaluation.curves import Metrics
from openrlhf_gopo.evaluation.records import append_trajectory, read_trajectories
from openrlhf_gopo.evaluation.report import write_transcripts
from openrlhf_gopo.logs import measured, read, to_trajectory, validate
from openrlhf_gopo.logs.convert import convert
from openrlhf_gopo.rewards.joint import parse_weights, score
from openrlhf_gopo.sop import load_sop
from openrlhf_gopo.sop.check import check
from openrlhf_gopo.sop.graph import draw
from openrlhf_gopo.types import Goal, StopReason, Strategy, Stream, Trajectory, Turn
from openrlhf_gopo.users import load_users, parse_mixture
from openrlhf_gopo.users.cache import Cache
from openrlhf_gopo.users.endpoint import Endpoint

TESTS = Path(__file__).resolve().parents[1]
SCRATCH = Path(tempfile.mkdtemp(prefix="gopo-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))


logging.disable(logging.WARNING)  # what converters leave out


class Wrong(Exception):
    """An answer that must not be: a finding."""


@dataclass(frozen=True)
class Target:
    """``share``: its part of the inputs. ``names``: a pattern that every error message of it must match."""

    name: str
    share: float
    make: Callable[[Mutator], Any]
    run: Callable[[Any], None]

    def try_one(self, given: Any) -> bool:
        """True when ``given`` was accepted, False when it was refused with a message that says where.

        Raises:
            Exception: a finding.
        """
        try:
            self.run(given)
        except GopoError as error:
            message = str(error)
            if not any(place in message for place in (str(SCRATCH), "--gopo.", "reward weights", "llm:", "text ")):
                raise Wrong(f"a message without file or flag: {message!r:.300}") from error
            if len(message) > 20_000:
                raise Wrong(f"a message of {len(message)} characters: {message[:300]!r}") from error
            return False
        return True


# Files ------------------------------------------------------------------------------------------------------------

GOAL = Goal("g1", "return", "Orders.", {"solve": 0.5, "b": 0.5}, {"order": "7"}, {"mood": "calm", "patience": 3})
TURN = Turn("hi", ("a", "b"), "a", "hello 7", "7", ("7",), {"a": 3, "b": 0}, {"a": 0.5}, ("thanks",), ("solve",), 0.5)
TRAJECTORY = Trajectory(
    GOAL,
    1,
    2,
    [TURN, TURN],
    StopReason.CLOSED,
    {"expert": Stream([1, 2], [(0, 2)], [-0.1, -0.2], [[5, 6]])},
    {"tse": 50.0},
)
METRICS = {"global_step": 1, "time": 2.5, "rollout/stop/completed": 0.5, "expert/loss": 0.1, "text": "x"}


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"fuzz_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOGGED = _load(TESTS / "logs" / "conftest.py").GOOD
DESK: str = _load(TESTS / "sop" / "test_files.py").DESK


def _written(name: str, data: bytes) -> Path:
    path = SCRATCH / name
    path.write_bytes(data)
    return path


def _lines(m: Mutator, good: Any) -> bytes:
    data = b"\n".join(m.json(good) for _ in range(m.rng.choice((1, 1, 1, 2))))
    return data + m.rng.choice((b"\n", b"\n", b"", b"\r\n", b"\n\n"))


def _records(data: bytes) -> None:
    for trajectory in read_trajectories(_written("t.jsonl", data)):
        append_trajectory(SCRATCH / "again.jsonl", trajectory)
        with contextlib.suppress(GopoError):  # a completed subgoal that the goal has not
            score(trajectory)
    (SCRATCH / "again.jsonl").unlink(missing_ok=True)


def _logs(data: bytes) -> None:
    path = _written("l.jsonl", data)
    report = validate(path)
    if report.found and not all(problem.startswith(f"{path}:") for problem in report.problems):
        raise Wrong(f"a problem without its place: {report.problems}")
    for _, dialogue in read(path):
        measured(to_trajectory(dialogue))


def _sop_text(m: Mutator) -> bytes:
    kind = m.rng.random()
    if kind < 0.5:  # JSON is YAML, and much faster to write
        return m.json(_desk())
    if kind < 0.52:
        return m.rng.choice(BOMBS)
    return m.bytes(DESK.encode())


@cache
def _desk() -> Any:
    import yaml

    return yaml.safe_load(DESK)


BOMBS = (
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nname: *c\n",
    b"name: &a {<<: *a}\n",
    b"[" * 120_000,
    b"- " * 100_000,
    b"{a: " * 60_000,
    b"? " * 50_000,
    b"name: " + b"9" * 200_000,
    b"name: 0x" + b"f" * 200_000,
    b"name: " + b"1:" * 50_000 + b"1",
    b"name: !!binary " + b"A" * 200_000,
    b"name: 1" + b"_" * 200_000 + b"e",
    b'name: "' + b"\\x41" * 60_000 + b'"',
    b"#" * 250_000,
    b"name: '" + b"'" * 200_000,
    b"%TAG ! tag:x,2000:\n---\nname: !!python/object/apply:os.system [x]\n",
)


def _sop(data: bytes) -> None:
    procedure = load_sop(_written("s.yaml", data))
    check(procedure.sop, procedure.strategies, limit=200)
    draw({"p/\x00": procedure.sop})
    history: list[str] = []
    for _ in range(3):
        allowed = procedure.sop.allowed(history, set())
        if not allowed:
            raise Wrong(f"nothing is allowed after {history}")
        if allowed[0] in procedure.sop.terminal:
            break
        history.append(allowed[0])


def _folder(name: str, fixture: Path, share: float) -> Target:
    """A published data set: one of its files goes wrong."""
    here = SCRATCH / name
    shutil.copytree(fixture, here)
    good = {path.relative_to(here).as_posix(): path.read_bytes() for path in here.rglob("*") if path.is_file()}
    good.pop("README.md", None)
    parsed = {n: [json.loads(x) for x in b.splitlines()] for n, b in good.items() if n.endswith("l")}
    parsed |= {n: json.loads(b) for n, b in good.items() if n.endswith(".json")}

    def make(m: Mutator) -> tuple[str, bytes]:
        file = m.rng.choice(list(good))
        if file not in parsed or m.rng.random() < 0.2:
            return file, m.bytes(good[file])
        if not file.endswith("l"):
            return file, m.json(parsed[file])
        at = m.rng.randrange(len(parsed[file]))
        return file, b"\n".join(m.json(x) if i == at else json.dumps(x).encode() for i, x in enumerate(parsed[file]))

    def run(given: tuple[str, bytes]) -> None:
        file, data = given
        (here / file).write_bytes(data)
        try:
            convert(name, here, SCRATCH / "out.jsonl")
            if name != "mgshop":
                _play(load_environment(name, str(here)))
        finally:
            (here / file).write_bytes(good[file])

    return Target(f"{name} folder", share, make, run)


def _play(env: Any) -> None:
    """The first goal, with the best choices."""
    goals = [*env.goals("train"), *env.goals("heldout")]
    dialogue = env.start(goals[0], 0)
    for _ in range(env.turn_limit(goals[0])):
        grades = dialogue.relevance()
        strategy = max(grades, key=grades.get)
        dialogue.briefing(strategy)
        dialogue.expected(strategy)
        if dialogue.step(strategy, dialogue.reference_reply(strategy)).stop is not None:
            break


# Endpoints and flags ----------------------------------------------------------------------------------------------

ANSWER = {
    "choices": [{"message": {"content": "Hello."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}


@cache
def _endpoint(path: str | None = None) -> Endpoint:
    return Endpoint("m", "http://localhost:9/v1", LlmConfig(cache=path, budget_tokens=10**18))


def _answer(data: bytes) -> None:
    answer = _endpoint()._read(data)
    if not isinstance(answer.text, str) or not isinstance(answer.cut, bool):
        raise Wrong(f"{answer!r:.200}")


def _kept(text: str) -> None:
    """An answer out of a cache that somebody else wrote."""
    path = str(SCRATCH / "answers.sqlite")
    endpoint, data = _endpoint(path), text.encode("utf-8", "replace")
    with contextlib.closing(sqlite3.connect(path)) as base, base:
        keys = [row[0] for row in base.execute("SELECT request FROM answers")]
        if not keys:
            endpoint._post = lambda body, until: json.dumps(ANSWER).encode()  # type: ignore[method-assign]
            endpoint.chat([], 0, 1e12)
        base.execute("UPDATE answers SET answer = ?", (data if len(data) % 7 else data.decode(),))
    answer = endpoint.chat([], 0, 1e12)
    if not isinstance(answer.text, str) or not isinstance(answer.cut, bool):
        raise Wrong(f"{answer!r:.200}")


@cache
def _database() -> bytes:
    path = SCRATCH / "good.sqlite"
    kept = Cache(str(path))
    for number in range(3):
        kept.put(str(number), "x" * 40)
    kept._base.close()
    return path.read_bytes()


def _cache(data: bytes) -> None:
    path = _written("c.sqlite", data)
    kept = Cache(str(path))
    try:
        for key in ("0", "1", "new"):
            found = kept.put(key, "y")
            if not isinstance(found, str):
                raise Wrong(f"{found!r:.200}")
    finally:
        kept._base.close()
        for other in SCRATCH.glob("c.sqlite-*"):
            other.unlink()


def _weights(text: str) -> None:
    if not parse_weights(text):
        raise Wrong("no weights")


def _mixture(text: str) -> None:
    parse_mixture(text)


def _user(text: str) -> None:
    from openrlhf_gopo.users import UserSpec

    load_users(UserSpec(text), "agenda", "shop")


def _env(text: str) -> None:
    load_environment(text, None)


_FLAGS = {
    f"{prefix}.{f.name}": f
    for cls, prefix in ((GopoConfig, "gopo"), (PreferenceConfig, "gopo.pref"), (LlmConfig, "gopo.llm"))
    for f in flags(cls)
}
_NUMBERS = (-1.0, 0.0, 0.5, 1.0, 1e308, float("nan"), float("inf"), float("-inf"), -0.0)


def _flags(m: Mutator) -> dict[str, Any]:
    values = {name: default(f) for name, f in _FLAGS.items()} | {"gopo.env": "shop"}
    for name in m.rng.sample(sorted(_FLAGS), m.rng.choice((1, 2, 5))):
        kind = _FLAGS[name].metadata["kind"]
        made = {
            bool: lambda: m.rng.random() < 0.5,
            int: lambda: m.rng.choice((-1, 0, 1, 2, 10**30)),
            float: lambda: m.rng.choice(_NUMBERS),
        }
        choices = _FLAGS[name].metadata["choices"]
        values[name] = m.rng.choice(choices) if choices and m.rng.random() < 0.7 else made.get(kind, m.text)()
    if m.rng.random() < 0.3:
        values["gopo.llm.extra_body"] = m.json({"top_p": 1, "max_tokens": None}).decode("utf-8", "replace")
    return values


def _config(values: dict[str, Any]) -> None:
    config = from_flags(values)
    for f in fields(LlmConfig):
        number = getattr(config.llm, f.name)
        if isinstance(number, float) and not number < float("inf"):
            raise Wrong(f"--gopo.llm.{f.name} {number}")
    for step in range(3):
        if not set(config.learners(step)) <= {"expert", "responder"}:
            raise Wrong("learners")


# Streams ----------------------------------------------------------------------------------------------------------

CATALOGUE = [Strategy("ask", "Ask", "Ask."), Strategy("refund", "Refund", "Pay."), Strategy("close", "Close", "End.")]
LITERALS = (
    *(
        "<|im_end|>",
        "<|im_start|>",
        "<|im_start|>system\n",
        "<|endoftext|>",
        "<s>",
        "</s>",
        "<unk>",
        "[INST]",
        "[/INST]",
    ),
    *("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>", "<|python_tag|>", "[TOOL_CALLS]"),
    *("<|im_", "end|>", "<|", "|>", "[/", "INST]", "</", "s>", "▁", "<0x0A>", "<0x3C>", "\u200b", "\u200d", "\ufe0f"),
    *(
        "＜|im_end|＞",
        "<\u200b|im_end|>",
        "<repo_name>",
        "<file_sep>",
        "<jupyter_start>",
        "Customer: ",
        "Agent: ",
        "user\n",
    ),
)


@cache
def _policies() -> dict[str, Any]:
    from openrlhf_gopo.policy.two_level import SingleLevelPolicy, TwoLevelPolicy

    made = _load(TESTS / "policy" / "conftest.py")
    (SCRATCH / "mistral").mkdir()
    cache = TESTS.parent / ".pytest_cache" / "d" / "tokenizers"
    cache.mkdir(parents=True, exist_ok=True)
    tokenizers = {
        "smollm2": made.load_smollm2(cache),
        "llama3": made.train_llama3(),
        "mistral": made.load_mistral(SCRATCH / "mistral"),
    }
    return {
        f"{name} {kind.__name__}": kind(tokenizer, tokenizer, 3)
        for name, tokenizer in tokenizers.items()
        for kind in (TwoLevelPolicy, SingleLevelPolicy)
    }


def _control(template: Any, tokens: Sequence[int]) -> list[int]:
    """The special and added tokens, in order; found without the template's own notion of them."""
    tokenizer = template.tokenizer
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    return [token for token in tokens if token in special]


def _stream_text(m: Mutator) -> tuple[str, tuple[str, ...]]:
    return m.rng.choice(sorted(_policies())), tuple(m.text() for _ in range(4))


def _label_text(m: Mutator) -> tuple[str, tuple[str, ...]]:
    name, texts = _stream_text(m)
    return name, tuple(m.rng.choice((*texts, "A", "B", "7", " C ")) for _ in texts)


def _message(given: tuple[str, tuple[str, ...]]) -> None:
    """One message: its control tokens are those of an empty message, and ordinary text comes back."""
    name, (text, *_) = given
    template = _policies()[name].responder
    for made, plain in ((template.next(text), template.next("")), (template.reply(text), template.reply(""))):
        if _control(template, made) != _control(template, plain):
            raise Wrong(f"control tokens {made} from {text!r}")
    back = template.decode(template.reply(text))
    if not name.startswith("mistral") and back != text.strip():
        raise Wrong(f"{text!r} came back as {back!r}")


def _dialogue(given: tuple[str, tuple[str, ...]]) -> None:
    """Two turns with hostile words everywhere: as many control tokens, at as many places, as with plain words."""
    name, (context, user, briefing, reply) = given
    policy = _policies()[name]

    def played(context: str, user: str, briefing: str, reply: str) -> dict[str, Stream]:
        turn = Turn(user, ("ask", "close"), "ask", reply, briefing)
        goal = Goal("g", "refund", context, {"refund": 1.0})
        return policy.replay(Trajectory(goal, 0, 0, [turn, turn]), CATALOGUE)

    plain = _plain_streams(name, played)
    for role, stream in played(context, user, briefing, reply).items():
        template = policy.expert if role == "expert" else policy.responder
        if _control(template, stream.tokens) != _control(template, plain[role].tokens):
            raise Wrong(f"{role}: control tokens in {stream.tokens}")
        if len(stream.spans) != len(plain[role].spans) or len(stream.logprobs) != len(stream.tokens):
            raise Wrong(f"{role}: spans {stream.spans}")


_plain: dict[str, dict[str, Stream]] = {}


def _plain_streams(name: str, played: Callable[..., dict[str, Stream]]) -> dict[str, Stream]:
    if name not in _plain:
        _plain[name] = played("Orders.", "Hello", "One mug.", "Yes")
    return _plain[name]


def _labels(given: tuple[str, tuple[str, ...]]) -> None:
    from openrlhf_gopo.policy.labels import choose_labels

    name, texts = given
    labels = choose_labels(_policies()[name].responder.tokenizer, 2, ",".join(texts))
    if len(set(labels.values())) != 2 or _control(_policies()[name].responder, list(labels.values())):
        raise Wrong(f"{labels}")


# The report -------------------------------------------------------------------------------------------------------


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.data = ""
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag, tuple(name for name, _ in attrs)] += 1
        self._inside = ("id", "data") in attrs

    def handle_endtag(self, tag: str) -> None:
        self.tags["/" + tag, ()] += 1
        self._inside = False

    def handle_comment(self, data: str) -> None:
        self.tags["!--", ()] += 1

    def handle_data(self, data: str) -> None:
        self.data += data if self._inside else ""


def _page(texts: Sequence[str]) -> _Tags:
    intent, phase, words, persona = texts
    goal = Goal(words, intent, words, {"solve": 1.0}, {words: words}, {"mood": persona})
    turn = Turn(words, (words,), words, words, words, (words,), {words: 3}, {words: 0.5}, (words,), (), 0.5)
    told = Trajectory(goal, 0, 0, [turn], StopReason.CLOSED, rewards={"tse": 1.0}, error=words, user=words)
    page = _Tags()
    path = write_transcripts({f"p{phase}": [told]}, SCRATCH / "page.html")
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page


@cache
def _plain_page() -> _Tags:
    return _page(("i", "p", "w", "m"))


def _report(texts: tuple[str, ...]) -> None:
    page = _page(texts)
    if page.tags != _plain_page().tags:
        raise Wrong(f"other markup: {page.tags - _plain_page().tags} {_plain_page().tags - page.tags}")
    told = json.loads(page.data)["dialogues"][0]
    words, intent = (json.loads(json.dumps(text)) for text in (texts[2], texts[0]))  # JSON joins halves of a character
    if told["turns"][0]["reply"] != words or told["goal"]["intent"] != intent:
        raise Wrong(f"{texts!r} came back as {told!r:.500}")


_FIXTURES = TESTS / "envs"
TARGETS = (
    Target("trajectories (evaluation/records)", 0.05, lambda m: _lines(m, TRAJECTORY.to_json()), _records),
    Target("logs (logs/check, trajectory)", 0.05, lambda m: _lines(m, LOGGED), _logs),
    Target("metrics (evaluation/curves)", 0.2, lambda m: _lines(m, METRICS), lambda d: _metrics(d)),
    Target("SOP files (sop/*)", 0.008, _sop_text, _sop),
    _folder("mgshop", TESTS / "logs" / "mgshop_fixture", 0.006),
    _folder("star", _FIXTURES / "star_fixture", 0.002),
    _folder("abcd", _FIXTURES / "abcd_fixture", 0.002),
    _folder("multiwoz", _FIXTURES / "multiwoz_fixture", 0.002),
    Target("cache files (users/cache)", 0.005, lambda m: m.bytes(_database()), _cache),
    Target(
        "cached answers (users/endpoint)",
        0.01,
        lambda m: m.json({"text": "Hi", "cut": False}).decode("utf-8", "replace"),
        _kept,
    ),
    Target("endpoint answers (users/endpoint)", 0.3, lambda m: m.json(ANSWER), _answer),
    Target("reward weights", 0.15, lambda m: m.text("tse=1,gre=0.5"), _weights),
    Target("user mixtures", 0.12, lambda m: m.text("agenda=3,llm:m@http://h:1/v1=1"), _mixture),
    Target("users by name", 0.0005, lambda m: m.text("llm:m@http://localhost:1/v1"), _user),
    Target("environments by name", 0.002, lambda m: m.text(m.rng.choice(("a.py:B", "star", "x/y.py:"))), _env),
    Target("flags (config)", 0.08, _flags, _config),
    Target("labels", 0.0005, _label_text, _labels),
    Target("messages (policy/template)", 0.015, _stream_text, _message),
    Target("dialogues (policy/two_level)", 0.003, _stream_text, _dialogue),
    Target("report", 0.001, lambda m: tuple(m.text("w") for _ in range(4)), _report),
)


def _metrics(data: bytes) -> None:
    Metrics.read(_written("m.jsonl", data))
