"""Files that a user names: trajectories, logs, metrics, SOPs, published data sets, caches."""

from __future__ import annotations

import contextlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from kit import SCRATCH, TESTS, Target, Wrong, load
from mutate import Mutator

from openrlhf_gopo.endpoint.cache import Cache
from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.errors import GopoError
from openrlhf_gopo.evaluation.curves import Metrics
from openrlhf_gopo.evaluation.records import append_trajectory, read_trajectories
from openrlhf_gopo.logs import measured, read, to_trajectory, validate
from openrlhf_gopo.logs.convert import convert
from openrlhf_gopo.rewards.joint import score
from openrlhf_gopo.sop import load_sop
from openrlhf_gopo.sop.check import check
from openrlhf_gopo.sop.graph import draw
from openrlhf_gopo.types import Goal, StopReason, Stream, Trajectory, Turn

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

LOGGED = load(TESTS / "logs" / "conftest.py").GOOD
DESK: str = load(TESTS / "sop" / "test_files.py").DESK


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


def _metrics(data: bytes) -> None:
    Metrics.read(_written("m.jsonl", data))


@cache
def _database() -> bytes:
    path = SCRATCH / "good.sqlite"
    kept = Cache(str(path), "--gopo.llm.cache")
    for number in range(3):
        kept.put(str(number), "x" * 40)
    kept._base.close()
    return path.read_bytes()


def _cache(data: bytes) -> None:
    path = _written("c.sqlite", data)
    kept = Cache(str(path), "--gopo.llm.cache")
    try:
        for key in ("0", "1", "new"):
            found = kept.put(key, "y")
            if not isinstance(found, str):
                raise Wrong(f"{found!r:.200}")
    finally:
        kept._base.close()
        for other in SCRATCH.glob("c.sqlite-*"):
            other.unlink()


TARGETS = (
    Target("trajectories (evaluation/records)", 0.05, lambda m: _lines(m, TRAJECTORY.to_json()), _records),
    Target("logs (logs/check, trajectory)", 0.05, lambda m: _lines(m, LOGGED), _logs),
    Target("metrics (evaluation/curves)", 0.2, lambda m: _lines(m, METRICS), _metrics),
    Target("SOP files (sop/*)", 0.008, _sop_text, _sop),
    _folder("mgshop", TESTS / "logs" / "mgshop_fixture", 0.006),
    _folder("star", TESTS / "envs" / "star_fixture", 0.002),
    _folder("abcd", TESTS / "envs" / "abcd_fixture", 0.002),
    _folder("multiwoz", TESTS / "envs" / "multiwoz_fixture", 0.002),
    Target("cache files (endpoint/cache)", 0.005, lambda m: m.bytes(_database()), _cache),
)
